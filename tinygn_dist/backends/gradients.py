"""Sums over micro-batches of a function of each weight gradient, kept as this rank's shards.

What a sharded backend leaves in `.grad` is a mean over ranks, that is over micro-batches that ran at the same time: no
square of a single micro-batch's gradient can be had from it, and its rounding depends on the number of ranks. So the
gradient is taken where autograd puts it, before any reduction, one weight at a time: the function is applied to this
rank's micro-batch alone, the result is summed over the owners of the weight in fp64, and only the owned piece stays.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from tinygn_dist.maths.sums import Moments
from tinygn_dist.models.anatomy import Matrix

Function = Callable[[torch.Tensor], torch.Tensor]
# from this rank's whole fp32 matrix to the owned piece of the sum over the weight's owners, in fp64 where there are
# several
Reduce = Callable[[torch.Tensor], torch.Tensor]


class GradientSums:
    """moments: per name the fp64 sum, shaped like this rank's shard."""

    def __init__(self, function: Function) -> None:
        self.moments = Moments()
        self._function = function
        self._taken = hashlib.sha256()
        self._counts = True

    @contextlib.contextmanager
    def micro_batch(self, counts: bool) -> Iterator[None]:
        """One backward. counts: False for a padding micro-batch, which runs only because the others' backward is a
        collective."""
        self._counts = counts
        yield

    def take(self, parameter: nn.Parameter, matrices: Sequence[tuple[Matrix, Reduce]]) -> None:
        """Add the gradients of matrices that lie in one parameter, and drop the parameter's."""
        grad, parameter.grad = parameter.grad, None
        for matrix, reduce in matrices:
            contribution = self._function(matrix.within(grad).float())
            if not self._counts:
                contribution = torch.zeros_like(contribution)
            self.moments.add(matrix.name, reduce(contribution))
            self._taken.update(matrix.name.encode())

    def order(self) -> str:
        """Equal for equal sequences of names, whose gradients came one after the other: it must be the same on every
        rank where a gradient is reduced the moment it is there."""
        return self._taken.hexdigest()[:16]


@contextlib.contextmanager
def hooked(sums: GradientSums, places: Sequence[tuple[nn.Parameter, Matrix, Reduce]]) -> Iterator[None]:
    """Inside, `sums` takes the gradient of every matrix from the parameter that holds it."""
    held: dict[nn.Parameter, list[tuple[Matrix, Reduce]]] = {}
    for parameter, matrix, reduce in places:
        held.setdefault(parameter, []).append((matrix, reduce))
    handles = []
    try:
        for parameter, matrices in held.items():
            handles.append(
                parameter.register_post_accumulate_grad_hook(lambda p, matrices=matrices: sums.take(p, matrices))
            )
        yield
    finally:
        for handle in handles:
            handle.remove()
