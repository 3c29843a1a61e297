"""The loss as (sum, number of tokens) per sequence, so that sums can be added over ranks and divided once, last.

Per-token losses are computed in fp32 and summed in fp64: finite differences subtract nearly equal numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

IGNORED = -100
AT_ONCE = 1 << 22
"""logits whose softmax is taken at once"""
Batch = dict[str, torch.Tensor]


class Losses(NamedTuple):
    """total: (batch,) float64 sums over tokens, differentiable. count: (batch,) int64 tokens that count. each: fp32
    losses of all that is summed, in any one shape, 0 where a token does not count; None in a mix of losses."""

    total: torch.Tensor
    count: torch.Tensor
    each: torch.Tensor | None = None

    def mean(self) -> torch.Tensor:
        """Mean loss per token over the batch, 0-dim float64."""
        return self.total.sum() / self.count.sum().clamp(min=1)


def real_tokens(batch: Batch) -> torch.Tensor | None:
    """(batch * seq,) bool, False at padding; None without padding."""
    mask = batch.get("attention_mask")
    return None if mask is None else mask.flatten().bool()


def last_logits_only(model: nn.Module) -> dict[str, int]:
    """Forward arguments that spare a causal LM the logits of all positions but one, for who reads hidden states."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


Objective = Callable[[nn.Module, Batch], Losses]


def model_inputs(batch: Batch) -> dict[str, Any]:
    """What the model's forward takes; labels stay out so that it does not compute a loss of its own."""
    return {name: value for name, value in batch.items() if name not in ("labels", "reference", "sequence")}


def causal_lm(model: nn.Module, batch: Batch) -> Losses:
    """Cross-entropy of each next token. labels: (batch, seq) int64, IGNORED where a token does not count."""
    logits = model(**model_inputs(batch), use_cache=False).logits
    # the last token predicts nothing: shifting the labels spares a copy of all logits but its own
    return token_losses(logits, F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED))


def decoder_start(config: Any) -> int:
    """The token that the targets of an encoder-decoder begin with."""
    named = (getattr(config, key, None) for key in ("decoder_start_token_id", "pad_token_id"))
    return next((token for token in named if token is not None), 0)


def continuation(batch: Batch, start: int) -> Batch:
    """Windows of text in two halves: an encoder-decoder reads the first and is to write the second (the prefix language
    modelling of Raffel et al. 2020). batch: (batch, seq) without padding; start: what the targets begin with."""
    half = batch["input_ids"].shape[1] // 2
    source, target = batch["input_ids"][:, :half], batch["input_ids"][:, half:]
    shifted = torch.cat([torch.full_like(target[:, :1], start), target[:, :-1]], 1)
    return {"input_ids": source, "decoder_input_ids": shifted, "labels": target}


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> Losses:
    """Cross-entropy of (batch, seq, vocab) logits against (batch, seq) labels, summed per sequence."""
    flat = _CrossEntropy.apply(logits.flatten(0, 1), labels.flatten())
    return Losses(flat.view(labels.shape).sum(1, dtype=torch.float64), (labels != IGNORED).sum(1), flat)


class _CrossEntropy(torch.autograd.Function):
    """(tokens,) fp32 losses of (tokens, vocab) logits, some tokens at a time.

    The logits of a language model outweigh all layers' activations. Autograd would keep as much again for their
    softmax, once more for its gradient, and for bf16 logits all of it and a copy in fp32; here nothing is kept but the
    logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits, labels)
        parts = [
            F.cross_entropy(part.float(), label, ignore_index=IGNORED, reduction="none")
            for part, label in _at_once(logits, labels)
        ]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, labels = ctx.saved_tensors
        parts = (_slopes(*some) for some in _at_once(logits, labels[:, None], slope[:, None]))
        if torch.is_grad_enabled():  # a gradient of this gradient is to be taken
            return torch.cat(list(parts)).to(logits.dtype), None
        found = torch.empty_like(logits)
        for (place,), part in zip(_at_once(found), parts, strict=True):
            place.copy_(part)
        return found, None


def _slopes(logits: torch.Tensor, labels: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """(n, vocab) fp32 gradients of n losses by their logits. labels, slope: (n, 1)."""
    away = logits.float().softmax(1).scatter_add(1, labels.clamp(min=0), -torch.ones_like(slope))
    return away * (slope * (labels != IGNORED))


def _at_once(logits: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    step = max(1, AT_ONCE // logits.shape[1])
    return zip(*(rows.split(step) for rows in (logits, *others)), strict=True)


def seq2seq_lm(model: nn.Module, batch: Batch) -> Losses:
    """Cross-entropy of each target token given the source. labels: (batch, targets) int64; decoder_input_ids: the same,
    one place later."""
    return token_losses(model(**model_inputs(batch), use_cache=False).logits, batch["labels"])


def classification(model: nn.Module, batch: Batch) -> Losses:
    """Loss of a head's answer for each sequence or image, as `head_losses`; where the batch has no labels, the squared
    distance of the scores from the dense model's. batch["reference"]: (batch, outputs) its scores."""
    return head_losses(model(**model_inputs(batch)).logits, answers_of(batch))


