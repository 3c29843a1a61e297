"""Each thing that a forward-only training goes on from is read back: one that was made again from the weights would
differ."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tests import tiny
from tinygn_dist.backends.base import Backend
from tinygn_dist.checkpoints.run_checkpoint import Checkpoints, Saved
from tinygn_dist.config import RecoverConfig
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.train.forward_only.loop import ForwardOnly
from tinygn_dist.train.state_io import read_forward_only, write_forward_only, write_weights

CASES = {
    "large steps": {"optimizer": "zo-nesterov", "learning_rate": 0.5},
    "adam": {"optimizer": "zo-adam", "learning_rate": 0.2},
    "the rate is being measured": {"optimizer": "zo-sgd"},
}
STEPS = {"the rate is being measured": 9}  # 32 directions in eight steps, and a first look
SOURCES = {
    "torch": lambda: torch.rand(3).tolist(),
    "numpy": lambda: numpy.random.rand(3).tolist(),
    "python": lambda: [random.random() for _ in range(3)],
}


def training(backend: Backend, case: str, weights: dict | None = None) -> tuple[Problem, ForwardOnly]:
    """From the beginning, or at weights that were read back before."""
    problem = tiny.problem("llama", backend, count=4, size=1)
    if weights is not None:
        problem.model.load_state_dict(weights)
    options, draw = RecoverConfig(batch_size=4, directions=4, **CASES[case]), torch.Generator().manual_seed(5)
    keep = {t.name: torch.rand(t.stored_shape, generator=draw) > 0.3 for t in problem.anatomy.matrices}
    return problem, ForwardOnly(problem.model, problem.anatomy.matrices, keep, problem.objective, options, backend)


def go_on(problem: Problem, made: ForwardOnly, start: int, steps: int) -> list[float]:
    return [made.step(problem.batches, number, 1.0)[0] for number in range(start, start + steps)]


def save(backend: Backend, folder: Path, made: ForwardOnly) -> Saved:
    with Checkpoints(folder, {}, backend, keep=1).writing("one") as writer:
        write_weights(writer, made.model, None, backend)
        write_forward_only(writer, made)
        writer.facts["num_ranks"] = backend.num_ranks
    return Checkpoints(folder, {}, backend, keep=1).newest()


def known(made: ForwardOnly) -> dict[str, Any]:
    """What the next step depends on, as plain values. Moments are made from `history`."""
    told = made.state_dict()
    told |= {"momentum": {name: part.tolist() for name, part in made.optimizer._first.items()}}
    told |= {"squares": {name: part.tolist() for name, part in made.optimizer._second.items()}}
    return told | {"weights": {n: p.detach().tolist() for n, p in made.model.named_parameters()}}


@pytest.mark.parametrize("case", CASES)
def test_everything_is_as_it_was(case: str, backend: Backend, tmp_path: Path):
    steps = STEPS.get(case, 3)
    problem, made = training(backend, case)
    go_on(problem, made, 0, steps)
    saved, wanted = save(backend, tmp_path, made), known(made)
    after = {name: draw() for name, draw in SOURCES.items()}
    again, resumed = training(backend, case, made.model.state_dict())
    other = known(resumed)  # what is there when nothing but the weights is read
    read_forward_only(saved, resumed)
    assert {name: draw() for name, draw in SOURCES.items()} == after, "random states"
    found = known(resumed)
    for name, value in wanted.items():
        assert found[name] == value, f"{name} was not restored"
    differing = {"history", "step", "scales"} if made.rate is not None else {"search", "step"}
    differing |= {"zo-sgd": set(), "zo-nesterov": {"momentum"}, "zo-adam": {"momentum", "squares"}}[
        made.options.optimizer
    ]
    assert differing <= {name for name in wanted if other[name] != wanted[name]}, "the test would not notice"
    assert go_on(again, resumed, steps, 3) == go_on(problem, made, steps, 3)
    assert tiny.same_bits(tiny.state_bytes(made.model), tiny.state_bytes(resumed.model))
