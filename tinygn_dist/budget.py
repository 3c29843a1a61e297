"""From a sparsity to whole numbers. Pure integers and floats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


def num_kept(total: int, sparsity: float) -> int:
    """total - round(sparsity * total): exactly round(s*n) go."""
    return total - round(sparsity * total)


def spread(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` dealt over blocks in proportion to their sizes: whole numbers that add up exactly."""
    whole, given, seen, shares = sum(sizes), 0, 0, []
    for size in sizes:
        seen += size
        upto = round(total * seen / whole)
        shares.append(upto - given)
        given = upto
    return shares


def blend(total: int, sizes: Sequence[int], wanted: Sequence[int], share: float) -> list[int]:
    """Whole numbers that add up to `total`: `share` of the way from in proportion to `sizes` (0) to `wanted` (1).

    sizes: how many each part has; wanted: how many a global cut would take from each. Remainders go to the largest
    fractions, then to the lower index.
    """
    whole = sum(sizes)
    exact = [share * want + (1 - share) * total * size / whole for size, want in zip(sizes, wanted, strict=True)]
    counts = [min(int(value), size) for value, size in zip(exact, sizes, strict=True)]
    by_fraction = sorted(range(len(sizes)), key=lambda i: (int(exact[i]) - exact[i], i))
    left = total - sum(counts)
    while left > 0:
        for index in by_fraction:
            if left and counts[index] < sizes[index]:
                counts[index] += 1
                left -= 1
    return counts


@dataclass(frozen=True, order=True)
class Mix:
    """What goes: whole layers, and heads (KV groups) and channels out of every remaining layer."""

    layers: int = 0
    heads: int = 0
    channels: int = 0


@dataclass(frozen=True)
class UnitSizes:
    """Counts and parameters of one model whose layers are alike. heads and channels are per layer (0 = fixed)."""

    layers: int
    layer_params: int
    heads: int
    head_params: int
    channels: int
    channel_params: int

    def removed_params(self, mix: Mix) -> int:
        """Parameters that go with a mix."""
        in_layer = mix.heads * self.head_params + mix.channels * self.channel_params
        return mix.layers * self.layer_params + (self.layers - mix.layers) * in_layer

    @property
    def total_params(self) -> int:
        return self.layers * self.layer_params


def mixes(sizes: UnitSizes, sparsity: float, kinds: Sequence[str], multiple_of: int) -> Iterator[Mix]:
    """Every mix of the allowed kinds that removes at least round(sparsity * layers' parameters), with no unit to
    spare: for each number of layers and heads the fewest channels (kept at a multiple of `multiple_of`) that reach it.

    A mix leaves at least one layer, head and channel block; where nothing reaches the target the iterator is empty.
    """
    target = round(sparsity * sizes.total_params)
    max_layers = sizes.layers - 1 if "layers" in kinds else 0
    max_heads = sizes.heads - 1 if "heads" in kinds and sizes.heads else 0
    for layers in range(max_layers + 1):
        for heads in range(max_heads + 1):
            for channels in _channel_steps(sizes, kinds, multiple_of):
                mix = Mix(layers, heads, channels)
                if sizes.removed_params(mix) >= target:
                    yield mix
                    break
            if sizes.removed_params(Mix(layers, heads)) >= target:
                break
        if sizes.removed_params(Mix(layers)) >= target:
            return


def _channel_steps(sizes: UnitSizes, kinds: Sequence[str], multiple_of: int) -> Iterator[int]:
    yield 0
    if "channels" not in kinds:
        return
    step = min(multiple_of, max(1, sizes.channels // 2))
    largest = (sizes.channels - 1) // step * step  # kept counts: multiples of step below the full width
    for kept in range(largest, 0, -step):
        yield sizes.channels - kept
