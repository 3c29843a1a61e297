"""What is a step of a recipe? The one contract of pruning, quantisation, reconstruction and recovery.

A recipe is a list of steps. Each is checked before any weight is read, runs on the model that the one before it left,
and returns an `Outcome`. The pipeline, `Compressor` and the Trainer callback run the same steps.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PretrainedConfig

from tinygn_dist.backends.base import Backend
from tinygn_dist.checkpoints.run_checkpoint import SavedUnder, WriterUnder
from tinygn_dist.checkpoints.sharded_load import Origin
from tinygn_dist.config import EvaluateConfig
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.models.anatomy import Anatomy


@dataclass(frozen=True)
class Request:
    """What is known of a model before a weight is read. skeleton: the model on the meta device. dtype: that its weights
    will have. build: a model of the same class with another config, whose weights are still to be filled in. evaluate:
    how speed is measured, for goals in seconds."""

    skeleton: nn.Module
    anatomy: Anatomy
    task: str
    dtype: torch.dtype
    build: Callable[[PretrainedConfig, torch.dtype], nn.Module]
    backend: Backend
    evaluate: EvaluateConfig = EvaluateConfig()


class Constraint(Protocol):
    """What a step leaves behind that must stay true while weights train and in the files: masks, a quantiser. Several
    hold at once, in the order of their steps."""

    def attach(self, model: nn.Module, *optimizers: Any) -> Sequence[Any]:
        """Make it true after every step of these prepared optimizers. Returns handles with `remove()`."""

    def violations(self, model: nn.Module, backend: Backend) -> int:
        """How many weights, over all ranks, break it."""

    def fingerprint(self, model: nn.Module, backend: Backend) -> str:
        """The same on every rank, at any number of processes, and on every backend."""

    @property
    def kept(self) -> Mapping[str, torch.Tensor]:
        """Masks by matrix name, True = keep, shaped like this rank's shards; none where it sets nothing to zero."""

    def write(self, writer: WriterUnder, model: nn.Module, optimizer: Any | None) -> dict[str, Any]:
        """Into a checkpoint of the run, and what else `Step.restore` needs to know: plain values. optimizer: the
        prepared one, None outside of training. A collective."""

    def resume_training(self, saved: SavedUnder, model: nn.Module, optimizer: Any) -> None:
        """What only training knows, into a prepared model. A collective."""


@dataclass(frozen=True)
class Outcome:
    """origin: the model that takes the place of the live one; None where the live one stays. layers: which of the live
    model's layers are left, where it is another one. constraint: what has to hold from here on. facts: by field of the
    report. notes: sentences for its reader. settle: called with the new model's problem once it is in place."""

    origin: Origin | None = None
    layers: Sequence[int] | None = None
    constraint: Constraint | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    settle: Callable[[Problem], None] | None = None


class Live(Protocol):
    """What a step may know of the run that it is part of."""

    backend: Backend
    constraints: Sequence[Constraint]
    """what earlier steps left behind"""
    layers: Sequence[int]
    """of each layer of the live model, which layer of the dense model it was"""

    def problem(self) -> Problem:
        """The live model on the calibration data."""

    def dense(self) -> Problem:
        """The dense model on the same data. Placed anew where it is not there."""


class Step(abc.ABC):
    """One entry of a recipe."""

    name: str
    """of its section"""

    @abc.abstractmethod
    def check(self, request: Request) -> None:
        """Everything that can be refused without a weight. Raises UserError (and Refused) with one line."""

    def measure(self, request: Request) -> None:  # noqa: B027 (most steps measure nothing)
        """What has to be measured on this machine before the weights load. A collective."""

    @abc.abstractmethod
    def run(self, live: Live) -> Outcome:
        """Do it. Every rank calls this and gets the same outcome."""

    def restore(self, live: Live, saved: SavedUnder, state: Mapping[str, Any]) -> Constraint:
        """The constraint that this step left in a run that goes on; state: what its `write` returned."""
        raise AssertionError(f"step {self.name} leaves no constraint")

    def figures(self, which: str, model: nn.Module) -> dict[str, Any]:
        """Measurements of its own for the report, by field. which: "dense" before the step, "smaller" of the model that
        was read back. A collective."""
        return {}


def kept_weights(constraints: Sequence[Constraint]) -> dict[str, torch.Tensor]:
    """Masks by matrix name of what all constraints keep."""
    together: dict[str, torch.Tensor] = {}
    for constraint in constraints:
        for name, keep in constraint.kept.items():
            together[name] = together[name] & keep if name in together else keep
    return together
