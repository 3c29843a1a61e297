"""How much the loss listens to the output of a linear layer, from forward passes alone.

The output of one layer is moved along a random direction, r_to = c |x_t| z_to with signs z (Rademacher), and the change
of each token's loss l_u is seen. To first order its mean square over directions is

    E sum_u (l_u(y + r) - l_u(y))^2 / c^2 = sum_u sum_to (dl_u / dy_to)^2 |x_t|^2,

the layer's gradient energy with every token's loss on its own (Hutchinson's estimate of a trace; node perturbation). A
forward of a sequence gives as many samples as it has tokens, so few forwards rank the layers, which a difference of the
whole loss does not. Nothing is known about single output rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.hooks import ModelHook
from torch import nn

from tinygn_dist.estimate.hooks import attached, first_input
from tinygn_dist.estimate.partial_forward import PrefixCache, running_layers
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths.counter_rng import key_of, signs
from tinygn_dist.models.anatomy import Matrix


def output_energies(problem: Problem, matrices: Sequence[Matrix], seed: int = 0) -> torch.Tensor:
    """(matrices,) fp64 sum_u sum_to (dl_u / dy_to)^2 |x_t|^2 over the micro-batches of all ranks, one forward per
    matrix and micro-batch, which starts at the matrix's layer. 0 for experts, whose outputs have no module to move, and
    where every loss is 0 (a distance to the dense model), which has no first order.

    The step c moves an output by the cube root of its dtype's resolution times its rms (fp32 0.005, bf16 0.2). The
    square root is usual where f carries one rounding; a token's loss carries those of all layers.
    """
    energies = torch.zeros(len(matrices), len(problem.batches), dtype=torch.float64)
    layers = range(problem.anatomy.num_layers)
    with torch.no_grad(), problem.progress.bar("output probes", problem.num_turns * len(matrices)) as advance:
        for micro_batch in problem.micro_batches():
            batch, cache = micro_batch.batch, PrefixCache()
            with cache.recording(problem.bare, problem.anatomy, layers):
                plain = problem.losses(batch).each
            for index, matrix in enumerate(matrices):
                if matrix.index is None:
                    nudge = _Nudge(key_of(seed, f"{matrix.name}/{micro_batch.number}"), micro_batch.real_tokens)
                    moved = _moved(problem, batch, cache, matrix, nudge)
                    if micro_batch.counts and nudge.scale > 0 and plain.any():
                        energy = float((moved - plain).double().square().sum()) / nudge.scale**2
                        energies[index, micro_batch.number] = energy
                advance()
    problem.backend.sum_over_data([energies])
    return energies.sum(1)


def _moved(problem: Problem, batch: dict, cache: PrefixCache, matrix: Matrix, nudge: _Nudge) -> torch.Tensor:
    """Each token's loss with the matrix's output moved."""
    layer, later = _layer_of(problem, matrix), contextlib.nullcontext()
    if layer is not None:
        left = range(layer, problem.anatomy.num_layers)
        later = running_layers(problem.bare, problem.anatomy, left, (cache, layer))
    with attached([(problem.bare.get_submodule(matrix.module), nudge)]), later:
        return problem.losses(batch).each


def _layer_of(problem: Problem, matrix: Matrix) -> int | None:
    """The layer a matrix lies in, to start from; None outside of the list of layers, or where a forward cannot start
    there."""
    return problem.anatomy.layer_of(matrix.module) if problem.anatomy.starts_anywhere else None


class _Nudge(ModelHook):
    """Moves a linear layer's output along its direction. scale: the c of the last forward, 0 where nothing could move.

    Signs are drawn by a token's number among the real ones, and padding stays where it is: how much of it there is, and
    on which side, changes nothing.
    """

    def __init__(self, key: int, real: torch.Tensor | None) -> None:
        """real: (tokens,) bool of the flattened micro-batch, None where all are."""
        self.key, self.real, self.scale = key, real, 0.0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        hidden = first_input(args, kwargs)
        self._length = None if hidden is None else hidden.float().square().sum(-1, keepdim=True).sqrt()
        return args, kwargs

    def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        length, self._length = self._length, None
        if length is None:
            return output
        rows, width = output.numel() // output.shape[-1], output.shape[-1]
        if self.real is None or len(self.real) != rows:  # a pooled sequence has no row for each token
            return self._moved(output, length)
        flat = output.reshape(rows, width).clone()
        flat[self.real] = self._moved(flat[self.real], length.reshape(rows, 1)[self.real])
        return flat.view(output.shape)

    def _moved(self, output: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        size, reach = float(output.float().square().mean().sqrt()), float(length.square().mean().sqrt())
        self.scale = torch.finfo(output.dtype).eps ** (1 / 3) * size / reach if reach > 0 else 0.0
        direction = signs(0, output.numel(), self.key, output.device).view(output.shape)
        return (output.float() + self.scale * length * direction).to(output.dtype)
