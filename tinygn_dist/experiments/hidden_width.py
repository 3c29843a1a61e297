"""The width of the residual stream: one set of hidden dimensions stays for the whole model, in embeddings, everything
that reads or writes the stream, norms and head.

RMSNorm divides by the root of the mean square over all dimensions. With k of d left the mean is over k; so its weights
are multiplied by sqrt(d / k) and its epsilon by d / k. The smaller model then computes what the dense one does with the
removed dimensions zero wherever they are written. LayerNorm also subtracts a mean, which spreads to dimensions that are
zero, so families with it are refused.
"""

from __future__ import annotations

import logging
import math

import torch

from tinygn_dist.config import PruneConfig
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.input_moments import input_moments
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths import criteria
from tinygn_dist.maths.counter_rng import key_of, uniform
from tinygn_dist.maths.counts import Mix
from tinygn_dist.models.anatomy import Anatomy
from tinygn_dist.models.kept import KeptUnits
from tinygn_dist.prune.structured.probing import UnitScores
from tinygn_dist.prune.structured.removal import RemovedUnits, UnitGoal, UnitMethod, UnitPlan

log = logging.getLogger(__name__)
_NOT_FITTED = "hidden dimensions: norms are scaled to the smaller width, the weights that stay are not re-fitted"
_CRITERIA = ("auto", "activation", "magnitude", "random")


def step_of(anatomy: Anatomy, multiple_of: int) -> int:
    """Kept widths are multiples of this: of the asked number where there is room, and of the heads, as configs
    check."""
    full, heads = anatomy.hidden.num_units, anatomy.hidden.least
    step = math.lcm(multiple_of, heads)
    return step if step <= full // 2 else heads


class HiddenWidth:
    """Dimensions of the residual stream. See `UnitMethod`."""

    def dense_params(self, anatomy: Anatomy) -> int:
        """All parameters."""
        return anatomy.total_params

    def plan(self, anatomy: Anatomy, options: PruneConfig, goal: UnitGoal) -> UnitPlan:
        """One mix: the fewest dimensions that reach the sparsity."""
        return UnitPlan((_mix(anatomy, options, goal),), goal.protect)

    def remove(self, problem: Problem, plan: UnitPlan, options: PruneConfig) -> RemovedUnits:
        """Choose the dimensions that go. Nothing is changed in the live model. What stays is not re-fitted."""
        (mix,), group = plan.mixes, problem.anatomy.hidden
        values = _scores(problem, options)
        kept = values.argsort(stable=True, descending=True)[: group.num_units - mix.hidden]
        log.info("hidden dimensions that stay: %d of %d", len(kept), group.num_units)
        layers = tuple(range(problem.anatomy.num_layers))
        units = KeptUnits(layers, hidden={0: tuple(sorted(kept.tolist()))})
        notes = (_NOT_FITTED,) if options.compensate else ()
        return RemovedUnits(units, UnitScores(by_group={("hidden", 0): values}), notes=notes)

    def recalibrate_(self, smaller: Problem) -> None:
        """Nothing."""


def _mix(anatomy: Anatomy, options: PruneConfig, goal: UnitGoal) -> Mix:
    if anatomy.hidden is None:
        raise UserError(f"hidden cannot be removed: {anatomy.fixed['hidden']}; use another --pattern")
    if options.counts is not None or goal.protect or options.uneven:
        raise UserError(
            "prune.counts, protect and uneven are about layers; hidden dimensions go from all: use prune.sparsity"
        )
    if options.criterion not in _CRITERIA:
        raise UserError(f"criterion {options.criterion} does not score hidden dimensions; use {', '.join(_CRITERIA)}")
    full, step = anatomy.hidden.num_units, step_of(anatomy, options.multiple_of)
    for kept in range((full - 1) // step * step, 0, -step):
        if (full - kept) * anatomy.hidden.unit_params >= round(goal.sparsity * anatomy.total_params):
            return Mix(hidden=full - kept)
    raise UserError(
        f"hidden cannot lose {goal.sparsity:.0%} of the {anatomy.total_params:,} parameters: of {full} dimensions a "
        f"multiple of {step} stays; lower sparsity or prune.multiple_of ({options.multiple_of})"
    )


def _scores(problem: Problem, options: PruneConfig) -> torch.Tensor:
    """(hidden,) fp64: over the matrices that read the stream, the share of each one's output energy that comes through
    a dimension, |W_:,j|^2 sum_t x_tj^2 (magnitude: without the inputs)."""
    group = problem.anatomy.hidden
    if options.criterion == "random":
        return uniform(0, group.num_units, key_of(options.seed, "hidden")).double()
    matrices = [problem.anatomy.matrix_of(module) for module, _ in group.readers]
    squares = [torch.ones(group.num_units, dtype=torch.float64, device=problem.backend.device) for _ in matrices]
    if options.criterion != "magnitude":
        moments = input_moments(problem, matrices, full=False)
        squares = [moments.moments.sum(moments.of(matrix)).double().clone() for matrix in matrices]
        problem.backend.sum_over_data(squares)
    total = torch.zeros(group.num_units, dtype=torch.float64)
    for matrix, square in zip(matrices, squares, strict=True):
        weight = problem.backend.shard(problem.model, matrix).weight
        weight = matrix.oriented(problem.backend.gather(problem.model, matrix, weight))
        energy = criteria.column_energy(weight, square.float()).double().cpu()
        total += energy / energy.sum()
    return total


METHODS: dict[str, UnitMethod] = {"hidden": HiddenWidth()}
