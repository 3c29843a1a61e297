"""Every criterion against its formula written a second time, in plain loops or numpy."""

import inspect

import numpy as np
import pytest
import torch

from tinygn_dist.maths import criteria
from tinygn_dist.maths.criteria import CRITERIA, STATISTICS
from tinygn_dist.maths.schedules import warmup_linear


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(0))


def test_magnitude_and_wanda(weight: torch.Tensor):
    inputs = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    norms = [sum(float(x) ** 2 for x in inputs[:, j]) ** 0.5 for j in range(5)]
    wanted = [[abs(float(weight[i, j])) * norms[j] for j in range(5)] for i in range(3)]
    assert torch.equal(criteria.magnitude(weight.bfloat16()), weight.bfloat16().float().abs())
    torch.testing.assert_close(criteria.wanda(weight, inputs.square().sum(0)), torch.tensor(wanted))


def test_ria_and_gblm(weight: torch.Tensor):
    generator = torch.Generator().manual_seed(1)
    inputs, grads = torch.randn(7, 5, generator=generator), torch.randn(4, 3, 5, generator=generator)
    w, x, g = np.abs(weight.double().numpy()), inputs.double().numpy(), grads.double().numpy()
    norms = np.sqrt((x**2).sum(0))
    relative = np.array([[w[i, j] / w[i].sum() + w[i, j] / w[:, j].sum() for j in range(5)] for i in range(3)])
    energy = inputs.square().sum(0)
    np.testing.assert_allclose(criteria.ria(weight, energy).numpy(), relative * np.sqrt(norms), rtol=1e-5)
    wanted = w * (norms + 100 * np.sqrt((g**2).sum(0)))
    np.testing.assert_allclose(criteria.gblm(weight, energy, grads.square().sum(0)).numpy(), wanted, rtol=1e-5)


def test_taylor_and_fisher(weight: torch.Tensor):
    grads = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(2))
    w, g = weight.double().numpy(), grads.double().numpy()
    np.testing.assert_allclose(
        criteria.taylor(weight, grads.sum(0)).numpy(), np.abs(w * g.sum(0)), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        criteria.fisher(weight, grads.square().sum(0)).numpy(), w**2 * (g**2).sum(0) / 2, rtol=1e-5
    )


def test_column_energy_is_the_energy_of_the_outer_product(weight: torch.Tensor):
    inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    wanted = [float((inputs[:, j, None] * weight[None, :, j]).square().sum()) for j in range(5)]
    torch.testing.assert_close(criteria.column_energy(weight, inputs.square().sum(0)), torch.tensor(wanted))


def test_unit_sums_and_block_influence():
    assert criteria.unit_sums(torch.arange(6.0), 2).tolist() == [1.0, 5.0, 9.0]
    assert criteria.block_influence(torch.tensor([8.0, 2.0]), torch.tensor(10.0)).tolist() == pytest.approx([0.2, 0.8])


def test_second_order_is_exact_for_a_quadratic_with_that_curvature():
    """Sequence losses l_s(gate) = a_s (gate - 1) + a_s^2 (gate - 1)^2 / 2: at gate 0 the change is -a_s + a_s^2 / 2."""
    slopes, counts = torch.tensor([[0.5, -2.0, 1.0]], dtype=torch.float64), torch.tensor([3.0, 5.0, 2.0])
    wanted = sum(-a + a * a / 2 for a in (0.5, -2.0, 1.0)) / 10
    assert criteria.second_order(slopes, counts).item() == pytest.approx(wanted, abs=1e-12)


def test_warmup_then_decay():
    factors = [warmup_linear(step, 20) for step in range(20)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[2:] == pytest.approx([(20 - s) / 18 for s in range(2, 20)])
    assert warmup_linear(0, 1) > 0 and all(0 < f <= 1 for f in factors)


def test_kfac_is_the_fisher_of_inputs_and_gradients_that_do_not_know_of_each_other(weight: torch.Tensor):
    """Over all pairs of an input and a gradient the mean of (dy x)^2 is what the factors say."""
    generator = torch.Generator().manual_seed(3)
    inputs, grads = torch.randn(4, 5, generator=generator), torch.randn(6, 3, generator=generator)
    pairs = torch.stack([(torch.outer(dy, x) * weight).square() for dy in grads for x in inputs])
    found = criteria.kfac(weight, inputs.square().sum(0), grads.square().sum(0)[:, None])
    torch.testing.assert_close(found, pairs.sum(0) / 2)


@pytest.mark.parametrize("name", [name for name, row in CRITERIA.items() if row.formula])
def test_a_row_asks_for_the_arguments_of_its_formula(name: str, weight: torch.Tensor):
    row = CRITERIA[name]
    asked = {need: torch.rand(3, 5) if STATISTICS[need].per == "weight" else torch.rand(5) for need in row.needs}
    asked |= {need: torch.rand(3, 1) for need in row.needs if STATISTICS[need].per == "output"}
    assert list(inspect.signature(row.formula).parameters)[1 : 1 + len(asked)] == list(asked)
    found = row.formula(weight.bfloat16(), **asked)
    assert found.shape == weight.shape and found.dtype == torch.float32 and bool((found >= 0).all())
    assert (found == 0).sum() < found.numel() and row.scope in ("row", "layer")
