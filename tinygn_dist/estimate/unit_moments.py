"""Moments of units: of the inputs of the weights that read them, for choosing and re-fitting, and of the outputs of
whole layers, for the weight that absorbs them; and how large units are.

Layers behind norm the residual stream, so an output error counts relative to its size there: every token weighs 1 /
(mean square of its layer's output). A few tokens whose stream is far larger than the others' would otherwise decide
alone. (A weight that absorbs layers which make such tokens themselves, near a model's ends, is not kept from it: there
it is the stream before them that is measured.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from tinygn_dist.estimate.hooks import Observer, first
from tinygn_dist.estimate.input_moments import InputMoments, Inputs, complete, input_hooks
from tinygn_dist.estimate.partial_forward import running_layers
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths import criteria
from tinygn_dist.maths.sums import Moments, add_gram, fill_below
from tinygn_dist.models.anatomy import UnitGroup
from tinygn_dist.models.matrices import Matrix

_FLOOR = 1e-6
"""of a mean square, as in norms"""
Segment = Sequence[int]
"""layers in a row"""
NOTHING: Mapping[str, Sequence[Segment]] = {}


class UnitMoments(NamedTuple):
    """This rank's sums, not yet reduced. inputs: a weighted Gram matrix (in, in) for each matrix. absorbed: by
    `absorbed_by( matrix's name, segment)` the sum (out, in) of w d x^T, d being the sum that the segment's layers added
    to the stream.

    Of matrices with a bias, a last input that is always 1 stands beside theirs: (in + 1, in + 1) and (out, in + 1).
    """

    inputs: InputMoments
    absorbed: Moments


def absorbed_by(name: str, segment: Segment) -> str:
    return f"{name} < {segment[0]} to {segment[-1]}"


def unit_moments(
    problem: Problem,
    matrices: Sequence[Matrix],
    with_constant: Collection[str],
    absorbs: Mapping[str, Sequence[Segment]] = NOTHING,
    layers: Sequence[int] | None = None,
) -> UnitMoments:
    """Sums over this rank's batches. with_constant: names of the matrices that have a bias. absorbs: by matrix's name,
    the segments behind it that it may have to absorb. layers: those that run, all by default."""
    found = UnitMoments(InputMoments(source_of={matrix.name: matrix.name for matrix in matrices}), Moments())
    for matrix in matrices:
        shape = matrix.shape[0], matrix.shape[1] + (matrix.name in with_constant)
        for segment in absorbs.get(matrix.name, ()):
            found.absorbed.reserve(absorbed_by(matrix.name, segment), shape, problem.backend.device)
    inputs, sizes, gains = Inputs(), dict[int, torch.Tensor](), dict[int, torch.Tensor]()
    behind = {layer for segments in absorbs.values() for segment in segments for layer in segment}
    watched = [
        (problem.bare.get_submodule(problem.anatomy.path_of(layer)), Observer(seen(into, layer), output=True))
        for seen, into, which in (
            (_mean_square, sizes, {matrix.layer for matrix in matrices}),
            (_gain, gains, behind),
        )
        for layer in sorted(which)
    ]
    running = running_layers(problem.bare, problem.anatomy, layers) if layers is not None else contextlib.nullcontext()
    hooks = [*input_hooks(problem.bare, matrices, inputs), *watched]
    with running:
        for micro_batch, _ in problem.forwards(problem.layers_alone, hooks, "input statistics"):
            mask = micro_batch.real_tokens
            for matrix in matrices if micro_batch.counts else ():
                ((hidden, _),) = inputs[matrix.name]
                rows = hidden.flatten(0, -2).float()
                weights = 1 / sizes[matrix.layer].view(-1, len(rows)).mean(0)  # of several streams (Gemma 3n) the mean
                if mask is not None:
                    rows, weights = rows[mask], weights[mask]
                constant = matrix.name in with_constant
                _add_inputs(found.inputs.moments, matrix.name, rows, weights, constant=constant)
                for segment in absorbs.get(matrix.name, ()):
                    gain = sum(gains[layer] for layer in segment)
                    weighted = (gain if mask is None else gain[mask]) * weights[:, None]
                    product = _with_one(weighted, rows, weights) if constant else weighted.t() @ rows
                    found.absorbed.add(absorbed_by(matrix.name, segment), product)
            inputs.clear()
    complete(found.inputs, problem)
    return found


def _add_inputs(sums: Moments, name: str, rows: torch.Tensor, weights: torch.Tensor, *, constant: bool) -> None:
    if constant:
        sums.add(name, _beside_one(rows, weights))
    else:
        sums.add_gram(name, rows, weights)


def _mean_square(sizes: dict[int, torch.Tensor], layer: int) -> Callable[[torch.Tensor, Any], None]:
    def seen(_: torch.Tensor, output: Any) -> None:
        sizes[layer] = first(output).flatten(0, -2).float().square().mean(-1).clamp(min=_FLOOR)

    return seen


def _gain(gains: dict[int, torch.Tensor], layer: int) -> Callable[[torch.Tensor, Any], None]:
    def seen(hidden: torch.Tensor, output: Any) -> None:
        gains[layer] = (first(output).float() - hidden.float()).flatten(0, -2)

    return seen


def _beside_one(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(in + 1, in + 1) fp64 weighted moment of (tokens, in) rows with a 1 at the end of each.

    Products are taken about the rows' mean and moved to zero in fp64: in fp32 the squares of a large constant would
    drown what varies beside it, and the matrix about the mean would not be one of squares.
    """
    total, about = weights.double().sum(), (weights @ rows) / weights.sum()
    apart = rows - about
    rest, about = (weights @ apart).double(), about.double()
    mixed, squares = torch.outer(about, rest), rows.new_zeros((rows.shape[1],) * 2, dtype=torch.float64)
    add_gram(squares, apart, weights)
    second = fill_below(squares) + mixed + mixed.t() + total * torch.outer(about, about)
    sums = rest + total * about
    return torch.cat([torch.cat([second, sums[None]]), torch.cat([sums, total[None]])[:, None]], 1)


def _with_one(weighted: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(out, in + 1) fp64 product of (tokens, out) weighted outputs and of (tokens, in) rows with a 1 at the end of
    each, likewise about the rows' mean."""
    about = (weights @ rows) / weights.sum()
    apart, sums = weighted.t() @ (rows - about), weighted.sum(0, dtype=torch.float64)
    return torch.cat([apart.double() + torch.outer(sums, about.double()), sums[:, None]], 1)


def column_energies(problem: Problem, groups: Sequence[UnitGroup], moments: InputMoments | None) -> list[torch.Tensor]:
    """||W_:,j||^2 sum w x_j^2 of every input feature of each group's output, over the data of all ranks, with the
    moments' weights of tokens; the sum of all weights that read the group, where there are several."""
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
