"""A recipe as a list of steps, and the flat form that stands for the usual one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pydantic import model_validator

from tinygn_dist.config.prune import PruneConfig
from tinygn_dist.config.quantize import SCHEMES, QuantizeConfig
from tinygn_dist.config.reconstruct import ReconstructConfig
from tinygn_dist.config.recover import RecoverConfig
from tinygn_dist.config.schedule import ScheduleConfig
from tinygn_dist.config.section import Section

if TYPE_CHECKING:
    from tinygn_dist.config import Config


class StepConfig(Section):
    """One step: exactly one of prune, reconstruct, recover and quantize."""

    prune: PruneConfig | None = None
    """units or weights go"""
    schedule: ScheduleConfig = ScheduleConfig()
    """beside prune: how its sparsity grows while the recover step after it trains"""
    reconstruct: ReconstructConfig | None = None
    """what is left of each layer is tuned to the dense model's hidden states"""
    recover: RecoverConfig | None = None
    """the compressed model trains"""
    quantize: QuantizeConfig | None = None
    """weights go onto a grid of few values"""

    @model_validator(mode="after")
    def _is_one_step(self) -> StepConfig:
        named = [name for name in STEPS if getattr(self, name) is not None]
        if len(named) != 1:
            raise ValueError(
                f"got {' and '.join(named) or 'nothing'}, accepted: one of {', '.join(STEPS)} in each step"
            )
        if "schedule" in self.model_fields_set and self.prune is None:
            raise ValueError(f"schedule beside {named[0]}, accepted: beside prune, whose sparsity it lets grow")
        if self.quantize is not None and self.quantize.scheme is None:
            raise ValueError(f"quantize without a scheme, accepted: {', '.join(SCHEMES)}")
        return self

    @property
    def name(self) -> str:
        return next(name for name in STEPS if getattr(self, name) is not None)


STEPS = tuple(name for name in StepConfig.model_fields if name != "schedule")
"""what a step can be"""


def usual_order(config: Config) -> tuple[StepConfig, ...]:
    """The steps that the flat form stands for: prune, then reconstruct, recover and quantize where they are asked for.
    With quantize, prune is asked for, too."""
    quantize = config.quantize
    steps = []
    if quantize.scheme is None or config.model_fields_set & {"prune", "schedule"}:
        steps.append(StepConfig(prune=config.prune, schedule=config.schedule))
    if config.reconstruct.epochs:
        steps.append(StepConfig(reconstruct=config.reconstruct))
    if config.recover.steps:
        steps.append(StepConfig(recover=config.recover))
    if quantize.scheme is not None:
        steps.append(StepConfig(quantize=quantize))
    return tuple(steps)


def check_order(steps: Sequence[StepConfig]) -> None:
    """Raises ValueError for steps that cannot follow one another."""
    trainings = [step.recover for step in steps if step.recover]
    if len({training.seq_len for training in trainings}) > 1:
        lengths = ", ".join(str(training.seq_len) for training in trainings)
        raise ValueError(f"recover.seq_len {lengths} in one recipe, accepted: one length for all recover steps")
    if len(trainings) > 1 and any(training.teacher_cache_gib is not None for training in trainings):
        raise ValueError("recover.teacher_cache_gib with several recover steps, accepted: one; leave it out")
    for before, after in _pairs(steps):
        _check_pair(before, after)
    quantised = [number for number, step in enumerate(steps) if step.quantize]
    if quantised and quantised[0] < len(steps) - 1:
        raise ValueError(
            f"step {quantised[0] + 2} ({steps[quantised[0] + 1].name}) after quantize, accepted: quantize as the last "
            "step, as weights have to stay on their grids"
        )
    zeroed = False
    for number, step in enumerate(steps):
        if step.prune and step.prune.unit_kinds and zeroed:
            raise ValueError(
                f"step {number + 1} removes units (pattern {step.prune.pattern}) after a step that set weights to "
                "zero; remove units first"
            )
        zeroed = zeroed or bool(step.prune and not step.prune.unit_kinds)
        follows = steps[number + 1] if number + 1 < len(steps) else None
        if step.prune and len(steps) > 2 and step.schedule.changes and not (follows and follows.recover):
            raise ValueError(
                f"step {number + 1} has schedule.kind {step.schedule.kind} and no recover step right after it, in "
                "which its sparsity could grow; add one, or use one-shot"
            )


def _pairs(steps: Sequence[StepConfig]) -> Iterator[tuple[StepConfig, StepConfig]]:
    """Every step with every later one."""
    yield from ((one, other) for number, one in enumerate(steps) for other in steps[number + 1 :])


def _check_pair(before: StepConfig, after: StepConfig) -> None:
    prune, schedule, recover = before.prune, before.schedule, after.recover
    if not prune:
        return
    if after.reconstruct and schedule.changes:
        raise ValueError(
            f"reconstruct.epochs {after.reconstruct.epochs} after schedule.kind {schedule.kind} and regrow "
            f"{schedule.regrow}, accepted: one-shot and none, as what is left must not change afterwards"
        )
    if after.reconstruct and prune.pattern == "hidden":
        raise ValueError(
            f"reconstruct.epochs {after.reconstruct.epochs} compares hidden states with the dense model's, and "
            "pattern hidden leaves narrower ones; leave it at 0, and use recover.steps"
        )
    if recover and recover.distill_hidden and prune.pattern in ("layers", "units", "filters"):
        raise ValueError(
            f"recover.distill_hidden compares layer by layer, and pattern {prune.pattern} may remove layers; accepted: "
            "patterns that keep them all; set it to 0"
        )


def check_schedule(prune: PruneConfig, schedule: ScheduleConfig, recover: RecoverConfig) -> None:
    """Raises ValueError for a schedule that this pruning or the training after it cannot follow."""
    if schedule.regrow != "none" and prune.pattern != "unstructured":
        raise ValueError(
            f"schedule.regrow {schedule.regrow!r} with pattern {prune.pattern!r}, accepted: pattern unstructured"
        )
    if prune.unit_kinds:
        _check_rounds(prune, schedule)
        return
    if not schedule.changes:
        return
    changes = f"and schedule.kind {schedule.kind} with regrow {schedule.regrow} changes them"
    if recover.forward_only or not recover.saved_on_the_way:
        raise ValueError(
            f"recover.optimizer {recover.optimizer} keeps its masks, {changes}; use adamw, sgd or nesterov"
        )
    if recover.train != "all" and schedule.watches_training:
        raise ValueError(
            f"schedule.kind {schedule.kind} with criterion {schedule.criterion} and regrow {schedule.regrow} looks at "
            f"how matrices train, and recover.train {recover.train} leaves them alone; use all"
        )
    if recover.train == "lora":
        raise ValueError(f"recover.train lora keeps its masks, {changes}; use all, or kind one-shot")


def _check_rounds(prune: PruneConfig, schedule: ScheduleConfig) -> None:
    if schedule.criterion != "auto":
        raise ValueError(
            f"schedule.criterion {schedule.criterion!r} scores weights and pattern {prune.pattern!r} removes units; "
            "use prune.criterion"
        )
    if schedule.growth == "late":
        raise ValueError(
            f"schedule.kind {schedule.kind} zeroes weights and pattern {prune.pattern!r} removes units; use iterative"
        )
    if prune.counts is not None and schedule.kind != "one-shot":
        raise ValueError("prune.counts fixes what goes, so it cannot go by a schedule; use prune.sparsity")
    if prune.asks_latency and schedule.kind != "one-shot":
        raise ValueError(f"prune.goal {prune.goal} with schedule.kind {schedule.kind}, accepted: one-shot; use params=")
