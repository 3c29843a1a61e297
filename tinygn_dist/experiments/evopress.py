"""Budgets between weights by search: levels are switched between two weights of the same size, so that the number of
zeros stays as it is, and a switch is kept where it brings the model closer to the dense one (EvoPress, Sieberling et
al. 2024).

Every weight is solved at all levels first; the search then only writes weights and runs forwards. One half of the
held-out sequences chooses, and what it chose must also be better on the other half: a search follows the noise of
few tokens. `--prune.solver.allocation search`. A perplexity at 50 % below that of allocation 0.75, beyond its noise,
would bring it in.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from pydantic import Field
from torch import nn

from tinygn_dist.config import DEFAULT_SHARE, PruneConfig, Section
from tinygn_dist.config.experiments import options_of
from tinygn_dist.estimate.hessians import hessians
from tinygn_dist.estimate.problem import Problem, batch_size
from tinygn_dist.evaluate.quality import mean_loss
from tinygn_dist.models.anatomy import Matrix
from tinygn_dist.models.objective import IGNORED, Batch, Losses, distillation, model_inputs
from tinygn_dist.prune.sparsity.allocations import Allocation, by_shares
from tinygn_dist.prune.sparsity.budgets import budgets_at, equal_budgets, saliency_tallies
from tinygn_dist.prune.sparsity.levels import Level
from tinygn_dist.prune.sparsity.masks import Masks
from tinygn_dist.prune.sparsity.solve import SolverTask, hessian_options, solve

log = logging.getLogger(__name__)
REACH, STEP = 2, 1 / 32
"""levels on each side of where the search starts, and the share of a weight's entries between two of them"""
OFFSPRING, SURVIVORS = 8, 2
"""candidates of a generation, and how many of them are measured on more than a quarter of the sequences"""
Levels = dict[str, int]


class EvoPressOptions(Section):
    generations: int = Field(20, ge=1)
    """rounds of eight candidates each"""
    samples: int = Field(16, ge=2)
    """calibration sequences held out, half to choose and half to check the choice"""
    seed: int = Field(0, ge=0)


class HeldOut(NamedTuple):
    """Sequences that choose, a quarter of those, and the sequences that check; their loss is the divergence from the
    model that was there when they were held out."""

    few: Problem
    choosing: Problem
    checking: Problem


def check(options: PruneConfig) -> None:
    """ValueError where the solver does not choose budgets."""
    solves = options.criterion in ("auto", "obs") and options.scope == "auto"
    if options.pattern != "unstructured" or not solves:
        raise ValueError(
            f"solver.allocation search is for criterion obs, got pattern {options.pattern}, criterion "
            f"{options.criterion} and scope {options.scope}, accepted: pattern unstructured, criterion auto or obs, "
            "scope auto"
        )


def in_passes(problem: Problem, matrices: Sequence[Matrix], task: SolverTask, levels: Sequence[Level]) -> Masks:
    """Shares by saliency until the last pass, which searches. The dense model is what it compares with there too."""
    asked = options_of(task.experiments, "evopress", EvoPressOptions)
    problem, rest = problem.split(asked.samples)
    held_out, notes = hold_out(rest), ()
    if levels[:-1]:
        notes = by_shares(problem, matrices, task, levels[:-1], [DEFAULT_SHARE]).notes
    task = replace(task, level=levels[-1])
    measured = hessians(problem, matrices, hessian_options(task, True))
    tallies = saliency_tallies(problem, matrices, measured, task.damping)
    start = equal_budgets(matrices, task.level, task.scope)
    start |= budgets_at(DEFAULT_SHARE, tallies, matrices, task.level)
    library = Library(problem, matrices, start)
    for level in range(-REACH, REACH + 1):
        library.keep(level, solve(problem, matrices, measured, library.budgets(level), task))
    levels_found, note = search(held_out, library, asked)
    library.write(levels_found)
    return Masks(matrices, library.masks(levels_found), (*notes, *measured.notes, note))


