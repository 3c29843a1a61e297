"""Training after (and between) compressions: the task loss and the dense model's logits, zeros kept at zero."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from tinygn_dist.backends.base import Backend
from tinygn_dist.config import RecoverConfig
from tinygn_dist.errors import UserError
from tinygn_dist.maths.schedules import Plan
from tinygn_dist.models.anatomy import Matrix
from tinygn_dist.models.objective import Batch, Losses, num_counted
from tinygn_dist.runtime.progress import Progress
from tinygn_dist.step import Constraint, kept_weights
from tinygn_dist.train.distill import student_losses
from tinygn_dist.train.forward_only.loop import ForwardOnly
from tinygn_dist.train.masked_lora import LowRankUpdates, check_targets, is_low_rank
from tinygn_dist.train.teacher_cache import TeacherCache

log = logging.getLogger(__name__)


@dataclass
class Course:
    """How far a training is. losses: of every step so far, the mean per token over all ranks. evaluations: on held-out
    data, by step. best: the step of the best of them with the final masks. probed: of a forward-only training, the step
    of its probes and its learning rate."""

    step: int = 0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    best: int | None = None
    probed: dict[str, Any] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        window = max(1, len(self.losses) // 10)
        first, last = self.losses[:window], self.losses[-window:]
        told = {
            "steps": self.step,
            "tokens": self.tokens,
            "first_loss": sum(first) / window,
            "last_loss": sum(last) / window,
        }
        more = {"evaluations": self.evaluations, "best_step": self.best, "probes": self.probed}
        return told | {name: value for name, value in more.items() if value not in (None, [], {})}


@dataclass(frozen=True)
class InTraining:
    """A model and its optimizer as the backend prepared them, for who saves them or goes on with saved ones."""

    model: nn.Module
    optimizer: Any
    """None in a forward-only training"""
    course: Course
    stopping: bool = False
    """some rank was asked to end the run"""
    forward_only: ForwardOnly | None = None
    """a forward-only training, in place of an optimizer"""


def _nothing(_: InTraining) -> None: ...


@dataclass(frozen=True)
class Recovery:
    """What a training is made of; `run` trains a model for a stretch of the plan's steps."""

    teacher: nn.Module | TeacherCache | None
    task: str
    sequences: Sequence[Batch]
    options: RecoverConfig
    plan: Plan
    backend: Backend
    progress: Progress
    begin: Callable[[InTraining], None] = _nothing
    """called before the first step"""
    stepped: Callable[[InTraining], None] = _nothing
    """called after every step"""
    ended: Callable[[InTraining], None] = _nothing
    """called after the last one, while the optimizer still holds the weights"""
    matrices: Callable[[], Sequence[Matrix]] = tuple
    """the weight matrices that the model has at that time, for what moves them apart from other parameters"""
    stopping: Callable[[], bool] = lambda: False
    """whether this rank was asked to end the run"""

    def run(self, model: nn.Module, constraints: Sequence[Constraint], course: Course, stop: int | None = None) -> None:
        """Train a placed model in place up to step `stop` (the end of the plan by default).

        Runs in fp32 and returns the weights to their dtype: a step of lr * g below half a bf16 ulp would vanish.
        """
        if self.options.forward_only:
            with self.backend.in_fp32(model):
                self._descend(model, constraints, course, self.plan.total if stop is None else stop)
            return
        with self.backend.in_fp32(model):
            model.train()
            self._train(model, constraints, course, self.plan.total if stop is None else stop)
            self.backend.spread_buffers(model)
            model.eval()

    def _train(self, model: nn.Module, constraints: Sequence[Constraint], course: Course, stop: int) -> None:
        updates = self._low_rank(model, constraints) if self.options.train == "lora" else None
        frozen = freeze(model, self.options, self.backend)
        optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], self.options)
        wrapped, prepared = self.backend.prepare(model, optimizer)
        handles = [handle for each in constraints for handle in each.attach(wrapped, prepared)]
        self.begin(InTraining(wrapped, prepared, course))
        with self.progress.bar("recovering", stop - course.step) as advance:
            for batch in windows(self.sequences, self.options, course.step, stop):
                for group in self.backend.inner_optimizer(prepared).param_groups:
                    group["lr"] = self.options.rate * self.plan.learning_rate(course.step)
                loss, count, stopping = self._one_step(wrapped, prepared, batch)
                course.losses.append(loss)
                course.step, course.tokens = course.step + 1, course.tokens + count
                rate = self.options.rate * self.plan.learning_rate(course.step - 1)
                self.backend.track({"recover/loss": loss, "recover/learning_rate": rate}, course.step)
                self.stepped(InTraining(wrapped, prepared, course, stopping))
                advance()
        self.ended(InTraining(wrapped, prepared, course))
        for handle in handles:
            handle.remove()
        if updates:
            updates.take(wrapped, prepared)
        self.backend.release(model, wrapped, prepared)
        if updates:
            updates.merge(model)
        self._check_constraints(model, constraints)  # in the masters that the weights were just read from
        for parameter in frozen:
            parameter.requires_grad_(True)

    def _check_constraints(self, model: nn.Module, constraints: Sequence[Constraint]) -> None:
        for constraint in constraints:
            wrong = constraint.violations(model, self.backend)
            assert wrong == 0, f"{wrong} weights break {type(constraint).__name__} after recovery"

    def _low_rank(self, model: nn.Module, constraints: Sequence[Constraint]) -> LowRankUpdates:
        keep = kept_weights(constraints)
        return LowRankUpdates(model, self.matrices(), keep, self.options.lora_rank, self.options.seed, self.backend)

    def _descend(self, model: nn.Module, constraints: Sequence[Constraint], course: Course, stop: int) -> None:
        """The same by forward passes alone; the model stays in eval mode."""

        def objective(student: nn.Module, batch: Batch) -> Losses:
            return student_losses(student, self.teacher, self.task, batch, self.options)

        keep = kept_weights(constraints)
        training = ForwardOnly(model, self.matrices(), keep, objective, self.options, self.backend)
        now = InTraining(model, None, course, forward_only=training)
        self.begin(now)
        with self.progress.bar("recovering", stop - course.step) as advance:
            for batch in windows(self.sequences, self.options, course.step, stop):
                loss, count = training.step(batch, course.step, self.plan.learning_rate(course.step))
                self._check(loss, training.rate)
                course.losses.append(loss)
                course.step, course.tokens = course.step + 1, course.tokens + count
                self.backend.track({"recover/loss": loss}, course.step)
                self.stepped(replace(now, stopping=any(self.backend.everyone(self.stopping()))))
                advance()
        self.ended(now)
        course.probed = {"step": asdict(training.step_taken), "learning_rate": training.rate}
        if training.rate is None:
            log.warning(
                "no step lowers the loss measurably after %d steps: the weights stayed where they were; raise "
                "recover.steps, batch_size and directions, or set learning_rate",
                course.step,
            )
        self._check_constraints(model, constraints)

    def _check(self, loss: float, rate: float | None = None) -> None:
        if not math.isfinite(loss):
            raise UserError(f"the training loss is {loss}; lower recover.learning_rate ({rate or self.options.rate:g})")

    def _one_step(self, wrapped: nn.Module, optimizer: Any, batch: list[Batch]) -> tuple[float, int, bool]:
        """One optimizer step over `batch`; returns the mean loss per token over all ranks, the tokens, and whether any
        rank is asked to stop."""
        backend, count = self.backend, sum(num_counted(sequence) for sequence in batch)
        mine = [sequence for sequence, _ in backend.dealt(batch)]
        if "pixel_values" in mine[0]:  # of one size, and BatchNorm wants to see many at once
            mine = [{name: torch.cat([image[name] for image in mine]) for name in mine[0]}]
        told = torch.tensor([0.0, float(self.stopping())], dtype=torch.float64)
        for index, sequence in enumerate(mine):
            sequence = {name: value.to(backend.device) for name, value in sequence.items()}
            with backend.no_sync(wrapped, last=index == len(mine) - 1):
                total = student_losses(wrapped, self.teacher, self.task, sequence, self.options).total.sum()
                # gradients are averaged over ranks afterwards; the mean loss per token wants their sum
                backend.backward(total * (backend.num_ranks / count))
            told[0] += total.detach().cpu()
        backend.clip_grad_norm(wrapped.parameters(), self.options.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        backend.sum_over_data([told])
        loss = float(told[0]) / count
        self._check(loss)
        return loss, count, bool(told[1])


def check_training(options: RecoverConfig, matrices: Sequence[Matrix], backend: Backend) -> None:
    """UserError, before work starts, for what this model or this launch cannot do."""
    if not options.steps:
        return
    if options.batch_size % backend.num_ranks:
        ranks = backend.num_ranks
        raise UserError(f"recover.batch_size {options.batch_size} on {ranks} ranks; accepted: a multiple of {ranks}")
    if options.forward_only and options.train == "norms-and-biases" and backend.splits_weights:
        raise UserError(
            f"recover.optimizer {options.optimizer} with train norms-and-biases where ranks hold pieces of weights; "
            "accepted: train all, or one process, DDP, ZeRO-1 or ZeRO-2"
        )
    if options.train == "lora":
        check_targets(matrices)
    if options.optimizer == "adamw-8bit":
        _adamw_8bit()
        if not backend.steps_plain_tensors:
            raise UserError(
                "recover.optimizer adamw-8bit under FSDP2, whose DTensors bitsandbytes does not know; accepted: DDP "
                "or ZeRO; or use adamw"
            )


def make_optimizer(parameters: Sequence[nn.Parameter], options: RecoverConfig) -> torch.optim.Optimizer:
    rate, decay = options.rate, options.weight_decay
    match options.optimizer:
        case "adamw":
            return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=decay)
        case "sgd" | "nesterov":
            nesterov = options.optimizer == "nesterov"
            return torch.optim.SGD(parameters, lr=rate, momentum=0.9, nesterov=nesterov, weight_decay=decay)
        case "adamw-8bit":
            return _adamw_8bit()(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=decay)
    raise AssertionError(options.optimizer)


