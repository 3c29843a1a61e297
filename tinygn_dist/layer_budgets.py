"""How many weights each layer loses: budgets between equal shares and one global cut of the saliency in units of loss.

The saliency is right to second order at the model it was measured on, which the compressed one is not, so the best budgets
lie on the way. How far depends on the model; `best_of` tries, equal shares included, and compares held-out losses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from tinygn_dist.anatomy import Target
from tinygn_dist.backends.pieces import Job
from tinygn_dist.budget import blend, num_kept
from tinygn_dist.config import PruneConfig
from tinygn_dist.estimate.energy import coarse
from tinygn_dist.estimate.setting import Setting
from tinygn_dist.evaluate import mean_loss
from tinygn_dist.solve import obs
from tinygn_dist.threshold import kth_largest

log = logging.getLogger(__name__)
CANDIDATES = (0.0, 0.5, 0.75, 1.0)
Masks = dict[str, torch.Tensor]


def shares(options: PruneConfig) -> Sequence[float]:
    """How far to go towards the global cut; several to try."""
    if options.scope == "global":
        return (1.0,)
    return CANDIDATES if options.allocation == "auto" else (options.allocation,)


class _Tried(NamedTuple):
    loss: float
    share: float
    masks: Masks
    weights: dict[str, torch.Tensor]


def best_of(
    candidates: Sequence[float], held_out: Setting, targets: Sequence[Target], solve: Callable[[float], Masks]
) -> Masks:
    """Solve at every candidate share, each from the weights that are there now, and leave the model and return the masks of
    the one with the least loss on `held_out`. Holds two copies of this rank's pieces of the weights."""
    backend, model = held_out.backend, held_out.model

    def copies() -> dict[str, torch.Tensor]:
        return {target.name: backend.shard(model, target).weight.clone() for target in targets}

    def put_back(weights: dict[str, torch.Tensor]) -> None:
        for target in targets:
            backend.write(model, target, weights[target.name])

    before, best, told = copies(), None, []
    for share in candidates:
        masks = solve(share)
        loss = mean_loss(held_out, f"allocation {share:g}")
        told.append(f"{share:g}: {loss:.4f}")
        if best is None or loss < best.loss:
            best = _Tried(loss, share, masks, copies())
        put_back(before)
    put_back(best.weights)
    note = f"allocation {best.share:g} chosen by held-out loss ({', '.join(told)})"
    log.info(note)
    held_out.notes.append(note)
    return best.masks


def allocate(
    setting: Setting, targets: Sequence[Target], jobs: Sequence[Job], options: PruneConfig, share: float
) -> dict[str, int]:
    """How many entries of each target go: `share` of the way from the same share everywhere to one global cut of
    the saliency in units of loss. Experts whose tokens had no gradient have no saliency and are not in it."""
    backend, held = setting.backend, {}

    def look(job: Job, weights: list[torch.Tensor]) -> None:
        for index, (target, weight) in enumerate(zip(job.targets, weights, strict=True)):
            cost = loss_per_error(job, index)
            if cost is not None:
                saliency = obs.saliency(weight, job.moments[0].float(), options.damping)
                held[target.name] = saliency.mul_(cost[:, None])

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


def loss_per_error(job: Job, index: int) -> torch.Tensor | None:
    """(out,) what a unit of squared error at each output row of a target costs in loss, up to one factor for the whole
    model: the row's gradient energy over the trace of the Hessian that the error is measured with. None where no
    gradient was measured."""
    rows = job.moments[1 + index].float() if len(job.moments) > 1 else torch.zeros(())
    return coarse(rows / job.moments[0].diagonal().float().sum()) if rows.any() else None
