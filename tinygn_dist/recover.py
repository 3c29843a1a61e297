"""Fine-tuning after compression: AdamW on the task loss and on the dense model's logits, zeros kept at zero."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tinygn_dist.backends.base import Backend
from tinygn_dist.config import RecoverConfig
from tinygn_dist.errors import UserError
from tinygn_dist.masking import Masks
from tinygn_dist.objective import IGNORED, Batch, Losses, distillation, feature_match, model_inputs, token_losses
from tinygn_dist.progress import Progress
from tinygn_dist.schedule import warmup_linear

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recovered:
    steps: int
    tokens: int
    first_loss: float
    last_loss: float


def check_batch(options: RecoverConfig, num_ranks: int) -> None:
    """UserError, before work starts, when a step cannot be dealt evenly."""
    if options.steps and options.batch_size % num_ranks:
        raise UserError(
            f"recover.batch_size {options.batch_size} on {num_ranks} ranks; accepted: a multiple of {num_ranks}"
        )


def recover(
    model: nn.Module,
    teacher: nn.Module | None,
    task: str,
    sequences: Sequence[Batch],
    masks: Masks | None,
    options: RecoverConfig,
    backend: Backend,
    progress: Progress,
) -> Recovered:
    """Train the model in place for `options.steps` steps. Runs in fp32 and returns the weights to their dtype: a step
    of lr * g below half a bf16 ulp would vanish."""
    with backend.in_fp32(model):
        model.train()
        losses, tokens = _train(model, teacher, task, sequences, masks, options, backend, progress)
        model.eval()
    window = max(1, len(losses) // 10)
    return Recovered(options.steps, tokens, sum(losses[:window]) / window, sum(losses[-window:]) / window)


def _train(model, teacher, task, sequences, masks, options, backend, progress) -> tuple[list[float], int]:
    """The loss of each step, and the tokens of them all."""
    frozen = _freeze_embeddings(model) if not options.train_embeddings else []
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=options.weight_decay
    )
    wrapped, prepared = backend.prepare(model, optimizer)
    handle = masks.enforce(wrapped, prepared, backend) if masks else None
    losses, tokens = [], 0
    with progress.bar("recovering", options.steps) as advance:
        for step, batch in enumerate(_steps(sequences, options)):
            for group in backend.inner_optimizer(prepared).param_groups:
                group["lr"] = options.learning_rate * warmup_linear(step, options.steps)
            loss, count = _one_step(wrapped, teacher, task, batch, prepared, options, backend)
            losses.append(loss)
            tokens += count
            backend.track({"recover/loss": loss}, step)
            advance()
    if handle is not None:
        handle.remove()
    backend.release(model, wrapped, prepared)
    if masks:  # in the masters that the weights were just read from
        wrong = masks.violations(model, backend)
        assert wrong == 0, f"{wrong} masked weights are not zero after recovery"
    for parameter in frozen:
        parameter.requires_grad_(True)
    return losses, tokens


def _steps(sequences: Sequence[Batch], options: RecoverConfig) -> Iterator[list[Batch]]:
    """options.steps lists of batch_size sequences, each epoch in a new order, the same on every rank."""
    generator = torch.Generator().manual_seed(options.seed)
    order: list[int] = []
    for _ in range(options.steps):
        while len(order) < options.batch_size:
            order += torch.randperm(len(sequences), generator=generator).tolist()
        yield [sequences[i] for i in order[: options.batch_size]]
        del order[: options.batch_size]


def _one_step(
    wrapped, teacher, task: str, batch: list[Batch], optimizer, options, backend: Backend
) -> tuple[float, int]:
    """One optimizer step over `batch`; returns the mean loss per token over all ranks, and the tokens."""
    count = sum(_num_counted(sequence) for sequence in batch)
    mine = [sequence for sequence, _ in backend.share(batch)]
    seen = torch.zeros(1, dtype=torch.float64)
    for index, sequence in enumerate(mine):
        sequence = {name: value.to(backend.device) for name, value in sequence.items()}
        with backend.no_sync(wrapped, last=index == len(mine) - 1):
            total = student_losses(wrapped, teacher, task, sequence, options).total.sum()
            # gradients are averaged over ranks afterwards; the mean loss per token wants their sum
            backend.backward(total * (backend.num_ranks / count))
        seen += total.detach().cpu()
    backend.clip_grad_norm(wrapped.parameters(), options.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    backend.sum_over_data([seen])
    loss = float(seen) / count
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise UserError(f"the training loss is {loss}; lower recover.learning_rate ({options.learning_rate:g})")
    return loss, count


def student_losses(
    model: nn.Module, teacher: nn.Module | None, task: str, batch: Batch, options: RecoverConfig
) -> Losses:
    """(1 - d) * task loss + d * divergence from the teacher, d = options.distill (0 without a teacher)."""
    if task == "feature-extraction":
        return feature_match(model, batch)
    logits = model(**model_inputs(batch), **({"use_cache": False} if task == "causal-lm" else {})).logits
    labels = batch["labels"]
    if task == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
        own = token_losses(logits, labels)
    else:
        own = token_losses(logits[:, None], labels[:, None])
        logits, labels = logits[:, None], labels[:, None]
    if teacher is None:
        return own
    with torch.no_grad():
        wanted = teacher(**model_inputs(batch)).logits
    wanted = wanted[:, :-1] if task == "causal-lm" else wanted[:, None]
    away = distillation(logits, wanted, labels != IGNORED, options.temperature)
    return Losses((1 - options.distill) * own.total + options.distill * away.total, own.count)


def _num_counted(batch: Batch) -> int:
    if "reference" in batch:
        return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
    labels = batch["labels"]
    return int((labels[:, 1:] != IGNORED).sum()) if labels.dim() == 2 else len(labels)


def _freeze_embeddings(model: nn.Module) -> list[nn.Parameter]:
    """Token embeddings (with a head tied to them) hold no pruned weight and a large share of a small model."""
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    frozen = [p for p in embeddings.parameters() if p.requires_grad] if isinstance(embeddings, nn.Embedding) else []
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen
