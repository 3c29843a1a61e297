"""Scores of units by every criterion. Larger = more important; those of probes and gates are in units of loss."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from tinygn_dist import score
from tinygn_dist.anatomy import UnitGroup
from tinygn_dist.budget import Mix
from tinygn_dist.config import PruneConfig
from tinygn_dist.errors import UserError
from tinygn_dist.estimate import probes
from tinygn_dist.estimate.activations import InputMoments, block_influence
from tinygn_dist.estimate.adaptive import Contest, Limit, race
from tinygn_dist.estimate.backprop import gate_gradients
from tinygn_dist.estimate.directions import key_of, uniform
from tinygn_dist.estimate.experts import output_mass
from tinygn_dist.estimate.gates import gate_derivatives
from tinygn_dist.estimate.memory import settled
from tinygn_dist.estimate.probes import Probe
from tinygn_dist.estimate.setting import Setting
from tinygn_dist.estimate.subsets import effects_together
from tinygn_dist.unit_statistics import column_energies, unit_magnitude

log = logging.getLogger(__name__)
REPROBED = 4
"""layers probed again after each removed one: removing one changes what the others are worth"""
MANY = 64
"""units per group above which single probes are too many, and the report lists none"""


@dataclass
class UnitScores:
    """by_group: (kind, layer) -> (units,) scores; a missing group is chosen by its solver. layer_order: layers, the
    first to go first. table: what the report shows. forwards: probe passes spent; exhaustive: what removal
    probes would have taken on every sequence; open: groups whose choice noise or the budget left open. steps: of gate derivatives, by kind and
    layer, with what was measured to choose them. kinked: gates at which the loss has no derivative."""

    by_group: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    layer_order: list[int] = field(default_factory=list)
    table: list[dict[str, Any]] = field(default_factory=list)
    forwards: int = 0
    exhaustive: int = 0
    open: int = 0
    started: float = field(default_factory=time.monotonic)
    steps: list[dict[str, Any]] = field(default_factory=list)
    kinked: int = 0


def score_units(setting: Setting, most: Mix, options: PruneConfig, moments: InputMoments | None) -> UnitScores:
    """Scores of every kind of which `most` removes some.

    auto: removal probes for layers, heads and experts, the solver's own saliency for channels. moments: unreduced Gram
    matrices of the groups' outputs, read by the criteria activation and removal of channels.
    """
    scores = UnitScores()
    if options.criterion == "gate":  # the only one that has a choice
        options = settled(setting, options)
    if most.layers:
        criterion = "removal" if options.criterion in ("auto", "obs") else options.criterion
        if criterion == "removal":
            _order_by_removal(scores, setting, most.layers, options)
        else:
            _order_by_score(scores, setting, criterion, options)
    for kind in ("heads", "channels", "experts", "filters"):
        groups = setting.anatomy.of_kind(kind)
        criterion = _criterion(kind, groups, options)
        if getattr(most, kind) and criterion != "obs":
            values = _group_scores(scores, setting, groups, criterion, options, moments, getattr(most, kind))
            scores.by_group |= {(kind, group.layer): value for group, value in zip(groups, values, strict=True)}
    return scores


def _criterion(kind: str, groups: Sequence[UnitGroup], options: PruneConfig) -> str:
    """What auto means for a kind. Experts have no solver, as layers have none: obs then means auto."""
    if kind == "experts" and options.criterion in ("auto", "obs"):
        return "removal" if groups and groups[0].num_units <= MANY else "activation"
    if options.criterion != "auto":
        return options.criterion
    return "obs" if kind == "channels" else "removal"


def _order_by_removal(scores: UnitScores, setting: Setting, num_removed: int, options: PruneConfig) -> None:
    """Greedy: probe every layer once, then after each removal probe the few best again without the removed ones."""
    known: dict[int, float] = {}
    ask, gone = _removable(setting, options), []

    def by_loss(layers: Sequence[int]) -> list[int]:
        return sorted(layers, key=lambda layer: (known[layer], layer))

    while len(gone) < num_removed:
        wanted = min(1 + REPROBED if not known else 1, len(ask))  # the first look also says which to probe again
        contest = Contest(tuple(range(len(ask))), wanted)
        mean, error = _raced(scores, setting, [Probe(layer) for layer in ask], [contest], options, gone)
        for layer, value, deviation in zip(ask, mean.tolist(), error.tolist(), strict=True):
            known[layer] = value
            scores.table.append(_row("layers", layer, "removal", value, deviation) | {"without": list(gone)})
        gone.append(by_loss([layer for layer in known if layer not in gone])[0])
        ask = by_loss([layer for layer in known if layer not in gone])[:REPROBED]
    scores.layer_order = gone


def _order_by_score(scores: UnitScores, setting: Setting, criterion: str, options: PruneConfig) -> None:
    num_layers = setting.anatomy.num_layers
    match criterion:
        case "gate":
            values = score.second_order(
                *_gate_grads(scores, setting, [Probe(layer) for layer in range(num_layers)], options)
            )
        case "activation":
            values = score.block_influence(*block_influence(setting))
        case "magnitude":
            values = torch.zeros(num_layers, dtype=torch.float64)
            for target in setting.anatomy.targets:
                weight = setting.backend.shard(setting.model, target).weight
                values[target.layer] += float(weight.double().square().sum())
            values = setting.backend.sum_over_shards(values)
        case "random":
            values = uniform(0, num_layers, key_of(options.seed, "layers"))
        case _:
            raise AssertionError(criterion)
    scores.layer_order = sorted(_removable(setting, options), key=lambda layer: (float(values[layer]), layer))
    scores.table += [_row("layers", layer, criterion, float(value)) for layer, value in enumerate(values)]


def _removable(setting: Setting, options: PruneConfig) -> list[int]:
    stay = {*options.protect, *setting.anatomy.lasting}
    return [layer for layer in range(setting.anatomy.num_layers) if layer not in stay]


def _group_scores(
    scores: UnitScores,
    setting: Setting,
    groups: Sequence[UnitGroup],
    criterion: str,
    options: PruneConfig,
    moments: InputMoments | None,
    removed: int,
) -> list[torch.Tensor]:
    match criterion:
        case "removal":
            return _removal(scores, setting, groups, options, moments, removed)
        case "gate":
            values = _gates(scores, setting, groups, options)
        case "activation" if groups[0].router:
            values, reached = output_mass(setting, groups)
            _warn_unreached(groups, reached)
        case "activation":
            values = [
                score.unit_sums(energy, group.output_width)
                for group, energy in zip(groups, column_energies(setting, groups, moments), strict=True)
            ]
        case "magnitude":
            values = [unit_magnitude(setting, group) for group in groups]
        case "random":
            values = [uniform(0, g.num_units, key_of(options.seed, f"{g.kind}/{g.layer}")) for g in groups]
        case _:
            raise AssertionError(criterion)
    for group, value in zip(groups, values, strict=True):
        if group.num_units <= MANY:
            scores.table += [
                _row(group.kind, group.layer, criterion, float(v)) | {"unit": unit} for unit, v in enumerate(value)
            ]
    return values


def _removal(
    scores: UnitScores,
    setting: Setting,
    groups: Sequence[UnitGroup],
    options: PruneConfig,
    moments: InputMoments | None,
    removed: int,
) -> list[torch.Tensor]:
    """One probe per head or expert; channels in blocks of similar activation energy, which orders them inside; of filters
    at most MANY blocks of similar magnitude per group, whose units share the block's loss."""
    of_filters = groups[0].kind == "filters"
    if of_filters:
        orders = [unit_magnitude(setting, group).argsort(stable=True) for group in groups]
        blocks = [list(order.split(max(1, len(order) // MANY))) for order in orders]
    elif groups[0].num_units <= MANY or groups[0].router:
        blocks = [list(torch.arange(group.num_units).split(1)) for group in groups]
    else:
        energies = column_energies(setting, groups, moments)
        blocks = [list(energy.argsort(stable=True).cpu().split(options.probe_channels)) for energy in energies]
    asked = [
        Probe(group.layer, group, tuple(block.tolist()))
        for group, parts in zip(groups, blocks, strict=True)
        for block in parts
    ]
    starts = itertools.accumulate((len(parts) for parts in blocks), initial=0)
    contests = [
        Contest(tuple(range(start, start + len(parts))), math.ceil(removed / len(parts[0])))
        for start, parts in zip(starts, blocks, strict=False)
    ]
    mean, error = _raced(scores, setting, asked, [] if of_filters else contests, options)
    if options.probe_subsets and not of_filters:
        mean, error = _together(scores, setting, asked, contests, (mean, error), options)
    for probe, value, deviation in zip(asked, mean.tolist(), error.tolist(), strict=True):
        row = _row(probe.group.kind, probe.layer, "removal", value, deviation)
        scores.table.append(row | {"unit": probe.units[0], "units": len(probe.units)})
    values, position = [], 0
    for group, parts in zip(groups, blocks, strict=True):
        spread = _share_among_units if of_filters else _spread_over_units
        values.append(spread(mean[position : position + len(parts)], parts, group.num_units))
        position += len(parts)
    return values


def _raced(
    scores: UnitScores,
    setting: Setting,
    asked: Sequence[Probe],
    contests: Sequence[Contest],
    options: PruneConfig,
    without: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss change of each probe and its standard error, as far as the contests need them known."""
    limit = Limit(
        float("inf") if options.probe_forwards is None else options.probe_forwards - scores.forwards,
        float("inf") if options.probe_minutes is None else scores.started + 60 * options.probe_minutes,
    )
    found = race(setting, asked, contests if options.probe_adaptive else [], without=without, limit=limit)
    scores.forwards += found.forwards
    scores.exhaustive += found.exhaustive
    scores.open += found.open
    return found.mean, found.error


def _together(
    scores: UnitScores,
    setting: Setting,
    asked: Sequence[Probe],
    contests: Sequence[Contest],
    alone: tuple[torch.Tensor, torch.Tensor],
    options: PruneConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same units by their part in the losses of random subsets, as many as the budget leaves."""
    count = options.probe_subsets
    if options.probe_forwards is not None:
        count = min(count, (options.probe_forwards - scores.forwards) // len(setting.batches))
    if count < 2:
        log.warning("prune.probe_forwards %d left nothing for prune.probe_subsets", options.probe_forwards)
        return alone
    found = effects_together(setting, asked, contests, alone[0], count, seed=options.seed)
    scores.forwards += found.forwards
    scores.exhaustive += found.forwards
    return found.mean, found.error


def _share_among_units(losses: torch.Tensor, blocks: Sequence[torch.Tensor], num_units: int) -> torch.Tensor:
    """One score per unit, in units of loss: its part of its block's."""
    value = torch.empty(num_units, dtype=torch.float64)
    for loss, block in zip(losses.tolist(), blocks, strict=True):
        value[block] = loss / len(block)
    return value


def _spread_over_units(losses: torch.Tensor, blocks: Sequence[torch.Tensor], num_units: int) -> torch.Tensor:
    """One score per unit: blocks in order of their loss, the units of a block in the block's own order."""
    value = torch.empty(num_units, dtype=torch.float64)
    for rank, index in enumerate(losses.argsort(stable=True).tolist()):
        value[blocks[index]] = rank + torch.arange(len(blocks[index]), dtype=torch.float64) / len(blocks[index])
    return value


def _gates(
    scores: UnitScores, setting: Setting, groups: Sequence[UnitGroup], options: PruneConfig
) -> list[torch.Tensor]:
    if options.estimator != "backprop" and groups[0].num_units > MANY:
        raise UserError(
            f"criterion gate needs two forwards per unit; {len(groups) * groups[0].num_units:,} {groups[0].kind} are too "
            "many for finite differences: use --estimator backprop, where a smaller data.micro_batch or data.seq_len makes it "
            "fit, or criterion obs, removal or activation"
        )
    derivatives, counts = _gate_grads(scores, setting, list(probes.single_units(groups)), options)
    return list(score.second_order(derivatives, counts).split([group.num_units for group in groups]))


def _gate_grads(
    scores: UnitScores, setting: Setting, gates: Sequence[Probe], options: PruneConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gates, sequences) derivatives of summed losses by the configured estimator, and the token counts."""
    if options.estimator == "backprop":
        groups = list(dict.fromkeys(gate.group for gate in gates if gate.group is not None))
        layers = [gate.layer for gate in gates if gate.group is None]
        by_group, by_layer, counts = gate_gradients(setting, groups, layers)
        return torch.cat([*by_group, by_layer]), counts
    found = gate_derivatives(setting, gates, scheme=options.probe_difference, step=options.probe_step)
    scores.forwards += found.forwards
    scores.kinked += len(found.kinked)
    for (layer, group), step in found.steps.items():
        scores.steps.append({"kind": group.kind if group else "layers", "layer": layer, **asdict(step)})
    log.info("gate derivatives: %d partial forwards, %d gates at a kink", found.forwards, len(found.kinked))
    return found.slopes, found.counts


def _warn_unreached(groups: Sequence[UnitGroup], reached: Sequence[torch.Tensor]) -> None:
    for group, tokens in zip(groups, reached, strict=True):
        never = (tokens == 0).nonzero().squeeze(1).tolist()
        if never:
            log.warning("no calibration token was routed to experts %s of layer %d: they score 0", never, group.layer)


def _row(kind: str, layer: int, criterion: str, value: float, error: float | None = None) -> dict[str, Any]:
    row = {"kind": kind, "layer": layer, "criterion": criterion, "score": value}
    return row if error is None else row | {"std_error": error}
