"""What goes: pattern, criterion, budget, and how it is measured."""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

from pydantic import Field, NonNegativeInt, field_validator, model_validator

from tinygn_dist.config.section import Section, one_of
from tinygn_dist.maths.criteria import CRITERIA

UNIT_KINDS = ("layers", "heads", "channels", "experts", "filters", "hidden")
WEIGHT_CRITERIA = tuple(name for name, row in CRITERIA.items() if row.one_shot)
UNIT_CRITERIA = ("removal", "gate", "obs", "magnitude", "activation", "random")


DEFAULT_SHARE = 0.75


class NM(NamedTuple):
    """N:M sparsity: `n` weights kept of every `m` consecutive ones along the input dimension."""

    n: int
    m: int


class PruneConfig(Section):
    pattern: str = "channels"
    """unstructured | N:M such as 2:4 (weights set to zero); layers | heads | channels | experts | filters | hidden | units
    (removed whole; hidden: dimensions of the residual stream; units searches a mix of all kinds the model has)"""
    sparsity: float = 0.2
    """fraction of the targeted weights to zero, or of the layers' parameters to remove; ignored for N:M"""
    goal: str | None = None
    """of units, instead of sparsity: params=0.8, bytes=0.8, flops=0.8 or latency=0.8, the share of the whole model that stays
    (flops: per token, without attention scores; latency: measured on this device before weights load, one forward of
    evaluate.batch_size x evaluate.prefill_tokens)"""
    criterion: str = Field(
        "auto",
        description=f"""what is scored; of weights: {", ".join(WEIGHT_CRITERIA)}; of units: {", ".join(UNIT_CRITERIA)}; auto:
        obs for weights and channels, removal for heads, layers and experts (activation where a layer has more than 64
        experts)""",
    )
    scope: Literal["auto", "row", "layer", "global"] = "auto"
    """where unstructured weights compete: in one output row, one weight matrix, or the whole model"""
    estimator: Literal["auto", "finite-difference", "backprop"] = "auto"
    """where derivatives come from: forward passes only, or backpropagation; auto: backpropagation where it fits in memory, else
    forward only (the report says which and why); criteria made of gradients always backpropagate, removal never"""
    allocation: float | Literal["auto", "owl", "search"] = DEFAULT_SHARE
    """criterion obs: how far layers' budgets go from the same share everywhere (0) to one global cut of the saliency in units
    of loss (1); auto: 0, 0.5, 0.75 and 1 are solved, and the best on held-out calibration sequences is taken; search: from
    0.75 on, zeros are moved between weights where that brings the model closer to the dense one; owl, for any criterion: layers
    with more outliers keep more"""
    search_generations: int = Field(20, ge=1)
    """allocation search: rounds of eight candidates each"""
    search_samples: int = Field(16, ge=2)
    """allocation search: calibration sequences held out, half to choose and half to check the choice"""
    owl_outliers: float = Field(5.0, gt=1)
    """allocation owl: a weight is an outlier where |w| ||x|| is more than so many times its layer's mean"""
    owl_spread: float = Field(0.08, gt=0, lt=0.5)
    """allocation owl: how far from the mean a layer's density may be; twice that lie between the layers with the fewest and
    the most outliers"""
    output_samples: int = Field(2, ge=1)
    """criterion obs without backprop: calibration sequences on which each layer's output is moved to learn how much the loss
    listens to it; one partial forward each per weight matrix"""
    passes: int | None = Field(None, ge=1)
    """criterion obs: in how many passes the zeros are reached, each measured on the model that the last one left; by default
    as many as it takes that none removes more than half of what is there (one up to 50 %, two up to 75 %)"""
    gram_gib: float = Field(16, ge=0)
    """criterion obs: room on each rank for the Gram matrices of the inputs (8 bytes times the square of a weight's inputs).
    Where those of all layers do not fit, groups of layers that do are solved one after another, each measured on what the
    compressed layers before it give (1.8 times the CPU time on SmolLM2-135M, for half the memory); 0: one layer at a time. Of
    pattern layers and units: room for what layers are judged by, together or one at a time"""
    solver: Literal["obs", "admm"] = "obs"
    """criterion obs: the sweep of SparseGPT, or also ADMM (ALPS), which finds mask and weights together in several times the
    time, and for each weight the one with the smaller error"""
    refine: int = Field(8, ge=0)
    """criterion obs: conjugate gradient iterations on the kept weights of each layer after the sweep"""
    reconstruct: int = Field(0, ge=0)
    """after masks or units are chosen, so many epochs over the calibration sequences in which the weights that are left of one
    layer after the other are tuned to the dense model's hidden states; one in eight sequences is held out, and on those no
    layer gets worse. Keeps a second, dense model, as distillation does. At 50 % of SmolLM2-135M two epochs on 64 sequences and
    a second pass of the solver gain 6 % of the perplexity in seven times the time; recover.steps gain more"""
    reconstruct_rate: float = Field(5e-3, gt=0)
    """learning rate of that (Adam, falling to zero), relative to each matrix's root mean square"""
    reconstruct_batch: int = Field(2, ge=1)
    """sequences per step of that, over all ranks"""
    most_mixes: int = Field(12, ge=1)
    """where several mixes of layers, heads, channels and experts reach the target, try at most so many of them"""
    probe_samples: int = Field(8, ge=1)
    """calibration sequences each probe is measured on (where several mixes are tried: at most so many of those held out, a quarter of
    all, measure them, while layers and heads are probed on as few as make 512 tokens). Layers whose gifts are taken over are judged on
    up to 32 of those held out"""
    probe_adaptive: bool = True
    """measure removal probes, and judge layers, on more sequences only where it is still open what goes: on 16 sequences about
    half the forwards, for 95 % of the units that all of them would choose"""
    probe_greedy: bool = False
    """of heads, channels and experts too, take out one at a time, anywhere in the model, and probe the best candidates again
    without those that are gone (as is done for layers): units that stand in for each other look free one at a time"""
    probe_pairs: int = Field(0, ge=0)
    """instead: remove so many pairs of the cheapest heads, blocks of channels or experts together, and count what both cost beyond
    the two alone; the report lists it"""
    probe_subsets: int = Field(0, ge=0)
    """instead: the loss without so many random subsets as large as what goes in all layers together, and a regression on who
    was in them"""
    probe_forwards: int | None = Field(None, ge=1)
    """stop probing after about this many forwards (of one micro-batch each, over all ranks; those of fits that layers are judged by
    count) and choose by what is known"""
    probe_minutes: float | None = Field(None, gt=0)
    """the same after so many minutes; the result then depends on the speed of the machines"""
    probe_together: int = Field(1, ge=1)
    """gate settings of one layer in one forward, each with a copy of the micro-batch: faster where a micro-batch leaves the
    device idle, for so many times its activations"""
    probe_cache_gib: float | None = Field(None, gt=0)
    """most memory, on the device and once more on the CPU, for the layer inputs that probes restart from; the rest waits in files
    (in TMPDIR); no limit by default"""
    probe_step: float | None = Field(None, gt=0, lt=1)
    """step of a gate derivative (a gate is 1); by default measured for each group of units from the loss's noise and
    curvature"""
    probe_difference: Literal["central", "forward"] = "central"
    """gate derivatives from both sides (more accurate, sees kinks), or from one at half the price"""
    matrices: tuple[str, ...] = (".*",)
    """regular expressions of weight names that may be masked"""
    ignore: tuple[str, ...] = ()
    """regular expressions of weight names that stay dense"""
    protect: tuple[int, ...] = ()
    """layers whose units are never removed"""
    compensate: bool = True
    """after units are removed, re-fit the remaining weights by least squares to the dense activations, and let the feed-forward before
    removed layers take over what they gave (filters: re-estimate the running statistics of BatchNorm)"""
    multiple_of: int = Field(64, ge=1)
    """channel counts are kept at a multiple of this"""
    counts: dict[Literal["layers", "heads", "channels", "experts"], NonNegativeInt] | None = None
    """remove exactly these many layers, and KV groups, channels and experts of each other layer, instead of meeting
    sparsity"""
    probe_channels: int = Field(256, ge=1)
    """channels per removal probe"""
    uneven: bool = False
    """let layers keep different numbers of channels or filters, where the model's config has a width for each layer (Gemma 3n,
    VGG), stage (ResNet) or stack (BART); refused elsewhere"""
    damping: float = Field(0.01, gt=0, lt=1)
    """added to the Hessian's diagonal, as a fraction of its mean; units fitted on hundreds of sequences want less (0.001 at 256)"""
    seed: int = Field(0, ge=0)
    """for criterion random and for probe_subsets"""

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

    @field_validator("sparsity")
    @classmethod
    def _fraction(cls, value: float) -> float:
        if not 0 <= value < 1:
            hint = f"; did you mean {value / 100:g}?" if 1 < value < 100 else ""
            raise ValueError(f"got {value:g}, accepted: 0 <= sparsity < 1{hint}")
        return value

    @field_validator("allocation", mode="before")
    @classmethod
    def _share_or_auto(cls, value: Any) -> Any:
        try:
            if value in ("auto", "owl", "search") or 0 <= float(value) <= 1:
                return value
        except (TypeError, ValueError):
            pass
        raise ValueError(
            f"got {value!r}, accepted: 0 (equal shares) to 1 (one global cut), auto, search or owl; try 0.75"
        )

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
        sets = [name for name in ("probe_greedy", "probe_pairs", "probe_subsets") if getattr(self, name)]
        if len(sets) > 1:
            raise ValueError(
                f"got {' and '.join(sets)}, accepted: one of them; each says how units are judged together"
            )
        if self.allocation == "owl" and (self.pattern != "unstructured" or self.scope == "global"):
            raise ValueError(
                f"allocation owl gives every layer a number of zeros, got pattern {self.pattern} and scope {self.scope}, "
                "accepted: pattern unstructured, scope auto, layer or row"
            )
        solves = self.criterion in ("auto", "obs") and self.scope == "auto"
        if self.allocation == "search" and (self.pattern != "unstructured" or not solves):
            raise ValueError(
                f"allocation search is for criterion obs, got pattern {self.pattern}, criterion {self.criterion} and scope "
                f"{self.scope}, accepted: pattern unstructured, criterion auto or obs, scope auto"
            )
        if self.solver == "admm" and (self.unit_kinds or self.criterion not in ("auto", "obs")):
            raise ValueError(
                f"solver admm solves weights of criterion obs, got pattern {self.pattern} and criterion {self.criterion}"
            )
        row = None if self.unit_kinds else CRITERIA.get(self.criterion)
        if row and row.needs_backprop and self.estimator == "finite-difference":
            raise ValueError(
                f"criterion {self.criterion!r} ranks single weights, which finite differences cannot resolve (relative "
                "error about d/K for K probes of d weights); use estimator backprop, or criterion obs"
            )
        return self

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
        return UNIT_KINDS if self.pattern == "units" else (self.pattern,) if self.pattern in UNIT_KINDS else ()
