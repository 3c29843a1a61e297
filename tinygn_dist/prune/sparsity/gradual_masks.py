"""Masks that change while the model trains: the sparsity grows by a plan, dead weights may come back.

Everything hangs on the optimizer's own steps, so it is the same in our training loop and in anybody else's, and micro
batches and skipped steps do not count. At an update the model is scored where it lies, between two steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from tinygn_dist.backends.base import Backend
from tinygn_dist.checkpoints.run_checkpoint import SavedUnder, WriterUnder
from tinygn_dist.config import PruneConfig, ScheduleConfig
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.estimate.reach import reached_by_data
from tinygn_dist.maths.schedules import Growth, Plan, make_plan
from tinygn_dist.models.anatomy import Matrix
from tinygn_dist.prune.sparsity.levels import Level, final_level, level_at
from tinygn_dist.prune.sparsity.mask_selection import choose_masks
from tinygn_dist.prune.sparsity.mask_updates import Best, UpdatePoint, step_statistics
from tinygn_dist.prune.sparsity.masks import Masks
from tinygn_dist.prune.sparsity.saved_masks import read_masks, write_masks
from tinygn_dist.prune.sparsity.sparsify import MaskGoal, criterion_of, sparsify

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """What one update did. step: optimizer steps done before it. sparsity: over all matrices. by_target: their own.
    removed, regrown: weights."""

    step: int
    sparsity: float
    removed: int
    regrown: int
    by_target: dict[str, float]


def plan_of(
    schedule: ScheduleConfig, prune: PruneConfig, total: int, rounds: bool = False, final: float | None = None
) -> Plan:
    """The plan of a training of `total` optimizer steps. final: the sparsity at its end, by default the pattern's.
    UserError when no update fits into it."""
    if final is None:
        final = 1 - prune.nm.n / prune.nm.m if prune.nm else prune.sparsity
    growth = Growth(
        schedule.growth, schedule.every, schedule.first, schedule.freeze, swaps=schedule.regrow != "none", rounds=rounds
    )
    return make_plan(growth, total, final)


class GradualMasks:
    """masks: those that hold now. steps: optimizer steps seen. history: the updates so far. notes: for the report, on
    how the first masks were chosen."""

    def __init__(
        self,
        problem: Problem,
        matrices: Sequence[Matrix],
        prune: PruneConfig,
        schedule: ScheduleConfig,
        plan: Plan,
        going_on: Mapping[str, Any] | None = None,
    ) -> None:
        """Chooses the first masks and applies them to the model of `problem`, whose batches score every update.

        going_on: what `state` returned when masks of another run of the program were saved, which are then to be
        filled in; nothing is chosen.
        """
        self.plan, self.history, self.steps = plan, [], 0
        self._prune, self._schedule, self._problem = prune, schedule, replace(problem, parts=None)
        matrices, self.notes = self._known(problem, matrices, going_on)
        self.step_statistics = step_statistics(problem, matrices, schedule, plan.levels[-1])
        level = level_at(final_level(prune), plan.levels[0])
        if going_on is None and level is not None:
            self.masks = sparsify(problem, matrices, prune, self._goal(level, prune.criterion, prune.solver.passes))
        else:
            self.masks = self._all(matrices)
        self.notes += self.masks.notes
        if going_on is not None:
            self.load_state(going_on)
        elif self.step_statistics:
            self.step_statistics.first_masks(self.masks.by_name, plan.levels[0], self._best(problem))

    @staticmethod
    def _known(
        problem: Problem, matrices: Sequence[Matrix], going_on: Mapping[str, Any] | None
    ) -> tuple[Sequence[Matrix], tuple[str, ...]]:
        """The matrices that calibration data reaches, or those that had masks before; the others stay dense."""
        if going_on is None:
            return reached_by_data(problem, matrices)
        before = set(going_on["matrices"])
        return [matrix for matrix in matrices if matrix.name in before], ()

    def _all(self, matrices: Sequence[Matrix]) -> Masks:
        shards = {t.name: self._problem.backend.shard(self._problem.model, t).weight for t in matrices}
        return Masks(matrices, {name: torch.ones_like(w, dtype=torch.bool) for name, w in shards.items()})

    def attach(
        self, model: nn.Module, *optimizers: Any, after_update: Callable[[Update], None] | None = None
    ) -> list[Any]:
        """Hold the masks after every step of the prepared optimizers, and change them when the plan says so, by the
        steps of the first one. Returns handles with `remove()`."""
        backend = self._problem.backend
        self._refuse_codes(optimizers)

        def stepped() -> None:
            self.steps += 1
            if self.steps in self.plan.updates:
                update = self._update(model, optimizers)
                if after_update:
                    after_update(update)

        if self.steps == 0:
            self._track(self._count(self._problem, self.masks))
        held: list[Any] = []
        if self.step_statistics and self.steps < self.plan.updates[-1]:
            held += self.step_statistics.attach(model, optimizers)
            with backend.paused(model) as bare:
                here = replace(self._problem, model=bare)
                self.step_statistics.before_steps(bare, optimizers[0], self._best(here))
        held += [self.masks.enforce(model, optimizer, backend) for optimizer in optimizers]
        return [*held, backend.after_step(model, optimizers[0], stepped)]

    def _refuse_codes(self, optimizers: Sequence[Any]) -> None:
        stays = self.step_statistics is not None and self.step_statistics.state_stays
        coded = [each for each in optimizers if self._problem.backend.keeps_codes(each)]
        if self.plan.updates and coded and not stays:
            raise UserError(
                f"{type(self._problem.backend.inner_optimizer(coded[0])).__name__} keeps its state in 8-bit codes, in "
                "which that of weights which go or come back cannot be cleared; accepted: optimizers with 32-bit "
                "state, or schedule.kind one-shot without regrow"
            )

    def _update(self, model: nn.Module, optimizers: Sequence[Any]) -> Update:
        backend = self._problem.backend
        with backend.paused(model) as bare:
            problem = replace(self._problem, model=bare)
            chosen = self._choose(problem, optimizers[0])
            update = self._count(problem, chosen)
            if self.step_statistics is None or not self.step_statistics.state_stays:
                self._clear_state(bare, optimizers, chosen)
            self.masks.by_name.update(chosen.by_name)
            self.masks.apply_(bare, backend)
            backend.agree(self.masks.fingerprint(bare, backend), "the mask")
        self.history.append(update)
        if self.step_statistics and self.steps == self.plan.updates[-1]:
            self.step_statistics.finish()
        self._track(update)
        log.info(
            "step %d: sparsity %.4f, %d weights removed, %d regrown",
            update.step, update.sparsity, update.removed, update.regrown,
        )  # fmt: skip
        return update

    def _clear_state(self, bare: nn.Module, optimizers: Sequence[Any], chosen: Masks) -> None:
        """What the optimizers know of weights that went or came back is of another life of theirs."""
        with torch.no_grad():
            for matrix in self.masks.matrices:
                changed = self.masks.by_name[matrix.name] ^ chosen.by_name[matrix.name]
                for optimizer in optimizers:
                    self._problem.backend.clear_state(bare, optimizer, matrix, changed)

    def _track(self, update: Update) -> None:
        """To the trackers: sparsity of the whole and of every matrix, and what changed."""
        changed = {"removed": update.removed, "regrown": update.regrown, "churn": update.removed + update.regrown}
        metrics = {f"mask/{name}": value for name, value in {"sparsity": update.sparsity, **changed}.items()}
        metrics |= {f"sparsity/{name}": value for name, value in update.by_target.items()}
        self._problem.backend.track(metrics, self.steps)

    def _choose(self, problem: Problem, optimizer: Any) -> Masks:
        schedule, matrices, level = self._schedule, self.masks.matrices, self.plan.level_after(self.steps)
        asked = level_at(final_level(self._prune), level)
        if self.step_statistics:
            sparsity, last = (0.0 if asked is None else level), self.plan.updates[-1]
            here = UpdatePoint(problem, optimizer, sparsity, self.steps, last)
            return Masks(matrices, self.step_statistics.choose(here, self.masks.by_name, self._best(problem)))
        if asked is None:
            return self.masks
        named = self._prune.criterion if schedule.criterion == "auto" else schedule.criterion
        return sparsify(
            problem, matrices, self._prune, self._goal(asked, named, passes=1)
        )  # updates are passes themselves

    def _best(self, problem: Problem) -> Best:
        """Masks of the largest scores, by the pattern and scope that are asked for."""

        def best(scores: Mapping[str, torch.Tensor], sparsity: float) -> dict[str, torch.Tensor]:
            level = level_at(final_level(self._prune), sparsity) if self._prune.nm else Level(sparsity)
            scope = "layer" if self._prune.scope == "auto" else self._prune.scope
            return choose_masks(problem, self.masks.matrices, scores, level, scope)

        return best

    @staticmethod
    def _goal(level: Level, criterion: str, passes: int | None) -> MaskGoal:
        return MaskGoal(criterion_of(criterion), level, passes)

    def _count(self, problem: Problem, chosen: Masks) -> Update:
        removed = regrown = 0
        for matrix in chosen.matrices:
            old, new = self.masks.by_name[matrix.name], chosen.by_name[matrix.name]
            removed += int((old & ~new).sum())
            regrown += int((new & ~old).sum())
        removed, regrown = problem.backend.sum_over_shards(torch.tensor([removed, regrown])).tolist()
        kept, sizes = chosen.kept(problem.backend), {t.name: t.numel for t in chosen.matrices}
        by_target = {name: 1 - kept[name] / size for name, size in sizes.items()}
        return Update(self.steps, 1 - sum(kept.values()) / sum(sizes.values()), removed, regrown, by_target)

    # -- as a constraint (tinygn_dist/step.py) ------------------------------------------------------------------------
    @property
    def kept(self) -> Mapping[str, torch.Tensor]:
        return self.masks.by_name

    def violations(self, model: nn.Module, backend: Backend) -> int:
        return self.masks.violations(model, backend)

    def fingerprint(self, model: nn.Module, backend: Backend) -> str:
        return self.masks.fingerprint(model, backend)

    def write(self, writer: WriterUnder, model: nn.Module, optimizer: Any | None) -> dict[str, Any]:
        """The masks, and what was summed up since the last update where that is known already."""
        backend = self._problem.backend
        write_masks(writer, self.masks, model, backend)
        if self.step_statistics and (optimizer is not None or self.step_statistics.knows_before_training):
            for name, whole in self.step_statistics.whole(model, optimizer):
                if backend.is_main:
                    writer.add(f"step_statistics|{name}", whole)
        return self.state()

    def read(self, saved: SavedUnder, model: nn.Module) -> None:
        """The masks that `write` wrote."""
        read_masks(saved, self.masks, model, self._problem.backend)

    def resume_training(self, saved: SavedUnder, model: nn.Module, optimizer: Any) -> None:
        """What `write` knew beside the masks, into a model prepared for training."""
        names = saved.names("step_statistics|")
        if self.step_statistics and names:
            found = {name.removeprefix("step_statistics|"): saved.tensor(name) for name in names}
            self.step_statistics.take(model, optimizer, found)

    def state(self) -> dict[str, Any]:
        """What has to be known, beside the masks, to go on. Plain values."""
        names = [matrix.name for matrix in self.masks.matrices]
        return {"steps": self.steps, "matrices": names, "history": [asdict(update) for update in self.history]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.steps, self.history = state["steps"], [Update(**update) for update in state["history"]]
