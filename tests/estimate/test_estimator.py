"""Which estimator fits in memory: what autograd keeps is counted right, nothing is kept meanwhile, the choice
follows."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tinygn_dist.config import PruneConfig
from tinygn_dist.estimate import estimator
from tinygn_dist.maths.counts import Mix
from tinygn_dist.prune.structured.scores import score_units

GIB = 2**30


def test_each_kept_storage_counts_once():
    """x.w needs x (for w), tanh its output y, and y^2 y again: 2 storages of 4 x 8 and 4 x 16 floats, w not counted."""
    weight = torch.randn(8, 16, requires_grad=True)
    with estimator.saved_sizes({weight.untyped_storage().data_ptr()}) as sizes:
        (torch.randn(4, 8) @ weight).tanh().square().sum()
    assert sorted(sizes) == [4 * 8 * 4, 4 * 16 * 4]


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_the_count_is_what_autograd_really_holds(backend, family: str):
    """Against the same forward with everything kept alive, where a storage is known by its address."""
    problem = tiny.problem(family, backend, count=2)
    kept, own = [], {p.untyped_storage().data_ptr() for p in problem.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        losses = problem.objective(problem.model, problem.batches[0])
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    sizes = [size for pointer, size in storages.items() if pointer not in own]
    assert estimator.backward_bytes(problem) == pytest.approx(sum(sizes) + 2 * max(sizes), rel=0.02)
    assert losses.total.requires_grad


def test_counting_leaves_no_trace_and_cannot_go_backward(backend):
    problem = tiny.problem("llama", backend)
    problem.model.requires_grad_(False)
    before = tiny.state_bytes(problem.model)
    estimator.backward_bytes(problem)
    assert tiny.same_bits(before, tiny.state_bytes(problem.model))
    assert not any(p.requires_grad or p.grad is not None for p in problem.model.parameters())
    x = torch.ones(2, requires_grad=True)
    with estimator.saved_sizes(set()):
        y = (x * x).sum()
    with pytest.raises(AssertionError, match="only counts"):
        y.backward()


@pytest.mark.parametrize("free,chosen", [(GIB, "backprop"), (1000, "finite-difference"), (None, "finite-difference")])
def test_auto_is_backprop_where_it_fits(backend, monkeypatch, free, chosen: str):
    problem = tiny.problem("llama", backend)
    monkeypatch.setattr(estimator, "free_bytes", lambda device: free)
    found, note = estimator.resolve_estimator(problem, "auto")
    assert found == chosen and f"estimator {chosen}" in note and ("GiB" in note) == (free is not None)
    assert not problem.notes
    for asked in ("backprop", "finite-difference"):  # is not looked into
        assert estimator.resolve_estimator(problem, asked) == (asked, None)


def test_what_statistics_hold_counts_too(backend, monkeypatch):
    problem = tiny.problem("llama", backend)
    needed = estimator.backward_bytes(problem)
    monkeypatch.setattr(estimator, "free_bytes", lambda device: round(needed / estimator.SPARE) + 1000)
    assert estimator.choose(problem)[0] == "backprop"
    assert estimator.choose(problem, held=1000)[0] == "finite-difference"


def test_scores_go_backward_only_where_it_fits(backend, monkeypatch):
    problem, went = tiny.problem("llama", backend), []
    plain = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: went.append(1) or plain(*a, **k))
    for free, backwards in ((1000, 0), (GIB, len(problem.batches))):
        monkeypatch.setattr(estimator, "free_bytes", lambda device, free=free: free)
        scores = score_units(problem, Mix(heads=1), PruneConfig(pattern="heads", criterion="gate"))
        assert len(went) == backwards and bool(scores.forwards) == (backwards == 0) and len(scores.notes) == 1
        assert not problem.notes
