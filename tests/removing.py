"""Plan and remove in one call, as the pipeline does, for tests that ask for the sparsity of their options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from tinygn_dist.config import PruneConfig
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths.counts import Latency, Mix
from tinygn_dist.models.anatomy import Anatomy
from tinygn_dist.models.kept import KeptUnits
from tinygn_dist.prune.structured.methods import method_of
from tinygn_dist.prune.structured.probing import UnitScores
from tinygn_dist.prune.structured.removal import Replan, Trial, UnitGoal, UnitPlan


class Found(NamedTuple):
    kept: KeptUnits
    scores: UnitScores
    trials: Sequence[Trial]
    shifts: dict[str, torch.Tensor]
    notes: Sequence[str]


def plan_mixes(
    anatomy: Anatomy, options: PruneConfig, latency: Latency | None = None, sparsity: float | None = None
) -> list[Mix]:
    """sparsity: that of the options by default."""
    goal = UnitGoal(options.sparsity if sparsity is None else sparsity, options.protect, latency)
    return list(method_of(anatomy, options).plan(anatomy, options, goal).mixes)


def remove_units(problem: Problem, mixes: Sequence[Mix], options: PruneConfig, replan: Replan | None = None) -> Found:
    plan = UnitPlan(tuple(mixes), options.protect, replan)
    found = method_of(problem.anatomy, options).remove(problem, plan, options)
    return Found(found.kept, found.scores, found.trials, dict(found.shifts), found.notes)
