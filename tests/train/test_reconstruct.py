"""Block reconstruction against closed forms and hidden states of plain forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests import plain, tiny
from tests.plain import LAYERS
from tests.ranks import Ranks
from tinygn_dist.backends.base import Backend
from tinygn_dist.config import PruneConfig, ReconstructConfig
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.models.anatomy import Matrix, read_anatomy
from tinygn_dist.models.objective import Batch
from tinygn_dist.prune.sparsity.sparsify import sparsify
from tinygn_dist.train.reconstruct import Block, Movable, blocks_of, check, reconstruct

HALF = PruneConfig(pattern="unstructured", sparsity=0.5, criterion="magnitude")
TUNED = ReconstructConfig(epochs=3, rate=0.02)
TOO_FAST = ReconstructConfig(epochs=3, rate=100.0)


def halved(
    family: str, backend: Backend | None = None, **data: Any
) -> tuple[Problem, Problem, dict[str, torch.Tensor]]:
    """A model without the smaller half of its weights, the dense one, and the masks."""
    dense, sparse = (tiny.problem(family, backend, **data) for _ in range(2))
    return sparse, dense, sparsify(sparse, sparse.anatomy.matrices, HALF).by_name


def run(
    sparse: Problem, dense: Problem, keep: dict, options: ReconstructConfig, matrices: Sequence[Matrix] | None = None
):
    layers = range(dense.anatomy.num_layers)
    blocks = blocks_of(layers, len(layers))
    movable = Movable(sparse.anatomy.matrices if matrices is None else matrices, keep)
    return reconstruct(sparse, dense, blocks, movable, options)


def hidden_states(model: nn.Module, family: str, batch: Batch) -> list[torch.Tensor]:
    """What every layer gives at real tokens, in fp64."""
    seen: list[torch.Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).double())

    handles = [layer.register_forward_hook(keep) for layer in model.get_submodule(LAYERS[family][0])]
    with torch.no_grad():
        plain.forward(model, batch)
    for handle in handles:
        handle.remove()
    real = batch["attention_mask"].bool() if "attention_mask" in batch else ...
    return [hidden[real].flatten(0, -2) for hidden in seen]


def relative_error(own: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((own - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())


# -- what is compared --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bert", "vit"])
def test_errors_are_those_of_whole_forwards(family: str):
    """Held out is the last of three micro-batches; padding counts for nothing."""
    sparse, dense, keep = halved(family)
    wanted = [
        relative_error(own, other)
        for own, other in zip(
            hidden_states(sparse.bare, family, sparse.batches[-1]),
            hidden_states(dense.bare, family, sparse.batches[-1]),
            strict=True,
        )
    ]
    told = run(sparse, dense, keep, TOO_FAST)
    assert [layer["before"] for layer in told["layers"]] == pytest.approx(wanted, rel=1e-5)
    assert (told["fitted_sequences"], told["held_out_sequences"]) == (4, 2)


def test_a_layer_does_the_work_of_removed_ones_after_it():
    assert blocks_of((0, 1, 2), 3) == [Block(layer, range(layer, layer + 1)) for layer in range(3)]
    assert blocks_of((1, 3), 6) == [Block(0, range(0, 3)), Block(1, range(3, 6))]

    dense = tiny.problem("llama")
    short = plain.without_layers(dense.bare, "llama", [1])
    student = replace(dense, model=short, anatomy=read_anatomy(short, needs_units=True))
    own, other = (hidden_states(s.bare, "llama", dense.batches[-1]) for s in (student, dense))
    wanted = [relative_error(own[0], other[1]), relative_error(own[1], other[2])]
    blocks, movable = blocks_of((0, 2), 3), Movable(student.anatomy.matrices)
    told = reconstruct(student, dense, blocks, movable, TOO_FAST)
    assert [layer["before"] for layer in told["layers"]] == pytest.approx(wanted, rel=1e-5)

    told = reconstruct(student, dense, blocks, movable, TUNED)
    own = hidden_states(student.bare, "llama", dense.batches[-1])
    assert told["layers"][1]["after"] == pytest.approx(relative_error(own[1], other[2]), rel=1e-5)
    assert told["layers"][1]["after"] < 0.9 * wanted[1]


# -- what it reaches ---------------------------------------------------------------------------------------------------
def test_a_linear_layer_reaches_the_least_squares_optimum():
    """Of down_proj alone a layer's output is a linear function: the best kept weights of each row are known. Fitted and
    held out are the same tokens."""
    sparse, dense, keep = halved("llama", count=1, size=8, length=20)
    sparse, dense = (replace(problem, batches=[*problem.batches, *problem.batches]) for problem in (sparse, dense))
    (matrix,) = (t for t in sparse.anatomy.matrices if t.layer == 0 and "down_proj" in t.name)
    optimum = best_rows(sparse, dense, matrix, keep[matrix.name])
    options = ReconstructConfig(epochs=400, rate=0.05)
    told = run(sparse, dense, keep, options, [matrix])["layers"][0]
    assert optimum < 0.9 * told["before"]
    assert told["after"] == pytest.approx(optimum, rel=2e-3) and told["after"] > optimum * (1 - 1e-5)


def best_rows(sparse: Problem, dense: Problem, matrix: Matrix, keep: torch.Tensor) -> float:
    """The least mean relative error of the first layer, by normal equations in fp64 over the kept entries of each
    row."""
    batch, read = sparse.batches[0], []
    module = sparse.bare.get_submodule(matrix.module)
    handle = module.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].double()))
    own = hidden_states(sparse.bare, "llama", batch)[0]
    handle.remove()
    wanted = hidden_states(dense.bare, "llama", batch)[0]
    rows, weight = read[0][batch["attention_mask"].bool()], module.weight.detach().double()
    aim = wanted - (own - rows @ weight.t())  # what down_proj should give
    scale = wanted.square().sum(-1, keepdim=True).rsqrt()
    found = torch.zeros_like(weight)
    for row, kept in enumerate(keep):
        found[row, kept] = torch.linalg.lstsq(rows[:, kept] * scale, aim[:, row : row + 1] * scale).solution[:, 0]
    return relative_error(rows @ found.t() - aim + wanted, wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_come_closer_and_nothing_else_moves(family: str):
    sparse, dense, keep = halved(family, count=9)
    before, original = tiny.state_bytes(sparse.bare), tiny.state_bytes(dense.bare)
    chosen = [matrix for matrix in sparse.anatomy.matrices if matrix.layer != 1]
    told = run(sparse, dense, keep, TUNED, chosen)
    errors = [(layer["before"], layer["after"], layer["epoch"]) for layer in told["layers"]]
    assert all(after < 0.9 * first and epoch > 0 for first, after, epoch in (errors[0], errors[2]))
    assert errors[1][0] == errors[1][1] and errors[1][2] == 0  # none of its weights was to move
    after = tiny.state_bytes(sparse.bare)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {matrix.parameter for matrix in chosen}
    for matrix in chosen:
        mask, weight = keep[matrix.name], after[matrix.name]
        assert not weight[~mask].any() and not torch.signbit(weight[~mask]).any()
        assert (weight[mask] != before[matrix.name][mask]).float().mean() > 0.95
    assert tiny.same_bits(original, tiny.state_bytes(dense.bare))
    assert all(p.requires_grad and p.grad is None for p in sparse.bare.parameters())


def test_what_gets_worse_on_held_out_sequences_is_not_taken():
    sparse, dense, keep = halved("llama")
    before = tiny.state_bytes(sparse.bare)
    told = run(sparse, dense, keep, TOO_FAST)
    assert all(layer["after"] == layer["before"] and layer["epoch"] == 0 for layer in told["layers"])
    assert tiny.same_bits(before, tiny.state_bytes(sparse.bare))


def test_bf16_weights_take_steps_that_are_smaller_than_their_resolution():
    sparse, dense = (tiny.problem("llama", model=tiny.build("llama").bfloat16(), count=9) for _ in range(2))
    keep = sparsify(sparse, sparse.anatomy.matrices, HALF).by_name
    told = run(sparse, dense, keep, ReconstructConfig(epochs=8, rate=2e-3))
    assert all(layer["after"] < 0.97 * layer["before"] for layer in told["layers"])
    assert {p.dtype for p in sparse.bare.parameters()} == {torch.bfloat16}


# -- the same on any number of ranks -----------------------------------------------------------------------------------
def reconstructed(backend: Backend) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    sparse, dense, keep = halved("llama", backend, count=12)
    told = run(sparse, dense, keep, ReconstructConfig(epochs=3, rate=0.02, batch_size=6))
    return told, tiny.state_bytes(sparse.bare)


def test_the_same_on_two_processes(process_groups: Callable[..., Ranks], backend: Backend):
    """Eleven micro-batches of two sequences in steps of three, and one held out: unequal shares on two ranks."""
    wanted, state = reconstructed(backend)
    for told, found in process_groups(2).call(reconstructed):
        for own, other in zip(told["layers"], wanted["layers"], strict=True):
            assert own == pytest.approx(other, rel=1e-4)
        for name, tensor in state.items():
            assert torch.equal(found[name] == 0, tensor == 0)
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


# -- refusals ----------------------------------------------------------------------------------------------------------
def test_what_has_no_hidden_states_to_compare_is_refused():
    anatomy = tiny.problem("llama").anatomy
    check(anatomy, TUNED)
    with pytest.raises(UserError, match="reconstruct.epochs 3 .* no single list of layers"):
        check(replace(anatomy, stacks=()), TUNED)
