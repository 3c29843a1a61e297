"""From a sparsity to whole numbers. Pure integers and floats."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tinygn_dist.maths.unit_kinds import UNIT_KINDS


def share_left(sparsity: float, began_with: int, here: int) -> float:
    """The share of the `here` parameters that are left which still has to go, so that `sparsity` of the `began_with` is
    gone; 0 where it is already."""
    left = 1 - (1 - sparsity) * began_with / here
    return left if round(left * here) > 0 else 0.0


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


def blend(total: int, sizes: Sequence[int], wanted: Sequence[float], share: float) -> list[int]:
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
    """How many units of each kind go, `mix[kind]`: one field for each row of UNIT_KINDS. Whole layers; heads (KV
    groups), channels and experts out of every layer that stays; of filters so many of the equal parts of every group;
    hidden dimensions of the whole model.

    uneven: channels or filters that go from each group of them, where groups may differ; `channels` or `filters` is
    then the largest.
    """

    layers: int = 0
    heads: int = 0
    channels: int = 0
    experts: int = 0
    filters: int = 0
    hidden: int = 0
    uneven: tuple[int, ...] = ()

    def __getitem__(self, kind: str) -> int:
        assert kind in UNIT_KINDS, kind
        return getattr(self, kind)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those of which some go."""
        return tuple(kind for kind in UNIT_KINDS if self[kind])

    def __str__(self) -> str:
        """Such as `2 layers, 1 KV groups of each layer, 64 channels of each layer`."""
        if self.uneven:
            (kind,) = self.kinds
            return f"{min(self.uneven)} to {max(self.uneven)} {kind} of a layer, {sum(self.uneven)} in all"
        named = [(self[kind], UNIT_KINDS[kind]) for kind in self.kinds]
        named.sort(key=lambda one: one[1].per_layer)
        return ", ".join(f"{n} {kind.label}" + " of each layer" * kind.per_layer for n, kind in named) or "nothing"


def largest_of(mixes: Iterable[Mix]) -> Mix:
    """Of every kind, the largest number in any of them."""
    mixes = list(mixes)
    return Mix(**{kind: max(mix[kind] for mix in mixes) for kind in UNIT_KINDS})


@dataclass(frozen=True)
class UnitSizes:
    """Counts and parameters of one model whose layers are alike, but for `dense_layers` of them without experts.

    heads, channels and experts are per layer (0 = fixed). least_experts: so many must stay, for the router to choose
    its top k.
    """

    layers: int
    layer_params: int
    heads: int
    head_params: int
    channels: int
    channel_params: int
    experts: int = 0
    expert_params: int = 0
    least_experts: int = 1
    dense_layers: int = 0
    dense_layer_params: int = 0
    head_counts: tuple[int, ...] = ()
    """how many heads a layer may keep; empty where any number will do"""
    uneven_params: int = 0
    """of all layers together, where they differ in size: then no number of whole layers, nor of heads, reaches a
    budget"""

    def removed_params(self, mix: Mix) -> int:
        """Parameters that go with a mix. Whole layers only where all are alike: which ones go is not known here."""
        assert not (mix.layers and (self.dense_layers or self.uneven_params))
        in_layer = mix.heads * self.head_params + mix.channels * self.channel_params
        in_sparse = mix.experts * self.expert_params
        left = self.layers - mix.layers
        return mix.layers * self.layer_params + left * in_layer + (left - self.dense_layers) * in_sparse

    @property
    def total_params(self) -> int:
        return (
            self.uneven_params
            or (self.layers - self.dense_layers) * self.layer_params + self.dense_layers * self.dense_layer_params
        )

    def count(self, kind: str) -> int:
        """How many there are (per layer, for kinds inside layers)."""
        return getattr(self, kind)

    def accepts(self, mix: Mix) -> bool:
        """Whether the class can be built without this many heads."""
        return not self.head_counts or self.heads - mix.heads in self.head_counts

    def most(self, kind: str) -> int:
        """How many units of a kind can go (per layer, for kinds inside layers), so that enough are left."""
        if kind == "layers":
            return 0 if self.dense_layers or self.uneven_params else self.layers - 1
        if kind == "heads" and self.uneven_params:
            return 0
        least = self.least_experts if kind == "experts" else 1
        return max(0, self.count(kind) - least)


