"""Zeroth-order SGD, Nesterov and Adam: updates from slopes along random sign directions.

The gradient is estimated by the mean over directions of slope * signs, in coordinates relative to each matrix's rms (so
that one learning rate fits all of them). It is rebuilt on every rank for its own shard from the directions' numbers and
slopes, so an optimizer's whole state follows from the history of those few numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

Rule = Literal["zo-sgd", "zo-nesterov", "zo-adam"]
MOMENTUM = 0.9
BETAS = (0.9, 0.95)
_EPS = 1e-12

Signs = Callable[[str, int], torch.Tensor]
"""(matrix name, direction) -> fp32 +1, -1 or 0, shaped like this rank's shard"""


def adam(mean: torch.Tensor, square: torch.Tensor, gradient: torch.Tensor, count: int) -> torch.Tensor:
    """Adam's direction at step `count` (from 1): about +-1 where gradients agree. Updates its two moments in place."""
    mean.lerp_(gradient, 1 - BETAS[0])
    square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    scale = math.sqrt(1 - BETAS[1] ** count) / (1 - BETAS[0] ** count)
    return mean.div(square.sqrt().add_(_EPS)).mul_(scale)


class ZerothOrder:
    """history: for each step the number of its first direction, the slopes, and the learning rate."""

    def __init__(self, rule: Rule, names: Sequence[str], signs: Signs, clip: float) -> None:
        """clip: largest size of a slope; larger ones (an estimate of the gradient's norm, too) are cut to it."""
        self.rule, self.names, self._signs, self.clip = rule, tuple(names), signs, clip
        self.history: list[tuple[int, list[float], float]] = []
        self._first: dict[str, torch.Tensor] = {}
        self._second: dict[str, torch.Tensor] = {}

    def step(self, first: int, slopes: Sequence[float], learning_rate: float) -> dict[str, torch.Tensor]:
        """Relative changes of every matrix's shard, to be multiplied by its rms and added. fp32."""
        clipped = [min(max(slope, -self.clip), self.clip) for slope in slopes]
        self.history.append((first, clipped, learning_rate))
        return {name: self._change(name, first, clipped).mul_(-learning_rate) for name in self.names}

    def state_dict(self) -> dict[str, Any]:
        return {"rule": self.rule, "history": list(self.history)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Rebuild the moments from the history, without any forward; bit-identical to those of the run that made it."""
        assert state["rule"] == self.rule, f"a history of {state['rule']} for {self.rule}"
        self.history, self._first, self._second = [], {}, {}
        for first, slopes, learning_rate in state["history"]:
            self.history.append((first, list(slopes), learning_rate))
            if self.rule != "zo-sgd":
                for name in self.names:
                    self._change(name, first, slopes)

    def _change(self, name: str, first: int, slopes: Sequence[float]) -> torch.Tensor:
        gradient = self._gradient(name, first, slopes)
        match self.rule:
            case "zo-sgd":
                return gradient
            case "zo-nesterov":
                momentum = self._first.setdefault(name, torch.zeros_like(gradient))
                momentum.mul_(MOMENTUM).add_(gradient)
                return gradient.add_(momentum, alpha=MOMENTUM)
            case "zo-adam":
                mean = self._first.setdefault(name, torch.zeros_like(gradient))
                square = self._second.setdefault(name, torch.zeros_like(gradient))
                return adam(mean, square, gradient, len(self.history))
        raise AssertionError(self.rule)

    def _gradient(self, name: str, first: int, slopes: Sequence[float]) -> torch.Tensor:
        total: torch.Tensor | None = None
        for index, slope in enumerate(slopes):
            part = self._signs(name, first + index).mul_(slope / len(slopes))
            total = part if total is None else total.add_(part)
        return total
