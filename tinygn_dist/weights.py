"""Weight patterns (unstructured, N:M): estimate what the criterion needs, score, select, and for `obs` solve."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from tinygn_dist import score
from tinygn_dist.anatomy import Target
from tinygn_dist.backends.base import Backend, Job
from tinygn_dist.budget import num_kept
from tinygn_dist.config import PruneConfig
from tinygn_dist.estimate.activations import InputMoments, input_moments
from tinygn_dist.estimate.backprop import weight_gradients
from tinygn_dist.estimate.directions import key_of, uniform
from tinygn_dist.masking import Masks
from tinygn_dist.objective import Batch, Objective
from tinygn_dist.progress import Progress
from tinygn_dist.selection import choose_masks
from tinygn_dist.solve import obs

log = logging.getLogger(__name__)
DEFAULT_SCOPE = {"wanda": "row"}  # as published; elsewhere a weight matrix is the group


def sparsify(
    model: nn.Module,
    targets: Sequence[Target],
    options: PruneConfig,
    objective: Objective,
    batches: Sequence[Batch],
    backend: Backend,
    progress: Progress,
) -> Masks:
    """Choose masks and apply them to the live weights (criterion obs also updates what is kept)."""
    criterion = "obs" if options.criterion == "auto" else options.criterion
    if criterion == "obs":
        found = input_moments(model, batches, [t.module for t in targets], backend, progress, full=True)
        masks = _solve(model, targets, options, found, backend)
    else:
        scores = _scores(model, targets, criterion, options, objective, batches, backend, progress)
        scope = DEFAULT_SCOPE.get(criterion, "layer") if options.scope == "auto" else options.scope
        masks = choose_masks(
            model, targets, scores, sparsity=options.sparsity, scope=scope, nm=options.nm, backend=backend
        )
    chosen = Masks(targets, masks)
    chosen.apply_(model, backend)
    return chosen


def _scores(model, targets, criterion, options, objective, batches, backend, progress) -> dict[str, torch.Tensor]:
    """fp32 scores shaped like this rank's shards."""
    weight = {target.name: backend.shard(model, target).weight for target in targets}
    match criterion:
        case "magnitude":
            return {name: score.magnitude(w) for name, w in weight.items()}
        case "random":
            return {
                t.name: _random(weight[t.name], backend.shard(model, t).offset, options.seed, t.name) for t in targets
            }
        case "wanda":
            found = input_moments(model, batches, [t.module for t in targets], backend, progress, full=False)
            backend.sum_over_data(found.moments.tensors())
            return {
                t.name: t.matrix(score.wanda(t.matrix(weight[t.name]), found.moments.rounded(found.of(t.module))))
                for t in targets
            }
        case "taylor" | "fisher":
            squares = criterion == "fisher"
            grads = weight_gradients(model, objective, batches, targets, backend, progress, squares=squares)
            rule = score.fisher if squares else score.taylor
            return {name: rule(w, grads.rounded(name)) for name, w in weight.items()}
    raise AssertionError(criterion)


def _solve(model, targets, options: PruneConfig, found: InputMoments, backend: Backend) -> dict[str, torch.Tensor]:
    jobs = input_jobs(targets, found)
    backend.sum_for_jobs(jobs)

    def solve(job: Job, weights: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        results, hessian = [], job.moments[0].float()
        for target, weight in zip(job.targets, weights, strict=True):
            solved = obs.prune(
                weight,
                hessian,
                target.numel - num_kept(target.numel, options.sparsity),
                nm=options.nm,
                per_row=options.scope == "row",
                damping=options.damping,
            )
            if solved.damping > options.damping:
                log.warning("%s: damping raised to %g to factorise its Hessian", target.name, solved.damping)
            results.append((solved.weight, solved.keep))
        return results

    return backend.map_targets(model, jobs, solve)


def input_jobs(targets: Sequence[Target], found: InputMoments) -> list[Job]:
    """Targets grouped by the input they share, with its Gram matrix and the cost of factorising and sweeping it."""
    by_source: dict[str, list[Target]] = {}
    for target in targets:
        by_source.setdefault(found.of(target.module), []).append(target)
    return [
        Job(tuple(group), [found.moments.pop(source)], sum(t.shape[0] for t in group) * n**2 + 2.0 * n**3)
        for source, group in by_source.items()
        for n in [group[0].shape[1]]
    ]


def _random(weight: torch.Tensor, offset: int, seed: int, name: str) -> torch.Tensor:
    return uniform(offset, offset + weight.numel(), key_of(seed, name)).view(weight.shape).to(weight.device)
