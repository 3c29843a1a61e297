"""Which units go together: greedily, within a budget."""

from __future__ import annotations

import pytest
import torch

from tests import plain, tiny
from tests.family_cases import MOE, build, make_problem
from tinygn_dist.config import PruneConfig
from tinygn_dist.estimate.probes import Probe, measure
from tinygn_dist.maths.counts import Mix
from tinygn_dist.prune.structured.scores import score_units


def losses_without(problem, family: str, kind: str, gone: dict[int, list[int]]) -> torch.Tensor:
    changed = plain.without_units(problem.model, family, kind, gone)
    return plain.total_losses(changed, problem.batches, family)


def mean_without(problem, gone: dict[int, list[int]]) -> float:
    counts = sum(float(plain.loss(problem.model, b, "llama").count.sum()) for b in problem.batches)
    return float(losses_without(problem, "llama", "heads", gone).sum()) / counts


@pytest.mark.parametrize("family, kind", [("llama", "heads"), ("qwen3", "channels")])
def test_probes_without_units_that_are_gone(backend, family: str, kind: str):
    """Of the same layer, and of an earlier and a later one."""
    problem = tiny.problem(family, backend)
    groups = problem.anatomy.of_kind(kind)
    gone, asked = (
        [Probe(1, groups[1], (0,)), Probe(2, groups[2], (1,))],
        [Probe(g.layer, g, (i,)) for g in groups for i in (1, 0)],
    )
    seen = measure(problem, asked, without=gone)
    before = losses_without(problem, family, kind, {1: [0], 2: [1]})
    for probe, row in zip(asked, seen.differences, strict=True):
        units = {1: {0}, 2: {1}}
        units.setdefault(probe.layer, set()).update(probe.units)
        wanted = losses_without(problem, family, kind, {layer: sorted(some) for layer, some in units.items()}) - before
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(seen.base, before, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", MOE[:2])
def test_probes_without_experts_that_are_gone(backend, family: str):
    """The loss without two of them is the same whichever is measured without the other."""
    problem = make_problem(build(family), backend)
    groups = problem.anatomy.of_kind("experts")
    gone = Probe(groups[-1].layer, groups[-1], (0,))
    probes = [Probe(groups[-1].layer, groups[-1], (2,)), Probe(groups[0].layer, groups[0], (1,)), Probe(0)]
    after = measure(problem, probes, without=[gone])
    for probe, row in zip(probes, after.differences, strict=True):
        other = measure(problem, [gone], without=[probe])
        torch.testing.assert_close(after.base + row, other.base + other.differences[0], rtol=1e-4, atol=1e-4)
    assert (after.differences - measure(problem, probes).differences).abs().max() > 1e-3


def test_units_go_in_the_order_of_a_brute_force_greedy_search(backend):
    """One head of two in each of three layers: no more than four candidates are left once one is gone."""
    problem = tiny.problem("llama", backend)
    scores = score_units(
        problem, Mix(heads=1), PruneConfig(pattern="heads", probes={"adaptive": False, "greedy": True}), None
    )
    gone: dict[int, list[int]] = {}
    while len(gone) < 3:
        candidates = [(layer, unit) for layer in range(3) if layer not in gone for unit in range(2)]
        best = min(candidates, key=lambda c: mean_without(problem, gone | {c[0]: [c[1]]}))
        gone[best[0]] = [best[1]]
    assert {layer: [int(scores.by_group["heads", layer].argmin())] for layer in range(3)} == gone
    again = [row["without"] for row in scores.table if "without" in row]
    assert again == [[[layer, gone[layer][0]] for layer in list(gone)[:count]] for count in (1, 1, 1, 1, 2, 2)]
    assert scores.forwards == (6 + 4 + 2) * len(problem.batches)


def test_a_spent_budget_ends_the_second_looks(backend):
    problem = tiny.problem("llama", backend)
    options = PruneConfig(pattern="heads", probes={"adaptive": False, "greedy": True, "forwards": 6 * 3})
    scores = score_units(problem, Mix(heads=1), options, None)
    single = score_units(problem, Mix(heads=1), PruneConfig(pattern="heads", probes={"adaptive": False}), None)
    assert scores.forwards == single.forwards == 6 * 3
    for layer in range(3):
        assert int(scores.by_group["heads", layer].argmin()) == int(single.by_group["heads", layer].argmin())
