"""Scores of units by every criterion, each with what it is measured in. Larger = more important."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from tinygn_dist import score
from tinygn_dist.anatomy import Anatomy, UnitGroup
from tinygn_dist.backends.base import Backend
from tinygn_dist.config import PruneConfig
from tinygn_dist.errors import UserError
from tinygn_dist.estimate import probes
from tinygn_dist.estimate.activations import InputMoments, block_influence
from tinygn_dist.estimate.backprop import gate_gradients
from tinygn_dist.estimate.directions import key_of, uniform
from tinygn_dist.estimate.probes import Probe
from tinygn_dist.objective import Batch, Objective
from tinygn_dist.progress import Progress

log = logging.getLogger(__name__)
REPROBED = 4
"""candidates probed again after each removed layer: removing one changes what the others are worth"""


@dataclass
class UnitScores:
    """by_group: (kind, layer) -> (units,) scores; a missing group is chosen by its solver. layer_order: layers, the
    first to go first. table: what the report shows, in units of loss per token where `unit` says so."""

    by_group: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    layer_order: list[int] = field(default_factory=list)
    table: list[dict] = field(default_factory=list)
    forwards: int = 0


def score_units(
    model: nn.Module,
    anatomy: Anatomy,
    needed: Collection[str],
    max_layers: int,
    options: PruneConfig,
    objective: Objective,
    batches: Sequence[Batch],
    moments: InputMoments | None,
    backend: Backend,
    progress: Progress,
) -> UnitScores:
    """Scores of the needed kinds. auto: removal probes for layers and heads, the solver's own saliency for channels."""
    scores = UnitScores()
    context = (model, anatomy, options, objective, batches, moments, backend, progress)
    if "layers" in needed:
        criterion = "removal" if options.criterion in ("auto", "obs") else options.criterion
        _order_layers(scores, criterion, max_layers, *context)
    for kind in ("heads", "channels"):
        criterion = {"heads": "removal", "channels": "obs"}[kind] if options.criterion == "auto" else options.criterion
        if kind in needed and criterion != "obs":
            _score_groups(scores, anatomy.of_kind(kind), criterion, *context)
    return scores


def _order_layers(
    scores, criterion, max_layers, model, anatomy, options, objective, batches, moments, backend, progress
):
    allowed = [layer for layer in range(anatomy.num_layers) if layer not in options.protect]
    match criterion:
        case "removal":
            _order_by_removal(scores, allowed, max_layers, model, anatomy, objective, batches, backend, progress)
            return
        case "gate":
            derivatives, counts = _gate_grads(
                scores,
                [Probe(layer) for layer in range(anatomy.num_layers)],
                model,
                anatomy,
                options,
                objective,
                batches,
                backend,
                progress,
            )
            values = score.second_order(derivatives, counts)
        case "activation":
            sums, tokens = block_influence(model, anatomy, batches, backend, progress)
            values = score.block_influence(sums, tokens)
        case "magnitude":
            values = torch.tensor(
                [
                    sum(
                        float(backend.shard(model, t).weight.double().square().sum())
                        for t in anatomy.targets
                        if t.layer == layer
                    )
                    for layer in range(anatomy.num_layers)
                ],
                dtype=torch.float64,
            )
            values = backend.sum_over_shards(values)
        case "random":
            values = uniform(0, anatomy.num_layers, key_of(options.seed, "layers"))
    scores.layer_order = sorted(allowed, key=lambda layer: (float(values[layer]), layer))
    scores.table += [
        {"kind": "layer", "layer": k, "score": float(v), "criterion": criterion} for k, v in enumerate(values)
    ]


def _order_by_removal(scores, allowed, max_layers, model, anatomy, objective, batches, backend, progress) -> None:
    """Greedy: probe every layer once, then after each removal probe the few best again without the removed ones."""
    known: dict[int, float] = {}
    ask, gone = list(allowed), []
    while len(gone) < max_layers:
        seen = probes.measure(
            model, anatomy, objective, batches, [Probe(layer) for layer in ask], backend, progress, without=gone
        )
        mean, error = score.ratio_mean(seen.differences, seen.counts)
        scores.forwards += seen.forwards
        for layer, value, deviation in zip(ask, mean.tolist(), error.tolist(), strict=True):
            known[layer] = value
            scores.table.append(
                {
                    "kind": "layer",
                    "layer": layer,
                    "score": value,
                    "std_error": deviation,
                    "without": list(gone),
                    "criterion": "removal",
                }
            )
        best = min((layer for layer in known if layer not in gone), key=lambda layer: (known[layer], layer))
        gone.append(best)
        ask = sorted((layer for layer in known if layer not in gone), key=lambda layer: (known[layer], layer))[
            :REPROBED
        ]
    scores.layer_order = gone


def _score_groups(scores, groups, criterion, model, anatomy, options, objective, batches, moments, backend, progress):
    match criterion:
        case "removal":
            values = _removal(scores, groups, model, anatomy, options, objective, batches, moments, backend, progress)
        case "gate":
            values = _gates(scores, groups, model, anatomy, options, objective, batches, backend, progress)
        case "activation":
            diagonals = _input_energy(moments, groups, backend)
            values = [
                score.unit_sums(score.column_energy(_output(model, g, anatomy, backend), d), g.output_width)
                for g, d in zip(groups, diagonals, strict=True)
            ]
        case "magnitude":
            values = [_unit_magnitude(model, group, backend) for group in groups]
        case "random":
            values = [uniform(0, g.num_units, key_of(options.seed, f"{g.kind}/{g.layer}")) for g in groups]
    for group, value in zip(groups, values, strict=True):
        scores.by_group[group.kind, group.layer] = value
        if group.num_units <= 64 and criterion != "removal":
            scores.table += [
                {"kind": group.kind, "layer": group.layer, "unit": unit, "score": float(v), "criterion": criterion}
                for unit, v in enumerate(value)
            ]


