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

from tinygn_dist import score
from tinygn_dist.anatomy import Target
from tinygn_dist.config import PruneConfig, ScheduleConfig
from tinygn_dist.dense_weights import Best, DenseWeights
from tinygn_dist.estimate.backprop import weight_gradients
from tinygn_dist.estimate.directions import key_of, uniform
from tinygn_dist.estimate.setting import Setting
from tinygn_dist.masking import Masks
from tinygn_dist.schedule import Plan, make_plan, swapped_share
from tinygn_dist.selection import choose_masks
from tinygn_dist.step_statistics import Consensus, Movement
from tinygn_dist.weights import at_sparsity, sparsify

log = logging.getLogger(__name__)
_ABOVE_ALL = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Update:
    """What one update did. step: optimizer steps done before it. sparsity: over all targets. by_target: their own.
    removed, regrown: weights."""

    step: int
    sparsity: float
    removed: int
    regrown: int
    by_target: dict[str, float]


def plan_of(schedule: ScheduleConfig, prune: PruneConfig, total: int, rounds: bool = False) -> Plan:
    """The plan of a training of `total` optimizer steps. UserError when no update fits into it."""
    return make_plan(
        schedule.kind,
        total=total,
        every=schedule.every,
        first=schedule.first,
        final=1 - prune.nm.n / prune.nm.m if prune.nm else prune.sparsity,
        freeze=schedule.freeze,
        swaps=schedule.regrow != "none",
        rounds=rounds,
    )


