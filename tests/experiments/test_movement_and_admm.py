"""Movement, ADMM and Top-KAST against plain loops over one matrix at a time."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tinygn_dist.backends.base import Backend
from tinygn_dist.config import Config, PruneConfig, ScheduleConfig
from tinygn_dist.prune.sparsity.gradual_masks import GradualMasks, plan_of

RATE, STEPS = 0.05, 12
HALF = PruneConfig(pattern="unstructured", criterion="magnitude", sparsity=0.5)


def run(backend: Backend, schedule: ScheduleConfig, prune: PruneConfig = HALF):
    """SGD on 0.5 |w - a|^2 of every matrix, a drawn once: weights before, matrices a, masks, model."""
    problem = tiny.problem("llama", backend)
    names = [matrix.name for matrix in problem.anatomy.matrices]
    generator = torch.Generator().manual_seed(3)
    aims = {n: torch.randn(problem.model.get_parameter(n).shape, generator=generator) * 0.1 for n in names}
    before = {n: problem.model.get_parameter(n).detach().clone() for n in names}
    masks = GradualMasks(problem, problem.anatomy.matrices, prune, schedule, plan_of(schedule, prune, STEPS))
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=RATE)
    masks.attach(problem.model, optimizer)
    for _ in range(STEPS):
        for name in names:
            weight = problem.model.get_parameter(name)
            weight.grad = weight.detach() - aims[name]
        optimizer.step()
    return before, aims, masks, problem.model


def largest(values: torch.Tensor, share: float) -> torch.Tensor:
    keep = torch.zeros(values.numel(), dtype=torch.bool)
    keep[values.flatten().topk(values.numel() - round(share * values.numel())).indices] = True
    return keep.view(values.shape)


def test_movement_removes_what_training_moved_towards_zero(backend: Backend):
    schedule = ScheduleConfig(kind="linear", criterion="movement", every=4, first=0.0, freeze=0.3)
    before, aims, masks, model = run(backend, schedule)
    assert [update.step for update in masks.history] == [4, 8] and not masks.step_statistics.values["movement"]
    for name in list(before)[:3]:
        weight, score, keep = before[name].clone(), torch.zeros_like(before[name]), None
        for step in range(1, STEPS + 1):
            gradient = weight - aims[name]
            score -= weight * gradient
            weight = weight - RATE * gradient
            if step >= 4:
                if step in (4, 8):
                    gone = torch.zeros_like(score, dtype=torch.bool) if keep is None else ~keep
                    keep = largest(score.masked_fill(gone, -1e9), {4: 0.25, 8: 0.5}[step])
                weight = weight * keep
        assert torch.equal(masks.masks.by_name[name], keep), name
        assert masks.history[-1].regrown == 0
        torch.testing.assert_close(model.get_parameter(name).detach(), weight, rtol=1e-5, atol=1e-6)
        assert (keep != largest(before[name].abs(), 0.5)).float().mean() > 0.05, "magnitude would have done"


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_admm_is_the_plain_algorithm(backend: Backend, pattern: str):
    """x - lr * (g + penalty * (x - z + u)); every 3 steps z = largest of x + u, u += x - z; cut at the last one."""
    prune = HALF.model_copy(update={"pattern": pattern})
    before, aims, masks, model = run(
        backend, ScheduleConfig(kind="admm", experiments={"elsa": {"penalty": 0.8}}, every=3), prune
    )

    def sparse(values: torch.Tensor) -> torch.Tensor:
        if pattern == "unstructured":
            return values * largest(values.abs(), 0.5)
        groups = values.view(-1, 4)
        order = groups.abs().argsort(1, descending=True)[:, :2]
        return torch.zeros_like(groups).scatter_(1, order, groups.gather(1, order)).view(values.shape)

    for name in list(before)[:3]:
        x = before[name].clone()
        z, u = sparse(x), torch.zeros_like(x)
        for step in range(1, STEPS + 1):
            pull = 0.8 * (x - z + u) if step <= 9 else 0.0
            x = x - RATE * (x - aims[name] + pull)
            if step in (3, 6, 9):
                z = sparse(x + u)
                u = u + x - z
            if step >= 9:
                x = x * (z != 0)
        assert torch.equal(masks.masks.by_name[name], z != 0), name
        torch.testing.assert_close(model.get_parameter(name).detach(), x, rtol=1e-4, atol=1e-6)
    assert [update.sparsity for update in masks.history] == pytest.approx([0, 0, 0.5], abs=1e-3)


def test_movement_at_one_threshold_for_all_matrices(backend: Backend):
    """Scope global: what soft movement's fixed threshold does, with the threshold that leaves the asked number."""
    prune = HALF.model_copy(update={"scope": "global"})
    schedule = ScheduleConfig(kind="linear", criterion="movement", every=4, first=0.0, freeze=0.6)
    before, aims, masks, _ = run(backend, schedule, prune)
    scores = {}
    for name, weight in before.items():
        scores[name] = torch.zeros_like(weight)
        for _ in range(4):
            gradient = weight - aims[name]
            scores[name] -= weight * gradient
            weight = weight - RATE * gradient
    count = sum(score.numel() for score in scores.values())
    threshold = torch.cat([score.flatten() for score in scores.values()]).kthvalue(round(0.5 * count)).values
    shares = []
    for name, score in scores.items():
        assert torch.equal(masks.masks.by_name[name], score > threshold), name
        shares.append(float((score > threshold).float().mean()))
    assert min(shares) < 0.49 and max(shares) > 0.51, "matrices keep different shares"


