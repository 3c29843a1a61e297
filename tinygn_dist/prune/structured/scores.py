"""Scores of units by every criterion. Larger = more important; those of probes and gates are in units of loss."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch

from tinygn_dist.config import PruneConfig
from tinygn_dist.errors import UserError
from tinygn_dist.estimate import probes
from tinygn_dist.estimate.backprop import gate_gradients
from tinygn_dist.estimate.estimator import resolve_estimator
from tinygn_dist.estimate.expert_moments import output_mass
from tinygn_dist.estimate.gates import gate_derivatives
from tinygn_dist.estimate.input_moments import InputMoments, block_influence
from tinygn_dist.estimate.probes import Probe
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.estimate.unit_moments import column_energies, unit_magnitude
from tinygn_dist.maths import criteria
from tinygn_dist.maths.counter_rng import key_of, uniform
from tinygn_dist.maths.counts import Mix
from tinygn_dist.maths.unit_kinds import UNIT_KINDS
from tinygn_dist.models.anatomy import Anatomy, UnitGroup
from tinygn_dist.prune.structured.probing import (
    MANY,
    ProbedGroup,
    Prober,
    UnitScores,
    order_layers,
    row_of,
    unit_losses,
)

log = logging.getLogger(__name__)


def score_units(problem: Problem, most: Mix, options: PruneConfig, moments: InputMoments | None = None) -> UnitScores:
    """Scores of every kind of which `most` removes some. moments: as of `UnitScorer`."""
    return UnitScorer(problem, options, moments=moments).score(most)


def reads_moments(anatomy: Anatomy, most: Mix, options: PruneConfig) -> bool:
    """Whether `UnitScorer` needs moments."""
    for kind in UNIT_KINDS:
        groups = anatomy.of_kind(kind) if most[kind] else ()
        if groups and not groups[0].router and kind != "filters":
            criterion = criterion_of(groups[0], options.criterion)
            if criterion == "activation" or criterion == "removal" and groups[0].num_units > MANY:
                return True
    return False


def criterion_of(group: UnitGroup, asked: str) -> str:
    """The criterion that `auto` and `obs` mean for units such as these. Only one weight that reads them can solve for
    them: experts and filters have none, and heads of a stack several."""
    kind = UNIT_KINDS[group.kind]
    if asked not in ("auto", "obs"):
        return asked
    if group.router and group.num_units > MANY:
        return "activation"
    if not kind.solved or group.also_read_by:
        return "removal"
    return kind.criterion if asked == "auto" else "obs"


def removable(anatomy: Anatomy, protect: Sequence[int]) -> list[int]:
    """The layers that may go."""
    stay = {*protect, *anatomy.lasting}
    return [layer for layer in range(anatomy.num_layers) if layer not in stay]


@dataclass
class UnitScorer:
    """Scores the units of a problem and adds them to `scores`.

    moments: unreduced Gram matrices of the groups' outputs, for the criteria activation and (of channels) removal.
    protect: layers that stay.
    """

    problem: Problem
    options: PruneConfig
    scores: UnitScores = field(default_factory=UnitScores)
    moments: InputMoments | None = None
    protect: Sequence[int] = ()

    @property
    def prober(self) -> Prober:
        return Prober(self.scores, self.problem, self.options.probes)

    def score(self, most: Mix) -> UnitScores:
        """Every kind of which `most` removes some. auto: removal probes for layers, heads and experts; channels are
        left to the solver's own saliency."""
        self._estimator = self.options.estimator
        if self.options.criterion == "gate" and most != Mix():  # the only one that has a choice
            self._estimator, note = resolve_estimator(self.problem, self.options.estimator)
            if note:
                log.info("%s", note)
                self.scores.notes.append(note)
        if most.layers:
            self._order_layers(most.layers)
        for kind in UNIT_KINDS:
            groups = self.problem.anatomy.of_kind(kind) if most[kind] else ()
            criterion = criterion_of(groups[0], self.options.criterion) if groups else "obs"
            if criterion != "obs":
                values = self._group_scores(groups, criterion, most[kind])
                self.scores.by_group |= {(kind, g.layer): value for g, value in zip(groups, values, strict=True)}
        return self.scores

    def _order_layers(self, removed: int) -> None:
        layers, criterion = removable(self.problem.anatomy, self.protect), self.options.criterion
        if criterion in ("auto", "obs", "removal"):
            self.scores.layer_order = order_layers(self.prober, layers, removed)
            return
        values = _LAYER_SCORES[criterion](self)
        self.scores.layer_order = sorted(layers, key=lambda layer: (float(values[layer]), layer))
        self.scores.table += [row_of("layers", layer, criterion, float(value)) for layer, value in enumerate(values)]

    def _layer_gates(self) -> torch.Tensor:
        return criteria.second_order(
            *self._gate_derivatives([Probe(layer) for layer in range(self.problem.anatomy.num_layers)])
        )

    def _layer_magnitudes(self) -> torch.Tensor:
        problem = self.problem
        values = torch.zeros(problem.anatomy.num_layers, dtype=torch.float64)
        for matrix in problem.anatomy.matrices:
            weight = problem.backend.shard(problem.model, matrix).weight
            values[matrix.layer] += float(weight.double().square().sum())
        return problem.backend.sum_over_shards(values)

    def _random_layers(self) -> torch.Tensor:
        return uniform(0, self.problem.anatomy.num_layers, key_of(self.options.seed, "layers"))

    def _group_scores(self, groups: Sequence[UnitGroup], criterion: str, removed: int) -> list[torch.Tensor]:
        """(units,) of each group."""
        if criterion == "removal":
            several = self.options.pattern == "units" and self.options.counts is None  # other mixes remove fewer
            blocks = self._blocks(groups)
            probed = [
                ProbedGroup(group, parts, removed, 1 if several else removed)
                for group, parts in zip(groups, blocks, strict=True)
            ]
            return unit_losses(self.prober, probed)
        values = _GROUP_SCORES[criterion](self, groups)
        for group, value in zip(groups, values, strict=True):
            if group.num_units <= MANY:
                self.scores.table += [
                    row_of(group.kind, group.layer, criterion, float(v)) | {"unit": unit}
                    for unit, v in enumerate(value)
                ]
        return values

    def _blocks(self, groups: Sequence[UnitGroup]) -> list[list[torch.Tensor]]:
        """The units of each probe. One head or expert; channels in blocks of similar activation energy, which orders
        them inside; of filters at most MANY blocks of similar magnitude per group, whose units share the block's
        loss."""
        if groups[0].kind == "filters":
            orders = [unit_magnitude(self.problem, group).argsort(stable=True) for group in groups]
            return [list(order.split(max(1, len(order) // MANY))) for order in orders]
        if groups[0].num_units <= MANY or groups[0].router:
            return [list(torch.arange(group.num_units).split(1)) for group in groups]
        energies, size = column_energies(self.problem, groups, self.moments), self.options.probes.channels
        return [list(energy.argsort(stable=True).cpu().split(size)) for energy in energies]

    def _gates(self, groups: Sequence[UnitGroup]) -> list[torch.Tensor]:
        if self._estimator != "backprop" and groups[0].num_units > MANY:
            raise UserError(
                f"criterion gate needs two forwards per unit; {len(groups) * groups[0].num_units:,} {groups[0].kind} "
                "are too many for finite differences: use --estimator backprop, where a smaller data.micro_batch or "
                "data.seq_len makes it fit, or criterion obs, removal or activation"
            )
        derivatives, counts = self._gate_derivatives(list(probes.single_units(groups)))
        return list(criteria.second_order(derivatives, counts).split([group.num_units for group in groups]))

    def _gate_derivatives(self, gates: Sequence[Probe]) -> tuple[torch.Tensor, torch.Tensor]:
        """(gates, sequences) derivatives of summed losses by the resolved estimator, and the token counts."""
        if self._estimator == "backprop":
            groups = list(dict.fromkeys(gate.group for gate in gates if gate.group is not None))
            layers = [gate.layer for gate in gates if gate.group is None]
            by_group, by_layer, counts = gate_gradients(self.problem, groups, layers)
            return torch.cat([*by_group, by_layer]), counts
        found = gate_derivatives(self.problem, gates, step=self.options.probes.step)
        self.scores.forwards += found.forwards
        self.scores.kinked += len(found.kinked)
        for (layer, group), step in found.steps.items():
            self.scores.steps.append({"kind": group.kind if group else "layers", "layer": layer, **asdict(step)})
        log.info("gate derivatives: %d partial forwards, %d gates at a kink", found.forwards, len(found.kinked))
        return found.slopes, found.counts

    def _activations(self, groups: Sequence[UnitGroup]) -> list[torch.Tensor]:
        if groups[0].router:
            values, reached = output_mass(self.problem, groups)
            _warn_unreached(groups, reached)
            return values
        energies = column_energies(self.problem, groups, self.moments)
        return [criteria.unit_sums(e, group.output_width) for group, e in zip(groups, energies, strict=True)]

    def _magnitudes(self, groups: Sequence[UnitGroup]) -> list[torch.Tensor]:
        return [unit_magnitude(self.problem, group) for group in groups]

    def _random_units(self, groups: Sequence[UnitGroup]) -> list[torch.Tensor]:
        return [uniform(0, g.num_units, key_of(self.options.seed, f"{g.kind}/{g.layer}")) for g in groups]


_LAYER_SCORES: dict[str, Callable[[UnitScorer], torch.Tensor]] = {
    "gate": UnitScorer._layer_gates,
    "activation": lambda scorer: criteria.block_influence(*block_influence(scorer.problem)),
    "magnitude": UnitScorer._layer_magnitudes,
    "random": UnitScorer._random_layers,
}
_GROUP_SCORES: dict[str, Callable[[UnitScorer, Sequence[UnitGroup]], list[torch.Tensor]]] = {
    "gate": UnitScorer._gates,
    "activation": UnitScorer._activations,
    "magnitude": UnitScorer._magnitudes,
    "random": UnitScorer._random_units,
}
"""by criterion, beside removal, which probes"""


def _warn_unreached(groups: Sequence[UnitGroup], reached: Sequence[torch.Tensor]) -> None:
    for group, tokens in zip(groups, reached, strict=True):
        never = (tokens == 0).nonzero().squeeze(1).tolist()
        if never:
            log.warning("no calibration token was routed to experts %s of layer %d: they score 0", never, group.layer)
