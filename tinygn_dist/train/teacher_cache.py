"""The dense model's most probable tokens on disk, so that it need not be there while the compressed one trains."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from tinygn_dist.backends.base import Backend
from tinygn_dist.errors import UserError
from tinygn_dist.models.objective import Batch, Losses, model_inputs
from tinygn_dist.runtime.progress import Progress

SEQUENCE = "sequence"
"""key of a batch: (batch,) int64, the numbers of its sequences in the cache"""
_BYTES = 8  # fp32 log-probability and int32 id
_DONE = "complete.json"
_LEAST_TAIL = 1e-6


class TeacherCache:
    """One file per training sequence, in a folder that every rank sees. identity: plain values that decide its
    content."""

    def __init__(self, folder: Path, top_k: int, temperature: float, identity: Mapping[str, Any]) -> None:
        self.folder, self.top_k, self.temperature = folder, top_k, temperature
        self._identity = json.loads(json.dumps({"top_k": top_k, "temperature": temperature, **identity}))

    def check_size(self, positions: int, cap_gib: float) -> None:
        """UserError when `positions` predictions do not fit into the cap."""
        size = positions * self.top_k * _BYTES / 2**30
        if size > cap_gib:
            raise UserError(
                f"recover.teacher_cache_gib {cap_gib:g}, and {positions:,} predictions of {self.top_k} tokens take "
                f"{size:.3g}; raise it, lower recover.teacher_top_k or recover.steps, or leave it out to keep the "
                "teacher in memory"
            )

    def is_complete(self, backend: Backend) -> bool:
        """Whether it was written to its end for the same model, data and options."""
        found = False
        if backend.is_main and (self.folder / _DONE).is_file():
            found = json.loads((self.folder / _DONE).read_text(encoding="utf-8")) == self._identity
        return backend.everyone(found)[0]

    def write(
        self,
        model: nn.Module,
        numbered: Sequence[tuple[int, Batch]],
        positions: Callable[[torch.Tensor], torch.Tensor],
        backend: Backend,
        progress: Progress,
    ) -> None:
        """Run the dense model over the numbered sequences, each on one rank. positions: which of the logits count."""
        backend.barrier()
        with backend.together("making room for the teacher's logits"):
            if backend.is_main:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
        mine = backend.dealt(numbered)
        with torch.no_grad(), progress.bar("asking the teacher", len(mine)) as advance:
            for (number, batch), real in mine:
                batch = {name: value.to(backend.device) for name, value in batch.items()}
                logits = positions(model(**model_inputs(batch)).logits)
                if real:
                    self._save(number, logits[0])
                advance()
        backend.barrier()
        with backend.together("writing the teacher's logits"):
            if backend.is_main:
                (self.folder / _DONE).write_text(json.dumps(self._identity), encoding="utf-8")
        backend.barrier()

    def _save(self, number: int, logits: torch.Tensor) -> None:
        values, ids = F.log_softmax(logits.float() / self.temperature, -1).topk(min(self.top_k, logits.shape[-1]))
        path = self._path(number)
        save_file({"values": values.cpu(), "ids": ids.int().cpu()}, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)

    def read(self, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, positions, k) fp32 log-probabilities at the cache's temperature, and int64 token ids."""
        stored = [load_file(self._path(number)) for number in batch[SEQUENCE].tolist()]
        values, ids = (torch.stack([one[name] for one in stored]).to(device) for name in ("values", "ids"))
        return values, ids.long()

    def remove(self, backend: Backend) -> None:
        backend.barrier()
        if backend.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.safetensors"


def coarse_distillation(
    student: torch.Tensor, values: torch.Tensor, ids: torch.Tensor, counts: torch.Tensor, temperature: float
) -> Losses:
    """The divergence of `objective.distillation` with all tokens but the teacher's k most probable ones taken as one: a
    lower bound of it, the same when k is the whole vocabulary.

    student: (batch, positions, vocab) logits. values: (batch, positions, k) the teacher's log-probabilities at the same
    temperature. ids: (batch, positions, k) their tokens. counts: (batch, positions) bool.
    """
    log_student = F.log_softmax(student.float() / temperature, -1).gather(-1, ids).double()
    values = values.double()
    tail, own_tail = (1 - logs.exp().sum(-1) for logs in (values, log_student))
    away = (values.exp() * (values - log_student)).sum(-1)
    rest = tail.clamp(min=_LEAST_TAIL) * (tail.clamp(min=_LEAST_TAIL) / own_tail.clamp(min=_LEAST_TAIL)).log()
    away = (away + torch.where(tail > _LEAST_TAIL, rest, 0.0)) * temperature**2
    return Losses((away * counts).sum(1), counts.sum(1))
