"""What removed units give on average goes into a bias: exact where they are constant, least squares with an intercept
else."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from tests import plain, tiny
from tests.removing import plan_mixes, remove_units
from tinygn_dist.backends.replicated import Replicated
from tinygn_dist.config import PruneConfig
from tinygn_dist.estimate.unit_moments import _beside_one, unit_moments
from tinygn_dist.maths.counts import Mix
from tinygn_dist.prune.structured.probing import UnitScores
from tinygn_dist.prune.structured.refit import RefitOptions, _about_mean, apply_mix, fit_jobs, with_bias
from tinygn_dist.prune.structured.shrink import smaller_config, smaller_origin
from tinygn_dist.prune.structured.trials import uncompensated

CONSTANT = list(range(3, 48, 3))  # 15 of 48 channels of every layer
READ_BY = {
    "bert-classifier": "intermediate.dense",
    "vit": "mlp.fc1",
    "opt": "fc1",
    "gpt2": "mlp.c_fc",
    "llama": "_proj",
}


@pytest.fixture(scope="module")
def backend() -> Replicated:
    return Replicated(Accelerator(cpu=True))


def with_constant_channels(family: str, backend: Replicated):
    """A model some of whose channels do not listen to their input: each is act(bias)."""
    model = tiny.build(family, **({"mlp_bias": True} if family == "llama" else {}))
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(READ_BY[family]) and getattr(module, "bias", None) is not None and "down" not in name:
                weight = module.weight if family != "gpt2" else module.weight.t()
                weight[CONSTANT] = 0
                module.bias[CONSTANT] = torch.linspace(1, 3, len(CONSTANT))
    return tiny.problem(family, backend, model=model, count=12, size=4, length=12)


def smaller(problem, kept, shifts) -> torch.nn.Module:
    config = smaller_config(problem.model.config, problem.anatomy, kept)
    origin = smaller_origin(
        lambda: type(problem.model)(config), problem.model, problem.anatomy, kept, problem.backend, shifts
    )
    return origin.take_whole().eval()


@pytest.mark.parametrize("family", READ_BY)
def test_constant_channels_leave_nothing_behind(family: str, backend: Replicated):
    """They are told to go, because channels that others can stand in for may be as cheap."""
    problem = with_constant_channels(family, backend)
    before = [plain.logits(problem.model, batch) for batch in problem.batches]
    groups = problem.anatomy.of_kind("channels")
    worth = torch.ones(48, dtype=torch.float64)
    worth[CONSTANT] = 0
    scores = UnitScores(by_group={("channels", group.layer): worth for group in groups})
    options, mix = PruneConfig(pattern="channels"), Mix(channels=len(CONSTANT))
    matrices = [problem.anatomy.matrix_of(group.output) for group in groups]
    biased = with_bias(problem, matrices)
    jobs = fit_jobs(problem, unit_moments(problem, matrices, biased), groups, biased, {})
    kept, shifts = apply_mix(problem, mix, scores, jobs, RefitOptions(True, options.damping, mix))
    with_shifts, without = smaller(problem, kept, shifts), smaller(problem, kept, {})
    for batch, dense in zip(problem.batches, before, strict=True):
        near = 1e-5 * float(dense.abs().max())
        torch.testing.assert_close(plain.logits(with_shifts, batch), dense, rtol=1e-4, atol=near)
        assert float((plain.logits(without, batch) - dense).abs().max()) > 100 * near
    assert uncompensated(problem, mix, kept) == []


def test_large_constants_do_not_drown_what_varies():
    """Three inputs near 100 with deviations of 1e-3, of which fp32 products would leave nothing; against fp64,
    weighted."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4000, 8, generator=generator)
    inputs[:, :3] = 100 + 1e-3 * inputs[:, :3]
    weights = torch.rand(4000, generator=generator)
    centred, mean = _about_mean(_beside_one(inputs[:2500], weights[:2500]) + _beside_one(inputs[2500:], weights[2500:]))
    wanted_mean = weights.double() @ inputs.double() / weights.double().sum()
    apart = (inputs.double() - wanted_mean) * weights.double().sqrt()[:, None]
    wanted = apart.t() @ apart
    torch.testing.assert_close(mean, wanted_mean, rtol=1e-9, atol=1e-7)
    size = wanted.diagonal().sqrt()
    assert float(((centred.double() - wanted) / torch.outer(size, size)).abs().max()) < 1e-4
    assert float(torch.linalg.eigvalsh(centred.double()).min()) > 0


def test_weight_and_bias_are_the_least_squares_fit_with_an_intercept(backend: Replicated):
    """Of the first layer, whose inputs nothing changed: torch.linalg.lstsq on the inputs and a column of ones, every
    token divided by the root mean square of what its layer gives; padding left out."""
    problem, seen = tiny.problem("opt", backend, count=12, size=4, length=12), {}
    layer = problem.model.model.decoder.layers[0]
    handles = [
        layer.fc2.register_forward_pre_hook(lambda _, args: seen.setdefault("inputs", []).append(args[0])),
        layer.register_forward_hook(lambda *a: seen.setdefault("stream", []).append(plain.hidden(a[2]))),
    ]
    for batch in problem.batches:
        plain.logits(problem.model, batch)
    for handle in handles:
        handle.remove()
    real = torch.cat([batch["attention_mask"].flatten() for batch in problem.batches]).bool()
    inputs, stream = (torch.cat([t.flatten(0, -2) for t in seen[key]])[real].double() for key in ("inputs", "stream"))
    weight, bias = layer.fc2.weight.detach().double(), layer.fc2.bias.detach().double()

    options = PruneConfig(pattern="channels", counts={"channels": 9}, damping=1e-6)
    kept, _, _, shifts, _ = remove_units(problem, plan_mixes(problem.anatomy, options), options)
    columns = torch.cat([inputs[:, list(kept.channels[0])], torch.ones(len(inputs), 1).double()], 1)
    share = 1 / stream.square().mean(1, keepdim=True).sqrt()
    alive = columns.abs().sum(0) > 0
    wanted = torch.linalg.lstsq(columns[:, alive] * share, (inputs @ weight.t() + bias) * share).solution.t()
    found = torch.cat(
        [
            layer.fc2.weight.detach()[:, list(kept.channels[0])],
            (layer.fc2.bias + shifts["model.decoder.layers.0.fc2.bias"]).detach()[:, None],
        ],
        1,
    ).double()
    torch.testing.assert_close(found[:, alive], wanted, rtol=1e-2, atol=2e-3 * float(wanted.abs().max()))
    apart = columns @ found.t() - inputs @ weight.t() - bias
    best = columns[:, alive] @ wanted.t() - inputs @ weight.t() - bias
    assert float((apart * share).square().sum()) == pytest.approx(float((best * share).square().sum()), rel=1e-3)


@pytest.mark.parametrize("compensate", [True, False])
def test_where_there_is_no_bias_the_report_says_so(backend: Replicated, compensate: bool):
    problem = tiny.problem("llama", backend)
    options = PruneConfig(pattern="channels", counts={"channels": 8}, compensate=compensate)
    *_, shifts, notes = remove_units(problem, plan_mixes(problem.anatomy, options), options)
    assert shifts == {} and ("down_proj has no bias" in " ".join(notes)) == compensate
