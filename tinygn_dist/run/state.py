"""What a run knows, from its first check to its report: one value that its functions read and change.

It is also all that a step sees of the run (`step.Live`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinygn_dist.backends.base import Backend
from tinygn_dist.checkpoints.companions import Companions
from tinygn_dist.checkpoints.load import Source
from tinygn_dist.checkpoints.run_checkpoint import Checkpoints, Saved
from tinygn_dist.checkpoints.sharded_load import placed
from tinygn_dist.config import Config
from tinygn_dist.data.splits import Splits
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.estimate.saved_moments import Parts
from tinygn_dist.models.anatomy import Anatomy
from tinygn_dist.models.objective import Batch, Objective
from tinygn_dist.run.report import Report
from tinygn_dist.runtime.progress import Progress
from tinygn_dist.runtime.stage_timer import Stages
from tinygn_dist.step import Constraint, Request, Step
from tinygn_dist.train.loop import Course
from tinygn_dist.train.teacher_cache import TeacherCache


@dataclass
class RunState:
    """Filled from top to bottom: what was asked for, what checking found, the live model, where the run is."""

    config: Config
    backend: Backend
    stopping: Callable[[], bool] = lambda: False
    """whether this rank was asked to stop"""
    progress: Progress = field(default_factory=Progress)
    stage: Stages = field(default_factory=Stages)

    source: Source | None = None
    request: Request | None = None
    steps: list[Step] = field(default_factory=list)
    destination: Path | None = None
    objective: Objective | None = None

    model: nn.Module | None = None
    """live, as the backend placed it"""
    anatomy: Anatomy | None = None
    """of the live model"""
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    """of the tensors to write, by name"""
    layers: Sequence[int] = ()
    left_by: dict[int, Constraint] = field(default_factory=dict)
    """constraints by the number of the step that left them"""
    beside: Companions = Companions()
    """what goes into the output beside the weights, the tokenizer or image processor among it"""
    digest: str = ""
    size: dict[str, int] = field(default_factory=dict)
    """of the dense model: parameters, and bytes on disk"""
    teacher: nn.Module | TeacherCache | None = None
    splits: Splits | None = None
    report: Report | None = None

    next: int = 0
    """the number of the step that comes next, or is under way"""
    course: Course = field(default_factory=Course)
    """of the training that is under way, or was the last"""
    checkpoints: Checkpoints | None = None
    best: Checkpoints | None = None
    """the weights of the best evaluation so far, named by its step"""
    saved: Saved | None = None
    """the checkpoint that this run goes on from, until all of it is taken up"""

    @property
    def processor(self) -> Any:
        """The tokenizer, or the image processor."""
        return self.beside.processor

    @property
    def constraints(self) -> Sequence[Constraint]:
        return tuple(self.left_by.values())

    def problem(self, batches: Sequence[Batch] | None = None, model: nn.Module | None = None) -> Problem:
        """The live model (or another one of its shape) on the calibration data (or other batches)."""
        return Problem(
            self.model if model is None else model,
            self.anatomy,
            self.objective,
            self.splits.calibration if batches is None else batches,
            self.backend,
            self.progress,
            self.report.notes,
            self.saved_statistics(),
        )

    def dense(self) -> Problem:
        """The dense model on the calibration data: the teacher, or placed anew."""
        model = self.teacher if isinstance(self.teacher, nn.Module) else placed(self.source, self.backend)[0]
        problem = self.problem(model=model)
        return Problem(
            model, self.request.anatomy, problem.objective, problem.batches, self.backend, self.progress, problem.notes
        )

    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be of this run."""
        asked = self.config.model_dump(mode="json", exclude={"output", "distributed", "checkpoint", "evaluate"})
        return {"config": asked, "model": self.digest, "data": self.splits.fingerprint()}

    def saved_statistics(self) -> Parts | None:
        """Where the step that is under way saves what it has measured so far."""
        every = self.config.checkpoint.statistics_every
        if not every or self.checkpoints is None:
            return None
        folder = self.statistics_folder / f"step-{self.next}"
        return Parts(every, folder, self.identity(), self.backend)

    @property
    def checkpoint_folder(self) -> Path:
        return Path(self.config.checkpoint.dir or f"{self.destination}.checkpoints").expanduser().resolve()

    @property
    def statistics_folder(self) -> Path:
        return self.checkpoints.folder.with_name(f"{self.checkpoints.folder.name}.statistics")