@dataclass(frozen=True)
class Latency:
    """Measured seconds of one forward of a model whose `layers` layers are alike.

    rest: everything but the layers. layer: one whole layer. heads, channels: one layer by how many KV groups or
    channels it keeps, the other kind whole; at a few counts, the full one and the least among them, linear in between.
    What heads and channels save is added: attention and feed-forward run one after the other.
    """

    layers: int
    rest: float
    layer: float
    heads: Mapping[int, float] = field(default_factory=dict)
    channels: Mapping[int, float] = field(default_factory=dict)

    def removed_seconds(self, mix: Mix) -> float:
        """Seconds that go with a mix."""
        return mix.layers * self.layer + (self.layers - mix.layers) * (self.layer - self._of_cut_layer(mix))

    def _of_cut_layer(self, mix: Mix) -> float:
        seconds = self.layer
        for gone, table in ((mix.heads, self.heads), (mix.channels, self.channels)):
            if gone:
                seconds -= self.layer - between(table, max(table) - gone)
        return seconds

    @property
    def total_seconds(self) -> float:
        return self.rest + self.layers * self.layer

    def corrected(self, mix: Mix, rest: float, layer: float, cut: float) -> Latency:
        """The table that agrees with new seconds: of the rest, of a whole layer and of one cut by a mix. What any
        number of heads or channels saves is scaled by the same factor."""
        saved = self.layer - self._of_cut_layer(mix)
        scale = (layer - cut) / saved if saved else layer / self.layer
        kinds = {
            kind: {count: layer - scale * (self.layer - seconds) for count, seconds in getattr(self, kind).items()}
            for kind in ("heads", "channels")
        }
        return replace(self, rest=rest, layer=layer, **kinds)


def between(table: Mapping[int, float], count: int) -> float:
    """The value at a count, on the line between its measured neighbours."""
    counts = sorted(table)
    high = max(1, min(bisect_left(counts, count), len(counts) - 1))
    below, above = counts[high - 1], counts[high]
    return table[below] + (table[above] - table[below]) * (count - below) / (above - below)


def mixes(
    sizes: UnitSizes, sparsity: float, kinds: Sequence[str], multiple_of: int, latency: Latency | None = None
) -> Iterator[Mix]:
    """Every mix of the allowed kinds that removes at least round(sparsity * layers' parameters), or this share of a
    latency, with no unit to spare: for each number of layers and heads the fewest channels (kept at a multiple of
    `multiple_of`) or experts that reach it.

    A mix leaves at least one layer, head and channel block, and the experts a router needs; where nothing reaches the
    target the iterator is empty.
    """
    removed, target = sizes.removed_params, float(round(sparsity * sizes.total_params))
    if latency is not None:
        removed, target = latency.removed_seconds, (sparsity - 1e-9) * latency.total_seconds
    max_layers = sizes.most("layers") if "layers" in kinds else 0
    max_heads = sizes.most("heads") if "heads" in kinds else 0
    for layers in range(max_layers + 1):
        for heads in range(max_heads + 1):
            if not sizes.accepts(Mix(heads=heads)):
                continue
            for inner in _feed_forward_steps(sizes, kinds, multiple_of):
                mix = replace(inner, layers=layers, heads=heads)
                if removed(mix) >= target:
                    yield mix
                    break
            if removed(Mix(layers, heads)) >= target:
                break
        if removed(Mix(layers)) >= target:
            return


def channel_step(channels: int, multiple_of: int) -> int:
    """Kept channel counts are multiples of this, below the full width."""
    return min(multiple_of, max(1, channels // 2))


def evenly(
    sizes: Sequence[int], cuts: Sequence[Sequence[int]], enough: Callable[[Sequence[int]], bool]
) -> list[int] | None:
    """Of each part one of its cuts (how many of its `sizes` units go, fewest first), so that all keep about the same
    share: the one of which the most is left goes on to its next, until there are enough. None where all are at their
    last before."""
    at = [0] * len(sizes)
    while True:
        gone = [cut[place] for cut, place in zip(cuts, at, strict=True)]
        if enough(gone):
            return gone
        able = [index for index, cut in enumerate(cuts) if at[index] + 1 < len(cut)]
        if not able:
            return None
        at[max(able, key=lambda index: (1 - gone[index] / sizes[index], -index))] += 1


def channel_cuts(channels: int, multiple_of: int) -> list[int]:
    """How many of one layer's channels may go, fewest first."""
    step = channel_step(channels, multiple_of)
    return [channels - kept for kept in range((channels - 1) // step * step, 0, -step)]


def _feed_forward_steps(sizes: UnitSizes, kinds: Sequence[str], multiple_of: int) -> Iterator[Mix]:
    """Fewest first. A layer has channels or experts, not both."""
    yield Mix()
    if "channels" in kinds:
        for gone in channel_cuts(sizes.channels, multiple_of):
            yield Mix(channels=gone)
    if "experts" in kinds:
        for gone in range(1, sizes.most("experts") + 1):
            yield Mix(experts=gone)
