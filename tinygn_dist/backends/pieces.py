"""What backends hand to stages: a rank's piece of a weight, and work on whole rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tinygn_dist.anatomy import Target


@dataclass(frozen=True)
class Shard:
    """This rank's piece of a target.

    weight: the live storage, any shape, possibly empty. offset: index of its first element in the flattened target *as
    stored* (which `target.start` places in a parameter that holds several); the piece is a run of consecutive elements.
    Masks and scores of a target have this shape on each rank. Edits go through `write`: there may be master copies.
    """

    weight: torch.Tensor
    offset: int


@dataclass
class Job:
    """Row work on targets that share one input. moments: this rank's partial sums over its data, until
    `sum_for_jobs` completes them on the rank that solves the job and empties them elsewhere. outcome: a small fact
    that `solve` may leave; `map_targets` brings it to every rank."""

    targets: tuple[Target, ...]
    moments: list[torch.Tensor]
    cost: float
    extra: dict[str, Any] = field(default_factory=dict)
    outcome: Any = None


# solve(job, whole (out, in) weights) -> for each target (new weight, keep mask), both (out, in)
Solve = Callable[[Job, list[torch.Tensor]], list[tuple[torch.Tensor, torch.Tensor]]]
Look = Callable[[Job, list[torch.Tensor]], None]
