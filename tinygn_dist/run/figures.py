"""The figures of a model, before and after."""

from __future__ import annotations

from typing import Any

from torch import nn

from tinygn_dist.evaluate import quality as measures
from tinygn_dist.evaluate.lm_tasks import task_scores
from tinygn_dist.run.state import RunState


def quality(state: RunState, model: nn.Module) -> dict[str, float]:
    """Of a model of the live one's shape, on the evaluation data."""
    return measures.quality(state.problem(state.splits.evaluation, model), state.source.task, "evaluating")


def all_figures(state: RunState, model: nn.Module) -> dict[str, Any]:
    """Quality, speed, and tasks where they are asked for."""
    asked, example = state.config.evaluate, state.splits.evaluation[0]
    fast = measures.speed(model, state.source.task, example, asked, state.backend) if asked.latency else {}
    tasks = task_scores(model, state.processor, asked, state.backend)
    return quality(state, model) | {"speed": fast} | ({"tasks": tasks} if tasks else {})


def evaluate_before(state: RunState) -> None:
    """Of the dense model."""
    for step in state.steps:
        state.report.add(step.name, step.figures("dense", state.model))
    state.report.before = all_figures(state, state.model) | state.size
    state.report.parameters = {"dense": state.size["num_params"]}
