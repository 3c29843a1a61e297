"""ADMM on one layer: exact counts, better masks than the sweep, and least squares on the mask it ends with."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests import tiny
from tests.maths.solve.test_obs import best_fit_error, layer, output_error
from tests.options import pruning
from tinygn_dist.experiments import alps
from tinygn_dist.maths.solve import layer as one_layer
from tinygn_dist.maths.solve.layer import error
from tinygn_dist.maths.solve.obs import LayerGoal
from tinygn_dist.prune.sparsity.sparsify import sparsify

SOLVE = {"obs": one_layer.solve, "admm": alps.SweepOrAdmm().solve}
PATTERNS = {"unstructured": {}, "per row": {"per_row": True}, "2:4": {"nm": (2, 4)}, "4:8": {"nm": (4, 8)}}


@pytest.mark.parametrize("how", PATTERNS)
def test_equals_least_squares_on_its_mask(how: str) -> None:
    """Brute force in float64: every row's output fitted on its kept inputs alone. Little damping, and conjugate
    gradients to the end."""
    weight, inputs = layer(out=8, num_inputs=16)
    goal = LayerGoal(64, damping=1e-7, **PATTERNS[how])
    found = SOLVE["admm"](weight, inputs.t() @ inputs, goal, 60)
    best = sum(best_fit_error(weight[r], found.keep[r].nonzero()[:, 0].tolist(), inputs) for r in range(8))
    assert output_error(weight, found.weight, inputs) == pytest.approx(best, rel=1e-5)
    assert not found.weight[~found.keep].any()


@pytest.mark.parametrize("how", PATTERNS)
@pytest.mark.parametrize("num_pruned", [0, 100, 256, 512])
def test_exact_counts(how: str, num_pruned: int) -> None:
    weight, inputs = layer(out=16, num_inputs=32)
    keep = alps.prune(weight, inputs.t() @ inputs, LayerGoal(num_pruned, **PATTERNS[how])).keep
    if how in ("2:4", "4:8"):
        n, m = PATTERNS[how]["nm"]
        assert (keep.view(16, -1, m).sum(2) == n).all()
    else:
        assert int((~keep).sum()) == num_pruned
    if how == "per row":
        assert int(keep.sum(1).max() - keep.sum(1).min()) <= 1


@pytest.mark.parametrize("how", PATTERNS)
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_never_worse_than_the_sweep_and_mostly_better(how: str, sparsity: float) -> None:
    """`solve` falls back; on its own ADMM has the smaller error on most layers, and clearly in the mean."""
    alone, ratios = [], []
    for seed in range(8):
        weight, inputs = layer(out=16, num_inputs=32, seed=seed)
        hessian, going = inputs.t() @ inputs, round(sparsity * 512)
        found = {name: solve(weight, hessian, LayerGoal(going, **PATTERNS[how]), 20) for name, solve in SOLVE.items()}
        errors = {solver: output_error(weight, each.weight, inputs) for solver, each in found.items()}
        ratios.append(errors["admm"] / errors["obs"])
        alone.append(bool(found["admm"].extras["by_admm"]))
    assert max(ratios) <= 1 + 1e-5 and sum(alone) >= 6
    assert torch.tensor(ratios).log().mean() < -0.03, ratios


def test_falls_back_to_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = layer(out=16, num_inputs=32)
    hessian = inputs.t() @ inputs
    plain = alps.prune
    monkeypatch.setattr(alps, "prune", lambda weight, *rest, **more: plain(weight.flip(1), *rest, **more))
    found, swept = (SOLVE[name](weight, hessian, LayerGoal(256), 8) for name in ("admm", "obs"))
    assert not found.extras["by_admm"] and torch.equal(found.weight, swept.weight)


def test_comes_closer_to_the_best_mask_of_a_small_row() -> None:
    """All 70 masks of 4 out of 8 are tried by hand. What both leave over the least error is at most half for ADMM."""
    over = {"obs": [], "admm": []}
    for seed in range(12):
        weight, inputs = layer(out=1, num_inputs=8, seed=seed)
        best = min(best_fit_error(weight[0], list(kept), inputs) for kept in itertools.combinations(range(8), 4))
        for solver, ratios in over.items():
            found = SOLVE[solver](weight, inputs.t() @ inputs, LayerGoal(4, damping=1e-6), 20)
            ratios.append(output_error(weight, found.weight, inputs) / best)
    assert all(ratio >= 1 - 1e-4 for ratios in over.values() for ratio in ratios)
    assert sum(over["admm"]) - 12 < 0.5 * (sum(over["obs"]) - 12)


def test_more_iterations_bring_the_sparse_weights_to_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The penalty grows until both halves of the split agree and the mask stands still: it stops long before the
    most."""
    weight, inputs = layer(out=16, num_inputs=32)
    hessian, projections = inputs.t() @ inputs, []
    plain = alps._largest
    monkeypatch.setattr(alps, "_largest", lambda size, *rest: projections.append(size) or plain(size, *rest))
    errors = []
    for iterations in (3, 12, 48, 300):
        projections.clear()
        found = alps.prune(weight, hessian, LayerGoal(256), iterations=iterations)
        errors.append(output_error(weight, found.weight, inputs))
    assert len(projections) < 150
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]


def test_rows_that_the_loss_does_not_hear_lose_more() -> None:
    weight, inputs = layer(out=4, num_inputs=16)
    energy = torch.tensor([1e-6, 1.0, 1.0, 1.0])
    hessian = inputs.t() @ inputs
    assert alps.prune(weight.sign(), hessian, LayerGoal(16, row_energy=energy)).keep.sum(1).tolist() == [0, 16, 16, 16]
    doubled = error(weight, 0 * weight, hessian, torch.full((4,), 2.0))
    assert doubled == pytest.approx(2 * output_error(weight, 0 * weight, inputs), rel=1e-5)


def test_dead_inputs_go_first() -> None:
    weight, inputs = layer(out=8, num_inputs=16)
    inputs[:, [3, 9]] = 0
    found = alps.prune(weight, inputs.t() @ inputs, LayerGoal(16))
    assert not found.keep[:, [3, 9]].any() and found.weight.isfinite().all()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_whole_model(pattern: str) -> None:
    """Counts, zeros and the note that says whose masks were taken."""
    problem = tiny.problem("llama")
    matrices = problem.anatomy.matrices
    masks = sparsify(problem, matrices, pruning(pattern=pattern, sparsity=0.5, method="admm"))
    total = sum(matrix.numel for matrix in matrices)
    assert sum(masks.kept(problem.backend).values()) == total // 2
    assert masks.violations(problem.model, problem.backend) == 0
    assert f"of {len(matrices)} weights" in masks.notes[-1] and masks.notes[-1].startswith("ADMM")
