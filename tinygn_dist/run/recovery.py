"""The part of a compression run that trains (block by block; as a whole, with rounds, evaluations on the way and checkpoints),
and a model's figures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from tinygn_dist.checkpoints.sharded_load import placed
from tinygn_dist.evaluate.lm_tasks import task_scores
from tinygn_dist.evaluate.quality import quality, speed
from tinygn_dist.models.anatomy import read_anatomy
from tinygn_dist.run.resume import Resumable
from tinygn_dist.runtime.progress import Progress
from tinygn_dist.train import reconstruct
from tinygn_dist.train.distill import by_token
from tinygn_dist.train.held_out import HeldOut
from tinygn_dist.train.loop import InTraining, Recovery, num_counted, window_numbers
from tinygn_dist.train.teacher_cache import SEQUENCE, TeacherCache


class TrainingStage(Resumable):
    teacher: nn.Module | TeacherCache | None
    progress: Progress
    processor: Any
    remove_units: Callable[[int], None]
    tell_masks: Callable[[], None]
    held_out: HeldOut | None = None
    skeleton: nn.Module
    kept_layers: Sequence[int] | None = None
    """the dense model's layers that are left, where some were removed"""

    def reconstruct(self) -> None:
        """Tune what is left of one layer after the other to the dense model's hidden states."""
        dense, batches = self.teacher, self.splits.calibration
        if not isinstance(dense, nn.Module):
            dense, _ = placed(self.source, self.backend)
        anatomy = read_anatomy(self.skeleton, needs_units=False)
        kept = range(anatomy.num_layers) if self.kept_layers is None else self.kept_layers
        self.report.reconstruction = reconstruct.reconstruct(
            self.problem(self.model, batches),
            replace(self.problem(dense, batches), anatomy=anatomy),
            reconstruct.blocks_of(kept, anatomy.num_layers),
            self.matrices or self.anatomy.matrices,
            self.masks.masks.by_name if self.masks else {},
            self.config.prune,
        )

    def recover(self) -> None:
        """Train: weights become fewer within the training, units between its rounds."""
        if every := self.config.recover.evaluate_every:
            self.held_out = HeldOut(self._held_out_figures, every, self.plan, self.backend)
        recovery = Recovery(
            self.teacher,
            self.source.task,
            self.splits.training,
            self.config.recover,
            self.plan,
            self.backend,
            self.progress,
            matrices=lambda: self.matrices or self.anatomy.matrices,
            begin=self._begin,
            stepped=self._stepped,
            ended=self._ended,
            stopping=self.stopping,
        )
        rounds = self._rounds()
        for number, steps in list(enumerate(rounds))[self.round :]:
            if number > self.round:
                self.remove_units(number)
                self.round = number
            recovery.run(self.model, self.masks, self.course, steps.stop)
        self.report.recovery |= self.course.told()
        if self.masks and self.masks.history:
            self.tell_masks()
            self.report.recovery["updates"] = [asdict(update) for update in self.masks.history]
        if not isinstance(self.teacher, TeacherCache):
            self.teacher = None

    @property
    def caches_teacher(self) -> bool:
        asked = self.config.recover
        return asked.taught and asked.teacher_cache_gib is not None and self.source.task != "feature-extraction"

    def write_teacher(self) -> None:
        """What the dense model, which is still the one that is placed, says about every sequence that training will see."""
        asked, task, sequences = self.config.recover, self.source.task, self.splits.training
        wanted = sorted({n for step in window_numbers(len(sequences), asked, asked.steps) for n in step})
        identity = {"model": self.digest, "data": self.splits.fingerprint(), "sequences": wanted}
        folder = self.checkpoints.folder.with_name(f"{self.checkpoints.folder.name}.teacher")
        self.teacher = TeacherCache(folder, asked.teacher_top_k, asked.temperature, identity)
        self.teacher.check_size(sum(num_counted(sequences[n]) for n in wanted), asked.teacher_cache_gib)
        self.splits.training = [batch | {SEQUENCE: torch.tensor([n])} for n, batch in enumerate(sequences)]
        if not self.teacher.is_complete(self.backend):
            numbered = [(n, self.splits.training[n]) for n in wanted]
            positions = functools.partial(by_token, task=task)
            self.teacher.write(self.model, numbered, positions, self.backend, self.progress)

    def _rounds(self) -> list[range]:
        return self.plan.rounds() if self.config.prune.unit_kinds else [range(self.plan.total)]

    def _begin(self, now: InTraining) -> None:
        if not self.go_on_training(now):
            self._look(now)

    def _stepped(self, now: InTraining) -> None:
        if self.held_out and self.held_out.due(now.course.step):
            self._look(now)
        if self.config.recover.saved_on_the_way:
            self.save_or_go_on(now)

    def _ended(self, now: InTraining) -> None:
        if self.config.recover.keep_best and now.course.step == self.plan.total:
            self.restore_best(now)

    def _look(self, now: InTraining) -> None:
        if self.held_out and self.held_out.look(now, self._final(now.course.step)) and self.config.recover.keep_best:
            self.save_best(now)

    def _final(self, step: int) -> bool:
        """Whether masks or units do not change any more."""
        if self.config.prune.unit_kinds:
            return self.round == len(self._rounds()) - 1
        return step >= max(self.plan.updates, default=0)

    def _held_out_figures(self, model: nn.Module) -> dict[str, float]:
        return quality(self.problem(model, self.splits.validation), self.source.task, "evaluating")

    def quality(self, model: nn.Module) -> dict[str, float]:
        return quality(self.problem(model, self.splits.evaluation), self.source.task, "evaluating")

    def all_figures(self, model: nn.Module) -> dict[str, Any]:
        asked, example = self.config.evaluate, self.splits.evaluation[0]
        fast = speed(model, self.source.task, example, asked, self.backend) if asked.latency else {}
        tasks = task_scores(model, self.processor, asked, self.backend)
        return self.quality(model) | {"speed": fast} | ({"tasks": tasks} if tasks else {})
