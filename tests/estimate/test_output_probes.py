"""Energies of layers by forward passes alone, against Jacobians that autograd gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import tiny
from tests.options import pruning
from tinygn_dist.estimate.output_probes import output_energies
from tinygn_dist.maths.counter_rng import key_of, signs
from tinygn_dist.models.objective import IGNORED
from tinygn_dist.prune.sparsity.sparsify import sparsify

FAMILIES = ["llama", "gpt2", "bert-classifier"]


def jacobian(problem, batch, matrix):
    """(losses, tokens, out) fp32 derivative of each token's loss by the matrix's output, and (tokens,) norms of what it
    read; one backward pass per token's loss."""
    kept = []

    def keep(module, inputs, output):
        kept[:] = inputs[0].detach(), output.detach().requires_grad_()
        return kept[1]

    handle = problem.bare.get_submodule(matrix.module).register_forward_hook(keep)
    each = problem.objective(problem.model, batch).each.flatten()
    handle.remove()
    x, y = kept
    rows = [torch.autograd.grad(loss, y, retain_graph=True)[0].flatten(0, -2) for loss in each if loss != 0]
    return torch.stack(rows), x.flatten(0, -2).norm(dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_probe_is_the_derivative_along_its_direction(family: str) -> None:
    problem = tiny.problem(family)
    matrices = problem.anatomy.matrices[:3] + problem.anatomy.matrices[-1:]
    found = output_energies(problem, matrices, seed=5)
    for matrix, energy in zip(matrices, found.tolist(), strict=True):
        expected = 0.0
        for number, batch in enumerate(problem.batches):
            slopes, length = jacobian(problem, batch, matrix)
            key = key_of(5, f"{matrix.name}/{number}")
            direction = length[:, None] * signs(0, slopes[0].numel(), key).view(slopes[0].shape)
            expected += float((slopes * direction).sum((1, 2)).square().sum())
        assert energy == pytest.approx(expected, rel=0.05), matrix.name


def test_the_mean_over_directions_is_the_energy() -> None:
    """60 directions, standard error from their own spread; sum_u sum_to (dl_u / dy_to)^2 |x_t|^2 from Jacobians."""
    problem = tiny.problem("llama")
    matrix = problem.anatomy.matrices[0]
    seen = torch.stack([output_energies(problem, [matrix], seed=seed)[0] for seed in range(60)])
    exact = 0.0
    for batch in problem.batches:
        slopes, length = jacobian(problem, batch, matrix)
        exact += float((slopes.square().sum((0, 2)) * length.square()).sum())
    assert abs(float(seen.mean()) - exact) < 4 * float(seen.std()) / 60**0.5
    assert float(seen.std()) / 60**0.5 < 0.1 * exact  # the test can fail


def test_probes_leave_no_trace_and_never_go_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = tiny.problem("llama")
    before = tiny.state_bytes(problem.bare)
    monkeypatch.setattr(torch.Tensor, "backward", None)
    output_energies(problem, problem.anatomy.matrices)
    assert tiny.same_bits(before, tiny.state_bytes(problem.bare))
    assert not any("_hf_hook" in module.__dict__ for module in problem.bare.modules())


def test_a_layer_the_loss_does_not_hear_loses_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an MLP writes is made small, so what its other weights do matters little, though they are as large as any.
    The global cut takes them all, a budget of three quarters of the way leaves a quarter of their equal share: 0.5 /
    4."""
    problem = tiny.problem("llama")
    monkeypatch.setattr(torch.Tensor, "backward", None)
    with torch.no_grad():
        problem.bare.get_submodule("model.layers.1.mlp.down_proj").weight.mul_(1e-3)
    options = pruning(pattern="unstructured", sparsity=0.5, estimator="finite-difference", allocation=0.75)
    kept = sparsify(problem, problem.anatomy.matrices, options).kept(problem.backend)
    sizes = {matrix.name: matrix.numel for matrix in problem.anatomy.matrices}
    assert sum(kept.values()) == sum(sizes.values()) - round(0.5 * sum(sizes.values()))
    for name in ("down_proj", "gate_proj", "up_proj"):
        quiet, other = (f"model.layers.{layer}.mlp.{name}.weight" for layer in (1, 0))
        assert kept[quiet] / sizes[quiet] == pytest.approx(0.125, abs=1e-3)
        assert kept[other] / sizes[other] > 0.5


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-classifier"])
def test_energies_do_not_depend_on_how_much_padding_there_is(family: str) -> None:
    """The same three sequences of a batch, padded further; directions are drawn by token."""
    problem = tiny.problem(family, count=2, size=3)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}

    def longer(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: torch.nn.functional.pad(value, (0, 6), value=fill[name]) if value.dim() == 2 else value
            for name, value in batch.items()
        }

    matrices = problem.anatomy.matrices
    wanted = output_energies(problem, matrices)
    found = output_energies(replace(problem, batches=[longer(batch) for batch in problem.batches]), matrices)
    torch.testing.assert_close(found, wanted, rtol=6e-2, atol=0)
