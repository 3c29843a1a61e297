"""Random directions in the space of weights: signs, slopes, exact restores, and the optimizers over them."""

from __future__ import annotations

import copy
import functools
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests import tiny
from tinygn_dist.config import RecoverConfig
from tinygn_dist.maths.counter_rng import hash64, key_of, signs
from tinygn_dist.models.anatomy import Matrix
from tinygn_dist.models.objective import Losses
from tinygn_dist.train.forward_only.loop import ForwardOnly
from tinygn_dist.train.forward_only.update_rules import ZerothOrder
from tinygn_dist.train.forward_only.weight_probes import WeightProbes

TARGET = Matrix("weight", "", 0, (8, 16), 1)


class Quadratic(nn.Module):
    """weight (8, 16); its loss is g.w + w.D w / 2 with known g and diagonal D."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, 16, generator=draw, dtype=torch.float64))
        self.g = torch.randn(8, 16, generator=draw, dtype=torch.float64)
        self.d = torch.rand(8, 16, generator=draw, dtype=torch.float64)


def loss(model: Quadratic, batch: dict) -> Losses:
    value = (model.g * model.weight + model.d * model.weight.square() / 2).sum()
    return Losses(3 * value[None], torch.tensor([3]))


BATCH = [{"x": torch.zeros(1)}]


# -- signs -------------------------------------------------------------------------------------------------------------
def test_signs_are_the_bits_of_the_hash():
    key, found = key_of(0, "w"), signs(0, 1000, key_of(0, "w")).tolist()
    words = [value & ((1 << 64) - 1) for value in hash64(torch.arange(16), key).tolist()]
    assert found == [1.0 if words[i // 64] >> (i % 64) & 1 else -1.0 for i in range(1000)]


@pytest.mark.parametrize("cuts", [(1,), (63, 64, 65), (100, 500, 501), (64, 128), (999,)])
def test_signs_are_the_same_whatever_the_shard_boundaries(cuts: tuple[int, ...]):
    edges = [0, *cuts, 1000]
    parts = [signs(a, b, 7) for a, b in zip(edges, edges[1:], strict=False)]
    assert torch.equal(torch.cat(parts), signs(0, 1000, 7)) and signs(5, 5, 7).numel() == 0


def test_signs_are_balanced_and_uncorrelated():
    """z-tests at 5 sigma: mean, neighbours at many distances (within and between words), other directions, bit
    places."""
    n = 1 << 20
    one, other = signs(0, n, key_of(0, "0/a")), signs(0, n, key_of(0, "1/a"))
    bound = 5 / math.sqrt(n)
    assert one.mean().abs() < bound and (one * other).mean().abs() < bound
    for lag in (1, 2, 7, 8, 63, 64, 65, 128, 4096):
        assert (one[lag:] * one[:-lag]).mean().abs() < bound * 1.01, lag
    assert one.view(-1, 64).mean(0).abs().max() < 5 / math.sqrt(n / 64)
    transformed = torch.fft.rfft(one).abs().square() / n  # the spectrum of white noise is flat
    assert transformed[1:].max() < 2 * math.log(n)


# -- slopes ------------------------------------------------------------------------------------------------------------
def test_slopes_are_those_of_the_quadratic(backend):
    """phi(t) = f(w + t rms z): phi'(0) = rms * grad.z exactly, since central differences are exact on quadratics."""
    model = Quadratic()
    probes = WeightProbes(model, [TARGET], {}, backend, seed=3)
    rms = float(model.weight.detach().square().mean().sqrt())
    seen = probes.slopes(loss, [BATCH] * 5, first=10, step=0.01)
    gradient = (model.g + model.d * model.weight.detach()) * rms
    wanted = [float((gradient * probes.signs(TARGET, number)).sum()) for number in range(10, 15)]
    assert seen.slopes.tolist() == pytest.approx(wanted, rel=1e-9) and seen.tokens == 15
    totals, counts = probes.losses(loss, BATCH, 10, [0.0])
    assert totals.tolist() == [[pytest.approx(loss(model, {}).total.item())]] and counts.tolist() == [3]