def _adamw_8bit() -> Callable[..., torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit  # an optional dependency
    except ImportError:
        raise UserError(
            "recover.optimizer adamw-8bit needs the package bitsandbytes; run: pip install bitsandbytes"
        ) from None
    return AdamW8bit


def freeze(model: nn.Module, options: RecoverConfig, backend: Backend) -> list[nn.Parameter]:
    """Parameters that do not train; their flags are to be set back.

    Token embeddings (with a head tied to them) hold no pruned weight and a large share of a small model.
    """
    fixed: dict[int, nn.Parameter] = {}
    if options.train != "all":
        fixed = {
            id(p): p for name, p in model.named_parameters() if len(backend.shape(p)) > 1 and not is_low_rank(name)
        }
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # of convolutional nets
        embeddings = None
    if isinstance(embeddings, nn.Embedding):
        fixed |= {id(p): p for p in embeddings.parameters()}
    chosen = [p for p in fixed.values() if p.requires_grad]
    for parameter in chosen:
        parameter.requires_grad_(False)
    return chosen


def windows(sequences: Sequence[Batch], options: RecoverConfig, start: int, stop: int) -> Iterator[list[Batch]]:
    """The lists of batch_size sequences of steps start..stop."""
    for step, numbers in enumerate(window_numbers(len(sequences), options, stop)):
        if step >= start:
            yield [sequences[number] for number in numbers]


def window_numbers(count: int, options: RecoverConfig, stop: int) -> Iterator[list[int]]:
    """Which of `count` sequences each step before `stop` takes; each epoch in a new order, the same on every rank."""
    generator = torch.Generator().manual_seed(options.seed)
    order: list[int] = []
    for _ in range(stop):
        while len(order) < options.batch_size:
            order += torch.randperm(count, generator=generator).tolist()
        yield order[: options.batch_size]
        del order[: options.batch_size]
