"""A tiny random model of every family, and the full model with units shut as reference for their removal.

One row of CASES per model type that `families.py` lists.
"""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from tests import tiny
from tinygn_dist.backends.replicated import Replicated
from tinygn_dist.estimate.hooks import InputGate, LayerGate, attached
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths.counts import Mix
from tinygn_dist.models.anatomy import read_anatomy
from tinygn_dist.models.kept import KeptUnits
from tinygn_dist.models.objective import causal_lm, classification, continuation, decoder_start, seq2seq_lm
from tinygn_dist.prune.structured.shrink import smaller_config
from tinygn_dist.runtime.progress import Progress

LAYERS, HEADS, KV_HEADS, HIDDEN, WIDTH, EXPERTS, TOP_K, VOCAB = 4, 4, 2, 32, 48, 5, 2, 96
_BASE = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    intermediate_size=WIDTH,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
_GROUPED = _BASE | dict(num_key_value_heads=KV_HEADS)
_OWN_HEAD_DIM = _GROUPED | dict(head_dim=16)  # not hidden / heads
_ENCODER = _BASE | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3)
_MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
_MOE = _OWN_HEAD_DIM | dict(num_experts_per_tok=TOP_K, moe_intermediate_size=24)
_T5 = dict(vocab_size=VOCAB, d_model=HIDDEN, d_kv=16, d_ff=WIDTH, num_layers=2, num_decoder_layers=2, num_heads=HEADS)
_T5 |= dict(dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)
_BART = dict(vocab_size=VOCAB, d_model=HIDDEN, encoder_layers=2, decoder_layers=2, encoder_attention_heads=HEADS)
_BART |= dict(decoder_attention_heads=HEADS, encoder_ffn_dim=WIDTH, decoder_ffn_dim=WIDTH, max_position_embeddings=64)
_BART |= dict(dropout=0.0, decoder_start_token_id=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)

CASES = {
    "llama": _GROUPED | dict(attention_bias=True, mlp_bias=True),
    "mistral": _GROUPED | dict(sliding_window=6),
    "qwen2": _GROUPED,
    "qwen3": _OWN_HEAD_DIM,
    "gemma": _OWN_HEAD_DIM,
    "gemma2": _OWN_HEAD_DIM | dict(sliding_window=4, layer_types=_MIXED),
    "gemma3_text": _OWN_HEAD_DIM | dict(sliding_window=4, layer_types=_MIXED),
    "gemma3n_text": _OWN_HEAD_DIM
    | dict(sliding_window=4, layer_types=_MIXED, num_kv_shared_layers=1, laurel_rank=4, hidden_size_per_layer_input=8)
    | dict(vocab_size_per_layer_input=VOCAB, activation_sparsity_pattern=[0.0] * LAYERS),
    "smollm3": _GROUPED | dict(no_rope_layers=[1, 0, 1, 1]),
    "granite": _GROUPED | dict(residual_multiplier=0.5, attention_multiplier=0.3),
    "olmo2": _GROUPED,
    "phi": _GROUPED,
    "phi3": _GROUPED,
    "gpt2": dict(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=64, n_inner=WIDTH)
    | dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2),
    "gpt_neox": _BASE,
    "bloom": dict(vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS, tie_word_embeddings=False),
    "falcon": _BASE | dict(ffn_hidden_size=WIDTH, new_decoder_architecture=True, num_kv_heads=KV_HEADS, bias=True),
    "opt": _BASE | dict(ffn_dim=WIDTH, word_embed_proj_dim=HIDDEN, dropout=0.0),
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "xlm-roberta": _ENCODER,
    "camembert": _ENCODER,
    "electra": _ENCODER | dict(embedding_size=16),
    "distilbert": dict(vocab_size=VOCAB, dim=HIDDEN, n_layers=LAYERS, n_heads=HEADS, hidden_dim=WIDTH, num_labels=3)
    | dict(dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0),
    "vit": _ENCODER | dict(image_size=8, patch_size=4),
    "t5": _T5,
    "mt5": _T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart": _BART,
    "mbart": _BART | dict(tie_word_embeddings=False),
    "convnext": dict(num_labels=3, image_size=16, patch_size=2, num_stages=2, hidden_sizes=[8, 16], depths=[2, 2]),
    "mixtral": _OWN_HEAD_DIM | dict(num_local_experts=EXPERTS, num_experts_per_tok=TOP_K),
    "qwen2_moe": _MOE | dict(num_experts=EXPERTS, shared_expert_intermediate_size=20, mlp_only_layers=[1]),
    "qwen3_moe": _MOE | dict(num_experts=EXPERTS, norm_topk_prob=False),
    "olmoe": _GROUPED | dict(num_experts=EXPERTS, num_experts_per_tok=TOP_K, norm_topk_prob=True),
    "gpt_oss": _OWN_HEAD_DIM
    | dict(num_local_experts=EXPERTS, num_experts_per_tok=TOP_K, sliding_window=4, layer_types=_MIXED)
    | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4)),
}
MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss")
NO_HEADS = (
    "olmo2",
    "olmoe",
    "gpt2",
    "gpt_neox",
    "bloom",
    "falcon",
    "opt",
    "bert",
    "roberta",
    "xlm-roberta",
    "camembert",
)
FIXED_LAYERS = ("gemma3n_text", "qwen2_moe")
SEVERAL_STACKS = ("t5", "mt5", "bart", "mbart", "convnext")
NO_HEADS += ("electra", "distilbert", "vit", "bart", "mbart", "convnext", "gemma3n_text")


