"""Where the removable units of each model family lie. The next family is one more `Family` at the end of `FAMILIES`.

Paths are relative to one layer (`Family.layers` holds them), which is relative to `model.base_model`. Only names are
written here; sizes are read from the model itself, so a family covers every checkpoint of its class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tinygn_dist.models.family_schema import (
    Attention,
    Experts,
    Family,
    FeedForward,
    Filters,
    Part,
    Residual,
    StackHeads,
)


def _separate(*paths: str) -> tuple[Part, ...]:
    return tuple(Part(path) for path in paths)


def _derived_head_dim(heads: str, hidden: str = "hidden_size") -> dict[str, str]:
    told = f"its config derives head_dim from {hidden} / {heads}, so fewer heads of the same size cannot be written"
    return {"heads": told}


def _qk_layernorm(config: Any) -> str | None:
    return "its class builds qk_layernorm of size hidden_size / num_attention_heads" if config.qk_layernorm else None


def _longrope(config: Any) -> str | None:
    if (config.rope_parameters or {}).get("rope_type") != "longrope":
        return None
    return "its config checks the longrope factors against hidden_size / num_attention_heads"


def _scaled_by_number(config: Any) -> str | None:
    told = "its class divides the attention scores of a layer by its number (scale_attn_by_inverse_layer_idx)"
    return told if config.scale_attn_by_inverse_layer_idx else None


def _resize_vgg(config: Any, width_of: Callable[[str], int]) -> None:
    numbers = iter(range(len(config.filters)))
    config.filters = [n and width_of(f"convolutions.{next(numbers)}") for n in config.filters]  # 0 is a pooling
    config.hidden = [width_of(f"classifier.{i}") for i in range(len(config.hidden))]


def _resize_resnet(config: Any, width_of: Callable[[str], int]) -> None:
    last = {"basic": 1, "bottleneck": 2}[config.layer_type]
    stages = range(len(config.hidden_sizes))
    config.hidden_sizes = [
        width_of(f"resnet.encoder.stages.{stage}.layers.0.layer.{last}.convolution") for stage in stages
    ]
    config.embedding_size = width_of("resnet.embedder.embedder.convolution")


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _stage_of(parameter: str) -> str:
    """The config has one width for each stage, and one for what comes before."""
    return parameter.partition(".layers.")[0] if ".layers." in parameter else "embedder"


_ONLY_FILTERS = dict.fromkeys(("layers", "heads", "channels", "experts"), "it is a convolutional net")
_JOINT_NORMS = {"heads": "its query and key norms run over all heads together, so every head depends on the others"}
_NO_EXPERTS = "its feed-forward layers are dense"
_NO_CHANNELS = {"channels": "its feed-forward layers are mixtures of experts; use --pattern experts"}
_SEPARATE_QKV = _separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GROUPED = Attention(inputs=_SEPARATE_QKV, output="self_attn.o_proj")
_GATED = FeedForward(inputs=_separate("mlp.gate_proj", "mlp.up_proj"), output="mlp.down_proj")
_GATED_THEN_NORMED = replace(_GATED, added=lambda config: False)
_RMS = Residual(
    reads=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"),
    writes=("self_attn.o_proj", "mlp.down_proj"),
    norms=("input_layernorm", "post_attention_layernorm"),
)
_NO_HIDDEN = (
    "its norms do not take the width of the stream alone (LayerNorm subtracts a mean; Gemma scales embeddings by the "
    "width's root; OLMo 2 norms small queries with the same epsilon) or its class is not described"
)
_4H = FeedForward(inputs=_separate("mlp.dense_h_to_4h"), output="mlp.dense_4h_to_h")
_PHI3_QKV = ("num_attention_heads", "num_key_value_heads", "num_key_value_heads")

_T5_FFN = tuple(
    FeedForward(
        _separate(*(f"layer.{at}.DenseReluDense.{name}" for name in names)), f"layer.{at}.DenseReluDense.wo", "d_ff"
    )
    for at in (2, 1)  # behind the decoder's cross attention, or where there is none
    for names in (("wi_0", "wi_1"), ("wi",))  # gated or not
)

FAMILIES = (
    Family(  # every norm is of the residual stream
        model_types=("llama", "mistral", "qwen2"),
        layers="layers",
        attention=_GROUPED,
        feed_forward=_GATED,
        residual=_RMS,
    ),
    Family(  # head_dim in the config
        model_types=("qwen3", "smollm3"),
        layers="layers",
        attention=_GROUPED,
        feed_forward=_GATED,
        residual=_RMS,
    ),
    Family(  # embeddings times the root of the width
        model_types=("gemma",),
        layers="layers",
        attention=_GROUPED,
        feed_forward=_GATED,
    ),
    Family(  # the same, and what it gives is normed
        model_types=("gemma2", "gemma3_text"),
        layers="layers",
        attention=_GROUPED,
        feed_forward=_GATED_THEN_NORMED,
    ),
    Family(  # a width for each layer (MatFormer)
        model_types=("gemma3n_text",),
        layers="layers",
        feed_forward=replace(
            _GATED_THEN_NORMED,
            uneven="layers",
            stays=lambda config, layer: config.activation_sparsity_pattern[layer] > 0,
        ),
        starts_anywhere=False,
        fixed={
            "layers": "its embeddings of each layer and the keys and values that its layers share lie at their "
            "positions",
            "heads": "its last layers have queries alone and read the keys and values of others",
        },
    ),
    Family(
        model_types=("granite",),
        layers="layers",
        attention=_GROUPED,
        feed_forward=replace(_GATED, added=lambda config: config.residual_multiplier == 1),
        residual=_RMS,
    ),
    Family(
        model_types=("olmo2",),
        layers="layers",
        feed_forward=_GATED_THEN_NORMED,
        fixed=_JOINT_NORMS,
    ),
    Family(
        model_types=("phi",),
        layers="layers",
        attention=Attention(inputs=_SEPARATE_QKV, output="self_attn.dense", fixed_if=_qk_layernorm),
        feed_forward=FeedForward(inputs=_separate("mlp.fc1"), output="mlp.fc2"),
    ),
    Family(  # qkv and gate_up fused, block after block
        model_types=("phi3",),
        layers="layers",
        attention=Attention(
            inputs=tuple(Part("self_attn.qkv_proj", block, _PHI3_QKV) for block in range(3)),
            output="self_attn.o_proj",
            fixed_if=_longrope,
        ),
        feed_forward=FeedForward(
            inputs=(Part("mlp.gate_up_proj", 0, 2), Part("mlp.gate_up_proj", 1, 2)), output="mlp.down_proj"
        ),
        residual=replace(_RMS, reads=("self_attn.qkv_proj", "mlp.gate_up_proj")),
    ),
    Family(
        model_types=("gpt2",),
        layers="h",
        feed_forward=FeedForward(inputs=_separate("mlp.c_fc"), output="mlp.c_proj", width="n_inner"),
        depth="n_layer",
        layers_fixed_if=_scaled_by_number,
        fixed=_derived_head_dim("n_head"),
    ),
    Family(
        model_types=("gpt_neox",),
        layers="layers",
        feed_forward=_4H,
        fixed=_derived_head_dim("num_attention_heads"),
    ),
    Family(
        model_types=("bloom",),
        layers="h",
        depth="n_layer",
        fixed=_derived_head_dim("n_head")
        | {"channels": "its class builds 4 * hidden_size channels whatever the config says"},
    ),
    Family(
        model_types=("falcon",),
        layers="h",
        feed_forward=FeedForward(_4H.inputs, _4H.output, width="ffn_hidden_size"),
        fixed=_derived_head_dim("num_attention_heads"),
    ),
    Family(
        model_types=("opt",),
        layers="decoder.layers",
        feed_forward=FeedForward(
            _separate("fc1"), "fc2", width="ffn_dim", added=lambda config: config.do_layer_norm_before
        ),
        fixed=_derived_head_dim("num_attention_heads"),
    ),
    Family(  # post-norm encoders
        model_types=("bert", "roberta", "xlm-roberta", "electra", "camembert"),
        layers="encoder.layer",
        feed_forward=FeedForward(_separate("intermediate.dense"), "output.dense", added=lambda config: False),
        fixed=_derived_head_dim("num_attention_heads"),
    ),
    Family(
        model_types=("distilbert",),
        layers="transformer.layer",
        feed_forward=FeedForward(_separate("ffn.lin1"), "ffn.lin2", width="hidden_dim", added=lambda config: False),
        depth="n_layers",
        fixed=_derived_head_dim("n_heads", "dim"),
    ),
    Family(
        model_types=("vit",),
        layers="layers",
        feed_forward=FeedForward(inputs=_separate("mlp.fc1"), output="mlp.fc2"),
        fixed=_derived_head_dim("num_attention_heads"),
    ),
    Family(
        model_types=("t5", "mt5"),
        layers=("encoder.block", "decoder.block"),
        stack_heads=StackHeads(
            blocks=("layer.0.SelfAttention", "layer.1.EncDecAttention"),
            inputs=("q", "k", "v"),
            output="o",
            bias="layer.0.SelfAttention.relative_attention_bias.weight",
        ),
        feed_forward=_T5_FFN,
        depth=("num_layers", "num_decoder_layers"),
    ),
    Family(
        model_types=("bart", "mbart"),
        layers=("encoder.layers", "decoder.layers"),
        feed_forward=FeedForward(
            _separate("fc1"),
            "fc2",
            width=("encoder_ffn_dim", "decoder_ffn_dim"),
            uneven="stacks",
            added=lambda config: config.model_type == "mbart",  # BART norms after it
        ),
        depth=("encoder_layers", "decoder_layers"),
        fixed=_derived_head_dim("encoder_attention_heads", "d_model"),
    ),
    Family(
        model_types=("convnext",),
        layers="encoder.stages.*.layers",
        depth="depths",
        fixed={
            "heads": "it has no attention",
            "channels": "its class builds 4 * width channels in every layer whatever the config says",
            "filters": "layer norms run over all channels of a stage, so each depends on the others",
        },
    ),
    Family(model_types=("tinygn_vgg",), layers="", filters=Filters(_resize_vgg, _module_of), fixed=_ONLY_FILTERS),
    Family(model_types=("resnet",), layers="", filters=Filters(_resize_resnet, _stage_of), fixed=_ONLY_FILTERS),
    Family(
        model_types=("mixtral",),
        layers="layers",
        attention=_GROUPED,
        experts=Experts(count="num_local_experts"),
        fixed=_NO_CHANNELS,
    ),
    Family(
        model_types=("qwen2_moe", "qwen3_moe"),
        layers="layers",
        attention=_GROUPED,
        experts=Experts(),
        fixed=_NO_CHANNELS,
    ),
    Family(
        model_types=("olmoe",),
        layers="layers",
        experts=Experts(),
        fixed=_NO_CHANNELS | _JOINT_NORMS,
    ),
    Family(
        model_types=("gpt_oss",),
        layers="layers",
        attention=Attention(inputs=_SEPARATE_QKV, output="self_attn.o_proj", per_head=("self_attn.sinks",)),
        experts=Experts(router="mlp.router", count="num_local_experts"),
        fixed=_NO_CHANNELS,
    ),
)


def family_of(model_type: str) -> Family | None:
    """The family a `config.model_type` belongs to, or None."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def fixed_units(family: Family, config: Any) -> dict[str, str]:
    """Unit kinds that cannot be removed from a model of this config, each with the reason."""
    fixed = dict(family.fixed)
    if family.experts is None:
        fixed.setdefault("experts", _NO_EXPERTS)
    if family.filters is None:
        fixed.setdefault("filters", "it is no convolutional net")
    if family.residual is None:
        fixed.setdefault("hidden", _NO_HIDDEN)
    if family.attention and (reason := family.attention.fixed_if(config)):
        fixed["heads"] = reason
    if reason := family.layers_fixed_if(config):
        fixed["layers"] = reason
    return fixed


def supported() -> str:
    """Every model type whose units can be removed, for messages."""
    return ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
