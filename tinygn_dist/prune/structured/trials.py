"""Mixes of units tried on the live model: the weights that are re-fitted for them, the loss they leave, and everything
put back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from tinygn_dist.config import PruneConfig
from tinygn_dist.estimate.hooks import routed_to, shifted
from tinygn_dist.estimate.partial_forward import running_layers
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.estimate.unit_moments import UnitMoments, unit_moments
from tinygn_dist.evaluate.quality import sequence_losses
from tinygn_dist.maths.counts import Mix
from tinygn_dist.models.kept import KeptUnits
from tinygn_dist.prune.structured.absorb import Absorbers, absorbers_of, not_absorbed
from tinygn_dist.prune.structured.mix_search import search
from tinygn_dist.prune.structured.probing import UnitScores
from tinygn_dist.prune.structured.refit import RefitJob, RefitOptions, apply_mix, fit_jobs, with_bias

log = logging.getLogger(__name__)


class RefitPlan:
    """The weights that are re-fitted when units go: readers of the kinds of which `most` removes some, and those that
    absorb layers."""

    def __init__(
        self,
        problem: Problem,
        most: Mix,
        absorbers: Absorbers,
        compensate: bool,
        layers: Sequence[int] | None = None,
    ) -> None:
        """compensate: whether biases are part of the fit. layers: those that run, all by default."""
        self._layers = layers
        self._problem, self._absorbers, anatomy = problem, absorbers, problem.anatomy
        self._groups = [
            group
            for group in anatomy.groups
            if group.router is None
            and (layers is None or group.layer in layers)
            and (most[group.kind] or group in absorbers)
        ]
        self._matrices = [anatomy.matrix_of(module) for group in self._groups for module, _ in group.readers]
        self._biased = with_bias(problem, self._matrices) if compensate else frozenset()

    def moments(self, problem: Problem) -> UnitMoments | None:
        """Over these sequences; None where nothing is re-fitted."""
        absorbs = {self._problem.anatomy.matrix_of(g.output).name: segments for g, segments in self._absorbers.items()}
        return unit_moments(problem, self._matrices, self._biased, absorbs, self._layers) if self._matrices else None

    def jobs(self, moments: UnitMoments | None) -> list[RefitJob]:
        """A collective."""
        return fit_jobs(self._problem, moments, self._groups, self._biased, self._absorbers) if moments else []


def uncompensated(problem: Problem, mix: Mix, kept: KeptUnits) -> list[str]:
    """Notes on what is lost in spite of the fit: means where there is no bias, layers that nothing absorbs."""
    notes: list[str] = []
    anatomy, removed = problem.anatomy, set(range(problem.anatomy.num_layers)) - set(kept.layers)
    absorbers = absorbers_of(anatomy, [removed])
    reading = [g for g in anatomy.groups if g.layer in kept.layers and g.router is None and mix[g.kind]]
    for what, groups in (("units", reading), ("layers", absorbers)):
        modules = [module for group in groups for module, _ in group.readers]
        without = {
            m.rpartition(".")[2] for m in modules if getattr(problem.bare.get_submodule(m), "bias", None) is None
        }
        if without:
            names = ", ".join(sorted(without))
            notes.append(f"{names} has no bias, so the average output of the removed {what} could not be added back")
    lost = not_absorbed(absorbers, removed)
    if lost:
        notes.append(
            f"the output of the removed layers {lost} is not reproduced: no feed-forward before them writes straight "
            "to the residual stream"
        )
    return notes


class Trials:
    """Mixes applied to the live model, measured, and undone to the last bit. losses: per token, in the order tried.
    jobs: of the weights that are re-fitted. notes: for the report."""

    def __init__(
        self, problem: Problem, most: Mix, options: PruneConfig, scores: UnitScores, jobs: Sequence[RefitJob] = ()
    ) -> None:
        """most: of every kind the largest number in any mix."""
        self._problem, self._scores, self.jobs = problem, scores, list(jobs)
        self._most_mixes = options.most_mixes
        self._refit = RefitOptions(options.compensate, options.damping, most)
        self._dense: dict[str, torch.Tensor] | None = None
        self.losses: dict[Mix, float] = {}
        self.notes: list[str] = []

    def best_of(self, candidates: Sequence[Mix]) -> Mix:
        """The only one, or the one that leaves the least loss."""
        if len(candidates) == 1:
            return candidates[0]
        best, untried = search(candidates, self.record_loss, self._most_mixes, self.losses)
        if untried:
            self.notes.append(
                f"{len(self.losses)} of the mixes that reach the goal were tried (losses in the report) and "
                f"{len(untried)} left out by the search or by prune.most_mixes={self._most_mixes}, such as {untried[0]}"
            )
        return best

    def commit(self, mix: Mix, problem: Problem, *, anew: bool) -> tuple[KeptUnits, dict[str, torch.Tensor]]:
        """Leaves the chosen mix in the live weights, which must be the dense ones. anew: fitted to these sequences.

        Where layers go, heads and channels are fitted to what the other layers then read: 2 % less perplexity where
        seven of SmolLM2-135M's layers and a quarter of its channels go (docs/results.md).
        """
        self._refit, self._dense, bare, gained = replace(self._refit, most=mix), None, problem.bare, {}
        if self.in_two_steps(mix):
            self._fit(problem, Mix(layers=mix.layers))
            kept, gained = self._apply(Mix(layers=mix.layers), self._scores)
            with shifted(bare, gained):
                self._fit(problem, replace(mix, layers=0), kept.layers)
        elif anew:
            self._fit(problem, mix)
        kept, shifts = self._apply(mix, self._scores)
        if self._refit.compensate:
            self.notes += uncompensated(problem, mix, kept)
        return kept, {name: gained.get(name, 0) + shifts.get(name, 0) for name in {**gained, **shifts}}

    def in_two_steps(self, mix: Mix) -> bool:
        """Whether layers are fitted before the rest. Not in several stacks, whose heads are of all layers at once."""
        inner = mix.heads or mix.channels
        return bool(self._refit.compensate and mix.layers and inner and len(self._problem.anatomy.stacks) == 1)

    def loss_of(self, mix: Mix) -> float:
        """Per token."""
        totals, counts = self.losses_of(mix, self._scores, self._problem)
        return float(totals.sum() / counts.sum())

    def record_loss(self, mix: Mix) -> float:
        """As `loss_of`; written to the log, and kept."""
        self.losses[mix] = loss = self.loss_of(mix)
        log.info("without %s: loss %.4f", mix, loss)
        return loss

    def losses_of(self, mix: Mix, scores: UnitScores, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a mix by these scores, as `sequence_losses` of this problem."""
        backend = problem.backend
        changed = [matrix for job in self.jobs for matrix in job.matrices]
        if self._dense is None:
            self._dense = {matrix.name: backend.shard(problem.model, matrix).weight.clone() for matrix in changed}
        try:
            return self._applied_losses(mix, scores, problem)
        finally:
            for matrix in changed:
                backend.write(problem.model, matrix, self._dense[matrix.name])

    def _applied_losses(self, mix: Mix, scores: UnitScores, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        kept, shifts = self._apply(mix, scores)
        routed = {g: kept.experts[g.layer] for g in problem.anatomy.of_kind("experts") if g.layer in kept.experts}
        with (
            routed_to(problem.bare, routed),
            shifted(problem.bare, shifts),
            running_layers(problem.bare, problem.anatomy, kept.layers),
        ):
            return sequence_losses(problem, "trying a mix")

    def _apply(self, mix: Mix, scores: UnitScores) -> tuple[KeptUnits, dict[str, torch.Tensor]]:
        return apply_mix(self._problem, mix, scores, self.jobs, self._refit)

    def _fit(self, problem: Problem, mix: Mix, layers: Sequence[int] | None = None) -> None:
        self.jobs = []  # their memory goes first
        removed = self._scores.layer_order[: mix.layers]
        absorbers = absorbers_of(problem.anatomy, [removed]) if self._refit.compensate else {}
        plan = RefitPlan(problem, mix, absorbers, self._refit.compensate, layers)
        self.jobs = plan.jobs(plan.moments(problem))
