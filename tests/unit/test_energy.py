"""Gradient energy of layer outputs against plain autograd, and budgets in units of loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import tiny
from tinygn_dist.budget import blend
from tinygn_dist.config import PruneConfig
from tinygn_dist.estimate.activations import input_moments
from tinygn_dist.estimate.energy import loss_moments
from tinygn_dist.weights import sparsify


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert-classifier"])
def test_loss_moments_equal_plain_autograd(family: str) -> None:
    """sum_t (1 + s_t / 4 mean s) x x^T of every input, s_t over all that read it, and sum_t dy^2 |x|^2, over real tokens, from
    gradients that torch keeps for us."""
    setting = tiny.setting(family)
    everything = sum(len(batch["input_ids"]) for batch in setting.batches)
    found = loss_moments(setting, setting.anatomy.targets, everything)
    gram, rows = {}, {}
    for batch in setting.batches:
        for source, names, x, grads in _seen(setting, batch):
            energy = sum(dy.square().mean(1) for dy in grads)
            weighted = x * (1 + 0.25 * energy / energy.mean()).bfloat16()[:, None]
            gram[source] = gram.get(source, 0) + weighted.t() @ x
            for name, dy in zip(names, grads, strict=True):
                assert found.inputs.source_of[name] == source
                rows[name] = rows.get(name, 0) + dy.square().t() @ x.square().sum(1)
    assert len(rows) == len(setting.anatomy.targets)
    for source, expected in gram.items():
        close = dict(rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
        torch.testing.assert_close(found.inputs.moments.sum(source), expected, **close)
    for name, expected in rows.items():
        torch.testing.assert_close(found.rows.sum(name), expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


def _seen(setting, batch):
    """For each input of the batch: its first reader's name, all readers' names, the fp64 real rows and gradients."""
    by_input: dict[int, list] = {}

    def keep(name):
        def hook(module, inputs, output) -> None:
            output.retain_grad()
            by_input.setdefault(id(inputs[0]), []).append((name, inputs[0], output))

        return hook

    handles = [
        setting.bare.get_submodule(target.module).register_forward_hook(keep(target.name))
        for target in setting.anatomy.targets
    ]
    setting.objective(setting.model, batch).total.sum().backward()
    for handle in handles:
        handle.remove()
    setting.bare.zero_grad()
    real = batch["attention_mask"].bool()
    for readers in by_input.values():
        names = [name for name, _, _ in readers]
        grads = [output.grad[real].double() for _, _, output in readers]
        yield names[0], names, readers[0][1].detach()[real].double(), grads


def test_sequences_without_backward_weigh_their_tokens_alike() -> None:
    """Gradient energy of the first micro-batch only: the sums are its own plus the plain ones of the others."""
    setting = tiny.setting("llama")
    targets = setting.anatomy.targets
    found = loss_moments(setting, targets, 1)
    alone = loss_moments(replace(setting, batches=setting.batches[:1]), targets, 1)
    plain = input_moments(replace(setting, batches=setting.batches[1:]), targets, full=True)
    for name in found.inputs.moments.names():
        expected = alone.inputs.moments.sum(name) + plain.moments.sum(name)
        torch.testing.assert_close(found.inputs.moments.sum(name), expected)
    for target in targets:
        assert torch.equal(found.rows.sum(target.name), alone.rows.sum(target.name))


def test_loss_moments_leave_no_trace() -> None:
    setting = tiny.setting("llama")
    before = tiny.state_bytes(setting.bare)
    flags = [p.requires_grad for p in setting.bare.parameters()]
    loss_moments(setting, setting.anatomy.targets, 2)
    assert tiny.same_bits(before, tiny.state_bytes(setting.bare))
    assert flags == [p.requires_grad for p in setting.bare.parameters()]
    assert all(p.grad is None for p in setting.bare.parameters())
    assert not any("_hf_hook" in module.__dict__ for module in setting.bare.modules())


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
    setting = tiny.setting("llama")
    quiet = setting.bare.get_submodule("model.layers.1.mlp.down_proj")
    with torch.no_grad():
        quiet.weight.mul_(1e-3)
    options = PruneConfig(pattern="unstructured", sparsity=0.5, allocation=allocation)
    masks = sparsify(setting, setting.anatomy.targets, options)
    kept = masks.kept(setting.backend)
    total = sum(target.numel for target in setting.anatomy.targets)
    assert sum(kept.values()) == total - round(0.5 * total)
    share = kept["model.layers.1.mlp.down_proj.weight"] / quiet.weight.numel()
    assert share == pytest.approx(0.5, abs=1e-3) if allocation == 0 else share < 0.5
