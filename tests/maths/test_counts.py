"""Whole numbers from a sparsity, against enumeration."""

import itertools
import random

import pytest

from tinygn_dist.maths.counts import Mix, UnitSizes, mixes, num_kept, share_left, spread


def test_exactly_round_of_s_times_n_go():
    for total in (1, 2, 7, 64, 1001, 10**9 + 7):
        for sparsity in (0.0, 1e-6, 0.1, 1 / 3, 0.5, 0.999999):
            assert total - num_kept(total, sparsity) == round(sparsity * total)
    assert num_kept(64, 0.5) == 32 and num_kept(10, 0.0) == 10


def test_spread_adds_up_and_no_block_is_over_full():
    draw = random.Random(0)
    for _ in range(500):
        sizes = [draw.randint(1, 200) for _ in range(draw.randint(1, 12))]
        total = draw.randint(0, sum(sizes))
        shares = spread(total, sizes)
        assert sum(shares) == total
        assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
        assert all(abs(share - total * size / sum(sizes)) <= 1 for share, size in zip(shares, sizes, strict=True))


def brute_force(sizes: UnitSizes, sparsity: float, kinds: tuple[str, ...], widths: list[int]) -> set[Mix]:
    """Of all mixes that reach the target, those whose channels cannot be fewer, whose heads are needed with as few
    channels as possible, and whose layers are needed."""
    target = round(sparsity * sizes.layers * sizes.layer_params)

    def removed(layers: int, heads: int, channels: int) -> int:
        per_layer = heads * sizes.head_params + channels * sizes.channel_params
        return layers * sizes.layer_params + (sizes.layers - layers) * per_layer

    layer_range = range(sizes.layers) if "layers" in kinds else (0,)
    head_range = range(max(1, sizes.heads)) if "heads" in kinds else (0,)
    channel_range = [0, *(sizes.channels - kept for kept in widths)] if "channels" in kinds else [0]
    found = set()
    for layers, heads in itertools.product(layer_range, head_range):
        if layers and removed(layers - 1, 0, 0) >= target or heads and removed(layers, heads - 1, 0) >= target:
            continue  # a smaller number alone was enough
        reaching = [c for c in channel_range if removed(layers, heads, c) >= target]
        if reaching:
            found.add(Mix(layers, heads, min(reaching)))
    return found


@pytest.mark.parametrize(
    "kinds", [("layers",), ("heads",), ("channels",), ("layers", "channels"), ("layers", "heads", "channels")]
)
@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.2, 0.5, 0.8, 0.97])
def test_mixes_are_those_of_brute_force(kinds: tuple[str, ...], sparsity: float):
    sizes = UnitSizes(layers=5, layer_params=1000, heads=4, head_params=60, channels=48, channel_params=12)
    for multiple, widths in ((8, [40, 32, 24, 16, 8]), (5, [45, 40, 35, 30, 25, 20, 15, 10, 5])):
        found = list(mixes(sizes, sparsity, kinds, multiple))
        assert len(found) == len(set(found))
        assert set(found) == brute_force(sizes, sparsity, kinds, widths)


def test_removed_params_is_the_sum_over_the_layers():
    sizes = UnitSizes(layers=6, layer_params=1000, heads=4, head_params=60, channels=48, channel_params=12)
    assert sizes.removed_params(Mix(2, 1, 8)) == 2 * 1000 + 4 * (60 + 8 * 12)
    assert sizes.total_params == 6000


def test_something_always_stays():
    sizes = UnitSizes(layers=3, layer_params=100, heads=2, head_params=20, channels=8, channel_params=5)
    for mix in mixes(sizes, 0.7, ("layers", "heads", "channels"), 4):
        assert mix.layers < 3 and mix.heads < 2 and mix.channels < 8
    assert list(mixes(sizes, 0.999, ("layers",), 4)) == []


def test_the_share_left_brings_what_is_left_to_the_sparsity_of_what_was_there():
    """Of 1,000 parameters 800 are left: for 40 % in all, 200 of the 800 still go."""
    assert share_left(0.4, 1000, 800) == pytest.approx(0.25)
    assert share_left(0.2, 1000, 800) == share_left(0.1, 1000, 800) == 0.0
    assert share_left(0.3, 1000, 1000) == pytest.approx(0.3)
