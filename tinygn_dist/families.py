"""Where the removable units of each model family lie. The next family is one more `Family` at the end of `FAMILIES`.

Paths are relative to one layer (`Family.layers` holds them), which is relative to `model.base_model`. Only names are
written here; sizes are read from the model itself, so a family covers every checkpoint of its class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Part(NamedTuple):
    """The `index`-th of `of` equal blocks of a linear module's output features (fused qkv: three blocks)."""

    path: str
    index: int = 0
    of: int = 1


@dataclass(frozen=True)
class Attention:
    """Projections of one attention block. Heads of one key/value group go together; head_dim never changes."""

    query: Part
    key: Part
    value: Part
    output: str
    num_heads: str = "num_attention_heads"
    num_kv_heads: str | None = None
    fixed: str | None = None
    """why heads cannot be removed in a checkpoint that stock classes load, or None"""


@dataclass(frozen=True)
class FeedForward:
    """Channel j is output feature j of every module in `inputs` and input feature j of `output`."""

    inputs: tuple[str, ...]
    output: str
    width: str = "intermediate_size"


@dataclass(frozen=True)
class Family:
    model_types: tuple[str, ...]
    layers: str
    attention: Attention
    feed_forward: FeedForward
    depth: str = "num_hidden_layers"


_TIED_HEAD_DIM = (
    "its config derives head_dim from hidden_size / {heads}, so fewer heads of the same size cannot be written"
)

FAMILIES = (
    Family(  # gated FFN, head_dim in the config
        model_types=(
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "smollm3",
            "olmo2",
            "granite",
        ),
        layers="layers",
        attention=Attention(
            query=Part("self_attn.q_proj"),
            key=Part("self_attn.k_proj"),
            value=Part("self_attn.v_proj"),
            output="self_attn.o_proj",
            num_kv_heads="num_key_value_heads",
        ),
        feed_forward=FeedForward(inputs=("mlp.gate_proj", "mlp.up_proj"), output="mlp.down_proj"),
    ),
    Family(
        model_types=("gpt2",),
        layers="h",
        attention=Attention(
            query=Part("attn.c_attn", 0, 3),
            key=Part("attn.c_attn", 1, 3),
            value=Part("attn.c_attn", 2, 3),
            output="attn.c_proj",
            num_heads="n_head",
            fixed=_TIED_HEAD_DIM.format(heads="n_head"),
        ),
        feed_forward=FeedForward(inputs=("mlp.c_fc",), output="mlp.c_proj", width="n_inner"),
        depth="n_layer",
    ),
    Family(
        model_types=("opt",),
        layers="decoder.layers",
        attention=Attention(
            query=Part("self_attn.q_proj"),
            key=Part("self_attn.k_proj"),
            value=Part("self_attn.v_proj"),
            output="self_attn.out_proj",
            fixed=_TIED_HEAD_DIM.format(heads="num_attention_heads"),
        ),
        feed_forward=FeedForward(inputs=("fc1",), output="fc2", width="ffn_dim"),
    ),
    Family(  # post-norm encoders
        model_types=("bert", "roberta", "xlm-roberta", "electra", "camembert"),
        layers="encoder.layer",
        attention=Attention(
            query=Part("attention.self.query"),
            key=Part("attention.self.key"),
            value=Part("attention.self.value"),
            output="attention.output.dense",
            fixed=_TIED_HEAD_DIM.format(heads="num_attention_heads"),
        ),
        feed_forward=FeedForward(inputs=("intermediate.dense",), output="output.dense"),
    ),
    Family(
        model_types=("vit",),
        layers="layers",
        attention=Attention(
            query=Part("attention.q_proj"),
            key=Part("attention.k_proj"),
            value=Part("attention.v_proj"),
            output="attention.o_proj",
            fixed=_TIED_HEAD_DIM.format(heads="num_attention_heads"),
        ),
        feed_forward=FeedForward(inputs=("mlp.fc1",), output="mlp.fc2"),
    ),
)


def family_of(model_type: str) -> Family | None:
    """The family a `config.model_type` belongs to, or None."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def supported() -> str:
    """Every model type whose units can be removed, for messages."""
    return ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