def test_only_kept_weights_move(backend):
    model, keep = Quadratic(), torch.rand(8, 16, generator=torch.Generator().manual_seed(1)) < 0.3
    with torch.no_grad():
        model.weight.masked_fill_(~keep, 0)
    probes = WeightProbes(model, [TARGET], {"weight": keep}, backend, seed=0)
    assert probes.scales["weight"] == pytest.approx(float(model.weight.detach()[keep].square().mean().sqrt()))
    with probes.along(0) as move:
        move(0.1)
        moved = model.weight.detach().clone()
    assert (moved[~keep] == 0).all() and ((moved - model.weight.detach())[keep].abs() > 0).all()


def test_the_estimate_has_the_bias_and_variance_of_the_formulas():
    """Mean of K Rademacher estimates: unbiased, relative squared error (d - 1) / K, variance per entry
    (|g|^2 - g_i^2) / K (methods of SPSA; noiseless and linear)."""
    size, count, repeats = 64, 8, 4000
    g = torch.linspace(-1, 1, size).double()
    z = signs(0, size * count * repeats, key_of(0, "w")).double().view(-1, size)
    estimates = ((z @ g)[:, None] * z).view(repeats, count, size).mean(1)
    errors = (estimates - g).square().sum(1).mean() / g.square().sum()
    assert float(errors) == pytest.approx((size - 1) / count, rel=0.05)
    variance, wanted = estimates.var(0), (g.square().sum() - g.square()) / count
    torch.testing.assert_close(variance, wanted, rtol=0.15, atol=0)
    assert ((estimates.mean(0) - g) / (wanted / repeats).sqrt()).abs().max() < 4.5


def test_ten_thousand_probes_leave_every_bit(backend):
    model = nn.Linear(16, 8, bias=False).bfloat16()
    before = model.weight.detach().clone()
    probes = WeightProbes(model, [TARGET], {}, backend, seed=0)
    for number in range(10_000):
        with probes.along(number) as move:
            move(0.02)
    assert not torch.equal(before, before + 0.02 * probes.scales["weight"])
    assert torch.equal(before.view(torch.uint8), model.weight.detach().view(torch.uint8))


def test_a_probe_that_fails_restores_too(backend):
    problem = tiny.problem("llama", backend)
    weights = tiny.state_bytes(problem.model)
    probes = WeightProbes(problem.model, problem.anatomy.matrices, {}, backend, 0)
    with pytest.raises(MemoryError), probes.along(0) as move:
        move(0.1)
        assert not tiny.same_bits(weights, tiny.state_bytes(problem.model))
        raise MemoryError("as if out of memory")
    assert tiny.same_bits(weights, tiny.state_bytes(problem.model))


# -- optimizers --------------------------------------------------------------------------------------------------------
def reference(rule: str, gradients: list[torch.Tensor], rate: float) -> list[torch.Tensor]:
    """torch's own optimizers on given gradients: the changes of each step."""
    weight = nn.Parameter(torch.zeros_like(gradients[0]))
    made = {
        "zo-sgd": lambda: torch.optim.SGD([weight], lr=rate),
        "zo-nesterov": lambda: torch.optim.SGD([weight], lr=rate, momentum=0.9, nesterov=True),
        "zo-adam": lambda: torch.optim.Adam([weight], lr=rate, betas=(0.9, 0.95), eps=1e-12),
    }[rule]()
    changes = []
    for gradient in gradients:
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        made.step()
        changes.append(weight.detach() - before)
    return changes


def of_key(name: str, direction: int) -> torch.Tensor:
    return signs(0, 100, key_of(0, f"{direction}/{name}")).view(10, 10)


