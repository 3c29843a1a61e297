"""Gram matrices of a few layers at a time: the same statistics, less memory, inputs from what is compressed already."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from tests import family_cases, tiny
from tests.options import changed, pruning
from tinygn_dist.backends.replicated import Replicated
from tinygn_dist.config import PruneConfig
from tinygn_dist.errors import UserError
from tinygn_dist.estimate import hessians
from tinygn_dist.estimate.gradient_energy import TokenWeights, loss_moments
from tinygn_dist.estimate.hessians import HessianOptions, gram_gib, layer_groups
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths import sums as moments
from tinygn_dist.maths.solve import least_squares, obs
from tinygn_dist.maths.sums import Moments, fill_below
from tinygn_dist.models.anatomy import Matrix, read_anatomy
from tinygn_dist.models.objective import model_inputs, real_tokens
from tinygn_dist.prune.sparsity import budgets, sparsify
from tinygn_dist.prune.sparsity.levels import Level

HALF = pruning(pattern="unstructured", sparsity=0.5)
IN_GROUPS = changed(HALF, **{"gram_gib": 0.0})
FORWARD = {"estimator": "finite-difference"}
ONE_LAYER = HessianOptions(room_gib=0)
FORWARD_ONLY = HessianOptions(backprop=False, competing=True)


# -- the same statistics -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "model_type", [t for t in family_cases.CASES if t not in ("gemma3n_text", *family_cases.SEVERAL_STACKS)]
)
def test_layer_by_layer_equals_all_at_once(model_type: str) -> None:
    """Of a model that does not change in between: what a layer is handed is what it reads in a whole forward, and the
    weights of tokens are those of one pass."""
    problem = family_cases.make_problem(family_cases.build(model_type), Replicated(Accelerator(cpu=True)))
    matrices = problem.anatomy.matrices
    wanted = loss_moments(problem, matrices, 0.0)
    before = tiny.state_bytes(problem.bare)
    seen = set()
    for jobs in hessians.hessians(problem, matrices, ONE_LAYER).jobs(solving=False):
        for job in jobs:
            (matrix,) = job.matrices
            gram, rows = job.moments
            family_cases.close(gram, fill_below(wanted.grams.sum(matrix.name)).float())
            family_cases.close(rows, wanted.rows.sum(matrix.name))
            seen.add(matrix.name)
    assert seen == {matrix.name for matrix in matrices}
    assert tiny.same_bits(before, tiny.state_bytes(problem.bare))
    assert not any("_hf_hook" in module.__dict__ for module in problem.bare.modules())


@pytest.mark.parametrize(("least", "sequences"), [(1, 3), (5, 6), (99, 12)])
def test_budgets_of_groups_come_from_the_first_sequences(
    monkeypatch: pytest.MonkeyPatch, least: int, sequences: int
) -> None:
    """A quarter of twelve, or whole micro-batches of three that hold as many as are asked at least; the energies of
    rows are of all, and so is what is solved on."""
    monkeypatch.setattr(hessians, "BUDGET_SEQUENCES", least)
    problem = tiny.problem("llama", count=4, size=3)
    matrices = problem.anatomy.matrices
    everything, some = (loss_moments(s, matrices, 0.0) for s in (problem, problem.first(sequences)))
    for solving, wanted in ((False, some), (True, everything)):
        for jobs in hessians.hessians(problem, matrices, ONE_LAYER).jobs(solving=solving):
            for job in jobs:
                name, (gram, rows) = job.matrices[0].name, job.moments
                family_cases.close(gram, fill_below(wanted.grams.sum(name)).float())
                family_cases.close(rows, everything.rows.sum(name))


@pytest.mark.parametrize("options", [HessianOptions(), FORWARD_ONLY], ids=["loss-aware", "forward-only"])
def test_budgets_see_all_layers_of_the_dense_model(options: HessianOptions) -> None:
    problem = tiny.problem("llama")
    matrices = problem.anatomy.matrices
    found = [
        budgets.budgets_at(0.75, budgets.saliency_tallies(problem, matrices, measured, 0.01), matrices, Level(0.5))
        for measured in (hessians.hessians(problem, matrices, replace(options, room_gib=room)) for room in (16, 0))
    ]
    assert found[0] == found[1] and len(set(found[0].values())) > 10


@pytest.mark.parametrize("options", [HessianOptions(), ONE_LAYER, FORWARD_ONLY], ids=["all", "groups", "forward-only"])
def test_gram_matrices_are_whole_also_where_they_have_several_blocks(
    monkeypatch: pytest.MonkeyPatch, options: HessianOptions
) -> None:
    """Forward-only against plain sums; loss-aware they are symmetric, with no corner left out."""
    monkeypatch.setattr(moments, "BLOCK", 7)
    problem = tiny.problem("llama")
    matrices = problem.anatomy.matrices
    plain = {matrix.name: gram.float() for matrix, gram in zip(matrices, _grams(problem, matrices), strict=True)}
    for jobs in hessians.hessians(problem, matrices, options).jobs(solving=False):
        for job in jobs:
            gram = job.moments[0]
            family_cases.close(gram, gram.t())
            assert gram.dtype == torch.float32 and gram[-1, 0] != 0
            if not options.backprop:
                for matrix in job.matrices:
                    family_cases.close(gram, plain[matrix.name])


# -- inputs from what is compressed ------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_every_layer_is_solved_on_what_the_compressed_layers_before_it_give(family: str) -> None:
    """Against whole forwards of a second model, whose layers are solved one after the other by hand."""
    options = changed(IN_GROUPS, **(FORWARD | {"allocation": 0.0}))
    # few tokens leave Gram matrices so near to singular that rounding moves what is solved on them by some per cent
    problem, by_hand, at_once = (tiny.problem(family, count=48, size=4, length=16) for _ in range(3))
    sparsify.sparsify(problem, problem.anatomy.matrices, options)
    for layer in range(problem.anatomy.num_layers):
        matrices = [matrix for matrix in by_hand.anatomy.matrices if matrix.layer == layer]
        for matrix, gram in zip(matrices, _grams(by_hand, matrices), strict=True):
            weight = matrix.oriented(by_hand.bare.get_parameter(matrix.parameter).data)
            goal = obs.LayerGoal(round(0.5 * matrix.numel), row_energy=torch.ones(len(weight)))
            solved = obs.prune(weight, gram.float(), goal)
            weight.copy_(least_squares.refit_masked(weight, solved.weight, solved.keep, gram.float(), 8, 0.01))
    sparsify.sparsify(at_once, at_once.anatomy.matrices, changed(options, **{"gram_gib": 16.0}))
    apart = []
    for matrix in by_hand.anatomy.matrices:  # rounding of a near-singular Gram matrix may flip a tie
        wanted, found, other = (s.bare.get_parameter(matrix.parameter).detach() for s in (by_hand, problem, at_once))
        assert int(((found == 0) != (wanted == 0)).sum()) <= 0.005 * matrix.numel, matrix.name
        assert float((found - wanted).norm()) <= 0.05 * float(wanted.norm()), matrix.name
        apart.append(float((other - wanted).norm() / wanted.norm()))
    assert max(apart) > 0.1  # the test can fail


def _grams(problem: Problem, matrices: list[Matrix]) -> list[torch.Tensor]:
    """fp64 sum of x x^T over real tokens, in whole forwards of the model as it is now."""
    sums = {matrix.name: torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64) for matrix in matrices}

    def add(name: str, batch: dict):
        def hook(module, inputs) -> None:
            rows = inputs[0].detach().flatten(0, -2)[real_tokens(batch)].double()
            sums[name] += rows.t() @ rows

        return hook

    for batch in problem.batches:
        handles = [problem.bare.get_submodule(t.module).register_forward_pre_hook(add(t.name, batch)) for t in matrices]
        with torch.no_grad():
            problem.model(**model_inputs(batch))
        for handle in handles:
            handle.remove()
    return list(sums.values())


@pytest.mark.parametrize("model_type", family_cases.MOE)
def test_experts_are_solved_on_what_reaches_them_by_then(model_type: str) -> None:
    problem = family_cases.make_problem(family_cases.build(model_type), Replicated(Accelerator(cpu=True)))
    matrices = problem.anatomy.matrices
    kept = sparsify.sparsify(problem, matrices, IN_GROUPS).kept(problem.backend)
    total = sum(matrix.numel for matrix in matrices)
    assert abs(sum(kept.values()) - total / 2) <= len(matrices)  # experts without a gradient are rounded alone
    assert all(p.isfinite().all() for p in problem.bare.parameters())


def test_token_weights_of_experts_that_now_read_other_tokens() -> None:
    """A token that an expert did not read before weighs what the mean one did, which is plain + 1."""
    problem = family_cases.make_problem(family_cases.build("mixtral"), Replicated(Accelerator(cpu=True)))
    found = TokenWeights(problem, problem.anatomy.matrices, 4.0)
    name = next(matrix.name for matrix in problem.anatomy.matrices if matrix.index == 0)
    weights_then, tokens_then = found._held[name, 0, 0]
    now = torch.arange(30)
    told = found.of(name, 0, now)
    held = dict(zip(tokens_then.tolist(), weights_then.float().tolist(), strict=True))
    assert told.tolist() == [held.get(token, 5.0) for token in range(30)] and 0 < len(held) < 24
    assert found.of(name, 99, now).tolist() == [1.0] * 30


# -- what it costs -----------------------------------------------------------------------------------------------------
def _peak_gib(monkeypatch: pytest.MonkeyPatch, options: PruneConfig) -> float:
    """The most that square fp64 sums took at the same time."""
    alive: list[weakref.ref] = []
    peak = 0

    def watch(name: str) -> None:
        plain = getattr(Moments, name)

        def call(self: Moments, source: str, *arguments: object) -> None:
            nonlocal peak
            plain(self, source, *arguments)
            held = self._sums[source]
            if held.dim() == 2 and held.shape[0] == held.shape[1] and all(one() is not held for one in alive):
                alive.append(weakref.ref(held))
            tensors = [one() for one in alive]
            peak = max(peak, sum(8 * tensor.numel() for tensor in tensors if tensor is not None))

        monkeypatch.setattr(Moments, name, call)

    watch("add")
    watch("reserve")
    problem = tiny.problem("llama")
    sparsify.sparsify(problem, problem.anatomy.matrices, options)
    return peak / 2**30


@pytest.mark.parametrize("change", [{}, FORWARD, {"pattern": "2:4"}], ids=str)
def test_no_more_gram_matrices_than_those_of_one_group(monkeypatch: pytest.MonkeyPatch, change: dict) -> None:
    matrices = tiny.problem("llama").anatomy.matrices
    by_layer = [gram_gib([matrix for matrix in matrices if matrix.layer == layer]) for layer in range(3)]
    assert 0 < _peak_gib(monkeypatch, changed(IN_GROUPS, **change)) <= max(by_layer)
    two = changed(IN_GROUPS, **(change | {"gram_gib": 2.1 * max(by_layer)}))
    assert max(by_layer) / 2 < _peak_gib(monkeypatch, two) <= 2 * max(by_layer)
    if not change:
        assert _peak_gib(monkeypatch, HALF) == pytest.approx(sum(by_layer))  # the test can fail


def test_a_layer_runs_twice_for_the_solver_and_once_for_budgets() -> None:
    """And once forward in the pass that goes backward; the last layer has nobody to hand over to."""
    problem = tiny.problem("llama")
    calls = [0, 0, 0]
    for index, layer in enumerate(problem.bare.model.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    options = changed(IN_GROUPS, **{"estimator": "backprop"})  # auto takes a forward to measure what fits
    masks = sparsify.sparsify(problem, problem.anatomy.matrices, options)
    count = len(problem.batches)
    assert calls == [4 * count, 4 * count, 3 * count]
    assert "prune.solver.gram_gib 0" in masks.notes[0] and "3 groups" in masks.notes[0]


# -- groups and refusals -----------------------------------------------------------------------------------------------
def test_groups_are_consecutive_layers_that_fit() -> None:
    anatomy = read_anatomy(tiny.build("llama", num_hidden_layers=7), needs_units=True)
    matrices = [matrix for matrix in anatomy.matrices if matrix.layer not in (0, 3)]
    one = gram_gib([matrix for matrix in matrices if matrix.layer == 1])
    assert one == pytest.approx(8 * (6 * 32**2 + 48**2) / 2**30)

    def layers(room: float) -> list[list[int]]:
        groups = layer_groups(anatomy, matrices, room)
        assert all({matrix.layer for matrix in group.matrices} <= set(group.layers) for group in groups)
        return [list(group.layers) for group in groups]

    assert layers(5.1 * one) == [[0, 1, 2, 3, 4, 5, 6]]
    assert layers(2.1 * one) == [[0, 1, 2, 3], [4, 5], [6]]
    assert layers(0) == [[0], [1], [2, 3], [4], [5], [6]]


def test_a_model_without_a_list_of_layers_is_refused_before_it_loads() -> None:
    anatomy = replace(tiny.problem("llama").anatomy, stacks=())
    with pytest.raises(
        UserError, match=r"prune.solver.gram_gib 0 and .* GiB of Gram matrices, .* raise prune.solver.gram_gib to"
    ):
        sparsify.check(anatomy, anatomy.matrices, IN_GROUPS)
    sparsify.check(anatomy, anatomy.matrices, HALF)
    sparsify.check(anatomy, anatomy.matrices, changed(IN_GROUPS, **{"criterion": "wanda"}))


# -- the cut -----------------------------------------------------------------------------------------------------------
def test_counts_by_size_find_the_cut() -> None:
    """Against sorting all of them: the counts add up, and are right to what a sixteenth of an octave blurs."""
    generator = torch.Generator().manual_seed(0)
    saliencies = [torch.rand(50_000, generator=generator).pow(4) * scale for scale in (1e-6, 1e-5, 3e-5)]
    saliencies[0][:700] = 0
    for going in (1, 700, 60_000, 149_999):
        cut = torch.cat(saliencies).sort().values[going]
        found = budgets.below_threshold(torch.stack([budgets.tally(s) for s in saliencies]), going)
        assert float(found.sum()) == pytest.approx(going)
        for number, saliency in zip(found.tolist(), saliencies, strict=True):
            assert number == pytest.approx(int((saliency < cut).sum()), abs=max(1, 0.005 * len(saliency)))


@pytest.mark.parametrize("model_type", ["gemma3n_text", "bart"])
def test_layers_that_cannot_run_by_themselves_need_room_for_all(model_type: str) -> None:
    matrices = family_cases.on_meta(model_type).matrices
    with pytest.raises(
        UserError, match="no one list of layers that can run by themselves; raise prune.solver.gram_gib"
    ):
        layer_groups(family_cases.on_meta(model_type), matrices, 0.0)
