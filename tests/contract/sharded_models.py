"""Models and data of the sharded jobs: sizes that no number of ranks divides."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import transformers as hf
from torch import nn

from tests import plain
from tinygn_dist.backends import Backend
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.models.anatomy import read_anatomy
from tinygn_dist.models.objective import objective_of
from tinygn_dist.runtime.progress import Progress

VOCAB = 96
NO_DOWN = {"ignore": ("down_proj",)}  # its 49 inputs are no multiple of 4


def llama(tied: bool = False) -> nn.Module:
    """49 rows do not divide by 2; a flat half of a (49, 40) or (40, 49) weight cuts a row."""
    config = hf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=40, intermediate_size=49, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=10, max_position_embeddings=64, tie_word_embeddings=tied,
        attn_implementation="eager", bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return seeded(config)


def gpt2() -> nn.Module:
    """Conv1D stores (in, out): shards of its rows are shards of inputs."""
    config = hf.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_inner=44, n_layer=2, n_head=4, n_positions=64, attn_implementation="eager",
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return seeded(config)


def mixtral() -> nn.Module:
    """3 experts in one tensor do not divide by 2: under FSDP2 a rank holds whole experts, under ZeRO-3 a part of
    one."""
    config = hf.MixtralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, num_local_experts=3, num_experts_per_tok=2,
        attn_implementation="eager", bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return seeded(config)


def deepseek() -> nn.Module:
    """bf16 weights beside routers in fp32, as its class keeps them."""
    config = hf.DeepseekV3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
        n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=12, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, max_position_embeddings=64, attn_implementation="eager", bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = seeded(config).bfloat16()
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            parameter.data = parameter.data.float()
    return model


def seeded(config: hf.PretrainedConfig, auto: Any = hf.AutoModelForCausalLM) -> nn.Module:
    torch.manual_seed(0)
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def rows(count: int = 5, length: int = 12) -> list[dict[str, torch.Tensor]]:
    """An odd number of micro-batches, so that ranks have unequal shares."""
    ids = torch.randint(3, VOCAB, (count, 1, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def problem(backend: Backend, model: nn.Module) -> Problem:
    anatomy = read_anatomy(model, needs_units=True)
    return Problem(backend.prepare(model), anatomy, objective_of("causal-lm"), rows(), backend, Progress())


def digest(backend: Backend, model: nn.Module) -> str:
    """Of every bit of the full state, from the main rank."""
    state, total = plain.full_state(backend, model), hashlib.sha256()
    for name in sorted(state):
        assert state[name].numel() > 0, f"{name} is empty"
        total.update(name.encode() + state[name].contiguous().numpy().tobytes())
    return backend.everyone(total.hexdigest()[:16])[0]
