"""Masks: hashed the same for any sharding, exact zeros, counted as integers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tinygn_dist.backends.pieces import Shard
from tinygn_dist.models.anatomy import Matrix
from tinygn_dist.prune.sparsity.mask_selection import keep_n_of_m, keep_per_row
from tinygn_dist.prune.sparsity.masks import Masks

TARGETS = (Matrix("a.weight", "a", 0, (6, 10), 1), Matrix("b.weight", "b", 1, (4, 7), 1))


def masks(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {t.name: torch.rand(t.shape, generator=generator) < 0.5 for t in TARGETS}


def fingerprint(whole: dict[str, torch.Tensor], cuts: dict[str, tuple[int, ...]]) -> str:
    """As ranks that hold flat slices of each weight would compute it; piece i of every matrix lies on rank i."""
    ranks = 1 + max(len(c) for c in cuts.values())
    sums: list[torch.Tensor] = []

    def one(rank: int, total: torch.Tensor | None) -> str:
        offsets, pieces = {}, {}
        for matrix in TARGETS:
            edges = [0, *cuts[matrix.name], *[matrix.numel] * (ranks - len(cuts[matrix.name]))]
            offsets[matrix.name], flat = edges[rank], whole[matrix.name].flatten()
            pieces[matrix.name] = flat[edges[rank] : edges[rank + 1]]

        def add(mine: torch.Tensor) -> torch.Tensor:
            sums.append(mine.clone())
            return mine if total is None else total

        backend = SimpleNamespace(shard=lambda model, t: Shard(torch.empty(0), offsets[t.name]), sum_over_shards=add)
        return Masks(TARGETS, pieces).fingerprint(nn.Module(), backend)

    for rank in range(ranks):
        one(rank, None)
    return one(0, sum(sums[1:], sums[0].clone()))


@pytest.mark.parametrize(
    "cuts", [{"a.weight": (30,), "b.weight": (1,)}, {"a.weight": (0, 13, 60), "b.weight": (7, 8, 9)}]
)
def test_the_fingerprint_does_not_depend_on_the_sharding(cuts: dict[str, tuple[int, ...]]):
    whole = masks()
    assert fingerprint(whole, cuts) == fingerprint(whole, {"a.weight": (), "b.weight": ()})


def test_the_fingerprint_sees_every_bit_and_which_weight_it_is_in():
    none, seen = {"a.weight": (), "b.weight": ()}, set()
    whole = masks()
    seen.add(fingerprint(whole, none))
    for matrix in TARGETS:
        for index in range(0, matrix.numel, 3):
            changed = {name: mask.clone() for name, mask in whole.items()}
            changed[matrix.name].view(-1)[index] ^= True
            seen.add(fingerprint(changed, none))
    assert len(seen) == 1 + sum(len(range(0, t.numel, 3)) for t in TARGETS)
    assert len(fingerprint(whole, none)) == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_are_plain_zeros_and_counts_are_integers(backend, dtype: torch.dtype):
    """bf16 counts stop at 256; -1.0 * 0 is -0.0; a mask must not change the dtype of a weight."""
    model = nn.Module()
    model.a, model.b = nn.Linear(10, 6, dtype=dtype), nn.Linear(2002, 3, dtype=dtype)
    matrices = (TARGETS[0], Matrix("b.weight", "b", 1, (3, 2002), 1))
    with torch.no_grad():
        model.a.weight.fill_(-1.0)
        model.b.weight.fill_(torch.nan)  # a masked weight is zero whatever was there
    keep = {"a.weight": masks()["a.weight"], "b.weight": torch.zeros(3, 2002, dtype=torch.bool)}
    keep["b.weight"][:, :1001] = True
    chosen = Masks(matrices, keep)
    chosen.apply_(model, backend)
    assert chosen.kept(backend) == {"a.weight": int(keep["a.weight"].sum()), "b.weight": 3003}
    assert model.a.weight.dtype == dtype and chosen.violations(model, backend) == 0
    assert not torch.signbit(model.a.weight[~keep["a.weight"]]).any()
    assert (model.b.weight[~keep["b.weight"]] == 0).all()
    with torch.no_grad():
        model.a.weight[~keep["a.weight"]] = 1e-7
    assert chosen.violations(model, backend) == int((~keep["a.weight"]).sum())


def test_n_of_m_against_a_loop_and_ties_to_the_left():
    scores = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).round(decimals=0)
    keep = keep_n_of_m(scores, 2, 4)
    for row, start in ((r, s) for r in range(5) for s in (0, 4, 8)):
        best = sorted(range(start, start + 4), key=lambda j: (-float(scores[row, j]), j))[:2]  # noqa: B023
        assert keep[row, start : start + 4].nonzero()[:, 0].tolist() == sorted(j - start for j in best)


def test_per_row_against_a_loop_and_ties_to_the_left():
    scores = torch.randn(5, 10, generator=torch.Generator().manual_seed(0)).round(decimals=0)
    keep = keep_per_row(scores, 0.3)
    for row in range(5):
        best = sorted(range(10), key=lambda j: (-float(scores[row, j]), j))[:7]  # noqa: B023
        assert keep[row].nonzero()[:, 0].tolist() == sorted(best)


def test_a_weight_that_something_else_moved_stops_the_next_step(backend):
    model = nn.Module()
    model.a, model.b = nn.Linear(10, 6), nn.Linear(4, 7)
    model.b.weight.data = model.b.weight.data.t().contiguous()  # stored (in, out)
    keep = {"a.weight": masks()["a.weight"], "b.weight": masks()["b.weight"]}
    matrices = (TARGETS[0], Matrix("b.weight", "b", 1, (4, 7), 1))
    chosen, optimizer = Masks(matrices, keep), torch.optim.SGD(model.parameters(), lr=0.1)
    chosen.apply_(model, backend)
    handle = chosen.enforce(model, optimizer, backend)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert chosen.violations(model, backend) == 0
    dropped = (~keep["b.weight"]).nonzero()[0].tolist()
    with torch.no_grad():
        model.b.weight[tuple(dropped)] = 1e-30
    moved = model.a.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"rank 0: 1 masked weights of b\.weight are not zero"):
        optimizer.step()
    assert torch.equal(model.a.weight, moved)  # before anything moved
    handle.remove()
    optimizer.step()
    assert chosen.violations(model, backend) > 1