def removable(model_type: str) -> list[str]:
    """What must be removable from the tiny model, written down here rather than read from the product."""
    kinds = ["layers"]
    if model_type in (*FIXED_LAYERS, *SEVERAL_STACKS):  # layers differ in size, or lie at their positions
        kinds = []
    kinds += [] if model_type in NO_HEADS else ["heads"]  # of T5 by their number
    kinds += [] if model_type in (*MOE, "bloom", "convnext") else ["channels"]
    return kinds + (["experts"] if model_type in MOE else [])


def auto_class(config):
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    if config.model_type in ("vit", "convnext"):
        return AutoModelForImageClassification
    return AutoModelForSequenceClassification if getattr(config, "num_labels", 2) == 3 else AutoModelForCausalLM


def build(model_type: str, **changes) -> nn.Module:
    """A tiny model in eval mode whose parameters (biases and norms too) are all random."""
    config = AutoConfig.for_model(model_type, **CASES[model_type] | changes)
    torch.manual_seed(1)
    model = auto_class(config).from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 and "norm" in name.lower() else 0.0, 0.2)
    return model


def make_problem(model: nn.Module, backend: Replicated) -> Problem:
    anatomy = read_anatomy(model, needs_units=True)
    objective = {AutoModelForCausalLM: causal_lm, AutoModelForSeq2SeqLM: seq2seq_lm}.get(
        auto_class(model.config), classification
    )
    return Problem(model, anatomy, objective, batches_for(model), backend, Progress(shown=False))


