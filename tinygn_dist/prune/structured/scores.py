"""Scores of units by every criterion. Larger = more important; those of probes and gates are in units of loss."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict

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
from tinygn_dist.estimate.unit_statistics import column_energies, unit_magnitude
from tinygn_dist.maths import criteria
from tinygn_dist.maths.counter_rng import key_of, uniform
from tinygn_dist.maths.counts import Mix
from tinygn_dist.models.anatomy import Anatomy, UnitGroup
from tinygn_dist.prune.structured.probing import MANY, UnitScores, order_layers, row_of, unit_losses

log = logging.getLogger(__name__)


def score_units(
    problem: Problem,
    most: Mix,
    options: PruneConfig,
    moments: InputMoments | None = None,
    scores: UnitScores | None = None,
    protect: Sequence[int] = (),
) -> UnitScores:
    """Scores of every kind of which `most` removes some, beside the `scores` of other kinds.

    auto: removal probes for layers, heads and experts, the solver's own saliency for channels. moments: unreduced Gram
    matrices of the groups' outputs, read by the criteria activation and removal of channels.
    """
    scores = scores or UnitScores()
    if options.criterion == "gate" and most != Mix():  # the only one that has a choice
        estimator, note = resolve_estimator(problem, options.estimator)
        options = options.model_copy(update={"estimator": estimator})
        if note and not any(old.startswith(f"estimator {estimator}") for old in problem.notes):
            log.info("%s", note)
            problem.notes.append(note)
    if most.layers:
        criterion = "removal" if options.criterion in ("auto", "obs") else options.criterion
        if criterion == "removal":
            order_layers(scores, problem, removable(problem.anatomy, protect), most.layers, options)
        else:
            _order_by_score(scores, problem, criterion, options, protect)
    for kind in ("heads", "channels", "experts", "filters"):
        groups = problem.anatomy.of_kind(kind)
        criterion = _criterion(kind, groups, options)
        if getattr(most, kind) and criterion != "obs":
            values = _group_scores(scores, problem, groups, criterion, options, moments, getattr(most, kind))
            scores.by_group |= {(kind, group.layer): value for group, value in zip(groups, values, strict=True)}
    return scores


def reads_moments(problem: Problem, most: Mix, options: PruneConfig) -> bool:
    """Whether `score_units` needs moments."""
    for kind in ("heads", "channels"):
        groups = problem.anatomy.of_kind(kind)
        if getattr(most, kind) and groups:
            criterion = _criterion(kind, groups, options)
            if criterion == "activation" or criterion == "removal" and groups[0].num_units > MANY:
                return True
    return False


def _criterion(kind: str, groups: Sequence[UnitGroup], options: PruneConfig) -> str:
    """What auto and obs mean for a kind. Experts have no solver, and heads that several weights read have several."""
    unsolved = kind in ("experts", "filters") or bool(groups and groups[0].also_read_by)
    if options.criterion not in ("auto", "obs"):
        return options.criterion
    if kind == "experts" and groups and groups[0].num_units > MANY:
        return "activation"
    return "removal" if unsolved or options.criterion == "auto" and kind != "channels" else "obs"


def _order_by_score(
    scores: UnitScores, problem: Problem, criterion: str, options: PruneConfig, protect: Sequence[int]
) -> None:
    num_layers = problem.anatomy.num_layers
    match criterion:
        case "gate":
            values = criteria.second_order(
                *_gate_grads(scores, problem, [Probe(layer) for layer in range(num_layers)], options)
            )
        case "activation":
            values = criteria.block_influence(*block_influence(problem))
        case "magnitude":
            values = torch.zeros(num_layers, dtype=torch.float64)
            for matrix in problem.anatomy.matrices:
                weight = problem.backend.shard(problem.model, matrix).weight
                values[matrix.layer] += float(weight.double().square().sum())
            values = problem.backend.sum_over_shards(values)
        case "random":
            values = uniform(0, num_layers, key_of(options.seed, "layers"))
        case _:
            raise AssertionError(criterion)
    scores.layer_order = sorted(removable(problem.anatomy, protect), key=lambda layer: (float(values[layer]), layer))
    scores.table += [row_of("layers", layer, criterion, float(value)) for layer, value in enumerate(values)]


def removable(anatomy: Anatomy, protect: Sequence[int]) -> list[int]:
    """The layers that may go."""
    stay = {*protect, *anatomy.lasting}
    return [layer for layer in range(anatomy.num_layers) if layer not in stay]


def _group_scores(
    scores: UnitScores,
    problem: Problem,
    groups: Sequence[UnitGroup],
    criterion: str,
    options: PruneConfig,
    moments: InputMoments | None,
    removed: int,
) -> list[torch.Tensor]:
    match criterion:
        case "removal":
            return unit_losses(scores, problem, groups, options, moments, removed)
        case "gate":
            values = _gates(scores, problem, groups, options)
        case "activation" if groups[0].router:
            values, reached = output_mass(problem, groups)
            _warn_unreached(groups, reached)
        case "activation":
            values = [
                criteria.unit_sums(energy, group.output_width)
                for group, energy in zip(groups, column_energies(problem, groups, moments), strict=True)
            ]
        case "magnitude":
            values = [unit_magnitude(problem, group) for group in groups]
        case "random":
            values = [uniform(0, g.num_units, key_of(options.seed, f"{g.kind}/{g.layer}")) for g in groups]
        case _:
            raise AssertionError(criterion)
    for group, value in zip(groups, values, strict=True):
        if group.num_units <= MANY:
            scores.table += [
                row_of(group.kind, group.layer, criterion, float(v)) | {"unit": unit} for unit, v in enumerate(value)
            ]
    return values


def _gates(
    scores: UnitScores, problem: Problem, groups: Sequence[UnitGroup], options: PruneConfig
) -> list[torch.Tensor]:
    if options.estimator != "backprop" and groups[0].num_units > MANY:
        raise UserError(
            f"criterion gate needs two forwards per unit; {len(groups) * groups[0].num_units:,} {groups[0].kind} are too "
            "many for finite differences: use --estimator backprop, where a smaller data.micro_batch or data.seq_len makes it "
            "fit, or criterion obs, removal or activation"
        )
    derivatives, counts = _gate_grads(scores, problem, list(probes.single_units(groups)), options)
    return list(criteria.second_order(derivatives, counts).split([group.num_units for group in groups]))


def _gate_grads(
    scores: UnitScores, problem: Problem, gates: Sequence[Probe], options: PruneConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gates, sequences) derivatives of summed losses by the configured estimator, and the token counts."""
    if options.estimator == "backprop":
        groups = list(dict.fromkeys(gate.group for gate in gates if gate.group is not None))
        layers = [gate.layer for gate in gates if gate.group is None]
        by_group, by_layer, counts = gate_gradients(problem, groups, layers)
        return torch.cat([*by_group, by_layer]), counts
    found = gate_derivatives(problem, gates, scheme=options.probe_difference, step=options.probe_step)
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
