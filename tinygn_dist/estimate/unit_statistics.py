"""What is known of units without looking at the loss: what they feed forward, and how large they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tinygn_dist.estimate.input_moments import InputMoments
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths import criteria
from tinygn_dist.models.anatomy import Matrix, UnitGroup


def column_energies(problem: Problem, groups: Sequence[UnitGroup], moments: InputMoments | None) -> list[torch.Tensor]:
    """||W_:,j||^2 sum w x_j^2 of every input feature of each group's output, over the data of all ranks, with the moments'
    weights of tokens; the sum of all weights that read the group, where there are several."""
    assert moments is not None
    read_by = [[problem.anatomy.matrix_of(module) for module, _ in group.readers] for group in groups]
    squares = {
        t.name: moments.moments.sum(moments.of(t)).diagonal()[: t.shape[1]].clone() for ts in read_by for t in ts
    }
    problem.backend.sum_over_data(list(squares.values()))

    def energy(matrix: Matrix) -> torch.Tensor:
        weight = problem.backend.shard(problem.model, matrix).weight
        weight = matrix.oriented(problem.backend.gather(problem.model, matrix, weight))
        return criteria.column_energy(weight, squares[matrix.name].float())

    return [torch.stack([energy(matrix) for matrix in matrices]).sum(0) for matrices in read_by]


def unit_magnitude(problem: Problem, group: UnitGroup) -> torch.Tensor:
    """(units,) sums of squares of every parameter that goes with a unit."""
    total = torch.zeros(group.num_units, dtype=torch.float64)
    parameters = {name for name, _ in problem.bare.named_parameters()}
    for piece in group.slices:
        if piece.tensor not in parameters:  # a buffer
            continue
        squares = problem.backend.whole(problem.model, piece.tensor).double().square().movedim(piece.dim, 0)
        own = squares.reshape(len(squares), -1).sum(1)[piece.start : piece.start + group.num_units * piece.width]
        total += criteria.unit_sums(own, piece.width).cpu()
    return total
