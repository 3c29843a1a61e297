"""Masked low-rank updates: what is merged computes what was trained, zeros stay, and ranks agree."""

from __future__ import annotations

import sys
from unittest import mock

import pytest
import torch

from tests import tiny
from tinygn_dist.backends.base import Backend
from tinygn_dist.config import Config, PruneConfig, RecoverConfig
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths.schedules import Plan
from tinygn_dist.prune.sparsity.gradual_masks import GradualMasks
from tinygn_dist.runtime.progress import Progress
from tinygn_dist.train.loop import Course, Recovery, check_training
from tinygn_dist.train.masked_lora import LowRankUpdates

LORA = RecoverConfig(steps=6, learning_rate=1e-2, batch_size=2, train="lora", lora_rank=3, distill=0)


def masks_of(problem: Problem) -> GradualMasks:
    prune = PruneConfig(pattern="unstructured", criterion="magnitude", sparsity=0.5)
    config = Config(model={"name": "m"}, prune=prune)
    return GradualMasks(problem, problem.anatomy.matrices, prune, config.schedule, Plan(6, (), (0.5,)))


def train(backend: Backend, family: str = "llama", sparse: bool = True, options: RecoverConfig = LORA):
    """(weights before, weights after, masks or None, losses)"""
    problem = tiny.problem(family, backend)
    masks = masks_of(problem) if sparse else None
    before = tiny.state_bytes(problem.bare)
    rows = [{k: v[i : i + 1] for k, v in b.items()} for b in tiny.batches(family, padded=False) for i in range(2)]
    course = Course()
    recovery = Recovery(
        None, "causal-lm", rows, options, Plan(6, (), (0.5,)), backend, Progress(),
        matrices=lambda: problem.anatomy.matrices,
    )  # fmt: skip
    recovery.run(problem.model, [masks] if masks else [], course)
    return before, tiny.state_bytes(problem.bare), masks, course.losses


def updated(
    problem: Problem, backend: Backend, keep: dict[str, torch.Tensor]
) -> tuple[LowRankUpdates, torch.optim.SGD]:
    """A model whose matrices have updates of rank 2, in an optimizer's hands."""
    updates = LowRankUpdates(problem.model, problem.anatomy.matrices, keep, 2, 0, backend)
    return updates, torch.optim.SGD([p for n, p in problem.bare.named_parameters() if ".low_rank." in n], lr=0.1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_merged_weights_compute_what_the_updates_computed(family: str, backend: Backend):
    problem = tiny.problem(family, backend)
    keep, matrices, model = masks_of(problem).masks.by_name, problem.anatomy.matrices, problem.bare
    dense, batch = tiny.state_bytes(model), tiny.batches(family, 1, padded=False)[0]
    with torch.no_grad():
        before = model(batch["input_ids"]).logits
        updates, optimizer = updated(problem, backend, keep)
        assert torch.equal(model(batch["input_ids"]).logits, before), "it starts from nothing"
        for matrix in matrices:
            model.get_submodule(matrix.module).low_rank.up.normal_(generator=torch.Generator().manual_seed(1))
        moved = model(batch["input_ids"]).logits
        updates.take(model, optimizer)
        assert torch.equal(model(batch["input_ids"]).logits, before), "the modules are as before"
        updates.merge(model)
        torch.testing.assert_close(model(batch["input_ids"]).logits, moved, rtol=1e-4, atol=1e-4)
    assert (moved - before).abs().max() > 0.1
    after = tiny.state_bytes(model)
    assert after.keys() == dense.keys()
    for matrix in matrices:
        gone = ~keep[matrix.name]
        assert not after[matrix.parameter][gone].any() and (after[matrix.parameter] != dense[matrix.parameter]).any()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_gradients_are_those_of_the_masked_sum(family: str, backend: Backend):
    """Against autograd through W + M * (2 U D) written out, of every update, input and bias."""
    problem = tiny.problem(family, backend)
    keep, batch = masks_of(problem).masks.by_name, tiny.batches(family, 1, padded=False)[0]
    updates, _ = updated(problem, backend, keep)
    model, parts = problem.bare, {}
    for matrix in problem.anatomy.matrices:
        module = model.get_submodule(matrix.module)
        module.weight.requires_grad_(False)
        with torch.no_grad():
            module.low_rank.up.normal_(generator=torch.Generator().manual_seed(1))

        def plainly(hidden: torch.Tensor, module=module, matrix=matrix) -> torch.Tensor:
            change = 2 * (module.low_rank.up @ module.low_rank.down) * matrix.oriented(keep[matrix.name])
            return torch.nn.functional.linear(hidden, matrix.oriented(module.weight) + change, module.bias)

        parts[module] = plainly

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(batch["input_ids"], labels=batch["input_ids"]).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    found = gradients()
    for module, plainly in parts.items():
        module.forward = plainly
    wanted = gradients()
    assert found.keys() == wanted.keys() and sum(".low_rank." in name for name in found) == 2 * len(parts)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 + 1e-5 * float(gradient.abs().max()))


