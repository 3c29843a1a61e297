"""The step that sets weights to zero: `prune` with pattern unstructured or N:M."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinygn_dist.checkpoints.run_checkpoint import SavedUnder
from tinygn_dist.config import PruneConfig, ScheduleConfig
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths.schedules import Plan
from tinygn_dist.models.anatomy import Matrix
from tinygn_dist.prune.sparsity import sparsify
from tinygn_dist.prune.sparsity.gradual_masks import GradualMasks
from tinygn_dist.step import Live, Outcome, Request, Step

STORED_DENSELY = (
    "zeros are stored densely: the files do not shrink and stock engines run at the dense speed; sparsity serves "
    "storage with compression, research, and kernels made for it"
)


@dataclass
class SetToZero(Step):
    """plan: when the sparsity changes in the training that follows."""

    options: PruneConfig
    schedule: ScheduleConfig
    plan: Plan
    matrices: Sequence[Matrix] = field(default=(), init=False)
    """those that may get zeros; known once checked"""

    name = "prune"

    def check(self, request: Request) -> None:
        self.matrices = request.anatomy.choose_matrices(self.options.matrices, self.options.ignore)
        sparsify.check(request.anatomy, self.matrices, self.options)

    def run(self, live: Live) -> Outcome:
        problem = live.problem()
        masks = GradualMasks(problem, self._matrices(problem), self.options, self.schedule, self.plan)
        return Outcome(constraint=masks, facts=facts(masks, problem), notes=(*masks.notes, STORED_DENSELY))

    def restore(self, live: Live, saved: SavedUnder, state: Mapping[str, Any]) -> GradualMasks:
        problem = live.problem()
        masks = GradualMasks(problem, self._matrices(problem), self.options, self.schedule, self.plan, state)
        masks.read(saved, problem.model)
        return masks

    def _matrices(self, problem: Problem) -> Sequence[Matrix]:
        """Of the model as earlier steps left it."""
        return problem.anatomy.choose_matrices(self.options.matrices, self.options.ignore)


def facts(masks: GradualMasks, problem: Problem) -> dict[str, Any]:
    """What the report says of masks, and every parameter accounted for. A collective."""
    model, backend, anatomy = problem.model, problem.backend, problem.anatomy
    fingerprint, kept = masks.fingerprint(model, backend), masks.masks.kept(backend)
    backend.agree(fingerprint, "the mask")
    chosen = sum(matrix.numel for matrix in masks.masks.matrices)
    in_layers = sum(matrix.numel for matrix in anatomy.matrices)
    return {
        "selection": {"fingerprint": fingerprint, "kept": kept},
        "parameters": {
            "targeted": chosen,
            "set_to_zero": chosen - sum(kept.values()),
            "kept_by_pattern": in_layers - chosen,
            "kept_not_a_layer_matrix": anatomy.total_params - in_layers,
        },
    }
