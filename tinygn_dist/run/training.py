"""The step that trains: rounds, evaluations on the way, checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from tinygn_dist.config import RecoverConfig
from tinygn_dist.evaluate.quality import quality
from tinygn_dist.maths.schedules import Plan
from tinygn_dist.prune.sparsity.gradual_masks import GradualMasks
from tinygn_dist.prune.sparsity.step import SetToZero, facts
from tinygn_dist.run import resume
from tinygn_dist.run.state import RunState
from tinygn_dist.step import Outcome, Request, Step
from tinygn_dist.train.held_out import HeldOut
from tinygn_dist.train.loop import Course, InTraining, Recovery, check_training


@dataclass
class Recover(Step):
    """plan: of the whole training. stretch: the steps of it that this step trains; more than one step share a training
    where units go in rounds."""

    options: RecoverConfig
    plan: Plan
    stretch: range
    after: SetToZero | None = None
    """the step before, where it set weights to zero: its matrices are those that may move"""

    name = "recover"

    def check(self, request: Request) -> None:
        matrices = self.after.matrices if self.after else request.anatomy.matrices
        check_training(self.options, matrices, request.backend)

    @property
    def last(self) -> bool:
        return self.stretch.stop == self.plan.total

    def run(self, live: RunState) -> Outcome:
        if not self.stretch.start and not (live.saved and live.saved.facts["in_training"]):
            live.course = Course()
        training = _Training(self, live, self._evaluations(live))
        recovery = Recovery(
            live.teacher,
            live.source.task,
            live.splits.training,
            self.options,
            self.plan,
            live.backend,
            live.progress,
            matrices=lambda: _movable(live),
            begin=training.begin,
            stepped=training.stepped,
            ended=training.ended,
            stopping=live.stopping,
        )
        recovery.run(live.model, live.constraints, live.course, self.stretch.stop)
        return Outcome(facts=self._facts(live))

    def _evaluations(self, live: RunState) -> HeldOut | None:
        if not self.options.evaluate_every:
            return None

        def figures(model: nn.Module) -> dict[str, float]:
            return quality(live.problem(live.splits.validation, model), live.source.task, "evaluating")

        return HeldOut(figures, self.options.evaluate_every, self.plan, live.backend)

    def _facts(self, live: RunState) -> dict[str, Any]:
        resumed = {key: live.report.recovery[key] for key in ("resumed_after_steps",) if key in live.report.recovery}
        recovery = resumed | live.course.told()
        changed = [each for each in live.constraints if isinstance(each, GradualMasks) and each.history]
        if not changed:
            return {"recovery": recovery}
        recovery["updates"] = [asdict(update) for update in changed[-1].history]
        return {"recovery": recovery} | facts(changed[-1], live.problem())


def _movable(live: RunState) -> list[Any]:
    """The matrices that training may move apart from other parameters: those with masks, where there are any."""
    masked = [each.masks.matrices for each in live.constraints if isinstance(each, GradualMasks)]
    return list(masked[-1] if masked else live.anatomy.matrices)


@dataclass(frozen=True)
class _Training:
    """What happens around the steps of a training."""

    step: Recover
    state: RunState
    held_out: HeldOut | None

    def begin(self, now: InTraining) -> None:
        if not resume.resume_training(self.state, now):
            self._look(now)

    def stepped(self, now: InTraining) -> None:
        if self.held_out and self.held_out.due(now.course.step):
            self._look(now)
        if self.step.options.saved_on_the_way:
            resume.save_or_stop(self.state, now)

    def ended(self, now: InTraining) -> None:
        if self.step.options.keep_best and now.course.step == self.step.plan.total:
            resume.restore_best(self.state, now)

    def _look(self, now: InTraining) -> None:
        final = self._final(now.course.step)
        if self.held_out and self.held_out.look(now, final) and self.step.options.keep_best:
            resume.save_best(self.state, now)

    def _final(self, step: int) -> bool:
        """Whether masks or units do not change any more."""
        in_rounds = self.step.plan.updates and not any(
            isinstance(each, GradualMasks) for each in self.state.constraints
        )
        return self.step.last if in_rounds else step >= max(self.step.plan.updates, default=0)
