"""What is a step of a recipe? The one contract of pruning, quantisation, reconstruction and recovery.

A recipe is a list of steps. Each is checked before any weight is read, runs on the model that the one before it left, and
returns an `Outcome`; a step knows nothing of the other steps, of the report, or of where the run is saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from tinygn_dist.backends.base import Backend
from tinygn_dist.checkpoints.load import Source
from tinygn_dist.checkpoints.sharded_load import Origin
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.models.anatomy import Anatomy


@dataclass(frozen=True)
class Request:
    """What is known of a model before a weight is read. skeleton: the model on the meta device."""

    source: Source
    skeleton: nn.Module
    anatomy: Anatomy
    backend: Backend


class Constraint(Protocol):
    """What a step leaves behind that must stay true while weights train and in the files: masks, a quantiser. Several hold
    at once, in the order of their steps."""

    def apply_(self, model: nn.Module, backend: Backend) -> None:
        """Make it true in the live weights of every rank."""

    def violations(self, model: nn.Module, backend: Backend) -> int:
        """How many weights, over all ranks, break it."""

    def fingerprint(self, model: nn.Module, backend: Backend) -> str:
        """The same on every rank, at any number of processes, and on every backend."""


@dataclass(frozen=True)
class Outcome:
    """origin: the model that takes the place of the live one; None where the live one stays. constraint: what has to hold
    from here on. facts: for the report, by name. notes: sentences for its reader."""

    origin: Origin | None = None
    constraint: Constraint | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Step(Protocol):
    """One entry of a recipe."""

    name: str

    def check(self, request: Request) -> None:
        """Everything that can be refused without a weight. Raises UserError (and Refused) with one line."""

    def run(self, problem: Problem) -> Outcome:
        """Do it. Every rank calls this and gets the same outcome."""
