"""Slopes of the loss along random sign directions in the space of weights, with forward passes only.

A direction moves every probed weight by t times the rms of its matrix, up or down; t is the relative step. Signs come
from (seed, direction, matrix, global element index) alone, so each rank makes only its shard of them, whatever the
sharding. Weights are put back from a copy of the shards: adding and subtracting would leave rounding behind.

Such slopes are for *updating* weights. They cannot rank them: from K directions a gradient of d entries is known to a
relative error of d / K.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tinygn_dist.backends.base import Backend
from tinygn_dist.maths.counter_rng import key_of, signs
from tinygn_dist.models.anatomy import Matrix
from tinygn_dist.models.objective import Batch, Objective

RESOLUTION = 2.0
"""a step below this many times a dtype's epsilon leaves many weights where they are: in bf16 an eighth of them at 0.015
rms, a third at 0.005"""

Direction = int | Mapping[str, torch.Tensor]
"""the number of a direction of signs, or a tensor for each matrix, shaped like this rank's shard"""


@dataclass(frozen=True)
class Slopes:
    """slopes: (directions,) fp64 d loss / d t per token. losses: (directions,) the mean of the two sides. tokens: of
    all directions."""

    slopes: torch.Tensor
    losses: torch.Tensor
    tokens: int


class WeightProbes:
    """Directions over some matrices of a model, on their kept weights.

    keep: masks shaped like this rank's shards; all of a matrix that has none.
    """

    def __init__(
        self,
        model: nn.Module,
        matrices: Sequence[Matrix],
        keep: Mapping[str, torch.Tensor],
        backend: Backend,
        seed: int,
    ) -> None:
        self.model, self.matrices, self.keep, self.backend, self.seed = model, tuple(matrices), keep, backend, seed
        self.scales = self._scales()

    def signs(self, matrix: Matrix, direction: int) -> torch.Tensor:
        """fp32 +1 and -1 (0 where masked), shaped like this rank's shard."""
        shard = self.backend.shard(self.model, matrix)
        key = key_of(self.seed, f"{direction}/{matrix.name}")
        found = signs(shard.offset, shard.offset + shard.weight.numel(), key, shard.weight.device)
        found = found.view(shard.weight.shape)
        return found.masked_fill_(~self.keep[matrix.name], 0) if matrix.name in self.keep else found

    @contextlib.contextmanager
    def along(self, direction: Direction) -> Iterator[Callable[[float], None]]:
        """Inside, `move(t)` puts the weights at relative step t of a direction; afterwards they are as before, bit for
        bit."""
        before = {t.name: self.backend.shard(self.model, t).weight.clone() for t in self.matrices}

        def move(t: float) -> None:
            for matrix in self.matrices:
                weight = before[matrix.name]
                up = self._of(matrix, direction).to(torch.promote_types(weight.dtype, torch.float32))
                moved = up.mul(t * self.scales[matrix.name]).add_(weight)
                self.backend.write(self.model, matrix, moved.to(weight.dtype))

        try:
            yield move
        finally:
            for matrix in self.matrices:
                self.backend.write(self.model, matrix, before[matrix.name])

    def slopes(self, objective: Objective, batches: Sequence[Sequence[Batch]], first: int, step: float) -> Slopes:
        """Central differences along directions first, first + 1, ..., each on its own sequences.

        Whole replicas of the model take different directions at the same time; the ranks that share one replica take
        the same and split its sequences. Only two losses per direction and sequence cross the network.
        """
        most = max(len(batch) for batch in batches)
        totals = torch.zeros(len(batches), 2, most, dtype=torch.float64)
        counts = torch.zeros(len(batches), most, dtype=torch.float64)
        for index in self.backend.dealt_over_replicas(range(len(batches))):
            mine = self.backend.dealt_within_replica(list(enumerate(batches[index])))
            with self.along(first + index) as move:
                for side, sign in enumerate((1, -1)):
                    move(sign * step)
                    for (position, batch), real in mine:
                        total, count = self._loss(objective, batch)
                        if real:
                            totals[index, side, position], counts[index, position] = total, count
        self.backend.sum_over_data([totals, counts])
        each = counts.sum(1)
        up, down = totals[:, 0].sum(1), totals[:, 1].sum(1)
        return Slopes((up - down) / (2 * step * each), (up + down) / (2 * each), int(each.sum()))

    def losses(
        self, objective: Objective, batch: Sequence[Batch], direction: Direction, steps: Sequence[float]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(steps, sequences) fp64 summed losses at relative steps of one direction, and (sequences,) tokens. Every rank
        gets all of them."""
        totals = torch.zeros(len(steps), len(batch), dtype=torch.float64)
        counts = torch.zeros(len(batch), dtype=torch.float64)
        mine = self.backend.dealt(list(enumerate(batch)))
        with self.along(direction) as move:
            for row, t in zip(totals, steps, strict=True):
                move(t)
                for (position, sequence), real in mine:
                    total, count = self._loss(objective, sequence)
                    if real:
                        row[position], counts[position] = total, count
        self.backend.sum_over_data([totals, counts])
        return totals, counts

    def _of(self, matrix: Matrix, direction: Direction) -> torch.Tensor:
        return self.signs(matrix, direction) if isinstance(direction, int) else direction[matrix.name]

    def _loss(self, objective: Objective, batch: Batch) -> tuple[float, int]:
        with torch.no_grad():
            found = objective(self.model, {name: value.to(self.backend.device) for name, value in batch.items()})
        return float(found.total.sum()), int(found.count.sum())

    def _scales(self) -> dict[str, float]:
        """The rms of each matrix's kept weights, over all shards."""
        sums = torch.zeros(len(self.matrices), 2, dtype=torch.float64)
        for row, matrix in zip(sums, self.matrices, strict=True):
            weight = self.backend.shard(self.model, matrix).weight
            keep = self.keep.get(matrix.name)
            row[0] = float((weight if keep is None else weight * keep).double().square().sum())
            row[1] = weight.numel() if keep is None else float(keep.sum())
        sums = self.backend.sum_over_shards(sums)
        rms = (sums[:, 0] / sums[:, 1].clamp(min=1)).sqrt().tolist()
        return {matrix.name: value for matrix, value in zip(self.matrices, rms, strict=True)}
