"""What chooses the masks of an update in another way than by a criterion; its rows are leaf files of experiments/.

`StepStatistics` is what gradual_masks.py asks of any of them. They may keep numbers about every weight from one
update to the next, while the optimizer steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from tinygn_dist.backends.base import Backend
from tinygn_dist.config import ScheduleConfig
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.models.anatomy import Matrix
from tinygn_dist.registry import experimental

Best = Callable[[Mapping[str, torch.Tensor], float], dict[str, torch.Tensor]]
"""(scores, sparsity) -> masks of the largest, both by matrix and shaped like this rank's shards"""


@dataclass(frozen=True)
class UpdatePoint:
    """Where an update stands. problem: with the model between two steps. sparsity: that of this update; 0 where nothing
    is masked yet, and then the masks stay. step, last_step: optimizer steps done, and those at the last update."""

    problem: Problem
    optimizer: Any
    sparsity: float
    step: int
    last_step: int


class StepStatistics(ABC):
    """Gathered in every step, asked for masks at every update, in this order: first_masks, attach, before_steps, then
    steps and choose, then finish. A run that goes on from saved ones leaves out first_masks, and calls take after
    before_steps."""

    knows_before_training = False
    """whether there is something to save before the first step"""
    state_stays = False
    """whether the optimizer's state of weights that come or go keeps its meaning"""

    def __init__(self, matrices: Sequence[Matrix], backend: Backend) -> None:
        self.matrices, self.backend = tuple(matrices), backend

    def first_masks(self, keep: Mapping[str, torch.Tensor], sparsity: float, best: Best) -> None:
        """The masks before the first step are chosen."""
        return

    @abstractmethod
    def attach(self, model: nn.Module, optimizers: Sequence[Any]) -> list[Any]:
        """Look at every step from here on; returns handles with `remove()`. To be called before masks are enforced:
        what runs after a step runs in the order of these calls."""

    def before_steps(self, model: nn.Module, optimizer: Any, best: Best) -> None:
        """The optimizer is there, and has not stepped."""
        return

    @abstractmethod
    def choose(self, here: UpdatePoint, keep: Mapping[str, torch.Tensor], best: Best) -> dict[str, torch.Tensor]:
        """The masks of an update. keep: those until now. Collectives, one parameter at a time."""

    @abstractmethod
    def finish(self) -> None:
        """No update comes any more: forget everything, and let steps pass."""

    @abstractmethod
    def whole(self, model: nn.Module, optimizer: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """(key, whole tensor on every rank), to save. Collectives."""

    @abstractmethod
    def take(self, model: nn.Module, optimizer: Any, whole: Mapping[str, torch.Tensor]) -> None:
        """What `whole` gave, at any world size on any backend."""


@dataclass(frozen=True)
class MaskUpdate:
    """A row of MASK_UPDATES, by the name that an option of the schedule gives.

    option: which one. make: (problem with the model before the first mask, matrices, schedule, sparsity at the end)
    -> what is kept from step to step. check: raises ValueError for a schedule that does not fit. watches_training:
    whether every matrix has to train as a whole.
    """

    option: Literal["kind", "criterion", "regrow"]
    make: Callable[[Problem, Sequence[Matrix], ScheduleConfig, float], StepStatistics]
    check: Callable[[ScheduleConfig], None]
    watches_training: bool = True


def step_statistics(
    problem: Problem, matrices: Sequence[Matrix], schedule: ScheduleConfig, final: float
) -> StepStatistics | None:
    """None where a criterion scores the updates. final: sparsity at the end."""
    name = schedule.experiment
    return experimental("MASK_UPDATES", MaskUpdate)[name].make(problem, matrices, schedule, final) if name else None
