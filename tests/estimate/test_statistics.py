"""Estimates in one process: what they measure is what plain code measures, and they leave no trace."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests import plain, tiny
from tinygn_dist.estimate import probes
from tinygn_dist.estimate.backprop import gate_gradients, weight_gradients
from tinygn_dist.estimate.gates import gate_derivatives
from tinygn_dist.estimate.input_moments import block_influence, input_moments
from tinygn_dist.estimate.partial_forward import PrefixCache, running_layers
from tinygn_dist.estimate.probes import Probe, measure, single_units
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.models.objective import model_inputs

ALL = tuple(tiny.CONFIGS)


@pytest.fixture(scope="module")
def settings(backend) -> Callable[[str], Problem]:
    made: dict[str, Problem] = {}
    return lambda family: made.setdefault(family, tiny.problem(family, backend))


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch, backend) -> Iterator[Callable[..., Problem]]:
    """Settings in float64 throughout (transformers computes softmax and norms in float32 whatever the model's dtype),
    so that finite differences are limited by theory alone."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)

    def build(family: str, **data: int) -> Problem:
        problem = tiny.problem(family, backend, model=tiny.build(family).double(), **data)
        double = [{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in problem.batches]
        return replace(problem, batches=double)

    yield build
    torch.set_default_dtype(before)


# -- removal probes ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ALL)
def test_probe_of_a_layer_is_the_loss_without_it(settings, family: str):
    problem = settings(family)
    seen = measure(problem, [Probe(layer) for layer in range(3)])
    base = plain.total_losses(problem.model, problem.batches, family)
    for layer in range(3):
        wanted = (
            plain.total_losses(plain.without_layers(problem.model, family, [layer]), problem.batches, family) - base
        )
        torch.testing.assert_close(seen.differences[layer], wanted, rtol=1e-4, atol=2e-4)
    assert seen.differences.abs().max() > 1e-2, "the layers do too little for this test to see anything"
    torch.testing.assert_close(seen.base, base, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ALL)
def test_probe_with_layers_already_gone(settings, family: str):
    problem = settings(family)
    seen = measure(problem, [Probe(0), Probe(2)], without=[Probe(1)])
    base = plain.total_losses(plain.without_layers(problem.model, family, [1]), problem.batches, family)
    torch.testing.assert_close(seen.base, base, rtol=1e-5, atol=1e-4)
    for row, gone in ((0, [0, 1]), (1, [1, 2])):
        wanted = plain.total_losses(plain.without_layers(problem.model, family, gone), problem.batches, family) - base
        torch.testing.assert_close(seen.differences[row], wanted, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("kind", ["heads", "channels"])
def test_probe_of_units_is_the_loss_with_their_weights_zeroed(settings, family: str, kind: str):
    problem = settings(family)
    groups = problem.anatomy.of_kind(kind)
    if kind == "heads" and family in tiny.FIXED_HEADS:
        assert groups == ()
        return
    chosen = [[1]] if kind == "heads" else [[5], list(range(0, 48, 3))]
    probes = [Probe(g.layer, g, tuple(units)) for g in groups for units in chosen]
    seen = measure(problem, probes)
    base = plain.total_losses(problem.model, problem.batches, family)
    for probe, difference in zip(probes, seen.differences, strict=True):
        changed = plain.without_units(problem.model, family, kind, {probe.layer: list(probe.units)})
        wanted = plain.total_losses(changed, problem.batches, family) - base
        torch.testing.assert_close(difference, wanted, rtol=1e-4, atol=2e-4)
    assert seen.differences.abs().max() > 1e-3


@pytest.mark.parametrize("family", ALL)
def test_counts_are_real_tokens(settings, family: str):
    problem = settings(family)
    seen = measure(problem, [])
    wanted = torch.cat([plain.loss(problem.model, b, family).count for b in problem.batches])
    assert seen.counts.tolist() == wanted.tolist() and seen.differences.shape == (0, len(wanted))


@pytest.mark.parametrize("family", ALL)
def test_a_gate_at_one_changes_nothing(settings, family: str):
    problem = settings(family)
    groups = [group for group in problem.anatomy.groups if group.layer == 1]
    seen = measure(problem, [*(Probe(1, g, (0,), 1.0) for g in groups), Probe(1, factor=1.0)])
    assert (seen.differences[:-1] == 0).all()
    assert seen.differences[-1].abs().max() < 1e-4


@pytest.mark.parametrize("family", ALL)
def test_restart_from_every_layer_equals_the_whole_forward(settings, family: str):
    problem = settings(family)
    model, anatomy, cache = problem.model, problem.anatomy, PrefixCache()
    with torch.no_grad():
        whole = plain.logits(model, problem.batches[0])
        with cache.recording(model, anatomy, range(3)):
            plain.forward(model, problem.batches[0])
        for layer in range(3):
            with running_layers(model, anatomy, range(layer, 3), (cache, layer)):
                assert torch.equal(plain.logits(model, problem.batches[0]), whole), layer
        assert torch.equal(plain.logits(model, problem.batches[0]), whole)


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_probes_without_reuse_see_the_same(settings, family: str):
    """And run every layer that is there: all three for units, the other two for a removed layer."""
    problem, ran = settings(family), [0]
    group = problem.anatomy.of_kind("channels")[2]
    asked = [Probe(1), Probe(2, group, (3, 4)), Probe(2, factor=0.5)]
    modules = problem.model.get_submodule(problem.anatomy.layers_path)
    handles = [layer.register_forward_pre_hook(lambda *_: ran.__setitem__(0, ran[0] + 1)) for layer in modules]
    whole = measure(problem, asked, reuse=False)
    for handle in handles:
        handle.remove()
    assert ran[0] == len(problem.batches) * (3 + 2 + 3 + 3)
    assert torch.equal(whole.differences, measure(problem, asked).differences)


@pytest.mark.parametrize(
    "ranks, batches, plain_forwards", [(2, 1, 1), (2, 2, 1), (2, 3, 2), (4, 2, 1), (3, 5, 3), (1, 4, 4)]
)
def test_work_is_dealt_so_that_all_ranks_do_as_much_and_little_is_done_twice(ranks, batches, plain_forwards):
    """30 layers out once each: every probe on every micro-batch once; a rank takes part in as few micro-batches as it
    can, and its forwards run as many layers as those of any other, within a thirtieth."""
    backend = SimpleNamespace(num_ranks=ranks, shards_weights=False)
    problem = Problem(None, None, None, [{}] * batches, backend, None)
    dealt = probes._dealt(problem, [Probe(layer) for layer in range(30)])
    done = sorted((work.batch, index) for work in dealt for index in work.probes)
    assert done == [(batch, index) for batch in range(batches) for index in range(30)]
    assert sorted(work.batch for work in dealt if work.first) == list(range(batches))
    of_each = [dealt[rank::ranks] for rank in range(ranks)]
    assert {len(own) for own in of_each} == {plain_forwards}
    run = [sum(30 - index for work in own for index in work.probes) for own in of_each]
    assert max(run) <= min(run) * 31 / 30


# -- derivatives -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ALL)
def test_gate_gradients_are_sums_of_weight_times_gradient(in_float64, family: str):
    """d f / d gate of a unit is the sum of w * g over the weights it feeds: plain autograd, sequence by sequence."""
    problem = in_float64(family)
    groups = list(problem.anatomy.groups)
    found, _, counts = gate_gradients(problem, groups, [])
    column, row = 0, 0
    for batch in problem.batches:
        for row in range(len(batch["labels"])):
            one = {key: value[row : row + 1] for key, value in batch.items()}
            problem.model.zero_grad()
            plain.loss(problem.model, one, family).total.sum().backward()
            for group, values in zip(groups, found, strict=True):
                name = problem.anatomy.matrix_of(group.output)
                weight = problem.model.get_parameter(name.name)
                product = name.oriented((weight * weight.grad).detach()).sum(0)
                wanted = product.view(group.num_units, group.output_width).sum(1)
                torch.testing.assert_close(values[:, column], wanted, rtol=1e-5, atol=1e-7)
            column += 1
    assert column == len(counts)


@pytest.mark.parametrize("family", ALL)
def test_finite_differences_agree_with_backpropagation_to_their_theoretical_error(in_float64, family: str):
    """Central differences in float64: truncation step^2 f'''/6 and rounding 2^-52 f / step are both below 1e-7."""
    problem = in_float64(family, count=2)
    groups = [group for group in problem.anatomy.groups if group.layer != 1]
    gates = [*single_units(groups), Probe(0), Probe(2)]
    by_group, by_layer, counts = gate_gradients(problem, groups, [0, 2])
    exact = torch.cat([*by_group, by_layer])
    found = gate_derivatives(problem, gates)
    torch.testing.assert_close(found.slopes, exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(counts, found.counts) and exact.abs().max() > 1e-2 and found.kinked == []
    assert {(group.layer, group) for group in groups} | {(0, None), (2, None)} == found.steps.keys()
    assert all(step.value > 2**-30 and step.noise < 1e-11 for step in found.steps.values())


def test_central_differences_converge_with_the_square_of_the_step(in_float64):
    problem = in_float64("llama", count=1)
    _, exact, _ = gate_gradients(problem, [], [0, 1, 2])
    errors = [
        float((gate_derivatives(problem, [Probe(i) for i in range(3)], step=step).slopes - exact).abs().max())
        for step in (0.04, 0.02, 0.01)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2) and errors[1] / errors[2] == pytest.approx(4, rel=0.2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-classifier", "vit"])
def test_weight_gradients_are_those_of_plain_backward(settings, family: str):
    problem = settings(family)
    matrices = problem.anatomy.matrices
    sums, squares = (weight_gradients(problem, matrices, squares=flag) for flag in (False, True))
    wanted = {t.name: torch.zeros(2, *problem.model.get_parameter(t.name).shape).double() for t in matrices}
    for batch in problem.batches:
        problem.model.zero_grad()
        plain.loss(problem.model, batch, family).mean().backward()
        for matrix in matrices:
            grad = problem.model.get_parameter(matrix.name).grad.double()
            wanted[matrix.name] += torch.stack([grad, grad.square()])
    problem.model.zero_grad()
    for matrix in matrices:
        torch.testing.assert_close(sums.sum(matrix.name), wanted[matrix.name][0], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(squares.sum(matrix.name), wanted[matrix.name][1], rtol=1e-3, atol=1e-8)


# -- statistics of inputs ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("full", [False, True])
def test_input_moments_are_x_t_x_without_padding(settings, family: str, full: bool):
    problem = settings(family)
    found = input_moments(problem, problem.anatomy.matrices, full=full)
    for matrix in problem.anatomy.matrices:
        seen: list[torch.Tensor] = []
        handle = problem.model.get_submodule(matrix.module).register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0].detach().flatten(0, -2))
        )
        for batch in problem.batches:
            with torch.no_grad():
                problem.model(**model_inputs(batch))
            if "attention_mask" in batch:
                seen[-1] = seen[-1][batch["attention_mask"].flatten().bool()]
        handle.remove()
        rows = torch.cat(seen).double()
        wanted = rows.t() @ rows if full else rows.square().sum(0)
        torch.testing.assert_close(found.moments.sum(found.of(matrix)), wanted, rtol=1e-4, atol=1e-4)


def test_layers_that_read_the_same_tensor_share_one_sum(settings):
    problem = settings("llama")
    found = input_moments(problem, problem.anatomy.matrices, full=True)
    of = {matrix.module.removeprefix("model.layers.0."): found.of(matrix) for matrix in problem.anatomy.matrices}
    assert len(found.moments.names()) == 3 * 4  # q=k=v, o, gate=up, down of three layers
    assert of["self_attn.v_proj"] == of["self_attn.q_proj"]
    assert of["mlp.up_proj"] != of["self_attn.q_proj"]


@pytest.mark.parametrize("family", ALL)
def test_block_influence_is_the_cosine_of_input_and_output(settings, family: str):
    problem, pairs = settings(family), {}
    sums, tokens = block_influence(problem)
    wanted = torch.zeros(3, dtype=torch.float64)
    layers = problem.model.get_submodule(plain.LAYERS[family][0])
    for index, layer in enumerate(layers):

        def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any, index: int = index) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            pairs[index] = (hidden, output[0] if isinstance(output, tuple) else output)

        handle = layer.register_forward_hook(keep, with_kwargs=True)
        for batch in problem.batches:
            with torch.no_grad():
                problem.model(**model_inputs(batch))
            one, other = (side.double().flatten(0, -2) for side in pairs[index])
            cosine = (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))
            wanted[index] += (
                cosine[batch["attention_mask"].flatten().bool()] if "attention_mask" in batch else cosine
            ).sum()
        handle.remove()
    torch.testing.assert_close(sums, wanted, rtol=1e-4, atol=1e-4)
    real = [int(b["attention_mask"].sum()) if "attention_mask" in b else 2 * 5 for b in problem.batches]
    assert tokens.tolist() == [sum(real)] * 3


# -- no trace ----------------------------------------------------------------------------------------------------------
ESTIMATES: dict[str, Callable[[Problem], Any]] = {
    "removal": lambda s: measure(s, [Probe(0), Probe(1, s.anatomy.of_kind("channels")[1], (0,)), Probe(2, factor=0.5)]),
    "gate derivatives": lambda s: gate_derivatives(s, [Probe(0), Probe(2, s.anatomy.of_kind("channels")[2], (3,))]),
    "gate gradients": lambda s: gate_gradients(s, s.anatomy.groups, [0, 1]),
    "weight gradients": lambda s: weight_gradients(s, s.anatomy.matrices, squares=True),
    "input moments": lambda s: input_moments(s, s.anatomy.matrices, full=True),
    "block influence": block_influence,
}


def trace(model: nn.Module) -> dict[str, Any]:
    """Everything about a model and the process that an estimate could disturb."""
    return {
        "modules": {name: module for name, module in model.named_modules()},
        "dicts": {name: dict(module.__dict__) for name, module in model.named_modules()},
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        "training": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()],
        "parameters": [id(p) for p in model.parameters()],
        "config": model.config.to_dict(),
        "random": (torch.get_rng_state().tolist(), random.getstate()),
    }


