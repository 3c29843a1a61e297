"""The step that takes whole units out: `prune` with pattern layers, heads, channels, experts, filters, hidden or
units."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from tinygn_dist.config import PruneConfig
from tinygn_dist.estimate.gates import check_step
from tinygn_dist.maths.counts import share_left
from tinygn_dist.models.anatomy import Anatomy
from tinygn_dist.prune.structured.latency import LatencyGoal
from tinygn_dist.prune.structured.methods import method_of
from tinygn_dist.prune.structured.removal import RemovedUnits, UnitGoal, UnitMethod, UnitPlan
from tinygn_dist.prune.structured.shrink import in_dtypes, smaller_config, smaller_origin
from tinygn_dist.prune.structured.size_goal import sparsity_of
from tinygn_dist.step import Live, Outcome, Request, Step


@dataclass
class RemoveUnits(Step):
    """level: the sparsity of the dense model once this step has run, where units go in rounds; None for all that the
    options ask for at once."""

    options: PruneConfig
    level: float | None = None
    plan: UnitPlan = field(default=UnitPlan(), init=False)
    """known once checked, or measured where a latency is asked for"""
    latency: LatencyGoal | None = field(default=None, init=False)

    name = "prune"

    def check(self, request: Request) -> None:
        options, anatomy = self.options, request.anatomy
        method = method_of(anatomy, options)
        self._request, self._dense_params = request, method.dense_params(anatomy)
        self._sparsity = sparsity_of(options, anatomy, request.skeleton, self._dense_params)
        self._goal = UnitGoal(self._sparsity, options.protect)
        if not options.asks_latency:
            self.plan = method.plan(anatomy, options, self._goal)
        if options.probes.step is not None:
            check_step(options.probes.step, request.dtype)

    def measure(self, request: Request) -> None:
        """What layers cost on this device, and the mixes that meet a latency by that."""
        if self.options.asks_latency:
            self.latency = LatencyGoal(request, self.options, self._goal)
            self.plan = self.latency.plan

    def run(self, live: Live) -> Outcome:
        """Choose, re-fit and take out. The live weights are re-fitted, and whoever places the origin lets them go."""
        problem, backend, options = live.problem(), live.backend, self.options
        method = method_of(problem.anatomy, options)
        plan = self._plan_for(method, problem.anatomy, live)
        if not plan.mixes:
            return Outcome()
        found = method.remove(problem, plan, options)
        kept = found.kept
        backend.agree(kept.fingerprint(), "the kept units")
        config = smaller_config(problem.bare.config, problem.anatomy, kept)
        build = functools.partial(self._request.build, config, problem.bare.dtype)
        dtypes = {name: tensor.dtype for name, tensor in problem.bare.state_dict().items()}
        build = in_dtypes(build, problem.anatomy, kept, dtypes)
        return Outcome(
            origin=smaller_origin(build, problem.model, problem.anatomy, kept, backend, found.shifts),
            layers=kept.layers,
            facts={"selection": _selection(found)},
            notes=found.notes,
            settle=method.recalibrate_ if options.compensate else None,
        )

    def _plan_for(self, method: UnitMethod, anatomy: Anatomy, live: Live) -> UnitPlan:
        """Of the model as earlier steps and rounds left it. A goal, and the level of a round, are of the dense
        model."""
        here = method.dense_params(anatomy)
        if self.level is None and here == self._dense_params:
            return self.plan
        whole = self._sparsity if self.level is None else self.level
        of_dense = self.level is not None or self.options.goal is not None
        left = share_left(whole, self._dense_params, here) if of_dense else whole
        protect = tuple(live.layers.index(layer) for layer in self.options.protect if layer in live.layers)
        return method.plan(anatomy, self.options, UnitGoal(left, protect)) if left else UnitPlan()

    def figures(self, which: str, model: nn.Module) -> dict[str, Any]:
        if self.latency is None:
            return {}
        self.latency.time(which, model)
        return {"latency": self.latency.figures}


def _selection(found: RemovedUnits) -> dict[str, Any]:
    scores = found.scores
    return {
        "fingerprint": found.kept.fingerprint(),
        "kept": asdict(found.kept),
        "scores": scores.table,
        "tried": [asdict(trial) for trial in found.trials],
        "probe_forwards": scores.forwards,
        "probe_forwards_exhaustive": scores.exhaustive,
        "open_contests": scores.open,
        "probe_steps": scores.steps,
        "kinked_gates": scores.kinked,
    }
