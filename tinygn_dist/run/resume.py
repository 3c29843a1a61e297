"""What of a compression run goes into a checkpoint, and how a run goes on from one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torch import nn
from transformers import PretrainedConfig

from tinygn_dist.backends.base import Backend
from tinygn_dist.checkpoints import load
from tinygn_dist.checkpoints.load import Source
from tinygn_dist.checkpoints.run_checkpoint import Checkpoints, Saved
from tinygn_dist.config import Config
from tinygn_dist.data.splits import Splits
from tinygn_dist.errors import Stopped
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.estimate.saved_moments import Parts
from tinygn_dist.maths.schedules import Plan
from tinygn_dist.models.anatomy import Anatomy, Matrix, read_anatomy
from tinygn_dist.run.report import Report
from tinygn_dist.train.gradual_masks import GradualMasks
from tinygn_dist.train.loop import Course, InTraining
from tinygn_dist.train.state_io import (
    read_forward_only,
    read_masks,
    read_step_statistics,
    read_training,
    read_weights,
    saved_origin,
    write_forward_only,
    write_masks,
    write_step_statistics,
    write_weights,
)

log = logging.getLogger(__name__)

_KEPT_OF_REPORT = ("before", "compressed", "selection", "earlier_rounds", "parameters", "reconstruction", "notes")


class Resumable:
    """The part of a run that writes its checkpoints and goes on from one; the rest of it is in pipeline.py."""

    config: Config
    backend: Backend
    source: Source
    splits: Splits
    destination: Path
    digest: str
    model: nn.Module
    anatomy: Anatomy
    matrices: tuple[Matrix, ...]
    plan: Plan
    masks: GradualMasks | None
    protected: tuple[int, ...]
    course: Course
    round: int
    report: Report
    stopping: Callable[[], bool]
    problem: Callable[..., Problem]
    checkpoints: Checkpoints
    best: Checkpoints
    """the weights of the best evaluation so far, named by its step"""
    parts: Parts | None
    saved: Saved | None = None

    @property
    def checkpoint_folder(self) -> Path:
        return Path(self.config.checkpoint.dir or f"{self.destination}.checkpoints").expanduser().resolve()

    def find_checkpoint(self) -> bool:
        """Whether there is one to go on from."""
        config, asked = self.config, self.config.checkpoint
        folder = self.checkpoint_folder
        identity = {
            "config": config.model_dump(mode="json", exclude={"output", "distributed", "checkpoint", "evaluate"}),
            "model": self.digest,
            "data": self.splits.fingerprint(),
        }
        self.checkpoints = Checkpoints(folder, identity, self.backend, asked.keep)
        self.best = Checkpoints(folder.with_name(f"{folder.name}.best"), identity, self.backend, keep=1)
        self.parts = None
        if asked.statistics_every:
            statistics = folder.with_name(f"{folder.name}.statistics")
            self.parts = Parts(asked.statistics_every, statistics, identity, self.backend)
            if asked.resume != "auto":
                self.parts.remove()
        if asked.resume == "auto":
            self.saved = self.checkpoints.newest()
        if self.saved is None:
            self.checkpoints.remove()
            self.best.remove()
        if self.saved:
            log.info("going on from %s", self.saved.path)
        return self.saved is not None

    def restore(self) -> None:
        """The model, masks and report as they were; what only training knows follows when it begins."""
        facts = self.saved.facts
        self.course, self.round = Course(**facts["course"]), facts["round"]
        for key, value in facts["report"].items():
            setattr(self.report, key, value)
        self.report.recovery["resumed_after_steps"] = [*facts["resumed"], self.course.step]
        if self.config.prune.unit_kinds:
            self.protected = tuple(facts["protected"])
            self.place_smaller(type(self.source.config).from_dict(facts["model_config"]))
        else:
            read_weights(self.saved, self.model, self.backend)
            problem = self.problem(self.model, self.splits.calibration)
            self.masks = GradualMasks(
                problem, self.matrices, self.config.prune, self.config.schedule, self.plan, going_on=facts["masks"]
            )
            read_masks(self.saved, self.masks.masks, self.model, self.backend)

    def place_smaller(self, config: PretrainedConfig) -> None:
        """The model of the checkpoint, of which each rank reads the pieces that it holds."""
        bare = self.backend.unwrap(self.model)
        origin = saved_origin(self.saved, lambda: load.rebuild(self.source, config, bare.dtype), bare)
        self.model = self.backend.place(origin)
        self.anatomy = read_anatomy(load.skeleton(self.source, config), needs_units=True)

    def save_or_go_on(self, now: InTraining | None = None) -> None:
        """A checkpoint where one is due or the run is asked to stop, which ends it then."""
        every, step = self.config.checkpoint.every, self.course.step
        stops = now.stopping if now else any(self.backend.everyone(self.stopping()))
        if stops or (every and step % every == 0):
            self.save(now)
        if stops:
            raise Stopped(
                f"stopped after {step} of {self.plan.total} training steps; {self.checkpoints.folder} has it all"
            )

    def save(self, now: InTraining | None) -> None:
        with self.checkpoints.writing(f"{step_name(self.course.step)}-{self.round:03d}") as writer:
            write_weights(writer, self.model, now, self.backend)
            if self.masks:
                write_masks(writer, self.masks.masks, self.model, self.backend)
            if self.masks and (now or self.masks.knows_before_training):
                model, optimizer = (now.model, now.optimizer) if now else (self.model, None)
                write_step_statistics(writer, self.masks, model, optimizer, self.backend)
            if now is not None and now.forward_only is not None:
                write_forward_only(writer, now.forward_only)
            writer.facts |= {
                "course": asdict(self.course),
                "round": self.round,
                "in_training": now is not None,
                "num_ranks": self.backend.num_ranks,
                "masks": self.masks.state() if self.masks else None,
                "protected": self.protected,
                "model_config": self.backend.unwrap(self.model).config.to_dict(),
                "report": {key: getattr(self.report, key) for key in _KEPT_OF_REPORT},
                "resumed": self.report.recovery.get("resumed_after_steps", []),
            }

    def remove_checkpoints(self) -> None:
        """At the end of a run."""
        for kept in (self.checkpoints, self.best, self.parts):
            if kept is not None:
                kept.remove()

    def go_on_training(self, now: InTraining) -> bool:
        """Take over what was saved from training, if it was; a best model that is no longer there is forgotten: the
        evaluations that replaced it come again."""
        resumed = self.saved is not None and self.saved.facts["in_training"]
        if self.saved is not None and self.masks and (resumed or self.masks.knows_before_training):
            read_step_statistics(self.saved, self.masks, now.model, now.optimizer)
        if resumed:
            if now.forward_only is not None:
                read_forward_only(self.saved, now.forward_only)
            else:
                read_training(self.saved, now, self.backend)
            if self.course.best is not None and not self.best.keep_only(step_name(self.course.best)):
                self.course.best = None
        self.saved = None
        return resumed

    def save_best(self, now: InTraining) -> None:
        with self.best.writing(step_name(self.course.step)) as writer:
            write_weights(writer, self.model, now, self.backend, states=False)

    def restore_best(self, now: InTraining) -> None:
        """Before a training ends: into the live weights and any masters behind them."""
        if self.course.best is not None and self.course.best != self.course.step:
            log.info("the best evaluation was that of step %d, whose weights are taken", self.course.best)
            read_weights(self.best.named(step_name(self.course.best)), now.model, self.backend)


def step_name(step: int) -> str:
    return f"{step:08d}"
