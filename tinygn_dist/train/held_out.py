"""A model that trains, measured on sequences that it does not train on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from tinygn_dist.backends.base import Backend
from tinygn_dist.maths.schedules import Plan
from tinygn_dist.train.loop import InTraining

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """measure: the figures of a bare model, its loss (or feature distance) first. every: optimizer steps between two
    evaluations."""

    measure: Callable[[nn.Module], dict[str, float]]
    every: int
    plan: Plan
    backend: Backend

    def due(self, step: int) -> bool:
        """At the first and the last step, after every mask update, and `every` steps."""
        return step % self.every == 0 or step in self.plan.updates or step == self.plan.total

    def look(self, now: InTraining, final: bool) -> bool:
        """Measure a model between two steps, and note it down in its course.

        final: whether its masks or units are the last ones, so that it may be the best. Returns whether it is.
        """
        course = now.course
        if now.optimizer is None:  # in eval mode, and no optimizer to keep away from it
            figures = self.measure(now.model)
        else:
            with self.backend.paused(now.model) as bare:
                figures = self.measure(bare)
        course.evaluations.append({"step": course.step, **figures})
        self.backend.track({f"held_out/{name}": value for name, value in figures.items()}, course.step)
        told = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        log.info("step %d, held-out data: %s", course.step, told)
        by_step = {seen["step"]: _loss(seen) for seen in course.evaluations}
        if final and (course.best is None or _loss(figures) < by_step[course.best]):
            course.best = course.step
            return True
        return False


def _loss(figures: dict[str, float]) -> float:
    return figures["loss"] if "loss" in figures else figures["feature_distance"]
