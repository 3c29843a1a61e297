"""Derivatives of the loss by gates, from finite differences with measured steps.

Every group of units has a step of its own, because noise and curvature differ between layers. All groups search at the
same time: one round of forwards serves the present question of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tinygn_dist.errors import UserError
from tinygn_dist.estimate.probes import Measured, Probe, measure
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths import finite_difference
from tinygn_dist.maths.finite_difference import Step
from tinygn_dist.models.anatomy import UnitGroup

Place = tuple[int, UnitGroup | None]
"""a layer and its group of units; None for the gate of the layer itself"""
_BEYOND_NOISE = 3.0
"""standard deviations"""
_NOTABLE = 0.1
"""a disagreement of the two sides below this share of the derivative does not matter"""
_KINKED = 0.75
"""halving the step halves a disagreement that comes from curvature, and leaves one that comes from a kink"""


@dataclass(frozen=True)
class GateDerivatives:
    """slopes, bends: (gates, sequences) fp64 first and second derivative of each sequence's summed loss. counts:
    (sequences,) tokens. steps: by place. kinked: indices of gates at which the loss has no derivative: forward and
    backward differences disagree beyond noise and curvature; their slope is the mean of the two. forwards: probe passes
    over all ranks, the search for steps included."""

    slopes: torch.Tensor
    bends: torch.Tensor
    counts: torch.Tensor
    steps: dict[Place, Step]
    kinked: list[int]
    forwards: int


def gate_derivatives(problem: Problem, gates: Sequence[Probe], *, step: float | None = None) -> GateDerivatives:
    """Central difference quotients at all gates 1 (the probes' own factors are ignored): two forwards per gate, an
    error in step^2.

    step: measured for each group of units by default. Raises UserError for a step that the model's dtype cannot see.
    """
    places = list(dict.fromkeys((gate.layer, gate.group) for gate in gates))
    if step is None:
        steps, forwards = measure_steps(problem, gates)
    else:
        check_step(step, gate_dtype(problem))
        steps, forwards = {place: finite_difference.given(step) for place in places}, 0
    sizes = torch.tensor([steps[gate.layer, gate.group].value for gate in gates], dtype=torch.float64)
    measured, h = _both_sides(problem, gates, sizes), sizes[:, None]
    up, down = measured.differences[0::2], measured.differences[1::2]
    slopes, bends = (up - down) / (2 * h), (up + down) / h**2
    found = GateDerivatives(slopes, bends, measured.counts, steps, [], forwards + measured.forwards)
    kinked, more = _kinks(problem, gates, sizes, found)
    return replace(found, kinked=kinked, forwards=found.forwards + more)


def measure_steps(problem: Problem, gates: Sequence[Probe]) -> tuple[dict[Place, Step], int]:
    """The step of each place, measured at its middle unit on the first micro-batch; and the forwards spent.

    One batch has more noise per token than all of them, so the steps are on the large side of what all would ask.
    """
    by_place: dict[Place, list[Probe]] = {}
    for gate in gates:
        by_place.setdefault((gate.layer, gate.group), []).append(gate)
    middle = {place: found[len(found) // 2] for place, found in by_place.items()}
    resolution = torch.finfo(gate_dtype(problem)).eps
    running = {place: finite_difference.search("central", resolution) for place in middle}
    wanted = {place: list(next(asking)) for place, asking in running.items()}
    one, steps, forwards = problem.first(1), {}, 0
    while wanted:
        asked = [replace(middle[place], factor=1 + t) for place, ts in wanted.items() for t in ts]
        measured = measure(one, asked)
        forwards += measured.forwards
        losses = iter(((measured.base.sum() + measured.differences.sum(1)) / measured.counts.sum()).tolist())
        answers = {place: [next(losses) for _ in ts] for place, ts in wanted.items()}
        wanted = {}
        for place, values in answers.items():
            try:
                wanted[place] = list(running[place].send(values))
            except StopIteration as done:
                steps[place] = done.value
    return steps, forwards


def gate_dtype(problem: Problem) -> torch.dtype:
    """Gates multiply activations, which have the dtype of the weights."""
    return next(problem.bare.parameters()).dtype


def check_step(step: float, dtype: torch.dtype) -> None:
    """UserError when 1 + step or 1 - step is 1 in `dtype`, or another number than asked by more than a tenth."""
    up, down = (float(torch.tensor(1 + sign * step, dtype=torch.float64).to(dtype)) for sign in (1, -1))
    if abs((up - down) / (2 * step) - 1) > 0.1 or up == 1 or down == 1:
        name, least = str(dtype).removeprefix("torch."), torch.finfo(dtype).eps
        better = max(least, finite_difference.power_of_two(step))
        raise UserError(
            f"prune.probes.step {step:g} moves a {name} gate from {down:g} to {up:g}, accepted: at least {least:g} "
            f"and exact in {name}, such as {better:g}; or leave it out to have it measured"
        )


def _both_sides(problem: Problem, gates: Sequence[Probe], sizes: torch.Tensor) -> Measured:
    """Every gate at 1 + size and at 1 - size, one after the other."""
    moved = [
        replace(gate, factor=1 + sign * size)
        for gate, size in zip(gates, sizes.tolist(), strict=True)
        for sign in (1, -1)
    ]
    return measure(problem, moved)


def _kinks(
    problem: Problem, gates: Sequence[Probe], sizes: torch.Tensor, found: GateDerivatives
) -> tuple[list[int], int]:
    """Gates whose two one-sided differences disagree by more than noise and curvature explain, and the forwards it
    took to know."""
    total = found.counts.sum()
    apart = (found.bends.sum(1) / total * sizes).abs()  # forward minus backward difference
    noise = torch.tensor([found.steps[gate.layer, gate.group].noise for gate in gates], dtype=torch.float64)
    beyond = _BEYOND_NOISE * math.sqrt(6) * noise / sizes
    resolution = torch.finfo(gate_dtype(problem)).eps
    notable = apart > _NOTABLE * (found.slopes.sum(1) / total).abs()
    odd = (apart > beyond) & notable & (sizes / 2 >= resolution)
    suspects = odd.nonzero().squeeze(1).tolist()
    if not suspects:
        return [], 0
    again = _both_sides(problem, [gates[i] for i in suspects], sizes[odd] / 2)
    halved = ((again.differences[0::2] + again.differences[1::2]).sum(1) / total / (sizes[odd] / 2)).abs()
    there = (halved > _KINKED * apart[odd]) & (halved > 2 * beyond[odd])
    return [i for i, kinked in zip(suspects, there.tolist(), strict=True) if kinked], again.forwards
