"""Units of models with several stacks of layers, and to a latency, on whatever backend runs
tests/contract/sharded_job.py."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
import transformers as hf
from torch import nn

from tests.contract.sharded_models import VOCAB, digest, rows, seeded
from tests.removing import plan_mixes, remove_units
from tinygn_dist.backends import Backend
from tinygn_dist.config import Config, PruneConfig
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.evaluate.quality import mean_loss
from tinygn_dist.models.anatomy import read_anatomy
from tinygn_dist.models.objective import continuation, objective_of
from tinygn_dist.pipeline import compress
from tinygn_dist.prune.structured import latency
from tinygn_dist.prune.structured.shrink import smaller_config, smaller_origin
from tinygn_dist.runtime.progress import Progress

_TEXT = dict(vocab_size=VOCAB, d_model=40, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)


def t5() -> nn.Module:
    """One embedding for both stacks and the head; the position bias of a stack in its first layer."""
    config = hf.T5Config(**_TEXT, d_kv=10, d_ff=49, num_layers=2, num_decoder_layers=3, num_heads=4, dropout_rate=0.0)
    return seeded(config, hf.AutoModelForSeq2SeqLM)


def bart() -> nn.Module:
    config = hf.BartConfig(
        **_TEXT, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=49, decoder_ffn_dim=49, max_position_embeddings=32, dropout=0.0, bos_token_id=1,
    )  # fmt: skip
    return seeded(config, hf.AutoModelForSeq2SeqLM)


def gemma3n() -> nn.Module:
    """A width for each layer; keys and values of an earlier layer in the last one; a module that runs twice in each."""
    config = hf.Gemma3nTextConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=49, num_hidden_layers=4, num_attention_heads=4, head_dim=10,
        num_key_value_heads=2, sliding_window=8, num_kv_shared_layers=1, laurel_rank=5, hidden_size_per_layer_input=7,
        layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        vocab_size_per_layer_input=VOCAB, activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0], pad_token_id=0,
    )  # fmt: skip
    return seeded(config, hf.AutoModelForCausalLM)


def convnext() -> nn.Module:
    config = hf.ConvNextConfig(
        num_labels=3, image_size=16, patch_size=2, num_stages=2, hidden_sizes=[7, 13], depths=[2, 3]
    )
    return seeded(config, hf.AutoModelForImageClassification)


CASES = {
    "t5": (t5, {"pattern": "units", "counts": {"layers": 1, "heads": 1, "channels": 14}}),
    "bart": (bart, {"pattern": "units", "counts": {"layers": 1, "channels": 14}}),
    "bart uneven": (bart, {"pattern": "channels", "uneven": True, "sparsity": 0.15, "multiple_of": 7}),
    "gemma3n uneven": (gemma3n, {"pattern": "channels", "uneven": True, "sparsity": 0.15, "multiple_of": 7}),
    "convnext": (convnext, {"pattern": "layers", "counts": {"layers": 2}}),
}


def stacks(backend: Backend) -> dict[str, list[object]]:
    """Fingerprint of what stays, digest of every bit of the smaller model, and its loss."""
    found: dict[str, list[object]] = {}
    for name, (build, case) in CASES.items():
        model, options = build(), PruneConfig(**case)
        config, anatomy = model.config, read_anatomy(model, needs_units=True)
        objective = objective_of({convnext: "image-classification", gemma3n: "causal-lm"}.get(build, "seq2seq-lm"))
        dense = Problem(backend.prepare(model), anatomy, objective, _batches(build), backend, Progress())
        kept, _, _, shifts, _ = remove_units(dense, plan_mixes(anatomy, options), options)
        backend.agree(kept.fingerprint(), "the kept units")
        make = functools.partial(type(build())._from_config, smaller_config(config, anatomy, kept))
        smaller = backend.place(smaller_origin(make, dense.model, anatomy, kept, backend, shifts))
        measured = Problem(smaller, anatomy, objective, dense.batches, backend, Progress())
        found[name] = [kept.fingerprint(), digest(backend, smaller), mean_loss(measured, "evaluating")]
    return found


def _batches(build) -> list[dict[str, torch.Tensor]]:
    if build is gemma3n:
        return list(rows())
    if build is not convnext:
        return [continuation({"input_ids": row["input_ids"]}, 0) for row in rows()]
    pixels = torch.randn(5, 2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return [{"pixel_values": pair, "labels": torch.tensor([number % 3, 1])} for number, pair in enumerate(pixels)]


def to_a_latency(backend: Backend, folder: Path) -> dict[str, object]:
    """A whole run to 0.6 of a latency. The main rank really builds what it would time; a parameter takes a second."""

    def seconds(models: Sequence[nn.Module], layers_path: str, *_) -> list[tuple[float, float]]:
        insides = (sum(p.numel() for p in model.get_submodule(layers_path).parameters()) for model in models)
        return [(float(inside), inside + 1000.0) for inside in insides]

    config = Config(
        model={"name": str(folder / "model")},
        data={"name": str(folder / "rows.txt"), "num_samples": 3, "seq_len": 12, "eval_samples": 3},
        prune={"pattern": "units", "goal": "latency=0.6", "multiple_of": 7},
        evaluate={"latency": False},
        output={"dir": str(folder / "latency"), "overwrite": True},
    )
    with mock.patch.object(latency, "_least_in_layers", seconds):
        report = compress(config, backend)
    left = report.latency["looked_at"][-1]["timed"]
    return {"kept": report.selection["fingerprint"], "tried": len(report.selection["tried"]), "left": left}
