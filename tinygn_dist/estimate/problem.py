"""What every estimate is made on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from accelerate.hooks import ModelHook
from torch import nn

from tinygn_dist.backends.base import Backend
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.hooks import attached
from tinygn_dist.models.anatomy import Anatomy
from tinygn_dist.models.objective import Batch, Losses, Objective, last_logits_only, model_inputs, real_tokens
from tinygn_dist.runtime.progress import Progress

Output = TypeVar("Output")


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch that this rank works on.

    batch: its tensors, on the device. number: its place among the problem's micro-batches. sequences: the places of its
    sequences among all of them. counts: False where it runs only because the forward of a sharded model needs every
    rank; nothing of it may be added to a sum.
    """

    batch: Batch
    number: int
    sequences: slice
    counts: bool

    @property
    def real_tokens(self) -> torch.Tensor | None:
        """(tokens,) bool of the flattened micro-batch, False at padding; None where there is none."""
        return real_tokens(self.batch)


@dataclass(frozen=True)
class Problem:
    """A model as the backend prepared it, its anatomy, the loss, and micro-batches on the CPU (equal on every rank).
    notes: where a stage leaves what the report should say."""

    model: nn.Module
    anatomy: Anatomy
    objective: Objective
    batches: Sequence[Batch]
    backend: Backend
    progress: Progress
    notes: list[str] = field(default_factory=list)
    parts: Any = None
    """gathering.Parts where statistics are saved on the way"""

    @property
    def bare(self) -> nn.Module:
        """The model without wrappers: names and modules as in its checkpoint."""
        return self.backend.unwrap(self.model)

    @property
    def num_sequences(self) -> int:
        return sum(map(batch_size, self.batches))

    @property
    def num_turns(self) -> int:
        """How many micro-batches this rank runs."""
        return len(self.backend.dealt(self.batches))

    def on_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.backend.device) for name, value in batch.items()}

    def micro_batches(self, doing: str | None = None) -> Iterator[MicroBatch]:
        """This rank's share of the micro-batches, one after the other. doing: what the progress bar says; None for no
        bar."""
        mine = self.backend.dealt(range(len(self.batches)))
        with (self.progress if doing else Progress()).bar(doing or "", len(mine)) as advance:
            for number, counts in mine:
                yield self.micro_batch(number, counts)
                advance()

    def micro_batch(self, number: int, counts: bool) -> MicroBatch:
        first = sum(map(batch_size, self.batches[:number]))
        sequences = slice(first, first + batch_size(self.batches[number]))
        return MicroBatch(self.on_device(self.batches[number]), number, sequences, counts)

    def forwards(
        self,
        run: Callable[[Batch], Output],
        hooks: Iterable[tuple[nn.Module, ModelHook]] = (),
        doing: str | None = None,
    ) -> Iterator[tuple[MicroBatch, Output]]:
        """The calibration loop: each of this rank's micro-batches with what `run` returns for it, without gradients.
        Hooks are attached while it runs, and only then."""
        hooks = list(hooks)
        for micro_batch in self.micro_batches(doing):
            with torch.no_grad(), attached(hooks):
                output = run(micro_batch.batch)
            yield micro_batch, output

    def losses(self, batch: Batch) -> Losses:
        return self.objective(self.model, batch)

    def layers_alone(self, batch: Batch) -> None:
        """A forward whose hooks see everything, and whose logits nobody needs."""
        self.model(**model_inputs(batch), **last_logits_only(self.bare))

    def first(self, num_sequences: int) -> Problem:
        """The same on the first micro-batches that hold at least `num_sequences` sequences."""
        count, chosen = 0, []
        for batch in self.batches:
            if count >= num_sequences:
                break
            chosen.append(batch)
            count += batch_size(batch)
        return replace(self, batches=chosen)

    def split(self, num_sequences: int) -> tuple[Problem, Problem]:
        """All but the last micro-batches, and the last ones, which hold at least `num_sequences` sequences, or half of
        the micro-batches where that is less. Raises UserError when there is only one."""
        if len(self.batches) < 2:
            raise UserError(
                "got one micro-batch of calibration data, and some must be held out; raise data.num_samples"
            )
        count = 1
        while count < len(self.batches) // 2 and sum(map(batch_size, self.batches[-count:])) < num_sequences:
            count += 1
        return replace(self, batches=self.batches[:-count]), replace(self, batches=self.batches[-count:])


def batch_size(batch: Batch) -> int:
    return len(next(iter(batch.values())))
