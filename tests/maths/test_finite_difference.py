"""Measured steps of finite differences: noise, bending and the step against functions whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from benchmarks import step_sizes
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.gates import check_step
from tinygn_dist.maths import finite_difference

FP64 = 2.0**-52


def noisy(coefficients: tuple[float, ...], sigma: float, seed: int) -> Callable[[list[float]], list[float]]:
    """The polynomial sum_k c_k t^k / k!, with Gaussian noise that is the same whenever t is."""
    draw, known = np.random.default_rng(seed), {}

    def phi(steps: list[float]) -> list[float]:
        for t in steps:
            known.setdefault(t, draw.normal() * sigma)
        return [sum(c * t**k / math.factorial(k) for k, c in enumerate(coefficients)) + known[t] for t in steps]

    return phi


# -- noise -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sigma", [1e-12, 1e-7, 1e-3])
def test_the_noise_of_a_smooth_function_is_found(sigma: float):
    """Seven points tell sigma within a factor 4 in 19 cases of 20, and without bias in the middle."""
    found = []
    for seed in range(200):
        spacing = 10 * sigma
        values = noisy((3.0, 0.2, 0.5, 1.0), sigma, seed)([spacing * i for i in range(7)])
        level, status = finite_difference.noise_level(values)
        assert status == "found" or level is not None
        found.append(level)
    assert sigma / 1.3 < np.median(found) < sigma * 1.3
    assert np.mean([sigma / 4 < level < sigma * 4 for level in found]) > 0.95


def test_gamma_makes_every_level_an_estimate_of_sigma():
    """E[T_k^2] = binom(2k, k) sigma^2, and (k!)^2 / (2k)! undoes it: pure noise is accepted at once."""
    values = np.random.default_rng(3).normal(5.0, 1e-4, 1501).tolist()
    level, status = finite_difference.noise_level(values)
    assert status == "found" and level == pytest.approx(1e-4, rel=0.05)


def test_spacings_that_say_nothing_are_named():
    assert finite_difference.noise_level([3.0] * 5 + [3.1, 3.0]) == (None, "too small")
    assert finite_difference.noise_level([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]) == (None, "too large")


# -- the step ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheme", ["forward", "central"])
@pytest.mark.parametrize("noise,bend", [(1e-7, 1.0), (1e-3, 20.0)])
def test_the_formula_is_where_the_error_is_least(scheme: str, noise: float, bend: float):
    best = finite_difference.optimal(scheme, noise, bend)
    error = finite_difference.expected_error(scheme, best, noise, bend)
    assert all(finite_difference.expected_error(scheme, best * f, noise, bend) > error for f in (0.9, 1.1))
    wanted = 2**0.25 * math.sqrt(noise * bend) if scheme == "forward" else 0.6005 * (noise**2 * bend) ** (1 / 3)
    assert error == pytest.approx(wanted, rel=1e-2)


@pytest.mark.parametrize("scheme", ["forward", "central"])
@pytest.mark.parametrize("sigma", [1e-14, 1e-7, 1e-5])
@pytest.mark.parametrize("bend", [0.1, 1.0, 50.0])
def test_a_measured_step_is_nearly_as_good_as_the_best(scheme: str, sigma: float, bend: float):
    """Median of the true RMS error over 40 draws of the noise within twice the least, nine in ten within 5 times."""
    best = finite_difference.optimal(scheme, sigma, bend)
    least = finite_difference.expected_error(scheme, min(best, finite_difference.LARGEST), sigma, bend)
    errors = []
    for seed in range(40):
        step = finite_difference.run(finite_difference.search(scheme, FP64), noisy((3.0, 0.3, bend, bend), sigma, seed))
        errors.append(finite_difference.expected_error(scheme, step.value, sigma, bend) / least)
        assert math.frexp(step.value)[0] == 0.5, "not a power of two"
    assert np.median(errors) < 2 and np.quantile(errors, 0.9) < 5


@pytest.mark.parametrize("dtype", step_sizes.DTYPES.values())
@pytest.mark.parametrize("scheme", ["forward", "central"])
@pytest.mark.parametrize("name", step_sizes.FUNCTIONS)
def test_closed_forms_reach_nearly_the_least_error_their_dtype_allows(name: str, scheme: str, dtype: torch.dtype):
    """Rounding is real here, and steps move weights. A quadratic has no third derivative: any central step is without
    bias, so the measured one is within the reach of the search, not at the largest."""
    _, error, least, _ = step_sizes.row(name, dtype, scheme, directions=8)
    assert error < (8 if (name, scheme) == ("quadratic", "central") else 2.5) * least


def test_where_nothing_bends_the_step_is_as_large_as_noise_lets_one_know():
    step = finite_difference.run(finite_difference.search("forward", FP64), noisy((3.0, 0.3), 1e-6, 0))
    assert step.value >= 2.0**-6


def test_a_step_stays_where_the_function_is_near_its_value():
    """exp(40 t) changes by a tenth within t = 0.0024; noise alone would ask for 0.006."""
    phi = noisy(tuple(40.0**k for k in range(12)), 5e-3, 0)
    step = finite_difference.run(finite_difference.search("central", FP64), phi)
    assert step.limit == "non-linearity" and 40 * step.value < 0.13 < 40 * finite_difference.optimal(
        "central", 5e-3, 40.0**3
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_step_below_what_the_dtype_sees(dtype: torch.dtype):
    resolution = torch.finfo(dtype).eps
    step = finite_difference.run(finite_difference.search("forward", resolution), noisy((3.0, 0.1, 1e8), 1e-14, 0))
    assert step.value >= resolution
    assert float(torch.tensor(1 + step.value).to(dtype)) == 1 + step.value
    assert float(torch.tensor(1 - step.value).to(dtype)) == 1 - step.value


# -- a step of the user's ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "step,dtype,better", [(0.001, torch.bfloat16, 2**-7), (1e-9, torch.float32, 2**-23), (0.011, torch.bfloat16, 2**-7)]
)
def test_a_step_the_dtype_cannot_see_is_refused_with_one_it_can(step: float, dtype: torch.dtype, better: float):
    with pytest.raises(UserError, match="accepted: at least") as told:
        check_step(step, dtype)
    assert f"such as {better:g};" in str(told.value)
    check_step(better, dtype)


def test_a_step_the_dtype_sees_is_taken():
    check_step(0.01, torch.float32)
    check_step(1e-9, torch.float64)
