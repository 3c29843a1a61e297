"""Scoring that dies between two micro-batches goes on there, with the identical result."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from tests import tiny
from tests.pipeline.test_resume import asked, weights
from tinygn_dist.backends.base import Backend
from tinygn_dist.estimate.input_moments import InputMoments, input_moments
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.estimate.saved_moments import Parts, in_parts
from tinygn_dist.pipeline import compress

CRITERIA = {
    "obs": {},
    "obs in two passes": {"prune.sparsity": 0.6},
    "obs, forward only": {"prune.estimator": "finite-difference"},
    "wanda": {"prune.criterion": "wanda"},
    "gblm": {"prune.criterion": "gblm"},
    "fisher": {"prune.criterion": "fisher"},
}


class Died(RuntimeError): ...


@pytest.mark.parametrize("name", CRITERIA)
def test_a_run_that_died_while_scoring_goes_on_there(
    name: str, backend: Backend, saved_model, text_file: Path, tmp_path: Path
):
    fixed = {"prune.pattern": "unstructured", "recover.steps": 0, "checkpoint.every": 0, "data.num_samples": 8}
    fixed |= {"data.micro_batch": 2, **CRITERIA[name]}
    model = saved_model("llama")
    compress(asked(model, text_file, tmp_path / "whole", **fixed), backend)
    parts = {"checkpoint.statistics_every": 1, "checkpoint.resume": "auto"}
    config = asked(model, text_file, tmp_path / "parts", **fixed, **parts)
    saved, real = [], Parts.save

    def save(self: Parts, what: str, done: int, found: object) -> None:
        real(self, what, done, found)
        saved.append((what, done))
        if len(saved) in (1, 4):
            raise Died

    with mock.patch.object(Parts, "save", save):
        for _ in range(2):
            with pytest.raises(Died):
                compress(config, backend)
        compress(config, backend)
    whats = list(dict.fromkeys(what for what, _ in saved))
    assert saved == [(what, done) for what in whats for done in (1, 2, 3, 4)], "some micro-batch was gathered twice"
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert not list(tmp_path.glob("*.checkpoints*"))


def gathered(backend: Backend, folder: Path, batches: int) -> dict[str, torch.Tensor]:
    """Sums of squares of inputs over the first batches, from what is saved in the folder on, over all ranks."""
    problem = tiny.problem("llama", backend, count=5)
    parts = Parts(2, folder, {"run": 1}, backend)
    problem = Problem(
        problem.model, problem.anatomy, problem.objective, problem.batches[:batches], backend, problem.progress, parts
    )
    found = in_parts(problem, "x", lambda some: input_moments(some, some.anatomy.matrices, full=False), InputMoments())
    backend.sum_over_data(found.moments.tensors())
    return {name: found.moments.sum(found.source_of[name]) for name in found.source_of}


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("done", [2, 5])
def test_another_number_of_ranks_goes_on(first: int, then: int, done: int, process_groups, tmp_path: Path):
    process_groups(first).call(gathered, tmp_path / "parts", done)
    found = process_groups(then).call(gathered, tmp_path / "parts", 5)
    (wanted,) = process_groups(1).call(gathered, tmp_path / "whole", 5)
    for sums in found:
        assert sums.keys() == wanted.keys() and all(torch.equal(sums[n], wanted[n]) for n in wanted)
