"""Gradient energy of layer outputs against plain autograd, and budgets in units of loss."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tests import plain, tiny
from tests.options import changed, pruning
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.backprop import recomputed
from tinygn_dist.estimate.gradient_energy import loss_moments
from tinygn_dist.maths.counts import blend
from tinygn_dist.maths.sums import fill_below
from tinygn_dist.prune.sparsity.allocations import CANDIDATES
from tinygn_dist.prune.sparsity.levels import final_level, levels_of_passes
from tinygn_dist.prune.sparsity.sparsify import sparsify


@pytest.mark.parametrize("weight", [0.0, 4.0])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert-classifier"])
def test_loss_moments_equal_plain_autograd(family: str, weight: float) -> None:
    """sum_t (weight + s_t / mean s) x x^T and sum_t dy^2 |x|^2 of every weight, over real tokens, from gradients that
    torch keeps for us."""
    problem = tiny.problem(family)
    found = loss_moments(problem, problem.anatomy.matrices, weight)
    gram, rows = {}, {}
    for batch in problem.batches:
        for name, x, dy in _seen(problem, batch):
            energy = dy.square().mean(1)
            weighted = x * (weight + energy / energy.mean()).bfloat16()[:, None]
            gram[name] = gram.get(name, 0) + weighted.t() @ x
            rows[name] = rows.get(name, 0) + dy.square().t() @ x.square().sum(1)
    assert set(rows) == {matrix.name for matrix in problem.anatomy.matrices}
    for name in rows:
        close = dict(rtol=1e-4, atol=1e-6 * float(gram[name].abs().max()))
        torch.testing.assert_close(fill_below(found.grams.sum(name)), gram[name], **close)
        torch.testing.assert_close(found.rows.sum(name), rows[name], rtol=1e-4, atol=1e-6 * float(rows[name].max()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-classifier"])
def test_recomputed_layers_give_the_same_gradients_and_keep_nothing_in_between(family: str) -> None:
    """Between forward and backward none of the memory is held that matrices inside of layers wrote; plain autograd
    holds some. The layers' forwards are as they were afterwards."""
    problem = tiny.problem(family)
    bare, batch = problem.bare, problem.batches[0]
    layers = [bare.get_submodule(problem.anatomy.path_of(layer)) for layer in range(problem.anatomy.num_layers)]
    inside = [bare.get_submodule(matrix.module) for matrix in problem.anatomy.matrices]
    before = [set(layer.__dict__) for layer in layers]

    def gradients() -> tuple[int, list[torch.Tensor]]:
        written: list[StorageWeakRef] = []
        note = lambda _, __, out: written.append(StorageWeakRef(out.untyped_storage()))  # noqa: E731
        handles = [module.register_forward_hook(note) for module in inside]
        loss = problem.objective(bare, batch).total.sum()
        held = sum(not storage.expired() for storage in written)
        for handle in handles:
            handle.remove()
        return held, list(torch.autograd.grad(loss, [module.weight for module in inside]))

    held, wanted = gradients()
    with recomputed(layers):
        held_then, found = gradients()
    assert held > held_then == 0
    assert [set(layer.__dict__) for layer in layers] == before
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def _seen(problem, batch):
    """Of each matrix in the batch: its name, the fp64 real rows it read and the gradients at its output."""
    kept = []

    def keep(name):
        def hook(module, inputs, output) -> None:
            output.retain_grad()
            kept.append((name, inputs[0], output))

        return hook

    handles = [
        problem.bare.get_submodule(matrix.module).register_forward_hook(keep(matrix.name))
        for matrix in problem.anatomy.matrices
    ]
    problem.objective(problem.model, batch).total.sum().backward()
    for handle in handles:
        handle.remove()
    problem.bare.zero_grad()
    real = batch["attention_mask"].bool()
    for name, x, output in kept:
        yield name, x.detach()[real].double(), output.grad[real].double()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(pattern="unstructured", sparsity=0.5), ["0.5"]),
        (dict(pattern="unstructured", sparsity=0.75), ["0.5", "0.75"]),
        (dict(pattern="unstructured", sparsity=0.51, passes=1), ["0.51"]),
        (dict(pattern="unstructured", sparsity=0.784, passes=3), ["0.4", "0.64", "0.784"]),
        (dict(pattern="unstructured", sparsity=0.0), ["0"]),
        (dict(pattern="2:4"), ["2:4"]),
        (dict(pattern="2:8"), ["4:8", "2:8"]),
        (dict(pattern="2:4", passes=2), ["3:4", "2:4"]),
        (dict(pattern="3:4", passes=9), ["3:4"]),
    ],
)
def test_every_pass_takes_the_same_share_of_what_is_left(options: dict, expected: list[str]) -> None:
    """0.784 is 1 - 0.6^3; N:M has no more passes than whole steps."""
    options = pruning(**options)
    asked = levels_of_passes(final_level(options), options.solver.passes)
    assert [str(step) if step.nm else f"{step.sparsity:.4g}" for step in asked] == expected


