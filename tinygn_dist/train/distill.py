"""What a compressed model trains towards: its task, the dense model's logits, the dense model's hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers.utils import ModelOutput

from tinygn_dist.config import RecoverConfig
from tinygn_dist.errors import UserError
from tinygn_dist.models.objective import (
    IGNORED,
    Batch,
    Losses,
    answers_of,
    distillation,
    feature_match,
    head_distance,
    head_losses,
    model_inputs,
    token_losses,
)
from tinygn_dist.train.teacher_cache import TeacherCache, coarse_distillation


def student_losses(
    model: nn.Module, teacher: nn.Module | TeacherCache | None, task: str, batch: Batch, options: RecoverConfig
) -> Losses:
    """(1 - d) * task loss + d * divergence from the teacher + h * distance of the hidden states, with d =
    options.distill and h = options.distill_hidden, both 0 without a teacher. Sums over the tokens of each sequence."""
    if task == "feature-extraction":
        return feature_match(model, batch)
    asked = {"use_cache": False} if task in ("causal-lm", "seq2seq-lm") else {}
    if teacher is not None and options.distill_hidden:
        asked["output_hidden_states"] = True
    output = model(**model_inputs(batch), **asked)
    if answers_of(batch).dtype in (torch.bool, torch.float32):
        return _head_losses(output, teacher, batch, options, asked)
    logits, labels = by_token(output.logits, task), batch["labels"]
    labels = labels[:, 1:] if task == "causal-lm" else labels if task == "seq2seq-lm" else labels[:, None]
    own, counts = token_losses(logits, labels), labels != IGNORED
    if teacher is None:
        return own
    if isinstance(teacher, TeacherCache):
        away = coarse_distillation(logits, *teacher.read(batch, logits.device), counts, options.temperature)
        return _mixed(own, away, options)
    with torch.no_grad():
        wanted = teacher(**model_inputs(batch), **asked)
    total = own.total
    if options.distill:
        away = distillation(logits, by_token(wanted.logits, task), counts, options.temperature)
        total = _mixed(own, away, options).total
    if options.distill_hidden:
        hidden = hidden_distance(output.hidden_states[1:], wanted.hidden_states[1:], batch.get("attention_mask"))
        total = total + options.distill_hidden * hidden * own.count
    return Losses(total, own.count)


def _head_losses(
    output: ModelOutput,
    teacher: nn.Module | TeacherCache | None,
    batch: Batch,
    options: RecoverConfig,
    asked: dict[str, bool],
) -> Losses:
    """The same for a head that answers with numbers or several labels."""
    own = head_losses(output.logits, answers_of(batch))
    if teacher is None:
        return own
    if isinstance(teacher, TeacherCache):
        raise UserError(
            "recover.teacher_top_k with a head that answers with numbers or several labels, accepted: 0, as there are "
            "no most probable classes to keep"
        )
    with torch.no_grad():
        wanted = teacher(**model_inputs(batch), **asked)
    if options.distill:
        away = head_distance(output.logits, wanted.logits, answers_of(batch), options.temperature)
        own = _mixed(own, away, options)
    if options.distill_hidden:
        hidden = hidden_distance(output.hidden_states[1:], wanted.hidden_states[1:], batch.get("attention_mask"))
        own = Losses(own.total + options.distill_hidden * hidden * own.count, own.count)
    return own


def _mixed(own: Losses, away: Losses, options: RecoverConfig) -> Losses:
    return Losses((1 - options.distill) * own.total + options.distill * away.total, own.count)


def by_token(logits: torch.Tensor, task: str) -> torch.Tensor:
    """(batch, positions, classes): those that predict a next token, or the one of a whole sequence or image."""
    if task == "seq2seq-lm":
        return logits
    return logits[:, :-1] if task == "causal-lm" else logits[:, None]


def hidden_distance(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], mask: torch.Tensor | None
) -> torch.Tensor:
    """(batch,) fp64: over the layers, the sum of |student - teacher|^2 / |teacher|^2, squares summed over a sequence's
    real tokens (SquareHead, Kurtic et al. 2023). States (batch, seq, hidden) of each layer; mask (batch, seq), 1 for
    real."""
    total = torch.zeros(len(student[0]), dtype=torch.float64, device=student[0].device)
    for own, wanted in zip(student, teacher, strict=True):
        away = (own.float() - wanted.float()).square().sum(-1, dtype=torch.float64)
        size = wanted.float().square().sum(-1, dtype=torch.float64)
        if mask is not None:
            away, size = away * mask, size * mask
        total = total + away.sum(1) / size.sum(1).clamp(min=1e-12)
    return total
