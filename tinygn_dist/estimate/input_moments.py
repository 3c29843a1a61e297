"""Second moments of what linear layers read: sums over real tokens of x^2 or of x x^T, and layers' block influence.

Layers that read the same tensor (q, k, v; gate, up) share one sum. Padding is left out. Every expert has sums of its
own, over the tokens routed to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook
from torch import nn

from tinygn_dist.estimate.expert_moments import ExpertObserver, Routed
from tinygn_dist.estimate.hooks import Observer, first
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths.sums import Moments
from tinygn_dist.models.anatomy import Matrix
from tinygn_dist.models.matrices import expert_weights


class Read(NamedTuple):
    """hidden: (..., in) what a matrix read. tokens: where its rows lie in the flattened micro-batch; None: in order."""

    hidden: torch.Tensor
    tokens: torch.Tensor | None


Inputs = dict[str, list[Read]]
"""by matrix, once for every time that its module ran"""
Weigh = Callable[[str, torch.Tensor, int], torch.Tensor]
"""(matrix's name, (n,) positions of real tokens in the flattened micro-batch, how often its module ran before) -> (n,)
fp32"""


@dataclass
class InputMoments:
    """moments: this rank's sums, by source. source_of: matrix -> the matrix whose name the shared sum carries."""

    moments: Moments = field(default_factory=Moments)
    source_of: dict[str, str] = field(default_factory=dict)

    def of(self, matrix: Matrix) -> str:
        return self.source_of[matrix.name]

    def merge(self, other: InputMoments) -> None:
        """Add the sums of other batches."""
        self.moments.merge(other.moments)
        self.source_of |= other.source_of


def input_moments(problem: Problem, matrices: Sequence[Matrix], *, full: bool) -> InputMoments:
    """Sums over this rank's batches, not yet reduced: a Gram matrix (in, in) per source with `full`, else (in,)
    sums of squares. The caller reduces them, to every rank or to the one that needs them."""
    found = InputMoments()
    inputs: Inputs = {}
    hooks = input_hooks(problem.bare, matrices, inputs)
    for micro_batch, _ in problem.forwards(problem.layers_alone, hooks, "input statistics"):
        if micro_batch.counts:
            add_inputs(found, inputs, micro_batch.real_tokens, full)
        inputs.clear()
    complete(found, problem)
    return found


def complete(found: InputMoments, problem: Problem) -> None:
    """Gram matrices whole; and every rank takes part in all sums, in one order: names and shapes come from the ranks
    whose batches reached them."""
    for name in found.moments.names():
        if found.moments.sum(name).dim() == 2:
            found.moments.fill_gram(name)
    everywhere = [one for one in problem.backend.everyone(_layout(found)) if one]
    shapes = {name: shape for sums, _ in everywhere for name, shape in sums}
    for name, shape in shapes.items():
        found.moments.reserve(name, shape, problem.backend.device)
    found.moments.reorder(shapes)
    found.source_of = {name: source for _, source_of in reversed(everywhere) for name, source in source_of.items()}


def block_influence(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """(layers,) fp64 sums over tokens of the cosine between each layer's input and output, and token counts."""
    sums = torch.zeros(problem.anatomy.num_layers, dtype=torch.float64)
    tokens = torch.zeros_like(sums)
    cosines: dict[int, torch.Tensor] = {}
    layers = [problem.bare.get_submodule(problem.anatomy.path_of(layer)) for layer in range(len(sums))]
    hooks = [(layer, Observer(_cosine_in(cosines, index), output=True)) for index, layer in enumerate(layers)]
    for micro_batch, _ in problem.forwards(problem.layers_alone, hooks, "block influence"):
        mask = micro_batch.real_tokens
        for index, cosine in cosines.items() if micro_batch.counts else ():
            cosine = cosine.flatten() if mask is None else cosine.flatten()[mask]
            sums[index] += cosine.double().sum().cpu()
            tokens[index] += len(cosine)
    problem.backend.sum_over_data([sums, tokens])
    return sums, tokens


def input_hooks(bare: nn.Module, matrices: Sequence[Matrix], inputs: Inputs) -> list[tuple[nn.Module, ModelHook]]:
    """One hook per module, which puts what each matrix reads into `inputs`."""
    wanted = {matrix.name for matrix in matrices}

    def linear(name: str) -> Observer:
        def seen(hidden: torch.Tensor, _: Any) -> None:
            inputs.setdefault(name, []).append(Read(hidden, None))

        return Observer(seen)

    def fused(module: str) -> ExpertObserver:
        leaves = expert_weights(bare.get_submodule(module))

        def seen(routed: Routed) -> None:
            for leaf, rows in zip(leaves, (routed.rows, routed.inner), strict=True):
                name = f"{module}.{leaf}[{routed.expert}]"
                if name in wanted:
                    inputs.setdefault(name, []).append(Read(rows, routed.tokens))

        return ExpertObserver(seen)

    by_module = {matrix.module: matrix for matrix in matrices}
    return [
        (bare.get_submodule(module), linear(matrix.name) if matrix.index is None else fused(module))
        for module, matrix in by_module.items()
    ]


def _cosine_in(pairs: dict[int, torch.Tensor], index: int):
    def seen(hidden: torch.Tensor, output: Any) -> None:
        features = 1 if hidden.dim() == 4 else -1  # of images
        pairs[index] = F.cosine_similarity(hidden.float(), first(output).float(), dim=features)

    return seen


def add_inputs(
    found: InputMoments, inputs: Inputs, mask: torch.Tensor | None, full: bool, weigh: Weigh | None = None
) -> None:
    """Add what one micro-batch read. With `weigh` every token has a weight of its own in every matrix's sum, and no sum
    is shared."""
    sources: dict[tuple[int, ...], str] = {}
    for name, reads in inputs.items():
        same = tuple(id(hidden) for hidden, _ in reads)  # `inputs` keeps every tensor alive
        source = name if weigh else sources.setdefault(same, name)
        found.source_of.setdefault(name, source)
        if source != name:
            continue
        for call, (hidden, tokens) in enumerate(reads):
            rows = hidden.flatten(0, -2).float()
            pooled = mask is not None and tokens is None and len(rows) != len(mask)  # no row for each token
            tokens = torch.arange(len(rows), device=rows.device) if tokens is None else tokens
            if mask is not None and not pooled:
                rows, tokens = rows[mask[tokens]], tokens[mask[tokens]]
            if full:
                found.moments.add_gram(name, rows, weigh(name, tokens, call) if weigh else None)
            else:
                found.moments.add(name, rows.square().sum(0))


def _layout(found: InputMoments) -> tuple[list[tuple[str, tuple[int, ...]]], dict[str, str]] | None:
    names = found.moments.names()
    return ([(n, tuple(found.moments.sum(n).shape)) for n in names], found.source_of) if names else None