def same_dicts(before: dict[str, dict], after: dict[str, dict]) -> bool:
    return before.keys() == after.keys() and all(
        before[name].keys() == after[name].keys()
        and all(value is after[name][key] or value == after[name][key] for key, value in before[name].items())
        for name in before
    )


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    weights, before = tiny.state_bytes(model), trace(model)
    yield
    after = trace(model)
    assert tiny.same_bits(weights, tiny.state_bytes(model))
    assert same_dicts(before.pop("dicts"), after.pop("dicts"))
    for what, value in before.items():
        assert value == after[what], what


def marked(family: str, backend, dtype: torch.dtype) -> Problem:
    """A model with odd flags: some frozen, some with gradients, some parts in training mode."""
    problem = tiny.problem(family, backend, model=tiny.build(family).to(dtype))
    parameters = list(problem.model.parameters())
    parameters[0].requires_grad_(False)
    parameters[3].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    problem.model.get_submodule(plain.LAYERS[family][0])[1].training = True
    return problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ESTIMATES)
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "bert-classifier"])
def test_an_estimate_leaves_no_trace(backend, family: str, name: str, dtype: torch.dtype):
    problem = marked(family, backend, dtype)
    with unchanged(problem.model):
        ESTIMATES[name](problem)


@pytest.mark.parametrize("name", ESTIMATES)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_nor_does_one_that_fails_midway(backend, name: str, at: int):
    """A forward that raises in the last layer must not leave hooks, missing layers or altered flags behind."""
    problem, calls = marked("llama", backend, torch.float32), iter(range(1, 1000))

    def boom(*_: Any) -> None:
        if next(calls) == at:
            raise MemoryError("as if out of memory")

    problem.model.model.layers[2].mlp.register_forward_pre_hook(boom)
    with unchanged(problem.model), pytest.raises(MemoryError):
        ESTIMATES[name](problem)


def test_estimates_work_under_accelerate_hooks_that_were_there_before(backend):
    """Offloading attaches hooks of its own; they must survive and keep working."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    calls = []

    class Counting(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
            calls.append(1)
            return args, kwargs

    plain_setting, problem = tiny.problem("llama", backend), tiny.problem("llama", backend)
    for layer in problem.model.model.layers:
        add_hook_to_module(layer, Counting())
        add_hook_to_module(layer.mlp.down_proj, Counting())
    for name, estimate in ESTIMATES.items():
        with unchanged(problem.model):
            estimate(problem)
        assert calls, name
    group = problem.anatomy.of_kind("channels")[1]
    asked = [Probe(1, group, (3,)), Probe(0)]
    wanted = measure(plain_setting, asked).differences
    assert torch.equal(measure(problem, asked).differences, wanted) and wanted.abs().max() > 0
