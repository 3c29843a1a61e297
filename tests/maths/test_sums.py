"""Sums that do not depend on the order of the batches, nor on the dtype of what is added."""

import pytest
import torch

from tinygn_dist.maths.sums import ChunkedStore, Moments


def contributions() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.rand(40, generator=generator) * 10 ** float(torch.rand(1, generator=generator) * 2) for _ in range(300)
    ]


def summed(parts: list[torch.Tensor]) -> Moments:
    moments = Moments()
    for part in parts:
        moments.add("x", part)
    return moments


def test_any_order_and_any_split_round_to_the_same_bits():
    parts, wanted = contributions(), summed(contributions()).rounded("x")
    for seed in range(5):
        order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed)).tolist()
        assert torch.equal(summed([parts[i] for i in order]).rounded("x"), wanted)
    for ranks in (2, 3, 4):
        total = Moments()
        for rank in range(ranks):
            total.merge(summed(parts[rank::ranks]))
        assert torch.equal(total.rounded("x"), wanted)


def test_three_hundred_batches_are_summed_without_stalling():
    """A running bf16 or fp16 sum of ones stops growing; counts must not."""
    moments = Moments()
    for _ in range(3000):
        moments.add("x", torch.ones(2, dtype=torch.bfloat16))
    assert moments.sum("x").tolist() == [3000.0, 3000.0]


def test_adding_does_not_alias_the_contribution():
    moments, part = Moments(), torch.ones(3, dtype=torch.float64)
    moments.add("x", part)
    moments.add("x", part)
    assert part.tolist() == [1.0] * 3 and moments.sum("x").tolist() == [2.0] * 3


def test_a_reserved_sum_is_zero_and_keeps_what_is_there():
    moments = Moments()
    moments.reserve("x", (2,), torch.device("cpu"))
    moments.add("x", torch.ones(2))
    moments.reserve("x", (2,), torch.device("cpu"))
    assert moments.sum("x").tolist() == [1.0, 1.0] and "x" in moments and moments.names() == ("x",)
    other = Moments()
    other.load_state_dict(moments.state_dict())
    assert torch.equal(other.pop("x"), torch.ones(2).double()) and "x" not in other


@pytest.mark.parametrize("shape", [(7, 5), (40, 256), (0, 300), (30, 600)])
def test_gram_is_the_weighted_sum_of_outer_products(shape: tuple[int, int]) -> None:
    """Of two micro-batches, one without weights, and filled twice."""
    generator = torch.Generator().manual_seed(0)
    rows, weights = torch.randn(shape, generator=generator), torch.rand(shape[0], generator=generator)
    exact, moments = rows.double(), Moments()
    moments.add_gram("x", rows)
    moments.fill_gram("x")
    torch.testing.assert_close(moments.sum("x"), exact.t() @ exact, rtol=1e-5, atol=1e-4)
    moments.add_gram("x", rows, weights)
    moments.fill_gram("x")
    wanted = torch.einsum("t,ti,tj->ij", weights.double() + 1, exact, exact)
    torch.testing.assert_close(moments.sum("x"), wanted, rtol=1e-5, atol=1e-4)
    assert torch.equal(moments.sum("x")[256:, :256], moments.sum("x")[:256, 256:].t())


def test_what_is_put_on_a_shelf_stays_as_it_was() -> None:
    """Whatever comes after it, in blocks that hold one, some or less than one."""
    for at_once in (1, 7, 1000):
        shelf, generator = ChunkedStore(torch.bfloat16, at_once), torch.Generator().manual_seed(0)
        values = [torch.randn(shape, generator=generator) for shape in [(3,), (2, 2), (0,), (5,), (1, 6), (4,)]]
        put = [shelf.put(value) for value in values]
        assert all(torch.equal(one, value.bfloat16()) for one, value in zip(put, values, strict=True))
        blocks = {one.untyped_storage().data_ptr() for one in put if one.numel()}
        assert len(blocks) == {1: 5, 7: 4, 1000: 1}[at_once]
