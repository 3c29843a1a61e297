"""Masks that change in training: which weights go and come, against a plain reference on one process."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from tests import plain, tiny
from tinygn_dist.backends.base import Backend
from tinygn_dist.config import Config, PruneConfig, ScheduleConfig
from tinygn_dist.errors import UserError
from tinygn_dist.prune.sparsity.gradual_masks import GradualMasks, plan_of

MAGNITUDE = PruneConfig(pattern="unstructured", criterion="magnitude", sparsity=0.5)


def start(backend: Backend, schedule: ScheduleConfig, prune: PruneConfig = MAGNITUDE, total: int = 8):
    """Masks attached to plain SGD over a bare model, which the test steps by hand."""
    problem = tiny.problem("llama", backend)
    plan = plan_of(schedule, prune, total)
    masks = GradualMasks(problem, problem.anatomy.matrices, prune, schedule, plan)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.0, momentum=0.9)
    masks.attach(problem.model, optimizer)
    return problem, masks, optimizer


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_constant_sparsity_stays_constant_and_a_growing_one_hits_each_level(backend: Backend):
    problem, masks, optimizer = start(backend, ScheduleConfig(kind="linear", every=2, first=0.25))
    for done in range(1, 9):
        step(problem.model, optimizer)
        level = masks.plan.level_after(done)
        for matrix in masks.masks.matrices:
            zeros = int((problem.model.get_parameter(matrix.parameter) == 0).sum())
            assert zeros == round(level * matrix.numel), (done, matrix.name)
    assert masks.steps == 8 and [update.step for update in masks.history] == [2, 4, 6]


def test_weights_are_ranked_as_they_are_at_the_update(backend: Backend):
    """A mask computed from the weights before training would remove others."""
    problem, masks, optimizer = start(backend, ScheduleConfig(kind="linear", every=1, first=0.25), total=2)
    name = masks.masks.matrices[0].name
    weight = problem.model.get_parameter(name)
    with torch.no_grad():
        weight.copy_(torch.linspace(1, 2, weight.numel()).view(weight.shape) * (weight != 0))
    kept = weight.detach().flatten().clone()
    step(problem.model, optimizer)
    order = kept.abs().argsort(stable=True)
    wanted = torch.ones(weight.numel(), dtype=torch.bool)
    wanted[order[: weight.numel() // 2]] = False
    assert torch.equal(masks.masks.by_name[name].flatten(), wanted)


def test_momentum_of_weights_that_changed_is_cleared(backend: Backend):
    problem, masks, optimizer = start(
        backend, ScheduleConfig(regrow="random", every=1, experiments={"regrowth": {"swap": 0.5}}), total=2
    )
    before = {name: keep.clone() for name, keep in masks.masks.by_name.items()}
    step(problem.model, optimizer)
    for name, keep in masks.masks.by_name.items():
        momentum = optimizer.state[problem.model.get_parameter(name)]["momentum_buffer"]
        changed = before[name] ^ keep
        assert changed.any() and not momentum[changed].any() and momentum[~changed].all()


def test_rigl_drops_the_smallest_and_grows_where_the_gradient_is_largest(backend: Backend):
    """Evci et al. 2020, on one matrix, with the gradient from plain autograd over the same batches."""
    schedule = ScheduleConfig(regrow="gradient", every=2, experiments={"regrowth": {"swap": 0.4}}, freeze=0.0)
    problem, masks, optimizer = start(backend, schedule, total=4)
    step(problem.model, optimizer)
    matrix = masks.masks.matrices[3]
    weight, keep = problem.model.get_parameter(matrix.name).detach().clone(), masks.masks.by_name[matrix.name].clone()
    gradient = torch.zeros_like(weight)
    for batch in problem.batches:
        losses = plain.loss(problem.model, batch, "llama")
        (grad,) = torch.autograd.grad(losses.total.sum() / losses.count.sum(), problem.model.get_parameter(matrix.name))
        gradient += grad
    step(problem.model, optimizer)
    budget = int(keep.sum())
    share = 0.4 / 2 * (1 + torch.cos(torch.tensor(torch.pi * 2 / 4)))
    survivors = weight.abs().flatten().topk(budget - round(float(share) * budget)).indices
    prospects = gradient.abs().flatten()
    prospects[survivors] = torch.inf
    wanted = torch.zeros(weight.numel(), dtype=torch.bool)
    wanted[prospects.topk(budget).indices] = True
    found = masks.masks.by_name[matrix.name]
    assert int(found.sum()) == budget and torch.equal(found.flatten(), wanted)
    assert masks.history[0].regrown == masks.history[0].removed > 0


def test_set_drops_the_smallest_and_grows_anywhere(backend: Backend):
    """Mocanu et al. 2018: always the same share goes; what grows has no preference among all that do not stay."""
    schedule = ScheduleConfig(regrow="random", every=1, experiments={"regrowth": {"swap": 0.4}}, freeze=0.0)
    problem, masks, optimizer = start(backend, schedule, total=3)
    grown = others = 0
    for number in range(3):
        before = {t.name: problem.model.get_parameter(t.name).detach().clone() for t in masks.masks.matrices}
        kept = {name: keep.clone() for name, keep in masks.masks.by_name.items()}
        step(problem.model, optimizer)
        for name, keep in masks.masks.by_name.items():
            budget = int(kept[name].sum())
            stay = before[name].abs().flatten().topk(round(0.6 * budget) - 1).indices
            assert int(keep.sum()) == budget and keep.flatten()[stay].all(), (number, name)
            grown += int((keep & ~kept[name]).sum())
            others += budget - len(stay) - 1
            assert not problem.model.get_parameter(name)[keep & ~kept[name]].any(), "they start from zero"
    assert grown / others == pytest.approx(0.5 / 0.7, abs=0.03)  # of the 0.7 that do not stay, 0.5 were zero


def test_n_of_m_goes_down_in_whole_steps(backend: Backend):
    prune = PruneConfig(pattern="2:4", criterion="magnitude")
    problem, masks, optimizer = start(backend, ScheduleConfig(kind="linear", every=2), prune)

    def per_group() -> set[int]:
        groups = [masks.masks.by_name[t.name].view(-1, 4).sum(1) for t in masks.masks.matrices]
        return set(torch.cat(groups).tolist())

    seen = [per_group()]
    for _ in range(8):
        step(problem.model, optimizer)
        seen.append(per_group())
    assert seen[0] == {3} and seen[-1] == {2} and all(len(numbers) == 1 for numbers in seen)


def test_an_update_leaves_gradients_modes_and_the_random_state_alone(backend: Backend):
    schedule = ScheduleConfig(kind="cubic", every=1, criterion="taylor")
    problem, masks, optimizer = start(backend, schedule, total=2)
    problem.model.train()
    problem.model.model.layers[0].eval()
    for parameter in problem.model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    state = torch.get_rng_state()
    optimizer.step()
    assert masks.history and torch.equal(torch.get_rng_state(), state)
    assert problem.model.training and not problem.model.model.layers[0].mlp.training
    assert problem.model.model.layers[1].training
    assert all((parameter.grad == 0.5).all() for parameter in problem.model.parameters())


def test_masks_do_not_change_over_state_in_8_bit_codes(backend: Backend):
    """Code 0 of bitsandbytes' signed map is -0.993: state that is "cleared" would be about the largest there is."""
    for kind, refused in (("linear", True), ("one-shot", False)):
        problem = tiny.problem("llama", backend)
        schedule = ScheduleConfig(kind=kind, every=2)
        masks = GradualMasks(problem, problem.anatomy.matrices, MAGNITUDE, schedule, plan_of(schedule, MAGNITUDE, 8))
        optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.0)
        optimizer.args = SimpleNamespace(optim_bits=8)
        with pytest.raises(UserError, match="SGD keeps its state in 8-bit") if refused else contextlib.nullcontext():
            masks.attach(problem.model, optimizer)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prune": {"pattern": "2:4"}, "schedule": {"regrow": "gradient"}}, "accepted: pattern unstructured"),
        ({"prune": {"pattern": "units"}, "schedule": {"criterion": "wanda"}}, "use prune.criterion"),
        ({"schedule": {"regrow": "random", "criterion": "obs"}}, "leave criterion at auto"),
    ],
)
def test_what_does_not_go_together_is_refused(asked: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Config(model={"name": "m"}, **asked)
