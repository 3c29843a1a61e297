"""How far forward-only descent may go, measured: from directions on some sequences, and what their sum does on others.

A step of K directions moves the weights by -rate * (1/K) sum_k c_k z_k, with slopes c_k = (g + n_k).z_k, where n_k is
how the gradient of direction k's own sequences differs from that of all. It lowers the loss most at

    rate = K / tr H * |g|^2 / (|g|^2 + |n|^2),

and on a language model's sequences |n|^2 is many times |g|^2, so that the rate K / tr H raises the loss. Nothing in one
batch tells g from n. So the slopes of a first set of sequences are summed up to one direction v, along which the loss
of *other* sequences is measured: its slope there is -|g|^2 (in units of v) without any n, its second derivative says
how far the step may go, and a set of sequences that sees no slope beyond its noise means that no step would help.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tinygn_dist.maths import confidence
from tinygn_dist.models.objective import Batch, Objective
from tinygn_dist.train.forward_only.weight_probes import WeightProbes

log = logging.getLogger(__name__)
DIRECTIONS = 32
"""summed up for the first look; twice as many for each further one"""
SEQUENCES = 16
"""on which their sum is looked at"""
LARGEST_CHANGE = 0.02
"""of a weight in one step, relative to the rms of its matrix"""
SAFE = 0.5
"""of the best step: the curvature at the start is not that of the whole way"""


@dataclass
class RateSearch:
    """Collects slopes and looks until a rate is found. All of it is numbers: `history` has the first direction of each
    step and its slopes, `seen` what the present look saw, (3, sequences) summed losses at v's steps -h, 0, h and
    (sequences,) tokens."""

    directions: int = DIRECTIONS
    history: list[tuple[int, list[float]]] = field(default_factory=list)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    _sum: tuple[dict[str, torch.Tensor], float] | None = None

    @property
    def gathered(self) -> int:
        return sum(len(slopes) for _, slopes in self.history)

    @property
    def looking(self) -> bool:
        """Whether enough directions are summed up, so that the next sequences are for looking."""
        return self.gathered >= self.directions

    def state_dict(self) -> dict[str, Any]:
        seen = [(totals.tolist(), counts.tolist()) for totals, counts in self.seen]
        return {"directions": self.directions, "history": list(self.history), "seen": seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.directions = state["directions"]
        self.history = [(first, list(slopes)) for first, slopes in state["history"]]
        self.seen = [tuple(torch.tensor(part, dtype=torch.float64) for part in pair) for pair in state["seen"]]
        self._sum = None

    def sum_of(self, probes: WeightProbes) -> tuple[dict[str, torch.Tensor], float]:
        """(1/K) sum_k c_k z_k by matrix, and its rms over the weights that move (relative, as the slopes are)."""
        if self._sum is not None:
            return self._sum
        total, sums = {}, torch.zeros(2, dtype=torch.float64)
        for matrix in probes.matrices:
            shard = torch.zeros_like(probes.signs(matrix, 0))
            for first, slopes in self.history:
                for index, slope in enumerate(slopes):
                    shard.add_(probes.signs(matrix, first + index), alpha=slope / self.gathered)
            total[matrix.name] = shard
            sums[0] += float(shard.double().square().sum())
            sums[1] += float(probes.signs(matrix, 0).count_nonzero())
        squares, number = probes.backend.sum_over_shards(sums).tolist()
        self._sum = total, (squares / max(number, 1)) ** 0.5
        return self._sum

    def look(
        self, probes: WeightProbes, objective: Objective, batch: Sequence[Batch], step: float
    ) -> tuple[float | None, torch.Tensor, torch.Tensor]:
        """The best rate of plain descent per direction (multiply by the K of a step), None where more must be seen; and
        the (sequences,) summed losses of the batch where the weights are, and their tokens."""
        total, size = self.sum_of(probes)
        reach = step / size if size else 0.0
        seen = probes.losses(objective, batch, total, [-reach, 0.0, reach])
        self.seen.append(seen)
        if sum(len(counts) for _, counts in self.seen) < SEQUENCES:
            return None, seen[0][1], seen[1]
        totals, counts = torch.cat([t for t, _ in self.seen], 1), torch.cat([c for _, c in self.seen])
        down, here, up = totals
        sides = torch.stack([(up - down) / (2 * step), (up - 2 * here + down) / step**2])
        (slope, bend), (error, unsure) = (values.tolist() for values in confidence.ratio_mean(sides, counts))
        log.info("%d directions together: slope %.3g +- %.2g, curvature %.3g", self.gathered, slope, error, bend)
        self.seen = []
        if slope <= error:  # the sum is mostly noise yet
            self.directions, self._sum = 2 * self.directions, None
            return None, seen[0][1], seen[1]
        best = (slope - error) / max(bend, unsure, 1e-12)  # a curvature lost in noise may be as large as that
        return SAFE * min(best, LARGEST_CHANGE) / size / self.gathered, seen[0][1], seen[1]
