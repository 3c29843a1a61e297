"""Units together: pairs against models without both, regressions against closed forms, choices that single removals miss."""

from __future__ import annotations

import pytest
import torch

from tests import plain, tiny
from tinygn_dist.config import PruneConfig
from tinygn_dist.estimate.elimination import Contest
from tinygn_dist.estimate.probes import Measured, Probe, single_units
from tinygn_dist.experiments.unit_subsets import draw, effects_together, interactions, shared_out
from tinygn_dist.maths.counts import Mix
from tinygn_dist.prune.structured.scores import score_units


def test_interactions_are_what_both_cost_beyond_the_two(backend):
    problem = tiny.problem("llama", backend)
    one, other = list(single_units(problem.anatomy.of_kind("heads")))[1::3]
    found = interactions(problem, [(one, other), (other, one)])

    def loss(gone: dict[int, list[int]]) -> float:
        changed = plain.without_units(problem.model, "llama", "heads", gone)
        counts = sum(float(plain.loss(changed, b, "llama").count.sum()) for b in problem.batches)
        return float(plain.total_losses(changed, problem.batches, "llama").sum()) / counts

    singles = [{probe.layer: list(probe.units)} for probe in (one, other)]
    wanted = loss(singles[0] | singles[1]) - loss(singles[0]) - loss(singles[1]) + loss({})
    assert found.mean.tolist() == pytest.approx([wanted] * 2, abs=2e-5) and abs(wanted) > 1e-3
    assert (found.error > 0).all() and found.forwards == 4 * len(problem.batches)


def test_subsets_have_the_asked_sizes_and_every_unit_equally_often():
    contests = [Contest((0, 1, 2), 1), Contest((3, 4, 5, 6, 7), 2)]
    for seed in range(20):
        chosen = draw(8, contests, 15, seed)
        assert (chosen[:, :3].sum(1) == 1).all() and (chosen[:, 3:].sum(1) == 2).all()
        assert chosen.sum(0).tolist() == [5] * 3 + [6] * 5
    chosen = draw(8, contests, 15, seed=0)
    assert torch.equal(chosen, draw(8, contests, 15, 0)) and not torch.equal(chosen, draw(8, contests, 15, 1))
    assert len({tuple(row.tolist()) for row in chosen}) > 8


def test_additive_losses_are_shared_out_exactly_and_single_losses_scaled():
    """Without interaction and noise the effects are the truth up to a constant per contest; where the single losses are
    proportional to it, they are only scaled."""
    draw_ = torch.Generator().manual_seed(0)
    truth = torch.rand(8, generator=draw_, dtype=torch.float64)
    contests = [Contest((0, 1, 2), 1), Contest((3, 4, 5, 6, 7), 2)]
    chosen = draw(8, contests, 30, seed=0).double()
    for alone in (torch.zeros(8, dtype=torch.float64), torch.rand(8, generator=draw_, dtype=torch.float64), 2 * truth):
        found, error = shared_out(chosen, 0.7 + chosen @ truth, alone)
        for part in (slice(0, 3), slice(3, 8)):
            apart = (found - truth)[part]
            assert (apart - apart.mean()).abs().max() < 0.02
        assert error.max() < 0.02


def test_errors_are_those_of_repeated_measurements():
    """With noise: the spread of the estimates over many draws of it, for the penalty that cross-validation takes."""
    draw_ = torch.Generator().manual_seed(1)
    chosen, truth = draw(6, [Contest(tuple(range(6)), 2)], 40, 0).double(), torch.linspace(0, 1, 6).double()
    seen = [
        shared_out(chosen, chosen @ truth + 0.3 * torch.randn(40, generator=draw_, dtype=torch.float64), truth * 0)
        for _ in range(300)
    ]
    spread, told = torch.stack([e for e, _ in seen]).std(0), torch.stack([e for _, e in seen]).mean(0)
    torch.testing.assert_close(told, spread, rtol=0.35, atol=0)


def test_units_that_stand_in_for_each_other_are_not_both_removed(backend):
    """Units 0 and 1 cost nothing alone and 10 together; each other one costs 1. Single removals would take both."""
    contest, cost = Contest(tuple(range(6)), 2), torch.tensor([0, 0, 1, 1, 1, 1]).double()

    def loss(units: set[int]) -> float:
        return float(sum(cost[unit] for unit in units)) + (10 if {0, 1} <= units else 0)

    def look(problem, asked):
        gone = [{probe.layer, *(other.layer for other in probe.also)} for probe in asked]
        rows = torch.tensor([[loss(units)] for units in gone], dtype=torch.float64)
        return Measured(rows, torch.ones(1).double(), torch.ones(1).double(), len(rows))

    problem, probes = tiny.problem("llama", backend), [Probe(i) for i in range(6)]
    found = effects_together(problem, probes, [contest], cost, 60, look=look)
    taken = set(found.mean.argsort()[:2].tolist())
    assert loss(set(cost.argsort(stable=True)[:2].tolist())) == 10 and loss(taken) <= 2 and found.forwards == 60


@pytest.mark.parametrize("limit,subsets", [(None, 12), (6 * 3 + 3 * 7, 7), (6 * 3, 0)])
def test_subsets_are_in_the_budget_of_forwards(backend, limit: int | None, subsets: int):
    problem = tiny.problem("llama", backend)
    options = PruneConfig(pattern="heads", probe_adaptive=False, probe_subsets=12, probe_forwards=limit)
    scores = score_units(problem, Mix(heads=1), options, None)
    single = score_units(problem, Mix(heads=1), options.model_copy(update={"probe_subsets": 0}), None)
    assert scores.forwards == single.forwards + 3 * subsets == 6 * 3 + 3 * subsets
    told, before = ([row["score"] for row in s.table] for s in (scores, single))
    assert (told == before) == (subsets == 0) and len(told) == 6
