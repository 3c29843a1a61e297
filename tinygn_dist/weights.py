"""Weight patterns (unstructured, N:M): estimate what the criterion needs, score, select, and for `obs` solve."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch

from tinygn_dist import score
from tinygn_dist.anatomy import Target
from tinygn_dist.backends.base import Job, Shard
from tinygn_dist.budget import num_kept
from tinygn_dist.config import PruneConfig
from tinygn_dist.estimate.activations import InputMoments, input_moments
from tinygn_dist.estimate.backprop import weight_gradients
from tinygn_dist.estimate.directions import key_of, uniform
from tinygn_dist.estimate.setting import Setting
from tinygn_dist.masking import Masks
from tinygn_dist.selection import choose_masks
from tinygn_dist.solve import obs

log = logging.getLogger(__name__)
DEFAULT_SCOPE = {"wanda": "row"}  # as published; elsewhere a weight matrix is the group
WITHOUT_DATA = ("magnitude", "random")


def sparsify(setting: Setting, targets: Sequence[Target], options: PruneConfig) -> Masks:
    """Choose masks and apply them to the live weights (criterion obs also updates what is kept)."""
    criterion = "obs" if options.criterion == "auto" else options.criterion
    if criterion == "obs":
        masks = _solve(setting, targets, options)
    else:
        masks = _choose(setting, targets, _scores(setting, targets, criterion, options.seed), criterion, options)
    chosen = Masks(targets, masks)
    chosen.apply_(setting.model, setting.backend)
    return chosen


def _choose(
    setting: Setting, targets: Sequence[Target], scores: dict[str, torch.Tensor], criterion: str, options: PruneConfig
) -> dict[str, torch.Tensor]:
    """Masks by scores; experts without any are pruned by magnitude, each to the same sparsity on its own: where the
    whole model competes, scores of another scale would empty them or spare them."""

    def masks(among: Sequence[Target], within: str) -> dict[str, torch.Tensor]:
        return choose_masks(
            setting.model,
            among,
            scores,
            sparsity=options.sparsity,
            scope=within,
            nm=options.nm,
            backend=setting.backend,
        )

    scope = DEFAULT_SCOPE.get(criterion, "layer") if options.scope == "auto" else options.scope
    alone = {} if criterion in WITHOUT_DATA else {t.name: t for t in _unreached(setting, targets, scores)}
    _warn_unreached(alone.values())
    for name, target in alone.items():
        scores[name] = score.magnitude(setting.backend.shard(setting.model, target).weight)
    together = [target for target in targets if scope != "global" or target.name not in alone]
    apart = list(alone.values()) if scope == "global" else []
    return {k: m for among, s in ((together, scope), (apart, "layer")) if among for k, m in masks(among, s).items()}


def _scores(setting: Setting, targets: Sequence[Target], criterion: str, seed: int) -> dict[str, torch.Tensor]:
    """fp32 scores shaped like this rank's shards."""
    shards = {target.name: setting.backend.shard(setting.model, target) for target in targets}
    match criterion:
        case "magnitude":
            return {name: score.magnitude(shard.weight) for name, shard in shards.items()}
        case "random":
            return {name: _random(shard, key_of(seed, name)) for name, shard in shards.items()}
        case "wanda":
            found = input_moments(setting, targets, full=False)
            setting.backend.sum_over_data(found.moments.tensors())
            return {
                t.name: t.matrix(score.wanda(t.matrix(shards[t.name].weight), found.moments.rounded(found.of(t))))
                for t in targets
            }
        case "taylor" | "fisher":
            grads = weight_gradients(setting, targets, squares=criterion == "fisher")
            rule = score.fisher if criterion == "fisher" else score.taylor
            return {name: rule(shard.weight, grads.rounded(name)) for name, shard in shards.items()}
    raise AssertionError(criterion)


def _unreached(setting: Setting, targets: Sequence[Target], scores: dict[str, torch.Tensor]) -> list[Target]:
    """Experts that no calibration token reached, whose scores are all zero: those say nothing about them."""
    experts = [target for target in targets if target.index is not None]
    nonzero = torch.tensor([int(torch.count_nonzero(scores[t.name])) for t in experts], dtype=torch.int64)
    nonzero = setting.backend.sum_over_shards(nonzero).tolist() if experts else []
    return [target for target, count in zip(experts, nonzero, strict=True) if count == 0]


def _warn_unreached(targets: Iterable[Target]) -> None:
    unreached: dict[str, set[int]] = {}
    for target in targets:
        unreached.setdefault(target.module, set()).add(target.index)
    for module, experts in unreached.items():
        never = sorted(experts)
        log.warning("no calibration token reached experts %s of %s: they are pruned by magnitude", never, module)


def _solve(setting: Setting, targets: Sequence[Target], options: PruneConfig) -> dict[str, torch.Tensor]:
    jobs = input_jobs(targets, input_moments(setting, targets, full=True))
    setting.backend.sum_for_jobs(jobs)

    def solve(job: Job, weights: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        results, hessian = [], job.moments[0].float()
        if job.targets[0].index is not None and not hessian.any():  # with the identity the solver keeps the largest
            hessian = torch.eye(len(hessian), device=hessian.device)
            _warn_unreached(job.targets)
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

    return setting.backend.map_targets(setting.model, jobs, solve)


def input_jobs(targets: Sequence[Target], found: InputMoments) -> list[Job]:
    """Targets grouped by the input they share, with its Gram matrix and the cost of factorising and sweeping it."""
    by_source: dict[str, list[Target]] = {}
    for target in targets:
        by_source.setdefault(found.of(target), []).append(target)
    return [
        Job(tuple(group), [found.moments.pop(source)], sum(t.shape[0] for t in group) * n**2 + 2.0 * n**3)
        for source, group in by_source.items()
        for n in [group[0].shape[1]]
    ]


def _random(shard: Shard, key: int) -> torch.Tensor:
    weight = shard.weight
    return uniform(shard.offset, shard.offset + weight.numel(), key).view(weight.shape).to(weight.device)
