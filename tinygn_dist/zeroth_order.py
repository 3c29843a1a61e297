"""Training with forward passes only: slopes along random directions, and an update rule over them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from tinygn_dist.anatomy import Target
from tinygn_dist.backends.base import Backend
from tinygn_dist.config import RecoverConfig
from tinygn_dist.estimate import step_size
from tinygn_dist.estimate.step_size import Step
from tinygn_dist.estimate.weight_probes import RESOLUTION, WeightProbes
from tinygn_dist.objective import Batch, Objective
from tinygn_dist.optim import MOMENTUM, ZerothOrder

log = logging.getLogger(__name__)
_LARGEST_CHANGE = 0.02
"""of a weight in one step, relative to the rms of its matrix"""


class ForwardOnly:
    """One training of a model's targets on their kept weights. The model is in eval mode: every loss is a difference, so
    nothing random may happen in the forward.

    Memory: the model, a copy of its targets while a direction is probed, and one (Nesterov) or two (Adam) more.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        keep: Mapping[str, torch.Tensor],
        objective: Objective,
        options: RecoverConfig,
        backend: Backend,
    ) -> None:
        self.model, self.objective, self.options, self.backend = model, objective, options, backend
        self.probes = WeightProbes(model, targets, keep, backend, options.seed)
        by_name = {target.name: target for target in targets}
        self.optimizer = ZerothOrder(
            options.optimizer,
            list(by_name),
            lambda name, direction: self.probes.signs(by_name[name], direction),
            options.clip_norm,
        )
        self.step_taken: Step | None = None
        self.rate = options.learning_rate

    def step(self, batch: Sequence[Batch], number: int, factor: float) -> tuple[float, int]:
        """Step `number` of the training on a batch; factor: on the learning rate. Returns the mean loss per token and the
        tokens, over all ranks."""
        count = self.options.directions
        if self.step_taken is None:
            self.step_taken = self._measure(batch)
        parts = [batch[index::count] for index in range(count)]
        seen = self.probes.slopes(self.objective, parts, number * count, self.step_taken.value)
        if self.rate is None:
            self.rate = self._measure_rate(batch, seen.slopes)
        changes = self.optimizer.step(number * count, seen.slopes.tolist(), self.rate * factor)
        for target in self.probes.targets:
            weight = self.backend.shard(self.model, target).weight
            change = changes.pop(target.name).mul_(self.probes.scales[target.name])
            self.backend.write(self.model, target, weight + change.to(weight.dtype))
        return float(seen.losses.mean()), seen.tokens

    def _measure(self, batch: Sequence[Batch]) -> Step:
        if self.options.probe_step is not None:
            return step_size.given(self.options.probe_step)
        resolution = RESOLUTION * torch.finfo(torch.float32).eps  # weights train in fp32
        direction = -1  # none of the training's
        step = step_size.run(
            step_size.search("central", resolution),
            lambda steps: self.probes.losses(self.objective, batch, direction, steps),
        )
        log.info("weight probes: relative step %.2g after %d forwards (%s)", step.value, step.evaluations, step.limit)
        return step

    def _measure_rate(self, batch: Sequence[Batch], slopes: torch.Tensor) -> float:
        """Half of the rate at which a step of plain descent lowers the loss most, K / tr H: noise of K directions costs
        rate^2 |g|^2 tr H / 2K, and the second derivative along a random direction is tr H on average."""
        h = self.step_taken.value
        down, here, up = self.probes.losses(self.objective, batch, -1, [-h, 0.0, h])
        bend, count = abs(up - 2 * here + down) / h**2, self.options.directions
        size = float(slopes.square().mean().sqrt())  # about |g|
        rate = min(0.5 * count / max(bend, 1e-12), _LARGEST_CHANGE * math.sqrt(count) / max(size, 1e-12))
        if self.options.optimizer == "zo-adam":  # which divides by about |g| / sqrt K
            rate *= size / math.sqrt(count)
        elif self.options.optimizer == "zo-nesterov":  # which adds up about ten steps
            rate *= 1 - MOMENTUM
        log.info("learning rate %.2g from a curvature of %.3g and slopes of %.3g", rate, bend, size)
        return rate
