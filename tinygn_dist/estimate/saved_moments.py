"""Statistics gathered some micro-batches at a time and saved in between, so that a run that dies in hours of scoring
goes on where it was.

Every statistic here is a sum over micro-batches in which the order does not matter to the last bit (see moments.py), so
gathering in parts, and going on from a saved part, gives the identical sum.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from tinygn_dist.backends.base import Backend
from tinygn_dist.checkpoints.run_checkpoint import Checkpoints, Saved
from tinygn_dist.estimate.gradient_energy import LossMoments
from tinygn_dist.estimate.input_moments import InputMoments
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths.sums import Moments

Found = TypeVar("Found", Moments, InputMoments, LossMoments)


@dataclass(frozen=True)
class Parts:
    """every: micro-batches, over all ranks, from one saving to the next. folder: seen by every rank. identity: as of
    `Checkpoints`."""

    every: int
    folder: Path
    identity: Mapping[str, Any]
    backend: Backend

    def of(self, name: str) -> Checkpoints:
        return Checkpoints(self.folder / re.sub(r"\W", "-", name), self.identity, self.backend, keep=1)

    def remove(self) -> None:
        Checkpoints(self.folder, self.identity, self.backend, keep=1).remove()

    def save(self, name: str, done: int, found: Moments | InputMoments | LossMoments) -> None:
        with self.of(name).writing(f"{done:08d}") as writer:
            for kind, moments in _moments(found).items():
                for source, total in moments.state_dict().items():
                    writer.add(f"{self.backend.rank}|{kind}|{source}", total)
            source_of = found.source_of if isinstance(found, InputMoments) else {}
            writer.facts |= {"done": done, "source_of": source_of} | self.backend.layout

    def load(self, name: str, empty: Found) -> tuple[int, Found]:
        """(micro-batches done, this rank's sums), none where nothing fits."""
        saved = self.of(name).newest()
        if saved is None or (isinstance(empty, Moments) and not self._same_shards(saved)):
            return 0, empty
        if isinstance(empty, InputMoments):
            empty.source_of |= saved.facts["source_of"]
        ranks, mine = saved.facts["num_ranks"], self.backend.rank
        for kind, moments in _moments(empty).items():
            for key in saved.names(f"0|{kind}|"):
                source = key.split("|", 2)[2]
                total = torch.zeros_like(saved.tensor(key), device=self.backend.device)
                for rank in range(mine, ranks, self.backend.num_ranks):  # what fewer ranks take over, or none
                    total += saved.tensor(f"{rank}|{kind}|{source}").to(self.backend.device)
                moments.add(source, total)
        return saved.facts["done"], empty

    def _same_shards(self, saved: Saved) -> bool:
        """Sums of weight gradients lie in the pieces of one layout."""
        return self.backend.layout.items() <= saved.facts.items()


def in_parts(problem: Problem, name: str, gather: Callable[[Problem], Found], empty: Found) -> Found:
    """`gather(setting)` over all batches of the setting: at once, or part by part with savings in between where
    `setting.parts` says so. empty: what nothing was added to yet."""
    parts: Parts | None = problem.parts
    if parts is None:
        return gather(problem)
    ranks = problem.backend.num_ranks
    size = -(-parts.every // ranks) * ranks  # the same micro-batches meet the same ranks
    done, found = parts.load(name, empty)
    for start in range(done, len(problem.batches), size):
        part = gather(replace(problem, batches=problem.batches[start : start + size], parts=None))
        for kind, moments in _moments(part).items():
            _moments(found)[kind].merge(moments)
        if isinstance(found, InputMoments):
            found.source_of |= part.source_of
        parts.save(name, min(start + size, len(problem.batches)), found)
    return found


def _moments(found: Moments | InputMoments | LossMoments) -> dict[str, Moments]:
    match found:
        case LossMoments():
            return {"grams": found.grams, "rows": found.rows}
        case InputMoments():
            return {"inputs": found.moments}
    return {"gradients": found}
