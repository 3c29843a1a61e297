"""Which units go together: greedily, by pairs, within a budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from tests import plain, tiny
from tests.family_cases import MOE, build, make_problem
from tinygn_dist.config import PruneConfig
from tinygn_dist.estimate.elimination import Contest, Standing
from tinygn_dist.estimate.probes import Probe, measure, single_units, together
from tinygn_dist.estimate.problem import ProbeCosts
from tinygn_dist.experiments.unit_subsets import Effects, interactions, pairs_of
from tinygn_dist.maths.counts import Mix
from tinygn_dist.prune.structured import probing
from tinygn_dist.prune.structured.scores import score_units


def losses_without(problem, family: str, kind: str, gone: dict[int, list[int]]) -> torch.Tensor:
    changed = plain.without_units(problem.model, family, kind, gone)
    return plain.total_losses(changed, problem.batches, family)


def mean_without(problem, gone: dict[int, list[int]]) -> float:
    counts = sum(float(plain.loss(problem.model, b, "llama").count.sum()) for b in problem.batches)
    return float(losses_without(problem, "llama", "heads", gone).sum()) / counts


@pytest.mark.parametrize("family, kind", [("llama", "heads"), ("qwen3", "channels")])
@pytest.mark.parametrize("costs", [ProbeCosts(), ProbeCosts(together=4)])
def test_probes_without_units_that_are_gone(backend, family: str, kind: str, costs: ProbeCosts):
    """Of the same layer, and of an earlier and a later one."""
    problem = replace(tiny.problem(family, backend), costs=costs)
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
    """What an expert costs without another one is what both cost beyond that one."""
    problem = make_problem(build(family), backend)
    groups = problem.anatomy.of_kind("experts")
    gone = Probe(groups[-1].layer, groups[-1], (0,))
    asked = [Probe(groups[-1].layer, groups[-1], (2,)), Probe(groups[0].layer, groups[0], (1,)), Probe(0)]
    after, before = (
        measure(problem, asked, without=[gone]),
        measure(problem, [gone, *(together([gone, p]) for p in asked)]),
    )
    wanted = before.differences[1:] - before.differences[0]
    torch.testing.assert_close(after.differences, wanted, rtol=1e-4, atol=1e-4)
    assert (after.differences - measure(problem, asked).differences).abs().max() > 1e-3


def test_units_go_in_the_order_of_a_brute_force_greedy_search(backend):
    """One head of two in each of three layers: no more than four candidates are left once one is gone."""
    problem = tiny.problem("llama", backend)
    scores = score_units(
        problem, Mix(heads=1), PruneConfig(pattern="heads", probe_adaptive=False, probe_greedy=True), None
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


def found(means: list[float]) -> Standing:
    mean = torch.tensor(means, dtype=torch.float64)
    return Standing(mean, mean * 0, (mean * 0).long(), mean.argsort(stable=True).argsort(), 0, 0, 0)


def test_pairs_begin_with_the_cheapest_units_that_may_go_together():
    contests = [Contest((0, 1), 1), Contest((2, 3, 4), 2), Contest((5,), 0)]
    losses = torch.tensor([0.0, 0.1, 0.2, 9.0, 0.3, 0.0])
    assert pairs_of(contests, losses, 5) == [(0, 2), (1, 2), (0, 4), (1, 4), (2, 4)]
    assert len(pairs_of(contests, losses, 100)) == 9, "all but the two that only one of can go"


def test_units_that_stand_in_for_each_other_are_not_both_taken(backend, monkeypatch: pytest.MonkeyPatch):
    """Units 0 and 1 cost least alone and 10 beyond that together; 0 and 3 seem to cost less together, but that is noise."""

    def told(problem, pairs):
        beyond = {(0, 1): 10.0, (0, 3): -3.0}
        mean = torch.tensor([beyond.get((one.layer, other.layer), 0.0) for one, other in pairs], dtype=torch.float64)
        return Effects(mean, torch.where(mean < 0, 3.0, 0.1).double(), 0)

    monkeypatch.setattr(probing, "interactions", told)
    probes, contest = [Probe(i) for i in range(4)], Contest((0, 1, 2, 3), 2)
    for options, gone in ((PruneConfig(probe_pairs=6), [0, 2]), (PruneConfig(probe_pairs=1, probe_forwards=1), [0, 1])):
        problem = tiny.problem("llama", backend)
        removals = probing.Removals(probing.UnitScores(), problem, options)
        assert probing._by_pairs(removals, probes, [contest], found([0.0, 0.1, 0.5, 0.6])) == gone


def test_pairs_are_in_the_report_and_in_the_budget(backend):
    problem = tiny.problem("llama", backend)
    heads = list(single_units(problem.anatomy.of_kind("heads")))
    for limit, count in ((None, 12), ((6 + 4 + 3) * 3, 3)):
        options = PruneConfig(pattern="heads", probe_adaptive=False, probe_pairs=99, probe_forwards=limit)
        scores = score_units(problem, Mix(heads=1), options, None)
        assert len(scores.pairs) == count and scores.forwards <= (limit or 99)
        names = [[tuple(unit) for unit in row["units"]] for row in scores.pairs]
        pairs = [tuple(heads[2 * layer + unit] for layer, unit in pair) for pair in names]
        exact = interactions(problem, pairs)
        assert [row["beyond"] for row in scores.pairs] == pytest.approx(exact.mean.tolist(), abs=1e-6)


def test_a_spent_budget_ends_the_second_looks(backend):
    problem = tiny.problem("llama", backend)
    options = PruneConfig(pattern="heads", probe_adaptive=False, probe_greedy=True, probe_forwards=6 * 3)
    scores = score_units(problem, Mix(heads=1), options, None)
    single = score_units(problem, Mix(heads=1), options.model_copy(update={"probe_greedy": False}), None)
    assert scores.forwards == single.forwards == 6 * 3
    for layer in range(3):
        assert int(scores.by_group["heads", layer].argmin()) == int(single.by_group["heads", layer].argmin())


def test_one_way_of_judging_units_together():
    with pytest.raises(ValidationError, match="probe_pairs and probe_subsets, accepted: one of them"):
        PruneConfig(pattern="heads", probe_pairs=3, probe_subsets=2)
