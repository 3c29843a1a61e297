"""Gate derivatives by finite differences in the dtypes models have: accuracy at the measured step, curvature, kinks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests import tiny
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.backprop import gate_gradients
from tinygn_dist.estimate.gates import gate_derivatives
from tinygn_dist.estimate.probes import Probe, single_units
from tinygn_dist.models.objective import Batch, Losses, add_reference, model_inputs


@pytest.mark.parametrize("dtype,exponents,factor", [(torch.float32, range(4, 13), 3), (torch.bfloat16, range(2, 8), 5)])
def test_measured_steps_are_nearly_as_good_as_the_best_one(backend, dtype, exponents, factor):
    """RMS error over heads against exact derivatives of the same weights in float32: at most 3 (bf16: 5) times that of
    the best of all powers of two, which nobody knows beforehand."""
    problem = tiny.problem("llama", backend, model=tiny.build("llama").to(dtype), count=1, size=4)
    groups = problem.anatomy.of_kind("heads")
    by_group, _, counts = gate_gradients(replace(problem, model=tiny.build("llama").to(dtype).float()), groups, [])
    exact, gates = torch.cat(by_group).sum(1), list(single_units(groups))

    def error(step: float | None) -> float:
        found = gate_derivatives(problem, gates, step=step)
        return float((found.slopes.sum(1) - exact).square().mean().sqrt())

    assert error(None) < factor * min(error(2.0**-k) for k in exponents)
    assert error(None) < 0.6 * float(exact.square().mean().sqrt())


def test_second_differences_are_the_second_derivative(backend):
    """Against double backpropagation through a gate on one layer's FFN output."""
    problem = tiny.problem("llama", backend, count=1)
    group = problem.anatomy.of_kind("channels")[2]
    found = gate_derivatives(problem, [Probe(2, group, tuple(range(48)))], step=2**-4)
    gate = torch.ones((), requires_grad=True)
    handle = problem.model.get_submodule(group.output).register_forward_pre_hook(lambda _, args: (args[0] * gate,))
    total = problem.objective(problem.model, problem.batches[0]).total.sum()
    (slope,) = torch.autograd.grad(total, gate, create_graph=True)
    (bend,) = torch.autograd.grad(slope, gate)
    handle.remove()
    assert float(found.slopes.sum()) == pytest.approx(slope.item(), rel=1e-2)
    assert float(found.bends.sum()) == pytest.approx(bend.item(), rel=3e-2, abs=3e-3)


def distance(power: int):
    """A loss whose gates all sit at its minimum: a kink for power 1, smooth for power 2."""

    def objective(model: nn.Module, batch: Batch) -> Losses:
        features = model(**model_inputs(batch)).last_hidden_state.double()
        away = (features - batch["reference"].double()).square().sum(-1) + 1e-18
        total = 1 + (away.sqrt() if power == 1 else away).sum(1)
        return Losses(total, torch.full((len(total),), away.shape[1]))

    return objective


@pytest.mark.parametrize("power,kinked", [(1, True), (2, False)])
def test_kinks_are_counted_and_smooth_minima_are_not(backend, power: int, kinked: bool):
    problem = tiny.problem("bert", backend, count=2)
    rows = add_reference(problem.model, problem.batches, problem.backend.device)
    problem = replace(problem, objective=distance(power), batches=rows)
    gates = list(single_units(problem.anatomy.of_kind("channels")[1:2]))[:6] + [Probe(0)]
    found = gate_derivatives(problem, gates, step=2**-7)
    assert found.kinked == (list(range(7)) if kinked else [])


def test_a_step_too_small_for_the_model_is_refused(backend):
    problem = tiny.problem("llama", backend, model=tiny.build("llama").bfloat16())
    with pytest.raises(UserError, match="bfloat16"):
        gate_derivatives(problem, [Probe(0)], step=1e-4)
