"""What goes: pattern, criterion, budget, and how it is measured."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, Protocol

from pydantic import Field, NonNegativeInt, field_validator, model_validator

from tinygn_dist.config.experiments import Options, check_options
from tinygn_dist.config.probes import ProbeConfig
from tinygn_dist.config.section import Section, one_of
from tinygn_dist.config.solver import SolverConfig
from tinygn_dist.maths.criteria import CRITERIA
from tinygn_dist.maths.unit_kinds import MIXED_KINDS, UNIT_KINDS
from tinygn_dist.registry import experimental

WEIGHT_CRITERIA = tuple(name for name, row in CRITERIA.items() if row.one_shot)
UNIT_CRITERIA = ("removal", "gate", "obs", "magnitude", "activation", "random")


class Checked(Protocol):
    """What a row of experiments/ knows of options that do not fit it."""

    def check(self, options: PruneConfig) -> None:
        """Raises ValueError."""


class NM(NamedTuple):
    """N:M sparsity: `n` weights kept of every `m` consecutive ones along the input dimension."""

    n: int
    m: int


class PruneConfig(Section):
    pattern: str = "channels"
    """unstructured | N:M such as 2:4 (weights set to zero); layers | heads | channels | experts | filters | hidden |
    units (removed whole; hidden: dimensions of the residual stream; units searches a mix of all kinds the model has)"""
    sparsity: float = 0.2
    """fraction of the targeted weights to zero, or of the layers' parameters to remove; ignored for N:M"""
    goal: str | None = None
    """of units, instead of sparsity: params=0.8, bytes=0.8, flops=0.8 or latency=0.8, the share of the whole model that
    stays (flops: per token, without attention scores; latency: measured on this device before weights load, one forward
    of evaluate.batch_size x evaluate.prefill_tokens)"""
    criterion: str = Field(
        "auto",
        description=f"""what is scored; of weights: {", ".join(WEIGHT_CRITERIA)}; of units: {", ".join(UNIT_CRITERIA)};
        auto:
        obs for weights and channels, removal for heads, layers and experts (activation where a layer has more than 64
        experts)""",
    )
    scope: Literal["auto", "row", "layer", "global"] = "auto"
    """where unstructured weights compete: in one output row, one weight matrix, or the whole model"""
    estimator: Literal["auto", "finite-difference", "backprop"] = "auto"
    """where derivatives come from: forward passes only, or backpropagation; auto: backpropagation where it fits in
    memory, else forward only (the report says which and why); criteria made of gradients always backpropagate, removal
    never"""
    solver: SolverConfig = SolverConfig()
    """criterion obs: how masks and updates are found together"""
    experiments: Options = {}
    """options of experiments by their names, such as {owl: {spread: 0.1}}"""
    most_mixes: int = Field(12, ge=1)
    """where several mixes of layers, heads, channels and experts reach the target, try at most so many of them"""
    probes: ProbeConfig = ProbeConfig()
    """how removals are measured"""
    matrices: tuple[str, ...] = (".*",)
    """regular expressions of weight names that may be masked"""
    ignore: tuple[str, ...] = ()
    """regular expressions of weight names that stay dense"""
    protect: tuple[int, ...] = ()
    """layers whose units are never removed"""
    compensate: bool = True
    """after units are removed, re-fit the remaining weights by least squares to the dense activations, and let the
    feed-forward before removed layers absorb them (filters: re-estimate the running statistics of BatchNorm)"""
    multiple_of: int = Field(64, ge=1)
    """channel counts are kept at a multiple of this"""
    counts: dict[str, NonNegativeInt] | None = None
    """remove exactly these many layers, and KV groups, channels and experts of each other layer, instead of meeting
    sparsity"""
    uneven: bool = False
    """let layers keep different numbers of channels or filters, where the model's config has a width for each layer
    (Gemma 3n, VGG), stage (ResNet) or stack (BART); refused elsewhere"""
    damping: float = Field(0.01, gt=0, lt=1)
    """added to the Hessian's diagonal, as a fraction of its mean; units fitted on hundreds of sequences want less
    (0.001 at 256)"""
    seed: int = Field(0, ge=0)
    """for criterion random"""

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, value: str) -> str:
        if value in ("unstructured", "units", *UNIT_KINDS):
            return value
        found = re.fullmatch(r"(\d+):(\d+)", value)
        if not found:
            raise ValueError(f"got {value!r}, accepted: unstructured, N:M such as 2:4, units, {', '.join(UNIT_KINDS)}")
        n, m = map(int, found.groups())
        if not 0 < n < m:
            raise ValueError(f"got {value!r}, N:M keeps N of every M weights, so 0 < N < M; try 2:4")
        return value

    @field_validator("criterion")
    @classmethod
    def _known_criterion(cls, value: str) -> str:
        known = ("auto", *dict.fromkeys((*WEIGHT_CRITERIA, *UNIT_CRITERIA)))
        return one_of(known, value)

    @field_validator("counts")
    @classmethod
    def _known_counts(cls, value: dict[str, int] | None) -> dict[str, int] | None:
        for kind in value or ():
            if kind not in MIXED_KINDS:
                raise ValueError(f"got {kind!r}, accepted: {', '.join(MIXED_KINDS)}")
        return value

    @field_validator("sparsity")
    @classmethod
    def _fraction(cls, value: float) -> float:
        if not 0 <= value < 1:
            hint = f"; did you mean {value / 100:g}?" if 1 < value < 100 else ""
            raise ValueError(f"got {value:g}, accepted: 0 <= sparsity < 1{hint}")
        return value

    @field_validator("experiments")
    @classmethod
    def _known_experiments(cls, value: Options) -> Options:
        return check_options(value)

    @field_validator("goal")
    @classmethod
    def _known_goal(cls, value: str | None) -> str | None:
        if value is None:
            return None
        found = re.fullmatch(r"(params|bytes|flops|latency)=(0?\.\d+|1|1\.0)", value)
        if not found or float(found[2]) == 0:
            raise ValueError(
                f"got {value!r}, accepted: params=, bytes=, flops= or latency= and what stays, such as params=0.8"
            )
        return value

    @model_validator(mode="after")
    def _criterion_fits(self) -> PruneConfig:
        if self.goal and (not self.unit_kinds or self.counts is not None):
            raise ValueError(
                f"goal {self.goal} is for units without counts; pattern {self.pattern} "
                + ("has counts" if self.counts is not None else "stores zeros densely, give sparsity")
            )
        allowed = UNIT_CRITERIA if self.unit_kinds else WEIGHT_CRITERIA
        if self.criterion not in ("auto", *allowed):
            raise ValueError(
                f"criterion {self.criterion!r} does not score pattern {self.pattern!r}, accepted: auto, "
                + ", ".join(allowed)
            )
        for row in self._experimental_rows():
            row.check(self)
        row = None if self.unit_kinds else CRITERIA.get(self.criterion)
        if row and row.needs_backprop and self.estimator == "finite-difference":
            raise ValueError(
                f"criterion {self.criterion!r} ranks single weights, which finite differences cannot resolve (relative "
                "error about d/K for K probes of d weights); use estimator backprop, or criterion obs"
            )
        return self

    def _experimental_rows(self) -> list[Checked]:
        """Rows of experiments/ that the solver's options name."""
        rows: list[Checked] = []
        if self.solver.method != "obs":
            rows.append(experimental("SOLVERS", Checked)[self.solver.method])
        if isinstance(self.solver.allocation, str) and self.solver.allocation != "auto":
            rows.append(experimental("ALLOCATIONS", Checked)[self.solver.allocation])
        return rows

    @property
    def fewest_micro_batches(self) -> int:
        """Of calibration data: some are held out where budgets are tried."""
        if self.solver.allocation == "auto":
            return 2
        return max([1, *(getattr(row, "micro_batches", 1) for row in self._experimental_rows())])

    @property
    def asks_latency(self) -> bool:
        return bool(self.goal) and self.goal.startswith("latency")

    @property
    def nm(self) -> NM | None:
        """The pattern as N:M, or None."""
        n, colon, m = self.pattern.partition(":")
        return NM(int(n), int(m)) if colon else None

    @property
    def unit_kinds(self) -> tuple[str, ...]:
        """The kinds of unit that may be removed; empty for weight patterns."""
        return tuple(UNIT_KINDS) if self.pattern == "units" else (self.pattern,) if self.pattern in UNIT_KINDS else ()
