"""The exact k-th over disjoint shards, against sorting everything in one place."""

import threading

import pytest
import torch

from tests.two_devices import DEVICE, two_devices
from tinygn_dist.maths.top_k import keep_largest, kth_largest


def alone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def reference(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Stable sort: ties to the smaller index."""
    order = scores.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[:keep]] = True
    return mask


def on_ranks(pieces: list[torch.Tensor], starts: list[int], keep: int) -> list[torch.Tensor]:
    """keep_largest by one thread per piece, which meet in every sum."""
    size, barrier, slots = len(pieces), threading.Barrier(len(pieces), timeout=30), [None] * len(pieces)
    results: list = [None] * size

    def work(rank: int) -> None:
        def add(tensor: torch.Tensor) -> torch.Tensor:
            slots[rank] = tensor.clone()
            barrier.wait()
            total = sum(slots[1:], slots[0].clone())
            barrier.wait()
            return total

        try:
            results[rank] = keep_largest([pieces[rank]], [starts[rank]], keep, add)[0]
        except threading.BrokenBarrierError:
            pass
        except Exception as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def tricky(kind: str, size: int = 1000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(size, generator=generator)
    match kind:
        case "random":
            return values
        case "few levels":
            return (values * 2).round()
        case "all equal":
            return torch.full((size,), 0.1)
        case "signed zeros":
            return torch.where(values > 0, 0.0, -0.0)
        case "infinite":
            return values.masked_fill(values > 1, torch.inf).masked_fill(values < -1, -torch.inf)
        case "denormal":
            return (torch.arange(size) % 50).float() * 1e-42
        case "huge range":
            return values.sign() * 10 ** (values * 12)
        case "close":
            return 1 + (torch.arange(size) % 97) * torch.finfo(torch.float32).eps
    raise AssertionError(kind)


KINDS = ("random", "few levels", "all equal", "signed zeros", "infinite", "denormal", "huge range", "close")


@pytest.mark.parametrize("kind", KINDS)
def test_same_as_a_stable_sort(kind: str):
    scores = tricky(kind)
    for keep in (0, 1, 2, 499, 500, 998, 999, 1000):
        mask = keep_largest([scores], [0], keep, alone)[0]
        assert int(mask.sum()) == keep
        assert torch.equal(mask, reference(scores, keep)), f"{kind}, keep {keep}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [(0, 1000), (333, 334), (500, 500), (1, 999)])
def test_any_sharding_gives_the_same_mask(kind: str, cuts: tuple[int, int]):
    scores, (first, second) = tricky(kind), cuts
    pieces = [scores[:first], scores[first:second], scores[second:]]  # some of them empty
    for keep in (1, 500, 999):
        masks = on_ranks(pieces, [0, first, second], keep)
        assert torch.equal(torch.cat(masks), reference(scores, keep)), f"{kind}, keep {keep}"


def test_several_pieces_per_rank_compete_and_keep_their_shapes():
    scores = tricky("few levels", 600)
    pieces = [scores[:200].view(10, 20), scores[200:201].view(1, 1), scores[201:].view(21, 19)]
    masks = keep_largest(pieces, [0, 200, 201], 250, alone)
    assert [mask.shape for mask in masks] == [piece.shape for piece in pieces]
    assert torch.equal(torch.cat([mask.flatten() for mask in masks]), reference(scores, 250))


def test_ties_follow_the_global_index_not_the_order_of_the_ranks():
    """Equal scores: the lowest global indices stay even when they lie on the last rank."""
    masks = on_ranks([torch.ones(4), torch.ones(4)], [4, 0], 5)
    assert masks[0].tolist() == [True, False, False, False] and masks[1].tolist() == [True] * 4


def test_ties_beyond_32_bits_of_index():
    """A model with more than 2^32 weights: indices do not wrap."""
    far = 5 * (1 << 32) + 7
    masks = on_ranks([torch.ones(3), torch.ones(3)], [far, 2], 4)
    assert masks[1].tolist() == [True] * 3 and masks[0].tolist() == [True, False, False]


def test_a_non_contiguous_piece():
    scores = tricky("random", 60).view(6, 10).t()
    mask = keep_largest([scores], [0], 20, alone)[0]
    assert torch.equal(mask.flatten(), reference(scores, 20))


def test_nan_is_refused_on_every_rank():
    with pytest.raises(ValueError, match="1 of 6 scores are NaN"):
        on_ranks([torch.ones(3), torch.tensor([1.0, torch.nan, 2.0])], [0, 3], 2)


@pytest.mark.parametrize("keep", [-1, 4])
def test_an_impossible_count_is_refused(keep: int):
    with pytest.raises(ValueError, match="of 3 scores"):
        keep_largest([torch.ones(3)], [0], keep, alone)


def test_no_scores_at_all():
    assert keep_largest([], [], 0, alone) == []
    assert keep_largest([torch.empty(0, 3)], [0], 0, alone)[0].shape == (0, 3)


def test_kth_largest_is_the_value_and_the_count_above():
    scores = torch.tensor([3.0, 1.0, 2.0, 2.0, -5.0])
    assert kth_largest([scores], 3, alone) == (2.0, 1)
    assert kth_largest([scores], 5, alone) == (None, 0)


def test_more_elements_than_quantile_allows():
    """torch.quantile stops at 2^24 elements; the count must be exact beyond."""
    size = (1 << 24) + 3
    scores = torch.rand(size, generator=torch.Generator().manual_seed(0))
    scores = (scores * 1000).round()  # thousands of ties
    mask = keep_largest([scores], [0], size // 3, alone)[0]
    assert int(mask.sum()) == size // 3
    assert float(scores[mask].min()) >= float(scores[~mask].max())


def test_pieces_may_lie_on_the_processor_and_on_the_device():
    """As those of a model of which a part is offloaded do; ties across both."""
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    with two_devices():
        here, there = scores[:3] + torch.zeros(3), scores[3:] + torch.zeros(3, device=DEVICE)
        first, second = keep_largest([here, there], [0, 3], 3, lambda counts: counts)
        assert first.device != second.device
    assert first.tolist() == [False, True, True] and second.tolist() == [True, False, False]
