"""Codes and scales are the same on every rank and at any number of processes."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.contract import sharded_models
from tests.ranks import Ranks
from tinygn_dist.backends.base import Backend
from tinygn_dist.maths.grids import Grid
from tinygn_dist.quantize.quantize import CodeTask, quantize

WAYS = {
    "int3": {},
    "int3 inputs alone": {"backprop": False},
    "int3 layer by layer": {"gram_gib": 0},
    "int3 nearest": {"effort": None},
}


def _codes(backend: Backend, family: str, way: str) -> tuple[str, int]:
    """Fingerprint and violations."""
    if family == "mixtral":
        problem = sharded_models.problem(backend, sharded_models.mixtral())
    else:
        problem = tiny.problem(family, backend, count=5)
    matrices = problem.anatomy.matrices
    quantiser = quantize(problem, matrices, CodeTask({each.name: Grid(3, False, 8) for each in matrices}, **WAYS[way]))
    return quantiser.fingerprint(problem.model, backend), quantiser.violations(problem.model, backend)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("way", WAYS)
def test_one_process_and_several_have_the_same_codes(family: str, way: str, ranks: Ranks, backend: Backend):
    if family == "gpt2" and way == "int3 layer by layer":
        pytest.skip("the other families show it")
    torch.manual_seed(0)
    alone = _codes(backend, family, way)
    assert alone[1] == 0
    assert ranks.call(_codes, family, way) == [alone] * ranks.size
