"""Second part of the contract: pieces of weights, and work on whole rows of them.

Two kinds of sum are kept apart because mixing them up is the typical bug: under DDP every rank holds every weight, so
adding a fact about weights over ranks counts it `num_ranks` times, while a fact about a batch must be added exactly
once. `sum_over_shards` is of the first kind, `sum_over_data` of the second.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from tinygn_dist.backends import collectives
from tinygn_dist.backends.gradients import GradientSums, hooked
from tinygn_dist.backends.pieces import Edited, Extras, Job, Look, Shard, Solve
from tinygn_dist.backends.placement import Placement
from tinygn_dist.models.anatomy import Matrix

_Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


class RowWork(Placement):
    """A piece is what a rank holds of a matrix, see `Shard`; whole weights exist one at a time."""

    def shard(self, model: nn.Module, matrix: Matrix) -> Shard:
        return Shard(matrix.within(self.unwrap(model).get_parameter(matrix.parameter).data), 0)

    def gather(self, model: nn.Module, matrix: Matrix, piece: torch.Tensor) -> torch.Tensor:
        return piece

    def shard_of(self, model: nn.Module, matrix: Matrix, whole: torch.Tensor) -> torch.Tensor:
        return whole

    def by_rows(
        self, model: nn.Module, matrix: Matrix, piece: torch.Tensor, work: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """`work` maps (rows, in) to the same shape, row by row. Moves nothing where the pieces are made of whole
        rows."""
        if piece.dim() == 2 and matrix.input_dim == 1:
            return work(piece)
        whole = matrix.oriented(work(matrix.oriented(self.gather(model, matrix, piece))))
        return self.shard_of(model, matrix, whole.contiguous())

    @abstractmethod
    def write(self, model: nn.Module, matrix: Matrix, piece: torch.Tensor) -> None: ...

    @abstractmethod
    def write_mask(self, model: nn.Module, matrix: Matrix, keep: torch.Tensor) -> None: ...

    def sum_over_shards(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    @contextlib.contextmanager
    def gradient_sums(
        self, model: nn.Module, matrices: Sequence[Matrix], function: Callable[[torch.Tensor], torch.Tensor]
    ) -> Iterator[GradientSums]:
        """Inside, every backward of a micro-batch adds function(fp32 gradient); afterwards `.moments` are complete over
        the data of all ranks. The matrices must require gradients."""
        sums = self._empty_sums(model, matrices, function)
        with hooked(sums, [(self.unwrap(model).get_parameter(t.parameter), t, lambda whole: whole) for t in matrices]):
            yield sums
        self.sum_over_data(sums.moments.tensors())

    def _empty_sums(self, model: nn.Module, matrices: Sequence[Matrix], function: Callable) -> GradientSums:
        sums = GradientSums(function)
        for matrix in matrices:
            weight = self.shard(model, matrix).weight
            sums.moments.reserve(matrix.name, tuple(weight.shape), weight.device)
        return sums

    def sum_for_jobs(self, jobs: Sequence[Job]) -> None:
        for job, owner in zip(jobs, self.owners_of([job.cost for job in jobs]), strict=True):
            for index, moment in enumerate(job.moments):
                collectives.sum_(moment, owner=owner)
                if owner != self.rank:
                    job.moments[index] = moment.new_empty(0)

    def map_matrices(self, model: nn.Module, jobs: Sequence[Job], solve: Solve) -> dict[str, Extras]:
        """Writes the new weights; returns the extras of each matrix by its name (see `Edited`).

        Every weight is gathered in turn and kept by its owner alone; the owners solve at the same time; then every
        result is sent once and each rank keeps its piece.
        """
        owners = self.owners_of([job.cost for job in jobs])
        mine, edited = self._owned_weights(model, jobs, owners), {}
        with self.together("solving the layers"):
            for index in list(mine):
                edited[index] = solve(jobs[index], mine.pop(index))
        layouts: dict[int, list[_Layout]] = {}
        for of_rank in self.everyone({index: list(map(_layout_of, results)) for index, results in edited.items()}):
            layouts |= of_rank
        extras = {}
        for index, (job, owner) in enumerate(zip(jobs, owners, strict=True)):
            for position, matrix in enumerate(job.matrices):
                result = edited[index][position] if owner == self.rank else None
                extras[matrix.name] = self._spread_result(model, matrix, result, layouts[index][position], owner)
        return extras

    def look_at_targets(self, model: nn.Module, jobs: Sequence[Job], look: Look) -> None:
        mine = self._owned_weights(model, jobs, self.owners_of([job.cost for job in jobs]))
        with self.together("looking at the layers"):
            for index in list(mine):
                look(jobs[index], mine.pop(index))

    def _owned_weights(
        self, model: nn.Module, jobs: Sequence[Job], owners: Sequence[int]
    ) -> dict[int, list[torch.Tensor]]:
        """The whole (out, in) weights of the jobs this rank owns, by index of the job."""
        mine: dict[int, list[torch.Tensor]] = {}
        for index, (job, owner) in enumerate(zip(jobs, owners, strict=True)):
            for matrix in job.matrices:
                weight = matrix.oriented(self.gather(model, matrix, self.shard(model, matrix).weight))
                if owner == self.rank:
                    mine.setdefault(index, []).append(weight)
        return mine

    def _spread_result(
        self, model: nn.Module, matrix: Matrix, result: Edited | None, layout: _Layout, owner: int
    ) -> Extras:
        """Write the owner's new (out, in) weight everywhere; returns the extras, in pieces where they are shaped like
        it."""

        def stored(whole: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
            sent = torch.empty(matrix.stored_shape, dtype=dtype, device=self.device)
            if whole is not None:
                sent.copy_(matrix.oriented(whole))
            return self.shard_of(model, matrix, collectives.broadcast_(sent, owner))

        dtype = self.shard(model, matrix).weight.dtype
        self.write(model, matrix, stored(result and result.weight, dtype))
        extras: Extras = {}
        for name, (shape, dtype) in layout.items():
            value = result and result.extras[name]
            if shape == matrix.shape:
                extras[name] = stored(value, dtype)
            else:
                sent = torch.empty(shape, dtype=dtype, device=self.device)
                if value is not None:
                    sent.copy_(value)
                extras[name] = collectives.broadcast_(sent, owner)
        return extras


def _layout_of(result: Edited) -> _Layout:
    """Shape and dtype of each extra, which other ranks need before it can be sent."""
    return {name: (tuple(value.shape), value.dtype) for name, value in result.extras.items()}