@pytest.mark.parametrize("kind", ["one-shot", "linear"])
def test_top_kast_is_the_plain_algorithm(backend: Backend, kind: str):
    """theta trains where it is among the largest 1 - s + explore, on the gradient at the largest 1 - s of it."""
    schedule = ScheduleConfig(
        kind=kind, regrow="top-kast", experiments={"top_kast": {"explore": 0.2}}, every=3, first=0.3, freeze=0.2
    )
    before, aims, masks, model = run(backend, schedule)
    assert [update.step for update in masks.history] == [3, 6, 9]
    levels = [0.5] * 4 if kind == "one-shot" else [0.3, 0.3 + 0.2 / 3, 0.3 + 0.4 / 3, 0.5]
    outside = regrown = 0
    for name in list(before)[:3]:
        theta, forward = before[name].clone(), torch.ones_like(before[name], dtype=torch.bool)
        for step in range(STEPS):
            if step in (0, 3, 6, 9):
                gone = ~forward
                forward = largest(theta.abs(), levels[step // 3])
                backward = largest(theta.abs(), levels[step // 3] - 0.2)
                regrown += int((gone & forward).sum())
            alpha = theta * forward
            outside += int((~backward).sum())
            if step < 9:
                theta = theta - RATE * (alpha - aims[name]) * backward
            else:
                theta = (alpha - RATE * (alpha - aims[name])) * forward
        assert torch.equal(masks.masks.by_name[name], forward), name
        torch.testing.assert_close(model.get_parameter(name).detach(), theta, rtol=1e-5, atol=1e-7)
    assert outside and regrown, "the test has weights that do not train, and some that come back"
    assert not masks.step_statistics.values


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"schedule": {"criterion": "movement"}}, "summed up in training"),
        ({"schedule": {"kind": "admm", "criterion": "obs"}}, "leave both at their defaults"),
        ({"schedule": {"kind": "admm"}, "prune": {"pattern": "heads"}}, "use iterative"),
        ({"schedule": {"regrow": "top-kast"}, "recover": {"train": "norms-and-biases"}}, "looks at how matrices train"),
        ({"schedule": {"kind": "admm"}, "recover": {"train": "norms-and-biases"}}, "looks at how matrices train"),
    ],
)
def test_what_does_not_go_together_is_refused(asked: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Config(**{"model": {"name": "m"}, "prune": {"pattern": "unstructured"}, **asked})