def hold_out(problem: Problem) -> HeldOut:
    choosing, checking = problem.split(sum(map(batch_size, problem.batches)) // 2)
    few = choosing.first(max(1, sum(map(batch_size, choosing.batches)) // 4))
    return HeldOut(from_dense(few), from_dense(choosing), from_dense(checking))


def search(held_out: HeldOut, library: Library, asked: EvoPressOptions) -> tuple[Levels, str]:
    """The best levels found, and a note. The model is left at levels that were tried last."""
    few, choosing, checking = held_out
    draw, parent = random.Random(asked.seed), library.start_levels()
    first = best = library.loss(parent, choosing)
    for _ in range(asked.generations):
        found = [library.switched(parent, draw) for _ in range(OFFSPRING)]
        ranked = sorted(range(OFFSPRING), key=lambda i: (library.loss(found[i], few), i))
        for index in ranked[:SURVIVORS]:
            loss = library.loss(found[index], choosing)
            if loss < best:
                parent, best = found[index], loss
    before, after = (library.loss(levels, checking) for levels in (library.start_levels(), parent))
    moved = sum(level != 0 for level in parent.values())
    note = (
        f"allocation by search: {moved} of {len(parent)} weights moved, divergence from the dense model {first:.4f} to "
        f"{best:.4f} where it was chosen and {before:.4f} to {after:.4f} on other sequences"
    )
    if after >= before:
        note, parent = f"{note}: not taken", library.start_levels()
    log.info(note)
    return parent, note


class Library:
    """Every matrix solved at every level it has: this rank's pieces, on the CPU, 2 * REACH + 2 copies of the weights.

    start: how many entries of each matrix go at level 0.
    """

    def __init__(self, problem: Problem, matrices: Sequence[Matrix], start: Mapping[str, int]) -> None:
        self._backend, self._model, self._start = problem.backend, problem.model, start
        self._matrices = {matrix.name: matrix for matrix in matrices}
        self._weights: dict[tuple[str, int], torch.Tensor] = {}
        self._masks: dict[tuple[str, int], torch.Tensor] = {}
        self._written: Levels = {}
        self._before = {name: self._piece(matrix).cpu() for name, matrix in self._matrices.items()}

    def start_levels(self) -> Levels:
        return dict.fromkeys(self._start, 0)

    def budgets(self, level: int) -> dict[str, int]:
        """How many entries go at a level; of a matrix that does not have it, as many as at level 0."""
        return {n: self._count(n, level) if self._has(n, level) else count for n, count in self._start.items()}

    def keep(self, level: int, solved: Masks) -> None:
        """Take what was solved out of the model, and put the weights back that were there before."""
        for name, matrix in self._matrices.items():
            if self._has(name, level):
                self._weights[name, level] = self._piece(matrix).cpu()
                self._masks[name, level] = solved.by_name[name].cpu()
            self._write(matrix, self._before[name])

    def _count(self, name: str, level: int) -> int:
        return self._start[name] + level * _step(self._matrices[name])

    def _has(self, name: str, level: int) -> bool:
        return 0 <= self._count(name, level) <= self._matrices[name].numel

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

    def masks(self, levels: Levels) -> dict[str, torch.Tensor]:
        return {n: self._masks[n, level].to(self._piece(self._matrices[n]).device) for n, level in levels.items()}

    def _piece(self, matrix: Matrix) -> torch.Tensor:
        return self._backend.shard(self._model, matrix).weight.clone()

    def _write(self, matrix: Matrix, piece: torch.Tensor) -> None:
        self._backend.write(self._model, matrix, piece.to(self._piece(matrix).device))


def _step(matrix: Matrix) -> int:
    return max(1, round(STEP * matrix.numel))


def from_dense(problem: Problem) -> Problem:
    """The same micro-batches with another loss: per token, the divergence KL(model now || model then) of what is
    predicted, where the model predicts classes or tokens; else the loss it has. Holds the present logits of this
    rank's share of the micro-batches in bf16, on the CPU: to be used with all of them."""
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


OPTIONS = {"evopress": EvoPressOptions}
ALLOCATIONS = {"search": Allocation(in_passes, check, all_layers=True, micro_batches=4)}
