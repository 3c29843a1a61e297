"""Tiny Llama-like checkpoints with byte-level BPE tokenizers, built in the test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, models, trainers
from torch import nn

from tests import tiny
from tinygn_dist.checkpoints.formats.gguf_tokenizer import PRE_TOKENIZERS

VOCAB = 320


def tokenizer(pre: str = "smollm", *, chat: bool = True) -> hf.PreTrainedTokenizerFast:
    """Byte-level BPE of at most VOCAB tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = PRE_TOKENIZERS[pre], decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 8,
        special_tokens=[AddedToken(one, special=True) for one in special],
        initial_alphabet=sorted(PRE_TOKENIZERS["gpt-2"].alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(tiny.texts(), trainer)
    made = hf.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=special[1], eos_token=special[2])
    if chat:
        made.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    return made


def model(kind: str = "llama", **changes: object) -> nn.Module:
    """Seed 0, weights large enough that layers matter."""
    config = {"llama": hf.LlamaConfig, "mistral": hf.MistralConfig, "qwen2": hf.Qwen2Config, "qwen3": hf.Qwen3Config}
    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = hf.AutoModelForCausalLM.from_config(config[kind](**sizes | changes))
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                else:
                    parameter.mul_(4)
    return made.eval()


def make_uneven(made: nn.Module, widths: Sequence[int], kv_heads: Sequence[int]) -> None:
    """Other widths in each layer: the first channels and KV groups stay."""
    config = made.config
    head_dim, per_group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    for layer, width, groups in zip(made.model.layers, widths, kv_heads, strict=True):
        rows = groups * head_dim
        for name, kept in (("gate_proj", width), ("up_proj", width)):
            shorten(getattr(layer.mlp, name), rows=kept)
        shorten(layer.mlp.down_proj, columns=width)
        shorten(layer.self_attn.q_proj, rows=rows * per_group)
        shorten(layer.self_attn.k_proj, rows=rows)
        shorten(layer.self_attn.v_proj, rows=rows)
        shorten(layer.self_attn.o_proj, columns=rows * per_group)


def shorten(linear: nn.Linear, *, rows: int | None = None, columns: int | None = None) -> None:
    linear.weight = nn.Parameter(linear.weight[:rows, :columns].detach().clone())
    linear.out_features, linear.in_features = linear.weight.shape
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[:rows].detach().clone())


def save(made: nn.Module, folder: Path, pre: str = "smollm") -> Path:
    made.save_pretrained(folder)
    tokenizer(pre).save_pretrained(folder)
    return folder