@pytest.mark.parametrize("rule", ["zo-sgd", "zo-nesterov", "zo-adam"])
def test_the_rules_are_those_of_torch(rule: str):
    slopes = [[0.5, -1.0], [0.2, 0.3], [5.0, -0.1], [0.0, 0.4]]
    clipped = [[min(max(c, -1), 1) for c in pair] for pair in slopes]
    gradients = [sum(c * of_key("w", 2 * i + k) for k, c in enumerate(pair)) / 2 for i, pair in enumerate(clipped)]
    optimizer = ZerothOrder(rule, ["w"], of_key, clip=1.0)
    for i, wanted in enumerate(reference(rule, gradients, 0.1)):
        found = optimizer.step(2 * i, slopes[i], 0.1)["w"]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["zo-sgd", "zo-nesterov", "zo-adam"])
def test_a_history_of_numbers_resumes_bit_for_bit(rule: str):
    draw = torch.Generator().manual_seed(0)
    slopes = torch.randn(12, 3, generator=draw).tolist()
    whole, half = ZerothOrder(rule, ["a", "b"], of_key, 2.0), ZerothOrder(rule, ["a", "b"], of_key, 2.0)
    changes = [whole.step(3 * i, pair, 0.1) for i, pair in enumerate(slopes)]
    for i, pair in enumerate(slopes[:6]):
        half.step(3 * i, pair, 0.1)
    resumed = ZerothOrder(rule, ["a", "b"], of_key, 2.0)
    resumed.load_state_dict(half.state_dict())
    for i, pair in enumerate(slopes[6:], 6):
        again = resumed.step(3 * i, pair, 0.1)
        assert all(torch.equal(again[name], changes[i][name]) for name in "ab")


# -- the whole training ------------------------------------------------------------------------------------------------
@functools.cache
def trained() -> tuple[nn.Module, list[dict]]:
    """A tiny model that has learnt an arithmetic rule (the next token is 5 times the last plus 3 mod 61, one in ten at
    random), and 48 sequences of it."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(61, (48, 24), generator=draw)
    for place in range(1, 24):
        odd = torch.rand(48, generator=draw) < 0.1
        ids[:, place] = torch.where(odd, ids[:, place], (5 * ids[:, place - 1] + 3) % 61)
    model = tiny.build("llama").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), [{"input_ids": row[None], "labels": row[None]} for row in ids]


def pruned(backend) -> tuple:
    """The trained model without the smaller three quarters of each matrix's weights, the masks, and its sequences."""
    model, rows = trained()
    problem, keep = replace(tiny.problem("llama", backend, model=copy.deepcopy(model)), batches=rows), {}
    with torch.no_grad():
        for matrix in problem.anatomy.matrices:
            weight = problem.model.get_parameter(matrix.name)
            keep[matrix.name] = weight.abs() > weight.abs().quantile(0.75)
            weight.masked_fill_(~keep[matrix.name], 0)
    return problem, keep


def mean_loss(training: ForwardOnly, batches: list) -> float:
    totals, counts = training.probes.losses(training.objective, batches, -1, [0.0])
    return float(totals.sum() / counts.sum())


@pytest.mark.parametrize("rule", ["zo-sgd", "zo-nesterov", "zo-adam"])
def test_descent_at_measured_step_and_rate_lowers_the_loss_and_keeps_zeros(backend, rule: str):
    problem, keep = pruned(backend)
    options = RecoverConfig(optimizer=rule, directions=8, batch_size=8, clip_norm=100.0)
    training = ForwardOnly(problem.model, problem.anatomy.matrices, keep, problem.objective, options, backend)
    seen, held_out = problem.batches[:32], problem.batches[32:]
    before = mean_loss(training, held_out)
    for number in range(60):
        training.step(seen[8 * (number % 4) :][:8], number, 1.0)
    assert mean_loss(training, held_out) < before - 0.05
    for matrix in problem.anatomy.matrices:
        assert torch.equal(problem.model.get_parameter(matrix.name) != 0, keep[matrix.name])
    assert 2**-15 < training.step_taken.value < 2**-3