def batches_for(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(2)
    if model.config.model_type == "vit":
        return [{"pixel_values": torch.randn(3, 3, 8, 8), "labels": torch.tensor([0, 2, 1])} for _ in range(2)]
    if model.config.model_type == "convnext":
        return [{"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 2, 1])} for _ in range(2)]
    if model.config.is_encoder_decoder:
        windows = [{"input_ids": torch.randint(3, VOCAB, (3, 14))} for _ in range(2)]
        return [continuation(batch, decoder_start(model.config)) for batch in windows]
    batches = []
    for _ in range(2):
        tokens, mask = torch.randint(3, VOCAB, (3, 10)), torch.ones(3, 10, dtype=torch.int64)
        mask[1, 7:] = 0
        tokens[mask == 0] = 0
        if auto_class(model.config) is AutoModelForCausalLM:
            labels = tokens.masked_fill(mask == 0, -100)
        else:
            labels = torch.tensor([0, 2, 1])
        batches.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return batches


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of real tokens (of every sequence, for classifiers)."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        out = model(**inputs).logits
    return out[batch["attention_mask"].bool()] if "attention_mask" in batch and out.dim() == 3 else out


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def choose(problem: Problem, kinds: list[str], seed: int = 0) -> tuple[KeptUnits, Mix]:
    """Some units to keep, other ones in every layer, and the mix that says how many went."""
    generator = torch.Generator().manual_seed(seed)
    anatomy = problem.anatomy
    gone_layers = {1, 3} if len(anatomy.stacks) > 1 else {1}  # the second of each stack
    layers = tuple(layer for layer in range(LAYERS) if "layers" not in kinds or layer not in gone_layers)
    kept, gone = {}, {"layers": LAYERS - len(layers)}
    for kind in set(kinds) - {"layers"}:
        for group in anatomy.of_kind(kind):
            stays = {"heads": 1, "channels": group.num_units - 16, "experts": group.num_units - 2}[kind]
            order = torch.randperm(group.num_units, generator=generator)[:stays]
            gone[kind] = group.num_units - stays
            if group.layer in layers:
                kept.setdefault(kind, {})[group.layer] = tuple(sorted(order.tolist()))
    return KeptUnits(layers, **kept), Mix(**gone)


@contextlib.contextmanager
def gated(problem: Problem, kept: KeptUnits):
    """The full model with everything that is not kept shut, by means of this test where the product has its own."""
    model, anatomy = problem.model, problem.anatomy
    hooks, handles = [], []
    for group in anatomy.groups:
        units = kept.of(group.kind).get(group.layer)
        if units is None:
            continue
        gone = torch.ones(group.num_units, dtype=torch.bool)
        gone[list(units)] = False
        if group.kind == "experts":
            router = model.get_submodule(group.router)
            handles.append(router.register_forward_hook(lambda m, _, out, gone=gone: route(m, out[0], gone)))
        else:
            readers = [(group.output, group.output_width), *group.also_read_by]
            hooks += [(model.get_submodule(path), InputGate((~gone).float(), width)) for path, width in readers]
    for layer in set(range(LAYERS)) - set(kept.layers):
        hooks.append((model.get_submodule(anatomy.path_of(layer)), LayerGate(torch.tensor(0.0))))
    try:
        with attached(hooks):
            yield model
    finally:
        for handle in handles:
            handle.remove()


def route(router: nn.Module, scores: torch.Tensor, gone: torch.Tensor):
    """The routing rules of the four classes, with some experts' logits at -inf."""
    masked = scores.masked_fill(gone, -torch.inf)
    if "GptOss" in type(router).__name__:
        top, chosen = masked.topk(router.top_k)
        return scores, top.softmax(-1), chosen
    top, chosen = masked.float().softmax(-1).topk(router.top_k)
    if "Mixtral" in type(router).__name__ or router.norm_topk_prob:
        top = top / top.sum(-1, keepdim=True)
    return scores, top, chosen


def shrunk(problem: Problem, kept: KeptUnits) -> nn.Module:
    model, anatomy = problem.model, problem.anatomy
    config = smaller_config(model.config, anatomy, kept)
    small = auto_class(config).from_config(config)
    small.load_state_dict(tiny.smaller_state(model.state_dict(), anatomy, kept), strict=True)
    small.tie_weights()
    return small.eval()


def on_meta(model_type: str, **changes):
    """Anatomy without weights: a refusal from it comes before weights load."""
    config = AutoConfig.for_model(model_type, **CASES[model_type] | changes)
    with torch.device("meta"):
        return read_anatomy(auto_class(config).from_config(config), needs_units=True)
