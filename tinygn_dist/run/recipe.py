"""From the recipe that was asked for to the steps that run it: units that go in rounds take turns with their
training."""

from __future__ import annotations

from collections.abc import Sequence

from tinygn_dist.config import PruneConfig, StepConfig
from tinygn_dist.maths.schedules import Plan
from tinygn_dist.prune.sparsity.gradual_masks import plan_of
from tinygn_dist.prune.sparsity.step import SetToZero
from tinygn_dist.prune.structured.methods import method_of
from tinygn_dist.prune.structured.size_goal import sparsity_of
from tinygn_dist.prune.structured.step import RemoveUnits
from tinygn_dist.quantize.step import Quantize
from tinygn_dist.run.training import Recover
from tinygn_dist.step import Request, Step
from tinygn_dist.train.reconstruct import Reconstruct


def steps_of(recipe: Sequence[StepConfig], request: Request) -> list[Step]:
    """In order. Raises UserError for a schedule that does not fit into its training."""
    steps: list[Step] = []
    plan: Plan | None = None  # of the pruning before, which the next training follows
    rounds = False
    for number, entry in enumerate(recipe):
        after = recipe[number + 1].recover if number + 1 < len(recipe) else None
        if entry.prune:
            rounds = bool(entry.prune.unit_kinds)
            final = _sparsity(entry.prune, request) if rounds else None
            plan = plan_of(entry.schedule, entry.prune, after.steps if after else 0, rounds, final)
            if not rounds:
                steps.append(SetToZero(entry.prune, entry.schedule, plan))
            elif plan.updates:
                steps += _in_rounds(entry, recipe[number + 1], plan)
            else:
                steps.append(RemoveUnits(entry.prune))
        if entry.reconstruct:
            steps.append(Reconstruct(entry.reconstruct))
        if entry.recover and not (rounds and plan and plan.updates):
            plan = plan if plan and plan.total == entry.recover.steps else Plan(entry.recover.steps)
            masked = next((step for step in reversed(steps) if isinstance(step, SetToZero)), None)
            steps.append(Recover(entry.recover, plan, range(plan.total), masked))
        if entry.quantize:
            steps.append(Quantize(entry.quantize))
        if entry.recover:
            plan = None
    return steps


def _sparsity(options: PruneConfig, request: Request) -> float:
    """Of the parameters that may go, once all rounds are over."""
    dense_params = method_of(request.anatomy, options).dense_params(request.anatomy)
    return sparsity_of(options, request.anatomy, request.skeleton, dense_params)


def _in_rounds(prune: StepConfig, recover: StepConfig, plan: Plan) -> list[Step]:
    """Some units go, the rest trains for a part of its steps, and so on."""
    steps: list[Step] = []
    for level, stretch in zip(plan.levels, plan.rounds(), strict=True):
        steps += [RemoveUnits(prune.prune, level), Recover(recover.recover, plan, stretch)]
    return steps
