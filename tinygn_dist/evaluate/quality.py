"""Perplexity, accuracy, feature distance, size and speed. Sums are reduced, then divided once."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tinygn_dist.backends.base import Backend
from tinygn_dist.config import EvaluateConfig
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.models.objective import Batch, model_inputs
from tinygn_dist.runtime.cpu_matmul import stock_matmul


def mean_loss(problem: Problem, doing: str) -> float:
    """Mean loss per token over all sequences, each counted once, whatever the number of ranks. Raises as
    `sequence_losses`."""
    totals, counts = sequence_losses(problem, doing)
    return float(totals.sum() / counts.sum())


def sequence_losses(problem: Problem, doing: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(sequences,) fp64 summed losses, and tokens that count, on every rank.

    Raises UserError naming the first sequence whose loss is NaN or inf.
    """
    totals, counts = torch.zeros(2, problem.num_sequences, dtype=torch.float64)
    for micro_batch, losses in problem.forwards(problem.losses, doing=doing):
        if micro_batch.counts:
            totals[micro_batch.sequences] = losses.total.cpu()
            counts[micro_batch.sequences] = losses.count.double().cpu()
    problem.backend.sum_over_data([totals, counts])
    if not totals.isfinite().all():
        bad = int((~totals.isfinite()).nonzero()[0])
        raise UserError(f"the loss of sequence {bad} is NaN or inf; check the model's dtype and the data")
    if not counts.sum():
        raise UserError(
            f"none of {len(counts)} sequences has a token or an answer that counts, so there is no loss; check the "
            "labels"
        )
    return totals, counts


def quality(problem: Problem, task: str, doing: str) -> dict[str, float]:
    """The figures of a task: loss and perplexity; loss and accuracy; or feature distance."""
    loss = mean_loss(problem, doing)
    if task in ("causal-lm", "seq2seq-lm"):
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if task == "feature-extraction":
        return {"feature_distance": loss, "embedding_similarity": _embedding_similarity(problem)}
    if "labels" not in problem.batches[0]:
        return {"score_distance": loss}
    return {"loss": loss} | head_figures(*_answers(problem))


def _answers(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, outputs) fp64 logits of a head and the labels that belong to them, on every rank."""
    labels = torch.cat([batch["labels"] for batch in problem.batches])
    logits = torch.zeros(len(labels), problem.bare.config.num_labels, dtype=torch.float64)
    for micro_batch, found in problem.forwards(lambda batch: problem.model(**model_inputs(batch)).logits):
        if micro_batch.counts:
            logits[micro_batch.sequences] = found.double().cpu()
    problem.backend.sum_over_data([logits])
    return logits, labels


def head_figures(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """(rows, outputs) logits against labels, whose dtype says of which kind (objective.head_losses): the accuracy of
    one class; of several labels the micro-averaged F1 and the share of rows that are right whole; of numbers the
    correlation of ranks (Spearman's) over all outputs, left out where either side is constant."""
    if labels.is_floating_point():
        found, wanted = logits.flatten(), labels.flatten().double()
        constant = len(found) < 2 or not found.std() or not wanted.std()
        return {} if constant else {"spearman": float(torch.corrcoef(torch.stack([ranks(found), ranks(wanted)]))[0, 1])}
    if labels.dtype == torch.bool:
        chosen = logits > 0
        right, either = float((chosen & labels).sum()), float(chosen.sum() + labels.sum())
        return {"f1": 2 * right / max(either, 1.0), "accuracy": float((chosen == labels).all(1).double().mean())}
    return {"accuracy": float((logits.argmax(-1) == labels).double().mean())}


def ranks(values: torch.Tensor) -> torch.Tensor:
    """(n,) fp64 ranks from 0; equal values have their mean rank."""
    _, group, sizes = values.unique(sorted=True, return_inverse=True, return_counts=True)
    ends = sizes.cumsum(0).double()
    return (ends - (sizes.double() + 1) / 2)[group]


def _embedding_similarity(problem: Problem) -> float:
    """Mean cosine between the dense model's and this model's sentence embeddings (means over real tokens)."""
    total = torch.zeros(2, dtype=torch.float64)
    for micro_batch, output in problem.forwards(lambda batch: problem.model(**model_inputs(batch))):
        if micro_batch.counts:
            batch, features = micro_batch.batch, output.last_hidden_state.float()
            tokens = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[..., None]
            own, dense = ((each * tokens).sum(1) for each in (features, batch["reference"].float()))
            total += torch.tensor([float(F.cosine_similarity(own, dense).double().sum()), len(own)])
    problem.backend.sum_over_data([total])
    return float(total[0] / total[1])


def speed(model: nn.Module, task: str, example: Batch, options: EvaluateConfig, backend: Backend) -> dict[str, Any]:
    """Prefill and decode tokens per second of one sequence (items per second for other tasks), on the main rank alone
    while the others wait (or take part, where the weights are sharded); median of three, after one warm-up. The number
    of threads is part of the figure."""
    bare = backend.unwrap(model)

    def measure() -> dict[str, Any]:
        with torch.no_grad(), stock_matmul():
            if task == "causal-lm":
                figures = _language_speed(bare, example, options, backend.device)
            else:
                batch = {k: v.to(backend.device) for k, v in model_inputs(example).items()}
                seconds = _median_seconds(lambda: bare(**batch))
                figures = {"items_per_second": round(len(next(iter(batch.values()))) / seconds, 2)}
        return figures | {"threads": torch.get_num_threads(), "device": str(backend.device)}

    return backend.on_main(measure) or {}


def _language_speed(
    model: nn.Module, example: Batch, options: EvaluateConfig, device: torch.device
) -> dict[str, float]:
    row = example["input_ids"][:1].to(device)
    prompt = row.repeat(1, -(-options.prefill_tokens // row.shape[1]))[:, : options.prefill_tokens]
    prefill = _median_seconds(lambda: model(input_ids=prompt, use_cache=True, logits_to_keep=1))

    def decode() -> None:
        length = options.decode_tokens
        model.generate(
            prompt[:, :8],
            attention_mask=torch.ones_like(prompt[:, :8]),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            min_new_tokens=length,
            max_new_tokens=length,
            pad_token_id=0,
        )

    return {
        "prefill_tokens_per_second": round(options.prefill_tokens / prefill, 1),
        "decode_tokens_per_second": round(options.decode_tokens / _median_seconds(decode), 1),
    }


def _median_seconds(work) -> float:
    work()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
