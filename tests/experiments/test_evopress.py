"""Budgets by search: counts that never change, a loss that torch gives, a choice that other sequences must confirm."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from tests import tiny
from tests.options import changed, pruning
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.hessians import HessianOptions, hessians
from tinygn_dist.evaluate.quality import mean_loss
from tinygn_dist.experiments import evopress
from tinygn_dist.experiments.evopress import REACH, EvoPressOptions, Library, _step, from_dense, hold_out, search
from tinygn_dist.prune.sparsity import sparsify
from tinygn_dist.prune.sparsity.levels import Level
from tinygn_dist.prune.sparsity.masks import Masks
from tinygn_dist.prune.sparsity.solve import solve, task_of

HALF = pruning(pattern="unstructured", sparsity=0.5)
TASK = task_of(HALF, Level(0.5), backprop=True)


def halves(matrices) -> dict[str, int]:
    return {matrix.name: matrix.numel // 2 for matrix in matrices}


def quiet_setting():
    """What layer 1's MLP writes is small, so its weights should lose more than their share."""
    problem = tiny.problem("llama", count=12, size=2, length=16)
    with torch.no_grad():
        problem.bare.get_submodule("model.layers.1.mlp.down_proj").weight.mul_(1e-2)
    return problem


def searched(problem, **asked: int):
    """A search from equal shares."""
    kept, held_out = problem.split(16)
    matrices = problem.anatomy.matrices
    found, held_out = hold_out(held_out), None
    measured, library = hessians(kept, matrices, HessianOptions()), Library(kept, matrices, halves(matrices))
    for level in range(-REACH, REACH + 1):
        library.keep(level, solve(kept, matrices, measured, library.budgets(level), TASK))
    levels, note = search(found, library, EvoPressOptions(seed=1, **asked))
    library.write(levels)
    return Masks(matrices, library.masks(levels), [note])


def test_zeros_move_to_where_the_loss_does_not_hear_them() -> None:
    problem = quiet_setting()
    _, held_out = problem.split(16)
    reference = from_dense(held_out)
    found = searched(problem, generations=12)
    kept, sizes = found.kept(problem.backend), {t.name: t.numel for t in problem.anatomy.matrices}
    assert sum(kept.values()) == sum(sizes.values()) // 2
    for matrix in problem.anatomy.matrices:  # the weights are those of the masks, at one of the levels
        weight = problem.bare.get_parameter(matrix.parameter)
        assert not weight[~found.by_name[matrix.name]].any()
        level = (matrix.numel // 2 - kept[matrix.name]) / _step(matrix)
        assert level == int(level) and abs(level) <= REACH
    quiet = [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    assert sum(kept[name] for name in quiet) < 0.5 * sum(sizes[name] for name in quiet)
    wanted, equal = mean_loss(reference, "here"), quiet_setting()
    matrices = equal.anatomy.matrices
    measured = hessians(equal.split(16)[0], matrices, HessianOptions())
    at_dense = from_dense(equal.split(16)[1])
    solve(equal, matrices, measured, halves(matrices), TASK)
    assert wanted < mean_loss(at_dense, "equal shares")
    assert "not taken" not in found.notes[-1] and f"of {len(sizes)} weights moved" in found.notes[-1]


def test_what_other_sequences_do_not_confirm_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense model is made to look worst on the sequences that check."""
    problem = quiet_setting()
    plain, calls, checking = evopress.Library.loss, Counter(), problem.batches[-1]["input_ids"]

    def loss(self, levels, where) -> float:
        found, checks = plain(self, levels, where), torch.equal(where.batches[-1]["input_ids"], checking)
        calls[checks] += 1
        return 1e9 if checks and any(levels.values()) else found

    monkeypatch.setattr(evopress.Library, "loss", loss)
    masks = searched(problem, generations=3)
    found = masks.kept(problem.backend)
    assert all(found[matrix.name] == matrix.numel - matrix.numel // 2 for matrix in problem.anatomy.matrices)
    assert masks.notes[-1].endswith("not taken") and calls[True] == 2 and calls[False] > 20


def test_the_same_seed_gives_the_same_budgets() -> None:
    one, other = (searched(quiet_setting(), generations=3) for _ in range(2))
    assert all(torch.equal(mask, other.by_name[name]) for name, mask in one.by_name.items())


@pytest.mark.parametrize("family", ["llama", "bert-classifier"])
def test_divergence_from_the_dense_model(family: str) -> None:
    """KL(dense || now) per counted token, in float64 from logits."""
    problem = tiny.problem(family)
    reference = from_dense(problem)
    assert mean_loss(reference, "dense") == pytest.approx(0, abs=1e-4)

    def logits() -> list[torch.Tensor]:
        with torch.no_grad():
            inputs = [{k: v for k, v in b.items() if k != "labels"} for b in problem.batches]
            return [problem.model(**each).logits.double() for each in inputs]

    dense = logits()
    with torch.no_grad():
        for matrix in problem.anatomy.matrices:
            problem.bare.get_parameter(matrix.parameter).mul_(0.8)
    total = count = 0
    for before, after, batch in zip(dense, logits(), problem.batches, strict=True):
        if family == "llama":
            real = batch["labels"][:, 1:] != -100
            before, after = before[:, :-1][real], after[:, :-1][real]
        total += float(F.kl_div(after.log_softmax(-1), before.log_softmax(-1), reduction="sum", log_target=True))
        count += len(before)
    with torch.no_grad():
        found = [reference.objective(problem.model, batch) for batch in reference.batches]
    assert sum(int(one.count.sum()) for one in found) == count
    assert float(sum(one.total.sum() for one in found)) == pytest.approx(total, rel=0.02)  # the dense logits are bf16


def test_the_last_pass_is_still_compared_with_the_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """In two passes the first divergence is that of the finished model, about what two passes without a search
    leave."""
    problem, options = tiny.problem("llama", count=8), changed(HALF, **{"sparsity": 0.75})
    matrices = problem.anatomy.matrices
    reference = evopress.hold_out(problem.split(4)[1]).choosing
    kept, _ = problem.split(4)
    sparsify.sparsify(kept, matrices, options)
    wanted = mean_loss(reference, "two passes")
    again, seen = tiny.problem("llama", count=8), []
    plain = evopress.Library.loss
    monkeypatch.setattr(
        evopress.Library, "loss", lambda *asked: seen.append(plain(*asked)) or seen[-1]
    )  # fmt: skip
    asked = {"allocation": "search", "experiments": {"evopress": {"generations": 1, "samples": 4}}}
    sparsify.sparsify(again, matrices, changed(options, **asked))
    assert seen[0] == pytest.approx(wanted, rel=1e-5)


def test_search_from_the_options_and_its_refusal() -> None:
    problem = tiny.problem("llama", count=6)
    options = changed(HALF, allocation="search", experiments={"evopress": {"generations": 1, "samples": 4}})
    matrices = problem.anatomy.matrices
    masks = sparsify.sparsify(problem, matrices, options)
    assert sum(masks.kept(problem.backend).values()) == sum(matrix.numel for matrix in matrices) // 2
    assert "allocation by search" in masks.notes[-1]
    with pytest.raises(
        UserError, match="allocation search solves all layers from one measurement, .* raise prune.solver.gram_"
    ):
        sparsify.check(problem.anatomy, matrices, changed(options, **{"gram_gib": 0.0}))
