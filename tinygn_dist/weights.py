"""Weight patterns (unstructured, N:M): estimate what the criterion needs, score, select, and for `obs` solve."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch

from tinygn_dist import score
from tinygn_dist.anatomy import Target
from tinygn_dist.backends.pieces import Job, Shard
from tinygn_dist.budget import blend, num_kept
from tinygn_dist.config import PruneConfig
from tinygn_dist.estimate.activations import InputMoments, input_moments
from tinygn_dist.estimate.backprop import weight_gradients
from tinygn_dist.estimate.directions import key_of, uniform
from tinygn_dist.estimate.energy import LossMoments, loss_moments
from tinygn_dist.estimate.setting import Setting
from tinygn_dist.masking import Masks
from tinygn_dist.selection import choose_masks
from tinygn_dist.solve import least_squares, obs
from tinygn_dist.threshold import kth_largest

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
            scores = {}
            for target in targets:
                weight, energy = shards[target.name].weight, found.moments.rounded(found.of(target))
                scores[target.name] = score.wanda(weight, target.per_input(energy, weight, shards[target.name].offset))
            return scores
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
    """Masks and updates by the layer solver; whole rows of each target are solved by one rank."""
    backend, aware = setting.backend, loss_aware(options)
    jobs = (
        loss_jobs(targets, loss_moments(setting, targets))
        if aware
        else input_jobs(targets, input_moments(setting, targets, full=True))
    )
    backend.sum_for_jobs(jobs)
    pruned = {target.name: _num_pruned(target, options) for target in targets}
    share = {"auto": options.allocation, "global": 1.0}.get(options.scope, 0.0)
    if aware and share > 0:
        pruned |= _allocate(setting, targets, jobs, options, share)

    def solve(job: Job, weights: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        results, hessian = [], job.moments[0].float()
        unreached = _is_unreached(job)
        if unreached:  # with the identity the solver keeps the largest
            hessian = torch.eye(len(hessian), device=hessian.device)
            _warn_unreached(job.targets)
        for target, weight in zip(job.targets, weights, strict=True):
            solved = obs.prune(
                weight,
                hessian,
                pruned[target.name],
                nm=options.nm,
                per_row=options.scope == "row",
                row_energy=_row_factor(job) if aware and not unreached else None,
                damping=options.damping,
            )
            if solved.damping > options.damping:
                log.warning("%s: damping raised to %g to factorise its Hessian", target.name, solved.damping)
            fitted = least_squares.refit_masked(
                weight, solved.weight, solved.keep, hessian, options.refine, solved.damping
            )
            results.append((fitted, solved.keep))
        return results

    return backend.map_targets(setting.model, jobs, solve)


def loss_aware(options: PruneConfig) -> bool:
    """Whether the solver weighs tokens and rows by gradient energy. Not for N:M: rows do not compete there, and token
    weights made 2:4 worse on SmolLM2-135M."""
    return options.estimator != "finite-difference" and options.nm is None


def _allocate(
    setting: Setting, targets: Sequence[Target], jobs: Sequence[Job], options: PruneConfig, share: float
) -> dict[str, int]:
    """How many entries of each target go: `share` of the way from the same share everywhere to one global cut of
    the saliency in units of loss. Experts that no token reached have no saliency and are not in it."""
    backend, held = setting.backend, {}

    def look(job: Job, weights: list[torch.Tensor]) -> None:
        for target, weight in zip(job.targets, weights, strict=True) if not _is_unreached(job) else ():
            held[target.name] = (
                obs.saliency(weight, job.moments[0].float(), options.damping) * _row_factor(job)[:, None]
            )

    def over_owners(tensor: torch.Tensor) -> torch.Tensor:
        backend.sum_over_data([tensor])  # each rank holds the saliencies of the targets it owns
        return tensor

    backend.look_at_targets(setting.model, jobs, look)
    competing = over_owners(torch.tensor([int(target.name in held) for target in targets])).tolist()
    targets = [target for target, competes in zip(targets, competing, strict=True) if competes]
    sizes = [target.numel for target in targets]
    keep = num_kept(sum(sizes), options.sparsity)
    threshold, _ = kth_largest(list(held.values()), keep, over_owners)
    if threshold is None:  # nothing goes
        return {}
    below = torch.tensor([int((held[t.name] < threshold).sum()) if t.name in held else 0 for t in targets])
    pruned = blend(sum(sizes) - keep, sizes, over_owners(below).tolist(), share)
    return {target.name: count for target, count in zip(targets, pruned, strict=True)}


def _is_unreached(job: Job) -> bool:
    return job.targets[0].index is not None and not job.moments[0].any()


def _row_factor(job: Job) -> torch.Tensor:
    """(out,) energy of each output row relative to the mean; the Hessian's token weights carry the scale."""
    rows = job.moments[1].float()
    return rows / rows.mean().clamp(min=torch.finfo(torch.float32).tiny)


def _num_pruned(target: Target, options: PruneConfig) -> int:
    rows, size = target.shape if options.scope == "row" else (1, target.numel)
    return rows * (size - num_kept(size, options.sparsity))


def input_jobs(targets: Sequence[Target], found: InputMoments) -> list[Job]:
    """Targets grouped by the input they share, with its Gram matrix and the cost of factorising and sweeping it."""
    by_source: dict[str, list[Target]] = {}
    for target in targets:
        by_source.setdefault(found.of(target), []).append(target)
    return [Job(tuple(group), [found.moments.pop(source)], _solve_cost(group)) for source, group in by_source.items()]


def loss_jobs(targets: Sequence[Target], found: LossMoments) -> list[Job]:
    """One job per target: its token-weighted Hessian and the energy of its rows."""
    return [Job((t,), [found.gram.pop(t.name), found.rows.pop(t.name)], _solve_cost([t])) for t in targets]


def _solve_cost(targets: Sequence[Target]) -> float:
    num_inputs = targets[0].shape[1]
    return sum(t.shape[0] for t in targets) * num_inputs**2 + 2.0 * num_inputs**3


def _random(shard: Shard, key: int) -> torch.Tensor:
    weight = shard.weight
    return uniform(shard.offset, shard.offset + weight.numel(), key).view(weight.shape).to(weight.device)
