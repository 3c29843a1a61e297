"""What a model family looks like: the words in which `families.py` describes one. Names only; sizes are read from the
model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple


class Part(NamedTuple):
    """The `index`-th block of a linear module's output features, which is split into `blocks`: so many equal ones, or
    ones in proportion to these config entries (fused qkv of grouped-query attention)."""

    path: str
    index: int = 0
    blocks: int | tuple[str, ...] = 1


@dataclass(frozen=True)
class Attention:
    """Projections of one attention block, for families whose config can say fewer heads of the same size.

    Heads of one key/value group go together; head_dim never changes. inputs: whose output features belong to the
    groups, in order. per_head: parameters with one entry per query head.
    """

    inputs: tuple[Part, ...]
    output: str
    num_heads: str = "num_attention_heads"
    num_kv_heads: str = "num_key_value_heads"
    per_head: tuple[str, ...] = ()
    fixed_if: Callable[[Any], str | None] = lambda config: None
    """why the heads of this very config must stay, or None"""

    def resize(self, config: Any, groups: int) -> None:
        """So many KV groups, with as many query heads each as before and heads of the same size. In place."""
        heads, kv_heads = getattr(config, self.num_heads), getattr(config, self.num_kv_heads)
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        setattr(config, self.num_heads, heads // kv_heads * groups)
        setattr(config, self.num_kv_heads, groups)


@dataclass(frozen=True)
class StackHeads:
    """Heads that go from all layers of a stack at once, because one parameter of its first layer, `bias` (..., heads),
    serves all. blocks: paths of attention modules in a layer, as far as it has them, each with the linear modules
    `inputs` and `output`."""

    blocks: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str
    bias: str
    num_heads: str = "num_heads"

    def resize(self, config: Any, groups: int) -> None:
        """So many heads of the same size, which the config names. In place."""
        setattr(config, self.num_heads, groups)


@dataclass(frozen=True)
class FeedForward:
    """Channel j is output feature j of every part in `inputs` and input feature j of `output`."""

    inputs: tuple[Part, ...]
    output: str
    width: str | tuple[str, ...] = "intermediate_size"
    """the config's entry, or all its entries, that say how many channels there are"""
    added: Callable[[Any], bool] = lambda config: True
    """whether what `output` gives is added to the residual stream as it is, with no norm or factor between or after:
    then it can also give what removed layers gave"""
    uneven: Literal["", "layers", "stacks"] = ""
    """whether the config has a width for each layer (`width` names a list) or each stack (an entry of `width` for
    each), so that they may keep different numbers of channels"""
    stays: Callable[[Any, int], bool] = lambda config, layer: False
    """whether the channels of this very layer depend on each other, so that all stay"""


@dataclass(frozen=True)
class Experts:
    """Expert j is entry j of every parameter of the modules `router` and `experts`; shared experts are no units, and
    layers without these modules have none."""

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    count: str = "num_experts"
    top_k: str = "num_experts_per_tok"


@dataclass(frozen=True)
class Residual:
    """What reads, writes and norms the residual stream, in each layer and around them (relative to the base model; the
    head is found). Only RMSNorm: x / rms(x) * weight. size, eps, num_heads: the config's entries. The epsilon grows as
    the width shrinks; norms of queries and keys, which read it too, then differ by a part in a million."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    norms: tuple[str, ...]
    embedding: str = "embed_tokens"
    last_norm: str = "norm"
    size: str = "hidden_size"
    eps: str = "rms_norm_eps"
    num_heads: str = "num_attention_heads"


@dataclass(frozen=True)
class Filters:
    """A convolutional net, whose groups of filters `dependencies` finds. resize(config, width_of) writes new widths
    into a config, width_of("module.path") being the outputs that a convolution or linear module keeps. slot(path): of a
    parameter, a name that is the same for all whose filters keep the same share; layers of different names may keep
    different ones.
    """

    resize: Callable[[Any, Callable[[str], int]], None]
    slot: Callable[[str], str]


@dataclass(frozen=True)
class Family:
    """attention, feed_forward, experts, filters: None where a family has none to remove; `fixed` then says why, by unit
    kind.

    layers: the list of layers; several where stacks of them run one after the other, and `depth` then has the config's
    entry for each (a `*` in a path stands for every number, and `depth` for a list with one entry for each).
    feed_forward: where layers differ, the first description whose modules a layer has holds for it.
    """

    model_types: tuple[str, ...]
    layers: str | tuple[str, ...]
    attention: Attention | None = None
    stack_heads: StackHeads | None = None
    feed_forward: FeedForward | tuple[FeedForward, ...] | None = None
    experts: Experts | None = None
    filters: Filters | None = None
    residual: Residual | None = None
    depth: str | tuple[str, ...] = "num_hidden_layers"
    layers_fixed_if: Callable[[Any], str | None] = lambda config: None
    """why the layers of this very config must stay, or None: where its class computes something from a layer's
    number"""
    starts_anywhere: bool = True
    """whether a forward may begin at any layer, from what the one before it returned: not where layers read more of
    earlier ones"""
    fixed: Mapping[str, str] = field(default_factory=dict)

    @property
    def stacks(self) -> tuple[tuple[str, str], ...]:
        """(path, depth) of every list of layers."""
        paths = (self.layers,) if isinstance(self.layers, str) else self.layers
        depths = (self.depth,) * len(paths) if isinstance(self.depth, str) else self.depth
        return tuple(zip(paths, depths, strict=True))

    @property
    def feed_forwards(self) -> tuple[FeedForward, ...]:
        return self.feed_forward if isinstance(self.feed_forward, tuple) else tuple(filter(None, [self.feed_forward]))
