"""Budgets between weights by search: levels are switched between two weights of the same size, so that the number of zeros stays
as it is, and a switch is kept where it brings the model closer to the dense one (EvoPress, Sieberling et al. 2024).

Every weight is solved at all levels first; the search then only writes weights and runs forwards. One half of the held-out
sequences chooses, and what it chose must also be better on the other half: a search follows the noise of few tokens.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from tinygn_dist.estimate.problem import Problem, batch_size
from tinygn_dist.evaluate.quality import mean_loss
from tinygn_dist.models.anatomy import Matrix
from tinygn_dist.models.objective import IGNORED, Batch, Losses, distillation, model_inputs

log = logging.getLogger(__name__)
REACH, STEP = 2, 1 / 32
"""levels on each side of where the search starts, and the share of a weight's entries between two of them"""
OFFSPRING, SURVIVORS = 8, 2
"""candidates of a generation, and how many of them are measured on more than a quarter of the sequences"""
Masks = dict[str, torch.Tensor]
Levels = dict[str, int]


class HeldOut(NamedTuple):
    """Sequences that choose, a quarter of those, and the sequences that check; their loss is the divergence from the model
    that was there when they were held out."""

    few: Problem
    choosing: Problem
    checking: Problem


def hold_out(problem: Problem) -> HeldOut:
    choosing, checking = problem.split(sum(map(batch_size, problem.batches)) // 2)
    few = choosing.first(max(1, sum(map(batch_size, choosing.batches)) // 4))
    return HeldOut(from_dense(few), from_dense(choosing), from_dense(checking))


def search(
    held_out: HeldOut,
    matrices: Sequence[Matrix],
    start: Mapping[str, int],
    solve: Callable[[Mapping[str, int]], Masks],
    *,
    generations: int,
    seed: int,
) -> Masks:
    """Leave the model at the best levels found and return its masks.

    start: how many entries of each matrix go at level 0. solve(such counts): writes the solved weights over those that are
    there now, returns their masks. On each rank 2 * REACH + 2 copies of its pieces of the weights are held on the CPU.
    """
    few, choosing, checking = held_out
    library = _Library(choosing, matrices, start, solve)
    draw, parent = random.Random(seed), dict.fromkeys(start, 0)
    first = best = library.loss(parent, choosing)
    for _ in range(generations):
        found = [library.switched(parent, draw) for _ in range(OFFSPRING)]
        ranked = sorted(range(OFFSPRING), key=lambda i: (library.loss(found[i], few), i))
        for index in ranked[:SURVIVORS]:
            loss = library.loss(found[index], choosing)
            if loss < best:
                parent, best = found[index], loss
    before, after = (library.loss(levels, checking) for levels in (dict.fromkeys(start, 0), parent))
    moved = sum(level != 0 for level in parent.values())
    note = (
        f"allocation by search: {moved} of {len(start)} weights moved, divergence from the dense model {first:.4f} to "
        f"{best:.4f} where it was chosen and {before:.4f} to {after:.4f} on other sequences"
    )
    if after >= before:
        note, parent = f"{note}: not taken", dict.fromkeys(start, 0)
    log.info(note)
    choosing.notes.append(note)
    library.write(parent)
    return library.masks(parent)


class _Library:
    """Every matrix solved at every level it has: this rank's pieces, on the CPU."""

    def __init__(
        self,
        problem: Problem,
        matrices: Sequence[Matrix],
        start: Mapping[str, int],
        solve: Callable[[Mapping[str, int]], Masks],
    ) -> None:
        self._backend, self._model = problem.backend, problem.model
        self._matrices = {matrix.name: matrix for matrix in matrices}
        self._weights: dict[tuple[str, int], torch.Tensor] = {}
        self._masks: dict[tuple[str, int], torch.Tensor] = {}
        self._written: Levels = {}
        before = {name: self._piece(matrix).cpu() for name, matrix in self._matrices.items()}
        for level in range(-REACH, REACH + 1):
            counts = {n: count + level * _step(self._matrices[n]) for n, count in start.items()}
            there = {n for n, count in counts.items() if 0 <= count <= self._matrices[n].numel}
            masks = solve({n: count if n in there else start[n] for n, count in counts.items()})
            for name, matrix in self._matrices.items():
                if name in there:
                    self._weights[name, level] = self._piece(matrix).cpu()
                    self._masks[name, level] = masks[name].cpu()
                self._write(matrix, before[name])

    def switched(self, levels: Levels, draw: random.Random) -> Levels:
        """One to three pairs of weights of one size each, one of which loses more and the other less; mostly one."""
        levels = dict(levels)
        for _ in range(min(draw.randint(1, 3), draw.randint(1, 3))):
            more = [name for name, level in levels.items() if (name, level + 1) in self._weights]
            up = draw.choice(more)
            less = [
                name
                for name, level in levels.items()
                if name != up and (name, level - 1) in self._weights
                if self._matrices[name].numel == self._matrices[up].numel
            ]
            if less:
                levels[draw.choice(less)] -= 1
                levels[up] += 1
        return levels

    def loss(self, levels: Levels, problem: Problem) -> float:
        self.write(levels)
        return mean_loss(problem, "searching budgets")

    def write(self, levels: Levels) -> None:
        for name, level in levels.items():
            if self._written.get(name) != level:
                self._write(self._matrices[name], self._weights[name, level])
        self._written = dict(levels)

    def masks(self, levels: Levels) -> Masks:
        return {n: self._masks[n, level].to(self._piece(self._matrices[n]).device) for n, level in levels.items()}

    def _piece(self, matrix: Matrix) -> torch.Tensor:
        return self._backend.shard(self._model, matrix).weight.clone()

    def _write(self, matrix: Matrix, piece: torch.Tensor) -> None:
        self._backend.write(self._model, matrix, piece.to(self._piece(matrix).device))


def _step(matrix: Matrix) -> int:
    return max(1, round(STEP * matrix.numel))


def from_dense(problem: Problem) -> Problem:
    """The same micro-batches with another loss: per token, the divergence KL(model now || model then) of what is predicted,
    where the model predicts classes or tokens; else the loss it has. Holds the present logits of this rank's share of the
    micro-batches in bf16, on the CPU: to be used with all of them."""
    if "labels" not in problem.batches[0]:
        return problem
    numbered = [{**batch, "sequence": torch.tensor([i])} for i, batch in enumerate(problem.batches)]
    problem, held = replace(problem, batches=numbered), {}
    for micro_batch, (logits, _) in problem.forwards(lambda batch: _predictions(problem.model, batch)):
        held[micro_batch.number] = logits.bfloat16().cpu()

    def divergence(model: nn.Module, batch: Batch) -> Losses:
        logits, counts = _predictions(model, batch)
        return distillation(logits, held[int(batch["sequence"])].to(logits.device), counts, 1.0)

    return replace(problem, objective=divergence)


def _predictions(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, positions, classes) logits, and (batch, positions) bool of those that count."""
    logits, labels = model(**model_inputs(batch)).logits, batch["labels"]
    if labels.dim() == 1:
        return logits[:, None], torch.ones_like(labels, dtype=torch.bool)[:, None]
    return logits[:, :-1], labels[:, 1:] != IGNORED
