"""How does llama.cpp call the tensors of a Hugging Face model, and in which order does it want their rows?

Sources: the package `gguf` (`constants.MODEL_TENSORS`) and llama.cpp's loaders of each architecture (src/models).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

UNEVEN = "deci"
"""the architecture whose feed-forward widths and heads are lists, one entry for each layer"""


@dataclass(frozen=True)
class Architecture:
    """name: in GGUF. interleaved: its rotary embedding turns neighbouring rows (2i, 2i + 1) of q and k, where
    transformers turns (i, i + head_dim / 2). can_be_uneven: `deci` has all its tensors."""

    name: str
    interleaved: bool
    can_be_uneven: bool


ARCHITECTURES: Mapping[str, Architecture] = {  # by transformers' model_type
    "llama": Architecture("llama", interleaved=True, can_be_uneven=True),
    "mistral": Architecture("llama", interleaved=True, can_be_uneven=True),
    "qwen2": Architecture("qwen2", interleaved=False, can_be_uneven=True),
    "qwen3": Architecture("qwen3", interleaved=False, can_be_uneven=False),  # deci has no norms of q and k
}
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_ROTATED = re.compile(r"\.(q|k)_proj\.(weight|bias)$")


def gguf_name(name: str) -> str | None:
    """None for a tensor that has no place in these architectures."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    match = _LAYER.fullmatch(name)
    if not match or match[2] not in _INSIDE:
        return None
    return f"blk.{match[1]}.{_INSIDE[match[2]]}.{match[3]}"


def row_order(name: str, num_rows: int, head_dim: int) -> torch.Tensor | None:
    """Which row of a Hugging Face tensor comes where in an interleaved architecture; None where rows stay.

    num_rows: whole heads of `head_dim` rows each. Rows i and i + head_dim / 2 of a head become 2i and 2i + 1.
    """
    if not _ROTATED.search(name):
        return None
    heads = torch.arange(num_rows).view(-1, 2, head_dim // 2)
    return heads.transpose(1, 2).reshape(-1)
