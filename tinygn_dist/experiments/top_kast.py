"""Weights that train without taking part: dense values behind a sparse model, as in Top-KAST (arXiv 2106.03517).

The forward uses the largest weights alone; the backward also moves the next largest, `explore` of all, so that they
may overtake. Their values must exist somewhere, and not in the model, which is sparse at every moment: they lie
here, one fp32 number for each of this rank's weights, shaped like its shards. What the optimizer does to a live
weight that is zero is its step, by whatever rule it has, since it started from zero; that step is added here before
the mask takes it away.

`schedule.regrow top-kast`. No figure on a real model: one below that of `cubic` with `obs` at the same tokens would
bring it in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import nn

from tinygn_dist.backends.base import Backend
from tinygn_dist.config import ScheduleConfig, Section
from tinygn_dist.config.experiments import options_of
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.experiments.regrowth import check_regrowth
from tinygn_dist.models.anatomy import Matrix
from tinygn_dist.prune.sparsity.mask_updates import Best, MaskUpdate, StepStatistics, UpdatePoint

_ABOVE_ALL = torch.finfo(torch.float32).max


class DenseWeights(StepStatistics):
    """values: matrix -> fp32, right where the mask removed a weight and of no meaning elsewhere. explored: matrix ->
    bool, the removed weights that train."""

    knows_before_training = True
    state_stays = True  # weights that come have trained before, and those that go train on

    def __init__(self, model: nn.Module, matrices: Sequence[Matrix], backend: Backend, explore: float) -> None:
        """Copies the weights as they are before the first mask. explore: share of a matrix's weights."""
        super().__init__(matrices, backend)
        self.explore = explore
        self.values = {t.name: backend.shard(model, t).weight.detach().float().clone() for t in matrices}
        self.explored: dict[str, torch.Tensor] = {}

    def attach(self, model: nn.Module, optimizers: Sequence[Any]) -> list[Any]:
        return [self.backend.after_step(model, each, lambda: self.seen(model)) for each in optimizers]

    def seen(self, model: nn.Module) -> None:
        """After a step of the optimizer, and before the mask."""
        for name, explored in self.explored.items():
            matrix = next(matrix for matrix in self.matrices if matrix.name == name)
            self.values[name] += self.backend.shard(model, matrix).weight.detach() * explored

    def first_masks(self, keep: Mapping[str, torch.Tensor], sparsity: float, best: Best) -> None:
        """Let the largest of what `keep` removed train."""
        sizes = {name: value.abs().masked_fill(keep[name], _ABOVE_ALL) for name, value in self.values.items()}
        wider = best(sizes, max(0.0, sparsity - self.explore))
        self.explored = {name: wider[name] & ~keep[name] for name in self.values}

    def choose(self, here: UpdatePoint, keep: Mapping[str, torch.Tensor], best: Best) -> dict[str, torch.Tensor]:
        """The masks of the largest weights, live and not; those that come in are written to the model."""
        model, sparsity = here.problem.model, here.sparsity
        if not sparsity:
            return dict(keep)
        for matrix in self.matrices:
            live = self.backend.shard(model, matrix).weight.detach().float()
            self.values[matrix.name] = torch.where(keep[matrix.name], live, self.values[matrix.name])
        chosen = best({name: value.abs() for name, value in self.values.items()}, sparsity)
        for matrix in self.matrices:
            weight = self.backend.shard(model, matrix).weight
            self.backend.write(model, matrix, (self.values[matrix.name] * chosen[matrix.name]).to(weight.dtype))
        self.first_masks(chosen, sparsity, best)
        return chosen

    def finish(self) -> None:
        self.values, self.explored = {}, {}

    def whole(self, model: nn.Module, optimizer: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for kind, pieces in (("dense", self.values), ("explored", self.explored)):
            for matrix in self.matrices if pieces else ():
                yield f"{kind}|{matrix.name}", self.backend.gather(model, matrix, pieces[matrix.name]).cpu()

    def take(self, model: nn.Module, optimizer: Any, whole: Mapping[str, torch.Tensor]) -> None:
        found: dict[str, dict[str, torch.Tensor]] = {"dense": {}, "explored": {}}
        by_name = {matrix.name: matrix for matrix in self.matrices}
        for key, tensor in whole.items():
            kind, _, name = key.partition("|")
            held = self.backend.shard(model, by_name[name]).weight
            piece = self.backend.shard_of(model, by_name[name], tensor.to(self.backend.device))
            found[kind][name] = piece.reshape(held.shape).clone()
        self.values, self.explored = found["dense"], found["explored"]


class TopKastOptions(Section):
    explore: float = Field(0.1, gt=0, lt=1)
    """share of all weights, the largest of the zeroed ones, that train on beside the model"""


def make(problem: Problem, matrices: Sequence[Matrix], schedule: ScheduleConfig, final: float) -> StepStatistics:
    asked = options_of(schedule.experiments, "top_kast", TopKastOptions)
    return DenseWeights(problem.model, matrices, problem.backend, asked.explore)


OPTIONS = {"top_kast": TopKastOptions}
MASK_UPDATES = {"top-kast": MaskUpdate("regrow", make, check_regrowth)}
