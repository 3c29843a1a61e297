"""Training with forward passes only: slopes along random directions, and an update rule over them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from tinygn_dist.backends.base import Backend
from tinygn_dist.config import RecoverConfig
from tinygn_dist.maths import finite_difference
from tinygn_dist.maths.finite_difference import Step
from tinygn_dist.models.anatomy import Matrix
from tinygn_dist.models.objective import Batch, Objective
from tinygn_dist.train.forward_only.learning_rate import RateSearch
from tinygn_dist.train.forward_only.update_rules import MOMENTUM, ZerothOrder
from tinygn_dist.train.forward_only.weight_probes import RESOLUTION, WeightProbes

log = logging.getLogger(__name__)


class ForwardOnly:
    """One training of a model's matrices on their kept weights. The model is in eval mode: every loss is a difference,
    so nothing random may happen in the forward.

    Memory: the model, a copy of what moves while a direction is probed, and one (Nesterov) or two (Adam) more.
    """

    def __init__(
        self,
        model: nn.Module,
        matrices: Sequence[Matrix],
        keep: Mapping[str, torch.Tensor],
        objective: Objective,
        options: RecoverConfig,
        backend: Backend,
    ) -> None:
        self.model, self.objective, self.options, self.backend = model, objective, options, backend
        if options.train == "norms-and-biases":
            matrices, keep = vectors(backend.unwrap(model)), {}
        self.probes = WeightProbes(model, matrices, keep, backend, options.seed)
        by_name = {matrix.name: matrix for matrix in matrices}
        self.optimizer = ZerothOrder(
            options.optimizer,
            list(by_name),
            lambda name, direction: self.probes.signs(by_name[name], direction),
            options.clip_norm,
        )
        self.step_taken: Step | None = None
        self.rate = options.learning_rate
        """None until it is measured: the weights stay where they are"""
        self.search = RateSearch()

    def step(self, batch: Sequence[Batch], number: int, factor: float) -> tuple[float, int]:
        """Step `number` of the training on a batch; factor: on the learning rate. Returns the mean loss per token and
        the tokens, over all ranks. The first steps measure the rate, unless one is given."""
        count = self.options.directions
        if self.step_taken is None:
            self.step_taken = self._measure(batch)
        if self.rate is None and self.search.looking:
            return self._look(batch)
        parts = [batch[index::count] for index in range(count)]
        seen = self.probes.slopes(self.objective, parts, number * count, self.step_taken.value)
        if self.rate is None:
            self.search.history.append((number * count, seen.slopes.tolist()))
        else:
            self._move(self.optimizer.step(number * count, seen.slopes.tolist(), self.rate * factor))
        return float(seen.losses.mean()), seen.tokens

    def state_dict(self) -> dict[str, Any]:
        """Numbers alone: with the weights, and with `probes.keep` where not all of them move, all that a training goes
        on from. What is measured at the beginning is among them: the weights are no longer those."""
        step = None if self.step_taken is None else asdict(self.step_taken)
        measured = {"step": step, "rate": self.rate, "scales": dict(self.probes.scales)}
        return measured | {"search": self.search.state_dict()} | self.optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step_taken = None if state["step"] is None else Step(**state["step"])
        self.rate = state["rate"]
        self.probes.scales = dict(state["scales"])
        self.search.load_state_dict(state["search"])
        self.optimizer.load_state_dict(state)

    def _move(self, changes: dict[str, torch.Tensor]) -> None:
        """changes: relative to each matrix's rms."""
        for matrix in self.probes.matrices:
            weight = self.backend.shard(self.model, matrix).weight
            change = changes.pop(matrix.name).mul_(self.probes.scales[matrix.name])
            self.backend.write(self.model, matrix, weight + change.to(weight.dtype))

    def _measure(self, batch: Sequence[Batch]) -> Step:
        if self.options.probe_step is not None:
            return finite_difference.given(self.options.probe_step)
        resolution = RESOLUTION * torch.finfo(torch.float32).eps  # weights train in fp32
        direction = -1  # none of the training's

        def mean_losses(steps: Sequence[float]) -> list[float]:
            totals, counts = self.probes.losses(self.objective, batch, direction, steps)
            return (totals.sum(1) / counts.sum()).tolist()

        step = finite_difference.run(finite_difference.search("central", resolution), mean_losses)
        log.info("weight probes: relative step %.2g after %d forwards (%s)", step.value, step.evaluations, step.limit)
        return step

    def _look(self, batch: Sequence[Batch]) -> tuple[float, int]:
        """What the directions so far do together on a new batch; where that settles the rate, the weights go there."""
        found, totals, counts = self.search.look(self.probes, self.objective, batch, self.step_taken.value)
        if found is not None:
            total, _ = self.search.sum_of(self.probes)
            self._move({name: shard.mul_(-found * self.search.gathered) for name, shard in total.items()})
            self.rate = self._for_the_rule(found * self.options.directions)
            log.info("learning rate %.2g", self.rate)
            self.search = RateSearch()
        return float(totals.sum() / counts.sum()), int(counts.sum())

    def _for_the_rule(self, rate: float) -> float:
        """From the rate of plain descent."""
        slopes = torch.tensor([slope for _, some in self.search.history for slope in some])
        if self.options.optimizer == "zo-adam":  # which divides by the estimate's rms
            return rate * float(slopes.square().mean().sqrt()) / math.sqrt(self.options.directions)
        if self.options.optimizer == "zo-nesterov":  # which adds up about ten steps
            return rate * (1 - MOMENTUM)
        return rate


def vectors(bare: nn.Module) -> list[Matrix]:
    """Every parameter of one dimension (norms and biases) as a matrix of one column."""
    return [
        Matrix(name, name.rpartition(".")[0], -1, (parameter.numel(), 1), 1)
        for name, parameter in bare.named_parameters()
        if parameter.dim() == 1
    ]
