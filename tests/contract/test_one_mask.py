"""The same mask and the same kept units for 1, 2 and 4 processes; zeros that stay zero through training."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests import family_cases, plain, tiny
from tests.options import pruning
from tests.ranks import Ranks
from tests.removing import plan_mixes, remove_units
from tinygn_dist.backends import make_backend
from tinygn_dist.backends.base import Backend
from tinygn_dist.config import DistributedConfig, RecoverConfig, ScheduleConfig
from tinygn_dist.estimate import hessians
from tinygn_dist.maths.schedules import Plan
from tinygn_dist.prune.sparsity.gradual_masks import GradualMasks
from tinygn_dist.prune.sparsity.masks import Masks
from tinygn_dist.prune.sparsity.sparsify import sparsify
from tinygn_dist.runtime.progress import Progress
from tinygn_dist.train.loop import Course, Recovery

SCOPES = {"row": ("unstructured", "row"), "layer": ("unstructured", "layer"), "global": ("unstructured", "global")}
PATTERNS = {**SCOPES, "2:4": ("2:4", "auto")}
MORE = {"owl": {"allocation": "owl"}, "admm": {"method": "admm"}}
MORE["search"] = {"allocation": "search", "experiments": {"evopress": {"generations": 2, "samples": 4}}}
IN_GROUPS = {"in groups": ("unstructured", "auto"), "2:4 in groups": ("2:4", "auto")}
CASES = [("obs", pattern) for pattern in (*IN_GROUPS, *MORE)]
CASES += [(c, p) for c in ("magnitude", "wanda", "ria", "taylor", "fisher", "kfac", "obs", "random") for p in PATTERNS]


def _mask(backend: Backend, family: str, criterion: str, pattern: str) -> dict[str, Any]:
    problem = tiny.problem(family, backend, count=5)
    name, scope = (PATTERNS | IN_GROUPS).get(pattern, ("unstructured", "auto"))
    more = {"gram_gib": 0} if pattern in IN_GROUPS else MORE.get(pattern, {})
    options = pruning(pattern=name, scope=scope, criterion=criterion, sparsity=0.4, **more)
    masks = sparsify(problem, problem.anatomy.matrices, options)
    state = plain.full_state(backend, problem.model)
    return {
        "fingerprint": masks.fingerprint(problem.model, backend),
        "kept": masks.kept(backend),
        "zeros": {t.name: int((state[t.name] == 0).sum()) for t in problem.anatomy.matrices},
        "negative": any(bool(torch.signbit(state[t.name][state[t.name] == 0]).any()) for t in problem.anatomy.matrices),
        "weights": {t.name: state[t.name].clone() for t in problem.anatomy.matrices},
    }


@functools.cache
def alone(family: str, criterion: str, pattern: str) -> dict[str, Any]:
    """One plain process: this one."""
    return _mask(make_backend(DistributedConfig()), family, criterion, pattern)


@pytest.mark.parametrize("criterion, pattern", CASES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_same_mask_at_every_world_size(ranks: Ranks, family: str, criterion: str, pattern: str):
    wanted = alone(family, criterion, pattern)
    sizes = {name: weight.numel() for name, weight in wanted["weights"].items()}
    for found in ranks.call(_mask, family, criterion, pattern):
        assert found["fingerprint"] == wanted["fingerprint"]
        assert found["kept"] == wanted["kept"] and not found["negative"]
        assert found["zeros"] == {name: size - found["kept"][name] for name, size in sizes.items()}
        for name, weight in wanted["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-6)
    share = 0.5 if pattern.startswith("2:4") else 0.6
    assert sum(wanted["kept"].values()) == pytest.approx(share * sum(sizes.values()), rel=0.03)


UNIT_CASES = [
    *(("layers", c) for c in ("removal", "gate", "magnitude", "activation")),
    *(("heads", c) for c in ("removal", "gate", "magnitude", "activation")),
    *(("channels", c) for c in ("auto", "removal", "magnitude", "activation")),
    ("units", "auto"),
]


def _units(backend: Backend, family: str, pattern: str, criterion: str, estimator: str = "auto") -> dict[str, Any]:
    problem = tiny.problem(family, backend, count=5)
    options = pruning(pattern=pattern, criterion=criterion, estimator=estimator, sparsity=0.15, multiple_of=8)
    kept, scores, trials, _, _ = remove_units(problem, plan_mixes(problem.anatomy, options), options)
    return {
        "fingerprint": kept.fingerprint(),
        "kept": kept,
        "table": scores.table,
        "trials": [(trial.mix, trial.loss) for trial in trials],
        "state": plain.full_state(backend, problem.model),
    }


@functools.cache
def units_alone(*case: str) -> dict[str, Any]:
    return _units(make_backend(DistributedConfig()), *case)


def check_units(ranks: Ranks, *case: str) -> None:
    wanted = units_alone(*case)
    for found in ranks.call(_units, *case):
        assert found["fingerprint"] == wanted["fingerprint"] and found["kept"] == wanted["kept"]
        assert [row["score"] for row in found["table"]] == pytest.approx(
            [r["score"] for r in wanted["table"]], rel=1e-9
        )
        assert [mix for mix, _ in found["trials"]] == [mix for mix, _ in wanted["trials"]]
        for name, weight in wanted["state"].items():
            torch.testing.assert_close(found["state"][name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pattern, criterion", UNIT_CASES)
def test_the_same_units_at_every_world_size(ranks: Ranks, pattern: str, criterion: str):
    check_units(ranks, "llama", pattern, criterion)


@pytest.mark.parametrize("family", ["gpt2", "bert", "vit"])
def test_the_same_channels_in_other_families(ranks: Ranks, family: str):
    check_units(ranks, family, "channels", "auto")


TAKEN_OVER = [
    ("llama", 5, {"pattern": "layers", "counts": {"layers": 2}}),
    ("llama", 20, {"pattern": "layers", "counts": {"layers": 2}}),
    ("opt", 5, {"pattern": "layers", "counts": {"layers": 2}}),
    ("llama", 5, {"pattern": "layers", "counts": {"layers": 2}, "gram_gib": 0}),
    ("llama", 5, {"pattern": "layers", "counts": {"layers": 2}, "probes": {"forwards": 20}}),
    ("llama", 5, {"pattern": "layers", "counts": {"layers": 2}, "probes": {"minutes": 1e-9}}),
    ("llama", 5, {"pattern": "units", "counts": {"layers": 1, "heads": 1, "channels": 8}}),
    ("opt", 5, {"pattern": "units", "counts": {"layers": 1, "channels": 8}}),
]
"""family, micro-batches, what is asked"""


def _taken_over(backend: Backend, family: str, count: int, asked: dict[str, Any]) -> dict[str, Any]:
    problem = tiny.problem(family, backend, count=count)
    options = pruning(**asked)
    kept, scores, _, shifts, _ = remove_units(problem, plan_mixes(problem.anatomy, options), options)
    state, spent = plain.full_state(backend, problem.model), (scores.forwards, scores.exhaustive)
    return {"kept": kept, "order": scores.layer_order, "spent": spent, "shifts": shifts, "state": state}


@pytest.mark.parametrize(("family", "count", "asked"), TAKEN_OVER)
def test_layers_are_judged_and_taken_over_alike(ranks: Ranks, family: str, count: int, asked: dict[str, Any]):
    """The same layers, weights and biases as on one process: where layers are judged in several rounds, where sums of
    one layer fit at a time, where a budget ends between two layers or at once, and where heads and channels are fitted
    to the shorter model."""
    wanted = _taken_over(make_backend(DistributedConfig()), family, count, asked)
    for found in ranks.call(_taken_over, family, count, asked):
        assert found["kept"] == wanted["kept"] and found["order"] == wanted["order"]
        assert found["spent"] == wanted["spent"] and found["shifts"].keys() == wanted["shifts"].keys()
        for part in ("state", "shifts"):
            for name, value in wanted[part].items():
                torch.testing.assert_close(found[part][name], value, rtol=1e-4, atol=1e-6)


def _uneven(backend: Backend, model_type: str) -> dict[str, Any]:
    model = family_cases.build(model_type)
    one = family_cases.make_problem(model, backend)
    problem = replace(one, model=backend.prepare(model), batches=5 * one.batches)
    options = pruning(pattern="channels", uneven=True, sparsity=0.2, multiple_of=8)
    kept, scores, trials, shifts, _ = remove_units(problem, plan_mixes(problem.anatomy, options), options)
    state = plain.full_state(backend, problem.model)
    return {"kept": kept, "spent": scores.forwards, "tried": [t.mix for t in trials], "shifts": shifts, "state": state}


@pytest.mark.parametrize("model_type", ["gemma3n_text", "bart"])
def test_the_same_widths_at_every_world_size(ranks: Ranks, model_type: str):
    wanted = _uneven(make_backend(DistributedConfig()), model_type)
    assert len(wanted["tried"]) > 1
    for found in ranks.call(_uneven, model_type):
        assert found["kept"] == wanted["kept"] and found["tried"] == wanted["tried"]
        assert found["spent"] == wanted["spent"] and found["shifts"].keys() == wanted["shifts"].keys()
        for part in ("state", "shifts"):
            for name, value in wanted[part].items():
                torch.testing.assert_close(found[part][name], value, rtol=1e-4, atol=1e-6)


def test_the_same_heads_by_backpropagation(ranks: Ranks):
    check_units(ranks, "llama", "heads", "gate", "backprop")


def _budgets_of_some(backend: Backend, least: int) -> str:
    problem = tiny.problem("llama", backend, count=9)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hessians, "BUDGET_SEQUENCES", least)
        masks = sparsify(problem, problem.anatomy.matrices, pruning(pattern="unstructured", sparsity=0.4, gram_gib=0))
    return masks.fingerprint(problem.model, backend)


def test_budgets_of_a_quarter_of_the_sequences_are_those_of_one_process(ranks: Ranks):
    """A count of micro-batches that no number of ranks divides: what tokens weigh is found by each rank's own
    numbers."""
    few, all_of_them = (_budgets_of_some(make_backend(DistributedConfig()), least) for least in (1, 99))
    assert few != all_of_them
    assert ranks.call(_budgets_of_some, 1) == [few] * ranks.size


def _few_rows(backend: Backend, criterion: str, room: float) -> tuple[str, str]:
    """One micro-batch: most ranks have nothing to look at, and still take part in every sum."""
    options = pruning(pattern="unstructured", sparsity=0.5, criterion=criterion, gram_gib=room)
    problem = tiny.problem("llama", backend, count=1)
    masks = sparsify(problem, problem.anatomy.matrices, options)
    channels = pruning(pattern="channels", sparsity=0.15, multiple_of=8)
    kept, *_ = remove_units(problem, plan_mixes(problem.anatomy, channels), channels)
    return masks.fingerprint(problem.model, backend), kept.fingerprint()


@pytest.mark.parametrize("criterion, room", [("wanda", 16.0), ("taylor", 16.0), ("obs", 16.0), ("obs", 0.0)])
def test_fewer_micro_batches_than_ranks(ranks: Ranks, criterion: str, room: float):
    wanted = _few_rows(make_backend(DistributedConfig()), criterion, room)
    assert ranks.call(_few_rows, criterion, room) == [wanted] * ranks.size


# -- zeros stay zero ---------------------------------------------------------------------------------------------------
def _trained(backend: Backend, accumulate: int) -> dict[str, Any]:
    """Three dense steps first, so that AdamW has momentum for every weight; then the mask, then five more steps with
    weight decay and clipping, looked at after every one."""
    torch.manual_seed(0)
    problem = tiny.problem("llama", backend)
    bare = problem.bare.train()
    matrices = problem.anatomy.matrices
    optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-2, weight_decay=0.1)
    model, optimizer = backend.prepare(bare, optimizer)
    masks, counts = None, []
    rows = [{k: v[backend.rank % 2 :][:1] for k, v in b.items() if k != "attention_mask"} for b in problem.batches]
    rows = [problem.on_device(row) for row in rows]
    for step in range(8):
        if step == 3:
            kept = {t.name: _every_other(backend, problem.model, t) for t in matrices}
            masks = Masks(matrices, kept)
            masks.apply_(model, backend)
            handle = masks.enforce(model, optimizer, backend)
        for micro in range(accumulate):
            with backend.no_sync(model, last=micro == accumulate - 1):
                loss = problem.objective(model, rows[(step + micro) % 3]).mean() / accumulate
                backend.backward(loss)
        backend.clip_grad_norm(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        if masks is not None:
            counts.append(masks.violations(model, backend))
    state = plain.full_state(backend, model)
    handle.remove()
    return {
        "violations": counts,
        "state": state,
        "negative": any(bool(torch.signbit(state[t.name][state[t.name] == 0]).any()) for t in matrices),
    }


def _every_other(backend: Backend, model: torch.nn.Module, matrix: Any) -> torch.Tensor:
    shard = backend.shard(model, matrix)
    indices = torch.arange(shard.weight.numel(), device=shard.weight.device) + shard.offset
    return (indices % 2 == 0).view(shard.weight.shape)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_zeros_survive_momentum_weight_decay_and_clipping(ranks: Ranks, accumulate: int):
    found = ranks.call(_trained, accumulate)
    dense = tiny.build("llama").state_dict()
    for result in found:
        assert result["violations"] == [0] * 5 and not result["negative"]
        for name, weight in result["state"].items():
            assert torch.equal(weight, found[0]["state"][name]), "ranks drifted apart"
            if "proj" in name:
                flat = weight.flatten()
                assert (flat[1::2] == 0).all() and (flat[0::2] != 0).all()
            assert not torch.equal(weight, dense[name]), f"{name} was not trained"


def _without_enforcement(backend: Backend) -> int:
    """The test above can fail: one step without the hook revives pruned weights."""
    problem = tiny.problem("llama", backend)
    optimizer = torch.optim.AdamW(problem.bare.parameters(), lr=1e-2)
    model, optimizer = backend.prepare(problem.bare, optimizer)
    masks = Masks(
        problem.anatomy.matrices, {t.name: _every_other(backend, problem.model, t) for t in problem.anatomy.matrices}
    )
    masks.apply_(model, backend)
    backend.backward(problem.objective(model, problem.on_device(problem.batches[0])).mean())
    optimizer.step()
    return masks.violations(model, backend)


def test_without_enforcement_they_would_not(pair: Ranks):
    assert min(pair.call(_without_enforcement)) > 1000


def _recovered(backend: Backend, options: RecoverConfig) -> tuple[Course, dict[str, torch.Tensor], int]:
    problem = tiny.problem("llama", backend, count=1)
    asked, plan = pruning(pattern="2:4", criterion="magnitude"), Plan(options.steps, (), (0.5,))
    masks = GradualMasks(problem, problem.anatomy.matrices, asked, ScheduleConfig(), plan)
    teacher = tiny.build("llama").to(backend.device)
    rows = [{k: v[:1] for k, v in b.items() if k != "attention_mask"} for b in tiny.batches("llama", 12, padded=False)]
    rows = [{k: v[:, : 6 + i % 4] for k, v in row.items()} for i, row in enumerate(rows)]  # of different lengths
    course = Course()
    Recovery(teacher, "causal-lm", rows, options, plan, backend, Progress()).run(problem.model, [masks], course)
    return course, plain.full_state(backend, problem.model), masks.masks.violations(problem.model, backend)


@functools.cache
def recovered_alone(options: RecoverConfig) -> tuple[Course, dict[str, torch.Tensor], int]:
    return _recovered(make_backend(DistributedConfig()), options)


@pytest.mark.parametrize("clip_norm", [1e-3, 100.0])
def test_recovery_is_the_same_training_at_every_world_size(ranks: Ranks, clip_norm: float):
    """Sequences of different lengths: a mean of per-rank means would weight tokens unequally."""
    options = RecoverConfig(steps=4, batch_size=4, learning_rate=1e-3, distill=0.5, clip_norm=clip_norm)
    wanted, state, _ = recovered_alone(options)
    for done, found, violations in ranks.call(_recovered, options):
        assert violations == 0 and done.tokens == wanted.tokens
        assert done.losses[0] == pytest.approx(wanted.losses[0], rel=1e-5)
        assert done.losses[-1] == pytest.approx(wanted.losses[-1], rel=1e-4)
        for name, weight in state.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=2e-4)
    assert wanted.losses[-1] < wanted.losses[0] or clip_norm < 1


def _one_sgd_step(backend: Backend) -> dict[str, torch.Tensor]:
    problem = tiny.problem("llama", backend)
    optimizer = torch.optim.SGD(problem.bare.parameters(), lr=0.1)
    model, optimizer = backend.prepare(problem.bare, optimizer)
    options = RecoverConfig(steps=1, batch_size=4, distill=0.0, clip_norm=1e9)
    recovery = Recovery(None, "causal-lm", (), options, Plan(1), backend, Progress())
    recovery._one_step(model, optimizer, _uneven_rows())
    return plain.full_state(backend, model)


def _uneven_rows() -> list[dict[str, torch.Tensor]]:
    rows = [{k: v[:1] for k, v in b.items() if k != "attention_mask"} for b in tiny.batches("llama", 4, padded=False)]
    return [{k: v[:, : 4 + 2 * i] for k, v in row.items()} for i, row in enumerate(rows)]


def test_one_step_follows_the_gradient_of_the_mean_loss_per_token(ranks: Ranks):
    """Plain SGD shows the size of the gradient, which Adam hides: neither a mean of means nor a factor of the number
    of ranks."""
    plain_model, rows = tiny.build("llama"), _uneven_rows()
    losses = [plain.loss(plain_model, row, "llama") for row in rows]
    (sum(x.total.sum() for x in losses) / sum(int(x.count.sum()) for x in losses)).backward()
    for state in ranks.call(_one_sgd_step):
        for name, parameter in plain_model.named_parameters():
            wanted = (parameter - 0.1 * parameter.grad).detach()
            torch.testing.assert_close(state[name], wanted, rtol=1e-4, atol=1e-6)