class GradualMasks:
    """masks: those that hold now. steps: optimizer steps seen. history: the updates so far."""

    def __init__(
        self,
        setting: Setting,
        targets: Sequence[Target],
        prune: PruneConfig,
        schedule: ScheduleConfig,
        plan: Plan,
        going_on: dict[str, Any] | None = None,
    ) -> None:
        """Chooses the first masks and applies them to the model of `setting`, whose batches score every update.

        going_on: what `state` returned when masks of another run of the program were saved, which are then to be
        filled in; nothing is chosen.
        """
        self.plan, self.history, self.steps = plan, [], 0
        self._prune, self._schedule, self._setting = prune, schedule, replace(setting, parts=None)
        self.step_statistics: Movement | Consensus | DenseWeights | None = None
        if schedule.kind == "admm":
            self.step_statistics = Consensus(targets, setting.backend, schedule.penalty)
        elif schedule.criterion == "movement":
            self.step_statistics = Movement(targets, setting.backend)
        elif schedule.regrow == "top-kast":
            self.step_statistics = DenseWeights(setting.model, targets, setting.backend, schedule.explore)
        asked = at_sparsity(prune, plan.levels[0])
        if going_on is None and asked is not None:
            self.masks = sparsify(setting, targets, asked)
        else:
            self.masks = self._all(targets)
        if going_on is not None:
            self.load_state(going_on)
        elif isinstance(self.step_statistics, DenseWeights):
            self.step_statistics.explore_beside(self.masks.by_name, plan.levels[0], self._largest(setting))

    @property
    def knows_before_training(self) -> bool:
        """Whether there is something about the weights to save before the first step."""
        return isinstance(self.step_statistics, DenseWeights)

    def _all(self, targets: Sequence[Target]) -> Masks:
        shards = {t.name: self._setting.backend.shard(self._setting.model, t).weight for t in targets}
        return Masks(targets, {name: torch.ones_like(w, dtype=torch.bool) for name, w in shards.items()})

    def attach(
        self, model: nn.Module, *optimizers: Any, after_update: Callable[[Update], None] | None = None
    ) -> list[Any]:
        """Hold the masks after every step of the prepared optimizers, and change them when the plan says so, by the
        steps of the first one. Returns handles with `remove()`."""
        backend = self._setting.backend

        def stepped() -> None:
            self.steps += 1
            if self.steps in self.plan.updates:
                update = self._update(model, optimizers)
                if after_update:
                    after_update(update)

        if self.steps == 0:
            self._track(self._count(self._setting, self.masks))
        held: list[Any] = []
        if self.step_statistics and self.steps < self.plan.updates[-1]:
            held += self.step_statistics.attach(model, optimizers)
            if isinstance(self.step_statistics, Consensus):
                with backend.paused(model) as bare:
                    self._project(replace(self._setting, model=bare), optimizers[0])
        held += [self.masks.enforce(model, optimizer, backend) for optimizer in optimizers]
        return [*held, backend.after_step(model, optimizers[0], stepped)]

    def _update(self, model: nn.Module, optimizers: Sequence[Any]) -> Update:
        backend, targets = self._setting.backend, self.masks.targets
        with backend.paused(model) as bare:
            setting = replace(self._setting, model=bare)
            chosen = self._choose(setting, optimizers[0])
            update = self._count(setting, chosen)
            with torch.no_grad():
                for target in targets:
                    changed = self.masks.by_name[target.name] ^ chosen.by_name[target.name]
                    if isinstance(self.step_statistics, DenseWeights):
                        continue  # they trained before, and train on
                    for optimizer in optimizers:
                        backend.clear_state(bare, optimizer, target, changed)
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

    def _track(self, update: Update) -> None:
        """To the trackers: sparsity of the whole and of every target, and what changed."""
        changed = {"removed": update.removed, "regrown": update.regrown, "churn": update.removed + update.regrown}
        metrics = {f"mask/{name}": value for name, value in {"sparsity": update.sparsity, **changed}.items()}
        metrics |= {f"sparsity/{name}": value for name, value in update.by_target.items()}
        self._setting.backend.track(metrics, self.steps)

    def _choose(self, setting: Setting, optimizer: Any) -> Masks:
        schedule, targets = self._schedule, self.masks.targets
        asked = at_sparsity(self._prune, self.plan.level_after(self.steps))
        if schedule.kind == "admm":
            projected = self._project(setting, optimizer)
            return self.masks if asked is None else Masks(targets, projected)
        if asked is None:
            return self.masks
        if isinstance(self.step_statistics, Movement):
            scores = self.step_statistics.scores(setting.model, optimizer)
            for name, keep in self.masks.by_name.items():  # a weight that is zero has stopped moving
                scores[name].masked_fill_(~keep, -_ABOVE_ALL)
            return Masks(targets, self._best(setting, scores, asked))
        if isinstance(self.step_statistics, DenseWeights):
            largest = self._largest(setting)
            return Masks(
                targets, self.step_statistics.choose(setting.model, self.masks.by_name, asked.sparsity, largest)
            )
        asked = asked.model_copy(update={"passes": 1})  # the updates are passes themselves
        if schedule.criterion != "auto":
            asked = asked.model_copy(update={"criterion": schedule.criterion})
        if schedule.regrow == "none":
            return sparsify(setting, targets, asked)
        share = swapped_share(schedule.swap, self.steps, self.plan.updates[-1], schedule.regrow == "gradient")
        return Masks(targets, self._regrown(setting, asked, share))

    def _project(self, setting: Setting, optimizer: Any) -> dict[str, torch.Tensor]:
        return self.step_statistics.project(
            setting.model,
            optimizer,
            lambda scores: self._best(setting, scores, at_sparsity(self._prune, self.plan.levels[-1])),
        )

    def _largest(self, setting: Setting) -> Best:
        return lambda scores, sparsity: self._best(setting, scores, self._prune, sparsity)

    def _best(
        self, setting: Setting, scores: Mapping[str, torch.Tensor], asked: PruneConfig, sparsity: float | None = None
    ) -> dict[str, torch.Tensor]:
        """Masks of the largest scores; sparsity: instead of the one asked for."""
        return choose_masks(
            setting.model,
            self.masks.targets,
            scores,
            sparsity=asked.sparsity if sparsity is None else sparsity,
            scope="layer" if asked.scope == "auto" else asked.scope,
            nm=asked.nm,
            backend=setting.backend,
        )

    def _regrown(self, setting: Setting, asked: PruneConfig, share: float) -> dict[str, torch.Tensor]:
        """The largest of the kept weights stay, all but `share` of the budget; the rest of it goes to the weights with
        the best prospects, dropped ones included, which start from zero unless they were kept all along."""
        backend, targets = setting.backend, self.masks.targets
        shards = {t.name: backend.shard(setting.model, t) for t in targets}
        sizes = {t.name: score.magnitude(shards[t.name].weight) for t in targets}
        stay = self._best(setting, sizes, asked, 1 - (1 - asked.sparsity) * (1 - share))
        if self._schedule.regrow == "random":
            growth = {
                name: uniform(
                    shard.offset, shard.offset + shard.weight.numel(), key_of(asked.seed + self.steps, name)
                ).view(shard.weight.shape)
                for name, shard in shards.items()
            }
        else:
            gradients = weight_gradients(setting, targets, squares=False)
            growth = {t.name: gradients.rounded(t.name).abs() for t in targets}
        growth = {n: growth[n].to(sizes[n].device).masked_fill(stay[n], _ABOVE_ALL) for n in stay}
        return self._best(setting, growth, asked)

    def _count(self, setting: Setting, chosen: Masks) -> Update:
        removed = regrown = 0
        for target in chosen.targets:
            old, new = self.masks.by_name[target.name], chosen.by_name[target.name]
            removed += int((old & ~new).sum())
            regrown += int((new & ~old).sum())
        removed, regrown = setting.backend.sum_over_shards(torch.tensor([removed, regrown])).tolist()
        kept, sizes = chosen.kept(setting.backend), {t.name: t.numel for t in chosen.targets}
        by_target = {name: 1 - kept[name] / size for name, size in sizes.items()}
        return Update(self.steps, 1 - sum(kept.values()) / sum(sizes.values()), removed, regrown, by_target)

    def state(self) -> dict[str, Any]:
        """What has to be known, beside the masks, to go on. Plain values."""
        return {"steps": self.steps, "history": [asdict(update) for update in self.history]}

    def load_state(self, state: dict[str, Any]) -> None:
        self.steps, self.history = state["steps"], [Update(**update) for update in state["history"]]
