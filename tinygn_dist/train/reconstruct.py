"""Block reconstruction: the weights that are left of one layer after the other are tuned until the layer gives, on what
the compressed layers before it give, what the dense model has at that place.

Masks and units are chosen before and stay. This is the block-wise fine-tuning of EBFT (Guo et al. 2024, arXiv
2402.12419), with an error that is relative to each token, because a few tokens of a language model are a hundred times
as long as the others; with a learning rate that is relative to each matrix; and with held-out sequences, on which a
layer never gets worse. Two streams of hidden states are kept, at one place in each model; a gradient is that of one
layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from tinygn_dist.config import ReconstructConfig
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.backprop import gradients_of
from tinygn_dist.estimate.hooks import first
from tinygn_dist.estimate.partial_forward import PrefixCache, output_of, run_layers
from tinygn_dist.estimate.problem import MicroBatch, Problem, batch_size
from tinygn_dist.models.anatomy import Anatomy, Matrix
from tinygn_dist.models.objective import Batch
from tinygn_dist.runtime.progress import Progress
from tinygn_dist.step import Live, Outcome, Request, Step, kept_weights
from tinygn_dist.train.forward_only.update_rules import BETAS

HELD_OUT = 8
"""one of so many calibration sequences is held out"""


@dataclass(frozen=True)
class Block:
    """A layer of the compressed model, and the layers of the dense one whose work it does."""

    layer: int
    dense: range


@dataclass(frozen=True)
class Tuned:
    """Mean squared error per token of a layer's output on held-out sequences, relative to the dense output's square;
    epoch: the one whose weights were taken, 0 for those from before."""

    layer: int
    before: float
    after: float
    epoch: int


@dataclass
class Reconstruct(Step):
    """The step `reconstruct`."""

    options: ReconstructConfig

    name = "reconstruct"

    def check(self, request: Request) -> None:
        check(request.anatomy, self.options)

    def run(self, live: Live) -> Outcome:
        problem, keep = live.problem(), kept_weights(live.constraints)
        dense = live.dense()
        matrices = [matrix for matrix in problem.anatomy.matrices if not keep or matrix.name in keep]
        blocks = blocks_of(live.layers, dense.anatomy.num_layers)
        found = reconstruct(problem, dense, blocks, Movable(matrices, keep), self.options)
        return Outcome(facts={"reconstruction": found})


@dataclass(frozen=True)
class Movable:
    """What may be tuned. keep: masks by matrix name, shaped like this rank's shards; a matrix without one moves as a
    whole."""

    matrices: Sequence[Matrix]
    keep: Mapping[str, torch.Tensor] = field(default_factory=dict)


def check(anatomy: Anatomy, options: ReconstructConfig) -> None:
    """UserError, before weights load, for a model that cannot be worked on layer by layer."""
    if not anatomy.layers_path:
        raise UserError(
            f"reconstruct.epochs {options.epochs} tunes one layer after the other, and {anatomy.model_class} has no "
            "single list of layers that can run by themselves; leave it at 0, and use recover.steps"
        )


def blocks_of(kept: Sequence[int], num_dense: int) -> list[Block]:
    """kept: the dense model's layers that stayed. What a kept layer reads must be what it read in the dense model, so
    the layer before it also does the work of those that were removed in between."""
    starts = [0, *kept[1:], num_dense]
    return [Block(layer, range(starts[layer], starts[layer + 1])) for layer in range(len(kept))]


def reconstruct(
    problem: Problem,
    dense: Problem,
    blocks: Sequence[Block],
    movable: Movable,
    options: ReconstructConfig,
) -> dict[str, Any]:
    """Tunes the live weights of `movable`; returns what the report says.

    problem, dense: the compressed and the dense model, on the same batches. Norms and biases stay.
    """
    fit, held_out = problem.split(max(1, sum(map(batch_size, problem.batches)) // HELD_OUT))
    parts = [_Part.of(group, problem, dense) for group in [*_groups(fit, options.batch_size), held_out.batches]]
    outcomes = []
    with problem.progress.bar("reconstruction", len(blocks) * options.epochs) as advance:
        for block in blocks:
            for part in parts:
                part.ask_dense(block)
            moved = [_Moved(problem, t, movable.keep.get(t.name)) for t in movable.matrices if t.layer == block.layer]
            outcomes.append(_tune(block, moved, parts, options, advance))
            for part in parts:
                part.go_on(block)
    return {
        "epochs": options.epochs,
        "learning_rate": options.rate,
        "fitted_sequences": sum(map(batch_size, fit.batches)),
        "held_out_sequences": sum(map(batch_size, held_out.batches)),
        "layers": [asdict(outcome) for outcome in outcomes],
    }


def _groups(fit: Problem, sequences: int) -> list[list[Batch]]:
    """The micro-batches of each step. They stay together in every epoch, so each is always the same rank's."""
    groups: list[list[Batch]] = [[]]
    for batch in fit.batches:
        if sum(map(batch_size, groups[-1])) >= sequences:
            groups.append([])
        groups[-1].append(batch)
    return groups


