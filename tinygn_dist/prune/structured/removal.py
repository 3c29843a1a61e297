"""What a way to remove units is asked, and what it hands back: the contract that every row of `methods.py` keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from tinygn_dist.config import PruneConfig
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths.counts import Latency, Mix
from tinygn_dist.models.anatomy import Anatomy
from tinygn_dist.models.kept import KeptUnits
from tinygn_dist.prune.structured.probing import UnitScores

Replan = Callable[[Mix], Sequence[Mix]]
"""the mixes to choose from, once the one given was looked at more closely (a latency that was timed)"""


@dataclass(frozen=True)
class UnitGoal:
    """How much has to go.

    sparsity: of `UnitMethod.dense_params`, or of the measured seconds where `latency` says what layers cost. protect:
    layers that stay whole, by their numbers in the model as it is now.
    """

    sparsity: float
    protect: tuple[int, ...] = ()
    latency: Latency | None = None

    def check_protect(self, anatomy: Anatomy) -> None:
        """UserError where a protected layer is none."""
        bad = [layer for layer in self.protect if not 0 <= layer < anatomy.num_layers]
        if bad:
            last = anatomy.num_layers - 1
            raise UserError(f"prune.protect names layer {bad[0]}, the model has layers 0 to {last}")


@dataclass(frozen=True)
class UnitPlan:
    """What may be removed. mixes: each reaches the goal; empty where nothing has to go. protect: as of the goal.
    replan: None where the mixes are final."""

    mixes: tuple[Mix, ...] = ()
    protect: tuple[int, ...] = ()
    replan: Replan | None = None


@dataclass(frozen=True)
class Trial:
    """A mix that was applied to the live model, and the loss per token it left."""

    mix: Mix
    loss: float


@dataclass(frozen=True)
class RemovedUnits:
    """What stays, and how that was chosen.

    trials: every mix that was tried. shifts: what biases gain when the units are taken out, which the live model lacks
    until then, (out,) fp32 by the bias's name. notes: sentences for the reader of the report.
    """

    kept: KeptUnits
    scores: UnitScores
    trials: tuple[Trial, ...] = ()
    shifts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class UnitMethod(Protocol):
    """A way to remove units."""

    def dense_params(self, anatomy: Anatomy) -> int:
        """How many parameters a sparsity is a share of."""

    def plan(self, anatomy: Anatomy, options: PruneConfig, goal: UnitGoal) -> UnitPlan:
        """The mixes that reach the goal. Needs no weights. UserError when none does."""

    def remove(self, problem: Problem, plan: UnitPlan, options: PruneConfig) -> RemovedUnits:
        """Choose the units, and re-fit the live weights of what stays; `shrink` then takes them out. A collective."""

    def recalibrate_(self, smaller: Problem) -> None:
        """Statistics that can only be measured on the smaller model, in place. A collective. Most methods have none."""