def test_no_layer_keeps_its_updated_matrix(backend: Backend):
    """What autograd keeps of a matrix's size is the matrix itself, which is there anyway."""
    problem = tiny.problem("llama", backend)
    updates, _ = updated(problem, backend, masks_of(problem).masks.by_name)
    shapes = {matrix.shape for matrix in problem.anatomy.matrices}
    held = {p.untyped_storage().data_ptr() for p in problem.bare.parameters()}
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        problem.bare(tiny.batches("llama", 1, padded=False)[0]["input_ids"])
    of_weights = [t for t in kept if tuple(t.shape) in shapes or tuple(t.t().shape if t.dim() == 2 else ()) in shapes]
    assert of_weights and all(t.untyped_storage().data_ptr() in held for t in of_weights)


def test_an_untrained_update_changes_nothing(backend: Backend):
    problem = tiny.problem("llama", backend)
    before = tiny.state_bytes(problem.bare)
    updates, optimizer = updated(problem, backend, {})
    updates.take(problem.model, optimizer)
    updates.merge(problem.model)
    assert tiny.same_bits(before, tiny.state_bytes(problem.bare))


def test_training_learns_keeps_zeros_and_moves_matrices_by_a_low_rank(backend: Backend):
    before, after, masks, losses = train(backend)
    assert losses[-1] < losses[0] - 0.1
    for name, keep in masks.masks.by_name.items():
        assert not after[name][~keep].any() and (after[name][keep] != before[name][keep]).all()
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    before, after, _, _ = train(backend, sparse=False)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight"):
        sizes = torch.linalg.svdvals((after[name] - before[name]).double())
        assert sizes[2] > 1e-3 and sizes[3] < 1e-6, "the update has another rank than 3"


def trained_on(backend: Backend) -> tuple[list[float], dict[str, torch.Tensor], int]:
    _, after, masks, losses = train(backend)
    zeros = sum(int((after[name][~keep] != 0).sum()) for name, keep in masks.masks.by_name.items())
    return losses, after, zeros


def test_two_ranks_train_as_one(backend: Backend, process_groups):
    losses, after, _ = trained_on(backend)
    for other_losses, other_after, wrong in process_groups(2).call(trained_on):
        assert other_losses == pytest.approx(losses, rel=1e-5) and wrong == 0
        for name, weight in after.items():
            torch.testing.assert_close(other_after[name], weight, rtol=1e-3, atol=1e-5)


def test_what_cannot_be_done_is_refused_before_work(backend: Backend):
    matrices = tiny.problem("llama", backend).anatomy.matrices
    with pytest.raises(UserError, match="without linear layers"):
        check_training(LORA, (), backend)
    with pytest.raises(ValueError, match="lora keeps its masks"):
        Config(model={"name": "m"}, prune={"pattern": "2:4"}, recover={"train": "lora"}, schedule={"kind": "cubic"})
    with mock.patch.dict(sys.modules, {"bitsandbytes.optim": None}), pytest.raises(UserError, match="pip install bits"):
        check_training(RecoverConfig(steps=1, optimizer="adamw-8bit"), matrices, backend)
    with (
        mock.patch.dict(sys.modules, {"bitsandbytes": mock.Mock(), "bitsandbytes.optim": mock.Mock()}),
        mock.patch.object(backend, "steps_plain_tensors", False),
        pytest.raises(UserError, match="adamw-8bit under FSDP2.*accepted: DDP or ZeRO"),
    ):
        check_training(RecoverConfig(steps=1, optimizer="adamw-8bit"), matrices, backend)
    with pytest.raises(ValueError, match="not saved on the way"):
        Config(model={"name": "m"}, recover={"optimizer": "adamw-8bit", "steps": 1}, checkpoint={"every": 1})


def test_8_bit_adam_trains_and_keeps_zeros(backend: Backend):
    pytest.importorskip("bitsandbytes")
    options = LORA.model_copy(update={"train": "all", "optimizer": "adamw-8bit", "learning_rate": 3e-3})
    before, after, masks, losses = train(backend, options=options)
    assert losses[-1] < losses[0] - 0.1
    for name, keep in masks.masks.by_name.items():
        assert not after[name][~keep].any() and (after[name] != before[name]).any()
