"""Which estimator fits in memory: what autograd keeps is counted right, nothing is kept meanwhile, the choice follows."""

from __future__ import annotations

from dataclasses import replace

import psutil
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
    options = estimator.resolve_estimator(problem, PruneConfig(pattern="heads", criterion="gate"))
    assert options.estimator == chosen and len(problem.notes) == 1 and chosen in problem.notes[0]
    assert ("GiB" in problem.notes[0]) == (free is not None)
    assert estimator.resolve_estimator(problem, options) is options  # what is asked for is not looked into


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
        here = replace(problem, notes=[])
        scores = score_units(here, Mix(heads=1), PruneConfig(pattern="heads", criterion="gate"), None)
        assert len(went) == backwards and bool(scores.forwards) == (backwards == 0) and len(here.notes) == 1


def test_free_memory_of_a_cpu_is_below_what_the_machine_has():
    free = estimator.free_bytes(torch.device("cpu"))
    total = 1024 * estimator._number_after(estimator.Path("/proc/meminfo"), "MemTotal:")
    assert 0 < free < total
    assert estimator.free_bytes(torch.device("meta")) is None


@pytest.mark.parametrize("most,room", [("1000", 700), ("max", None), (None, None)])
def test_the_room_of_a_control_group(tmp_path, most: str | None, room: int | None):
    """Limit 1000, used 400, of which 100 are cache that the system takes back."""
    files = [tmp_path / name for name in ("max", "current", "stat")]
    for file, text in zip(files, (most, "400", "anon 5\ninactive_file 100\n"), strict=True):
        if text is not None:
            file.write_text(text)
    assert estimator._group_room((*map(str, files), "inactive_file ")) == room


def test_the_peak_is_not_below_what_is_held():
    held = torch.ones(1 << 25)  # 128 MiB
    found = estimator.peak_gib(torch.device("cpu"))
    assert found.keys() == {"peak_memory_gib"}
    assert found["peak_memory_gib"] >= 0.98 * psutil.Process().memory_info().rss / 2**30 > 0.12
    del held
