"""Tasks of lm-evaluation-harness on a model in memory, before and after compression (the extra `lm-eval`)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from tinygn_dist.backends.base import Backend
from tinygn_dist.config import EvaluateConfig
from tinygn_dist.errors import UserError

_RESAMPLES = 1000
"""for the standard error of metrics that are no means"""


def check_tasks(options: EvaluateConfig, task: str) -> None:
    """UserError, before weights load, where the tasks cannot be run."""
    if not options.tasks:
        return
    if task != "causal-lm":
        raise UserError(f"evaluate.tasks are for models that write text, got a {task} model; leave them out")
    if options.task_dir is not None and not Path(options.task_dir).is_dir():
        raise UserError(f"evaluate.task_dir {options.task_dir} is not a folder; accepted: one with task files (.yaml)")
    try:
        known = _manager(options).all_tasks
    except ImportError as error:
        raise UserError(
            f"evaluate.tasks needs the package lm_eval ({error}); run: pip install 'tinygn-dist[lm-eval]'"
        ) from None
    missing = [name for name in options.tasks if name not in known]
    if missing:
        raise UserError(
            f"evaluate.tasks {missing[0]!r} is no task of lm_eval; `lm_eval ls tasks` lists them, and "
            "evaluate.task_dir adds a folder of your own"
        )


def task_scores(model: nn.Module, processor: Any, options: EvaluateConfig, backend: Backend) -> dict[str, dict]:
    """{task: {metric: value}} as lm_eval names them, standard errors included. On the main rank alone while the others
    wait, or on every rank alike where the weights are sharded. Leaves the random state as it was."""
    if not options.tasks:
        return {}
    before = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    found = backend.on_main(lambda: _scores(backend.unwrap(model), processor, options)) or {}
    random.setstate(before[0])
    numpy.random.set_state(before[1])
    torch.set_rng_state(before[2])
    return found


def _scores(model: nn.Module, processor: Any, options: EvaluateConfig) -> dict[str, dict]:
    from lm_eval import simple_evaluate  # an optional dependency
    from lm_eval.models.huggingface import HFLM

    told = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=processor),
        tasks=list(options.tasks),
        limit=options.task_limit,
        task_manager=_manager(options),
        bootstrap_iters=_RESAMPLES,
        log_samples=False,
    )
    return {
        name: {key.removesuffix(",none"): value for key, value in metrics.items() if isinstance(value, int | float)}
        for name, metrics in told["results"].items()
    }


def _manager(options: EvaluateConfig) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=options.task_dir)
