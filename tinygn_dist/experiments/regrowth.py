"""Zeroed weights come back at each update in place of the smallest kept ones: where the loss has the largest gradient
(RigL, Evci et al. 2020, `schedule.regrow gradient`), or at random (SET, Mocanu et al. 2018, `schedule.regrow
random`).

No figure on a real model: a perplexity below that of `cubic` with `obs` at the same tokens would bring it in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import nn

from tinygn_dist.config import ScheduleConfig, Section
from tinygn_dist.config.experiments import options_of
from tinygn_dist.estimate.backprop import weight_gradients
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths import criteria
from tinygn_dist.maths.schedules import swapped_share
from tinygn_dist.models.anatomy import Matrix
from tinygn_dist.prune.sparsity.mask_updates import Best, MaskUpdate, StepStatistics, UpdatePoint
from tinygn_dist.prune.sparsity.weight_scores import scores

_ABOVE_ALL = torch.finfo(torch.float32).max


class RegrowthOptions(Section):
    swap: float = Field(0.3, gt=0, lt=1)
    """share of the kept weights that an update swaps; by gradients it decays to 0 at the last update"""
    seed: int = Field(0, ge=0)
    """of regrowth at random"""


class Regrowth(StepStatistics):
    """The largest of the kept weights stay, all but a share of the budget; the rest of it goes to the weights with the
    best prospects, dropped ones included, which start from zero unless they were kept all along. Nothing is kept
    between updates."""

    def __init__(
        self, problem: Problem, matrices: Sequence[Matrix], options: RegrowthOptions, by_gradient: bool
    ) -> None:
        super().__init__(matrices, problem.backend)
        self.options, self.by_gradient = options, by_gradient

    def attach(self, model: nn.Module, optimizers: Sequence[Any]) -> list[Any]:
        return []

    def choose(self, here: UpdatePoint, keep: Mapping[str, torch.Tensor], best: Best) -> dict[str, torch.Tensor]:
        if not here.sparsity:
            return dict(keep)
        share = swapped_share(self.options.swap, here.step, here.last_step, self.by_gradient)
        shards = {t.name: self.backend.shard(here.problem.model, t).weight for t in self.matrices}
        sizes = {name: criteria.magnitude(weight) for name, weight in shards.items()}
        stay = best(sizes, 1 - (1 - here.sparsity) * (1 - share))
        growth = self._prospects(here)
        growth = {n: growth[n].to(sizes[n].device).masked_fill(stay[n], _ABOVE_ALL) for n in stay}
        return best(growth, here.sparsity)

    def _prospects(self, here: UpdatePoint) -> dict[str, torch.Tensor]:
        if not self.by_gradient:
            return scores(here.problem, self.matrices, "random", self.options.seed + here.step)
        gradients = weight_gradients(here.problem, self.matrices, squares=False)
        return {t.name: gradients.rounded(t.name).abs() for t in self.matrices}

    def finish(self) -> None:
        return

    def whole(self, model: nn.Module, optimizer: Any) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ()

    def take(self, model: nn.Module, optimizer: Any, whole: Mapping[str, torch.Tensor]) -> None:
        return


def make_by_gradient(
    problem: Problem, matrices: Sequence[Matrix], schedule: ScheduleConfig, final: float
) -> StepStatistics:
    return Regrowth(problem, matrices, options_of(schedule.experiments, "regrowth", RegrowthOptions), True)


def make_at_random(
    problem: Problem, matrices: Sequence[Matrix], schedule: ScheduleConfig, final: float
) -> StepStatistics:
    return Regrowth(problem, matrices, options_of(schedule.experiments, "regrowth", RegrowthOptions), False)


def check_regrowth(schedule: ScheduleConfig) -> None:
    if schedule.criterion not in ("auto", "magnitude"):
        raise ValueError(
            f"criterion {schedule.criterion!r} with regrow {schedule.regrow!r}: the smallest kept weights make room "
            "for the regrown ones; leave criterion at auto"
        )


OPTIONS = {"regrowth": RegrowthOptions}
MASK_UPDATES = {
    "gradient": MaskUpdate("regrow", make_by_gradient, check_regrowth, watches_training=False),
    "random": MaskUpdate("regrow", make_at_random, check_regrowth, watches_training=False),
}