@dataclass
class _Part:
    """Micro-batches that are worked on together, with what the two models give for this rank's share of them: `starts`
    and `dense_starts` before the present layer, `dense_ends` behind it."""

    problem: Problem
    dense: Problem
    starts: list[PrefixCache] = field(default_factory=list)
    dense_starts: list[PrefixCache] = field(default_factory=list)
    dense_ends: list[PrefixCache] = field(default_factory=list)

    @classmethod
    def of(cls, batches: Sequence[Batch], problem: Problem, dense: Problem) -> _Part:
        return cls(*(replace(s, batches=batches, progress=Progress()) for s in (problem, dense)))

    def ask_dense(self, block: Block) -> None:
        self.dense_ends = run_layers(self.dense, block.dense, self.dense_starts)

    def go_on(self, block: Block) -> None:
        """The dense model's states are at the next layer already."""
        self.starts, self.dense_starts = run_layers(self.problem, _only(block), self.starts), self.dense_ends

    def error(self, block: Block) -> float:
        """Mean per token, over all ranks; the same on each, whatever their number."""
        backend = self.problem.backend
        found = torch.zeros(2, len(self.problem.batches), dtype=torch.float64)
        with torch.no_grad():
            for turn, micro_batch in enumerate(self.problem.micro_batches()):
                errors = self._errors(block, turn, micro_batch)
                if micro_batch.counts:
                    each = torch.tensor([float(errors.sum(dtype=torch.float64)), len(errors)])
                    found[:, micro_batch.number] = each
        backend.sum_over_data([found])
        return float(found[0].sum() / found[1].sum())

    def gradients(self, block: Block, matrices: Sequence[Matrix]) -> dict[str, torch.Tensor]:
        """fp32, shaped like this rank's shards, of the sum of the errors."""
        problem = self.problem
        with problem.backend.gradient_sums(problem.model, matrices, lambda grad: grad) as sums:
            for turn, micro_batch in enumerate(problem.micro_batches()):
                with sums.micro_batch(counts=micro_batch.counts):
                    self._errors(block, turn, micro_batch).sum().backward()
        return {matrix.name: sums.moments.rounded(matrix.name) for matrix in matrices}

    def _errors(self, block: Block, turn: int, micro_batch: MicroBatch) -> torch.Tensor:
        """(real tokens,) fp32 squared errors, relative to the dense output's square. turn: which of this rank's
        micro-batches it is."""
        start = self.starts[turn] if self.starts else None
        output = output_of(self.problem, _only(block), micro_batch.batch, start)
        wanted = self.dense_ends[turn].at(block.dense.stop).float()
        away = (first(output).float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-20)
        real = micro_batch.real_tokens
        return away.flatten() if real is None else away.flatten()[real]


class _Moved:
    """This rank's piece of a matrix that is tuned: in fp32, and as it was at its best. rms: of all its weights that are
    not zero."""

    def __init__(self, problem: Problem, matrix: Matrix, keep: torch.Tensor | None) -> None:
        self.matrix, self._problem = matrix, problem
        weight = problem.backend.shard(problem.model, matrix).weight
        self._best, self.value, self._keep = weight.clone(), weight.float().clone(), keep
        sums = [float(self.value.double().square().sum()), float((self.value != 0).sum())]
        squares, count = problem.backend.sum_over_shards(torch.tensor(sums, dtype=torch.float64)).tolist()
        self.rms = (squares / max(count, 1)) ** 0.5

    def take(self, gradient: torch.Tensor) -> None:
        """For the optimizer's next step. gradient: its own to keep."""
        self.value.grad = gradient if self._keep is None else gradient.mul_(self._keep)

    def show(self) -> None:
        """Writes the value to the model."""
        self._write(self.value.to(self._best.dtype))

    def remember(self) -> None:
        self._best.copy_(self.value)

    def take_best(self) -> None:
        self._write(self._best)

    def _write(self, piece: torch.Tensor) -> None:
        self._problem.backend.write(self._problem.model, self.matrix, piece)


def _tune(
    block: Block,
    moved: Sequence[_Moved],
    parts: Sequence[_Part],
    options: ReconstructConfig,
    advance: Callable[[], None],
) -> Tuned:
    """parts: the micro-batches of each step, and last those held out. advance: called after every epoch."""
    *fit, held_out = parts
    problem, matrices = held_out.problem, [one.matrix for one in moved]
    epochs, steps, done = options.epochs, options.epochs * len(fit), 0
    before = best = held_out.error(block)
    taken = 0
    parameters = [problem.bare.get_parameter(name) for name in dict.fromkeys(t.parameter for t in matrices)]
    order = torch.Generator().manual_seed(0)
    optimizer = _optimizer(moved)
    with gradients_of(problem.bare, parameters):
        for epoch in range(1, epochs + 1):
            for index in torch.randperm(len(fit), generator=order).tolist() if moved else ():
                gradients = fit[index].gradients(block, matrices)
                for one, group in zip(moved, optimizer.param_groups, strict=True):
                    one.take(gradients.pop(one.matrix.name))
                    group["lr"] = options.rate * (1 - done / steps) * one.rms
                optimizer.step()
                for one in moved:
                    one.show()
                done += 1
            now = held_out.error(block)
            if now < best:
                best, taken = now, epoch
                for one in moved:
                    one.remember()
            advance()
    for one in moved:
        one.take_best()
    return Tuned(block.layer, before, best, taken)


def _optimizer(moved: Sequence[_Moved]) -> torch.optim.Optimizer | None:
    if not moved:
        return None
    groups = [{"params": [one.value]} for one in moved]
    return torch.optim.Adam(groups, betas=BETAS, eps=1e-12, fused=True)


def _only(block: Block) -> range:
    return range(block.layer, block.layer + 1)