def _removal(
    scores, groups, model, anatomy, options, objective, batches, moments, backend, progress
) -> list[torch.Tensor]:
    """One probe per head; channels in blocks of similar activation energy, the energy ordering inside a block."""
    blocks: list[list[torch.Tensor]] = []
    asked: list[Probe] = []
    energies = _input_energy(moments, groups, backend) if groups[0].kind == "channels" else [None] * len(groups)
    for group, energy in zip(groups, energies, strict=True):
        if energy is None:
            order, size = torch.arange(group.num_units), 1
        else:
            order = score.column_energy(_output(model, group, anatomy, backend), energy).argsort(stable=True).cpu()
            size = options.probe_channels
        blocks.append(list(order.split(size)))
        asked += [Probe(group.layer, group, tuple(block.tolist())) for block in blocks[-1]]
    seen = probes.measure(model, anatomy, objective, batches, asked, backend, progress)
    scores.forwards += seen.forwards
    mean, error = score.ratio_mean(seen.differences, seen.counts)
    values, position = [], 0
    for group, parts in zip(groups, blocks, strict=True):
        value = torch.empty(group.num_units, dtype=torch.float64)
        here = mean[position : position + len(parts)]
        for rank, block in enumerate(here.argsort(stable=True).tolist()):
            # the report shows losses; selection needs an order, and a block's channels keep theirs
            inside = torch.arange(len(parts[block]), dtype=torch.float64) / len(parts[block])
            value[parts[block]] = float(here[block]) if len(parts[block]) == 1 else rank + inside
            scores.table.append(
                {
                    "kind": group.kind,
                    "layer": group.layer,
                    "units": len(parts[block]),
                    "first": int(parts[block][0]),
                    "score": float(here[block]),
                    "std_error": float(error[position + block]),
                    "criterion": "removal",
                }
            )
        values.append(value)
        position += len(parts)
    return values


def _gate_grads(scores, gates, model, anatomy, options, objective, batches, backend, progress):
    """(gates, sequences) derivatives by the configured estimator."""
    if options.estimator == "backprop":
        groups = list(dict.fromkeys(g.group for g in gates if g.group is not None))
        layers = [g.layer for g in gates if g.group is None]
        by_group, by_layer, counts = gate_gradients(
            model, anatomy, objective, batches, groups, layers, backend, progress
        )
        return torch.cat([*by_group, by_layer]), counts
    step = probes.default_step(next(backend.unwrap(model).parameters()).dtype)
    scores.forwards += 2 * len(gates) * len(batches)
    log.info(
        "gate derivatives by central differences, step %.2g, %d partial forwards", step, 2 * len(gates) * len(batches)
    )
    return probes.gate_derivatives(model, anatomy, objective, batches, gates, backend, progress, step)


def _gates(scores, groups, model, anatomy, options, objective, batches, backend, progress) -> list[torch.Tensor]:
    if options.estimator != "backprop" and groups[0].num_units > 64:
        raise UserError(
            f"criterion gate needs two forwards per unit; {len(groups) * groups[0].num_units:,} channels are too many for "
            "finite differences: use --estimator backprop, or criterion obs or removal"
        )
    gates = list(probes.single_units(groups))
    derivatives, counts = _gate_grads(scores, gates, model, anatomy, options, objective, batches, backend, progress)
    return list(score.second_order(derivatives, counts).split([group.num_units for group in groups]))


def _input_energy(moments: InputMoments, groups: Sequence[UnitGroup], backend: Backend) -> list[torch.Tensor]:
    """fp32 sums of x^2 over all ranks, per group; the Gram matrices themselves stay unreduced."""
    diagonals = [moments.moments.sum(moments.of(group.output)).diagonal().clone() for group in groups]
    backend.sum_over_data(diagonals)
    return [diagonal.float() for diagonal in diagonals]


def _output(model, group: UnitGroup, anatomy: Anatomy, backend: Backend) -> torch.Tensor:
    target = next(target for target in anatomy.targets if target.module == group.output)
    return target.matrix(backend.shard(model, target).weight)


def _unit_magnitude(model: nn.Module, group: UnitGroup, backend: Backend) -> torch.Tensor:
    """Sum of squares of every weight that goes with a unit."""
    bare = backend.unwrap(model)
    weight = bare.get_submodule(group.output).weight.detach().double()
    rows = weight if isinstance(bare.get_submodule(group.output), nn.Linear) else weight.t()
    total = score.unit_sums(rows.square().sum(0), group.output_width)
    for row in group.inputs:
        module = bare.get_submodule(row.part.path)
        weight = module.weight.detach().double()
        matrix = weight if isinstance(module, nn.Linear) else weight.t()
        block = matrix.chunk(row.part.of)[row.part.index]
        total = total + score.unit_sums(block.square().sum(1), row.width)
    return total