def test_norms_and_biases_move_alone(backend):
    problem, keep = pruned(backend)
    before = {name: p.detach().clone() for name, p in problem.model.named_parameters()}
    options = RecoverConfig(
        optimizer="zo-sgd", directions=2, batch_size=2, learning_rate=1e-3, probe_step=2**-8, train="norms-and-biases"
    )
    training = ForwardOnly(problem.model, problem.anatomy.matrices, keep, problem.objective, options, backend)
    training.step(problem.batches[:2], 0, 1.0)
    for name, p in problem.model.named_parameters():
        assert bool((p.detach() != before[name]).any()) == (p.dim() == 1), name


class Noisy(nn.Module):
    """A loss that is quadratic in weight (1, 64): each sequence has the gradient g + its own noise at the start, and
    the same Hessian, 50 times the identity."""

    def __init__(self, g: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 64, dtype=torch.float64))
        self.g = g


def noisy_loss(model: Noisy, batch: dict) -> Losses:
    away = model.weight - 1
    value = 5 + model.g * away.sum() + (batch["noise"] * away).sum() + 50 * away.square().sum() / 2
    return Losses(value[None], torch.tensor([1]))


def descended(backend, g: float, noise: float, seed: int, steps: int) -> ForwardOnly:
    """Sequences in pairs of opposite noise, so that g is the gradient of all of them together."""
    draw = torch.Generator().manual_seed(seed)
    each = [noise * torch.randn(1, 64, generator=draw, dtype=torch.float64) for _ in range(64)]
    options = RecoverConfig(optimizer="zo-sgd", directions=8, batch_size=16, probe_step=2**-6, clip_norm=1e9)
    matrix = Matrix("weight", "", 0, (1, 64), 1)
    training = ForwardOnly(Noisy(g), [matrix], {}, noisy_loss, options, backend)
    for number in range(steps):
        pairs = [each[(8 * number + i) % 64] for i in range(8)]
        training.step([{"noise": sign * one} for one in pairs for sign in (1, -1)], number, 1.0)
    return training


def test_the_measured_rate_is_shrunk_by_the_noise_of_sequences(backend):
    """|g|^2 = 16; a direction sees two sequences, so |n|^2 = 64 / 2 and a quarter to a half of K / tr H is best. Half
    of that is taken, and one standard error of the slope less."""
    best = 8 / (64 * 50) * 16 / (16 + 32)
    rates = [descended(backend, 0.5, 1.0, seed, 12).rate for seed in range(6)]
    assert 0.2 * best < min(rates) and max(rates) < best and 0.3 * best < sum(rates) / 6 < 0.7 * best


def test_where_there_is_no_slope_nothing_moves_far(backend):
    """Without a gradient at most one look in six should be fooled, and then by less than its noise."""
    moved = []
    for seed in range(6):
        training = descended(backend, 0.0, 1.0, seed, 6)
        moved.append(float((training.model.weight.detach() - 1).square().mean().sqrt()))
    assert sorted(moved)[3] == 0.0 and max(moved) < 0.02


def test_a_state_of_numbers_resumes_bit_for_bit(backend):
    """Through the search for the rate (stopped while gathering and while looking) and past it."""

    def run(stops: list[int]) -> torch.Tensor:
        torch_model, state = None, None
        for start, stop in zip([0, *stops], [*stops, 14], strict=True):
            problem, keep = pruned(backend)
            if torch_model is not None:
                problem.model.load_state_dict(torch_model, strict=False)  # buffers that no checkpoint has
            options = RecoverConfig(optimizer="zo-adam", directions=4, batch_size=4, probe_step=2**-8)
            training = ForwardOnly(problem.model, problem.anatomy.matrices, keep, problem.objective, options, backend)
            if state is not None:
                training.load_state_dict(json.loads(json.dumps(state)))
            for number in range(start, stop):
                training.step(problem.batches[4 * (number % 4) :][:4], number, 1.0)
            torch_model, state = tiny.state_bytes(problem.model), training.state_dict()
        return torch_model

    whole = run([])
    assert tiny.same_bits(whole, run([5, 10]))
    assert not tiny.same_bits(whole, tiny.state_bytes(pruned(backend)[0].model))