def test_two_passes_measure_the_model_that_the_first_one_left() -> None:
    """The same as asking twice."""
    once, twice = tiny.problem("llama"), tiny.problem("llama")
    options = pruning(pattern="unstructured", sparsity=0.75)
    sparsify(once, once.anatomy.matrices, options)
    sparsify(twice, twice.anatomy.matrices, changed(options, **{"sparsity": 0.5}))
    sparsify(twice, twice.anatomy.matrices, changed(options, **{"passes": 1}))
    assert tiny.same_bits(tiny.state_bytes(once.bare), tiny.state_bytes(twice.bare))
    zeros = sum(int((p == 0).sum()) for n, p in once.bare.named_parameters() if n.endswith("proj.weight"))
    assert zeros == round(0.75 * sum(matrix.numel for matrix in once.anatomy.matrices))


def test_loss_moments_leave_no_trace() -> None:
    problem = tiny.problem("llama")
    before = tiny.state_bytes(problem.bare)
    flags = [p.requires_grad for p in problem.bare.parameters()]
    loss_moments(problem, problem.anatomy.matrices, 0.0)
    assert tiny.same_bits(before, tiny.state_bytes(problem.bare))
    assert flags == [p.requires_grad for p in problem.bare.parameters()]
    assert all(p.grad is None for p in problem.bare.parameters())
    assert not any("_hf_hook" in module.__dict__ for module in problem.bare.modules())


def test_blend_adds_up_and_reaches_both_ends() -> None:
    sizes, wanted = [100, 300, 50], [90, 100, 35]
    assert blend(225, sizes, wanted, 1.0) == wanted
    assert blend(225, sizes, wanted, 0.0) == [50, 150, 25]
    assert blend(225, sizes, wanted, 0.5) == [70, 125, 30]
    assert sum(blend(224, sizes, [90, 99, 35], 0.3)) == 224
    assert blend(7, [3, 3, 3], [3, 3, 1], 1.0) == [3, 3, 1]


@pytest.mark.parametrize("allocation", [0.0, 0.5, 1.0])
def test_exact_count_whatever_the_allocation(allocation: float) -> None:
    """A global budget moves zeros between layers and never changes their number; a quiet layer loses more."""
    problem = tiny.problem("llama")
    quiet = problem.bare.get_submodule("model.layers.1.mlp.down_proj")
    with torch.no_grad():
        quiet.weight.mul_(1e-3)
    options = pruning(pattern="unstructured", sparsity=0.5, allocation=allocation)
    masks = sparsify(problem, problem.anatomy.matrices, options)
    kept = masks.kept(problem.backend)
    total = sum(matrix.numel for matrix in problem.anatomy.matrices)
    assert sum(kept.values()) == total - round(0.5 * total)
    share = kept["model.layers.1.mlp.down_proj.weight"] / quiet.weight.numel()
    assert share == pytest.approx(0.5, abs=1e-3) if allocation == 0 else share < 0.5


def test_auto_allocation_is_the_best_on_held_out_loss() -> None:
    """Every share is solved on its own here, on a fresh model, and measured by the plain loss."""
    options = pruning(pattern="unstructured", sparsity=0.5, probes={"samples": 2})
    losses, states = {}, {}
    for share in CANDIDATES:
        problem = tiny.problem("llama")
        kept, held_out = problem.split(2)
        sparsify(kept, problem.anatomy.matrices, changed(options, **{"allocation": share}))
        with torch.no_grad():
            found = [plain.loss(problem.bare, batch, "llama") for batch in held_out.batches]
        losses[share] = float(sum(one.total.sum() for one in found)) / int(sum(one.count.sum() for one in found))
        states[share] = tiny.state_bytes(problem.bare)
    problem = tiny.problem("llama")
    masks = sparsify(problem, problem.anatomy.matrices, changed(options, **{"allocation": "auto"}))
    best = min(losses, key=losses.__getitem__)
    assert len(set(losses.values())) == len(CANDIDATES)
    assert tiny.same_bits(tiny.state_bytes(problem.bare), states[best])
    assert masks.notes[-1].startswith(f"allocation {best:g} chosen") and f"{losses[best]:.4f}" in masks.notes[-1]
    for matrix in problem.anatomy.matrices:
        weight = problem.bare.get_parameter(matrix.parameter)
        assert not weight[~masks.by_name[matrix.name]].any()


def test_split_holds_out_the_last_sequences() -> None:
    problem = tiny.problem("llama")
    kept, held_out = problem.split(1)
    assert [*kept.batches, *held_out.batches] == list(problem.batches) and len(held_out.batches) == 1
    everything = problem.split(10**6)
    assert len(everything[1].batches) == len(problem.batches) // 2
    with pytest.raises(UserError, match="data.num_samples"):
        kept.first(1).split(1)


class _NoSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden):
        return hidden.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("nan")


def test_gradients_without_a_value_are_named_in_one_line() -> None:
    problem = tiny.problem("llama")
    handle = problem.bare.model.layers[1].register_forward_hook(lambda module, args, out: _NoSlope.apply(out))
    options = pruning(pattern="unstructured", sparsity=0.5, passes=1, estimator="backprop")
    with pytest.raises(
        UserError, match="layers.[01].* hold NaN or inf, though no loss does; use --estimator finite-diff"
    ):
        sparsify(problem, problem.anatomy.matrices, options)
    masks = sparsify(problem, problem.anatomy.matrices, changed(options, **{"estimator": "finite-difference"}))
    handle.remove()
    assert sum(masks.kept(problem.backend).values()) > 0