def answers_of(batch: Batch) -> torch.Tensor:
    """What a head is to answer: the labels, or the dense model's scores."""
    return batch["labels"] if "labels" in batch else batch["reference"]


def head_losses(logits: torch.Tensor, labels: torch.Tensor) -> Losses:
    """Losses of (batch, outputs) logits; the dtype of the labels says of which kind, as `problem_type` does in
    transformers.

    int64 (batch,): cross-entropy of one class. bool (batch, outputs): binary cross-entropy of several, their mean.
    Floats (batch,) or (batch, outputs): squared error, the mean over the outputs.
    """
    if labels.is_floating_point():
        losses = (logits.float() - labels.float().view_as(logits)).square().mean(1)
    elif labels.dtype == torch.bool:
        losses = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none").mean(1)
    else:
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
    return Losses(losses.double(), torch.ones(len(labels), dtype=torch.int64, device=labels.device), losses)


def head_distance(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float) -> Losses:
    """How far a head's (batch, outputs) logits are from the teacher's, for the same kinds of labels: the divergence of
    classes, the mean divergence of yes and no for each of several, and the mean squared distance of numbers."""
    if labels.is_floating_point():
        return head_losses(student, teacher.detach())
    if labels.dtype == torch.bool:
        student, teacher = (torch.stack([logits, torch.zeros_like(logits)], -1) for logits in (student, teacher))
        counts = torch.ones_like(student[..., 0], dtype=torch.bool)
        away = distillation(student, teacher, counts, temperature)
        return Losses(away.total / counts.shape[1], torch.ones_like(away.count))
    counts = torch.ones(len(labels), 1, dtype=torch.bool, device=labels.device)
    return distillation(student[:, None], teacher[:, None], counts, temperature)


def num_counted(batch: Batch) -> int:
    """Tokens (or items) of a batch that its loss is a mean over."""
    if "labels" not in batch or batch["labels"].dim() == 1 or batch["labels"].dtype != torch.int64:
        return len(next(iter(batch.values())))
    if "reference" in batch:
        return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def feature_match(model: nn.Module, batch: Batch) -> Losses:
    """Squared distance of each token's features from the dense model's, relative to their squared length.

    For encoders without a head: 0 at the dense model. batch["reference"]: (batch, seq, hidden) dense features.
    """
    features, reference = model(**model_inputs(batch)).last_hidden_state.float(), batch["reference"].float()
    away = (features - reference).square().sum(-1) / reference.square().sum(-1).clamp(min=1e-12)
    counts = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(away)
    away = away * counts
    return Losses(away.sum(1, dtype=torch.float64), counts.sum(1).long(), away)


def add_reference(model: nn.Module, batches: list[Batch], device: torch.device) -> list[Batch]:
    """The batches with the model's present features (or its head's scores) as their reference, which waits where the
    batches do. device: the model's."""
    made = []
    with torch.no_grad():
        for batch in batches:
            there = {name: value.to(device) for name, value in model_inputs(batch).items()}
            output = model(**there)
            reference = output.logits.float() if "logits" in output else output.last_hidden_state
            made.append({**batch, "reference": reference.to(next(iter(batch.values())).device)})
    return made


def needs_reference(task: str, batches: Sequence[Batch]) -> bool:
    """Whether the loss is a distance to the dense model: of encoders without a head, and of scores without labels."""
    return task == "feature-extraction" or any("labels" not in batch for batch in batches)


def distillation(student: torch.Tensor, teacher: torch.Tensor, counts: torch.Tensor, temperature: float) -> Losses:
    """Divergence KL(teacher || student) per counted token, times temperature^2 (Hinton et al. 2015, so that its
    gradient keeps the scale of the task's). Logits (batch, seq, vocab), counts (batch, seq) bool."""
    log_student = F.log_softmax(student.float() / temperature, -1)
    log_teacher = F.log_softmax(teacher.float() / temperature, -1)
    away = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1) * temperature**2
    away = away * counts
    return Losses(away.sum(1, dtype=torch.float64), counts.sum(1), away)


def objective_of(task: str) -> Objective:
    return {
        "causal-lm": causal_lm,
        "seq2seq-lm": seq2seq_lm,
        "sequence-classification": classification,
        "image-classification": classification,
        "feature-extraction": feature_match,
    }[task]
