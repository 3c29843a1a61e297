"""What every estimate is made on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from tinygn_dist.backends.base import Backend
from tinygn_dist.config import PruneConfig
from tinygn_dist.errors import UserError
from tinygn_dist.models.anatomy import Anatomy
from tinygn_dist.models.objective import Batch, Objective
from tinygn_dist.runtime.progress import Progress


@dataclass(frozen=True)
class ProbeCosts:
    """What probes may take. together: settings of one layer's gates in one forward. cache_bytes: layer inputs that are kept
    where the layers run, and again in CPU memory; the rest wait in files."""

    together: int = 1
    cache_bytes: float = float("inf")


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
    costs: ProbeCosts = ProbeCosts()

    @property
    def bare(self) -> nn.Module:
        """The model without wrappers: names and modules as in its checkpoint."""
        return self.backend.unwrap(self.model)

    def on_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.backend.device) for name, value in batch.items()}

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


def costs_of(options: PruneConfig) -> ProbeCosts:
    """As configured."""
    room = float("inf") if options.probe_cache_gib is None else options.probe_cache_gib * 2**30
    return ProbeCosts(options.probe_together, room)
