"""Every criterion against its formula written a second time, in plain loops or numpy."""

import numpy as np
import pytest
import torch

from tinygn_dist.maths import criteria
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


def test_ratio_mean_against_numpy_and_a_known_case():
    draw = np.random.default_rng(0)
    differences, counts = draw.normal(size=(4, 9)), draw.integers(1, 30, 9).astype(float)
    mean, error = criteria.ratio_mean(torch.tensor(differences), torch.tensor(counts))
    ratio = differences.sum(1) / counts.sum()
    residual = differences - ratio[:, None] * counts
    wanted = np.sqrt(9 * (residual**2).sum(1) / 8) / counts.sum()
    np.testing.assert_allclose(mean.numpy(), ratio)
    np.testing.assert_allclose(error.numpy(), wanted)
    equal, error = criteria.ratio_mean(torch.tensor([[1.0, 3.0]]).double(), torch.tensor([1.0, 1.0]).double())
    assert equal.item() == 2 and error.item() == pytest.approx(np.std([1, 3], ddof=1) / np.sqrt(2))


def test_ratio_mean_error_is_what_resampling_shows():
    draw = np.random.default_rng(1)
    counts = draw.integers(5, 50, (2000, 40)).astype(float)
    differences = 0.3 * counts + draw.normal(size=counts.shape) * 4
    found = [
        criteria.ratio_mean(torch.tensor(d)[None], torch.tensor(c)) for d, c in zip(differences, counts, strict=True)
    ]
    spread = np.std([m.item() for m, _ in found])
    assert np.mean([e.item() for _, e in found]) == pytest.approx(spread, rel=0.1)


def test_one_sequence_has_no_known_error():
    mean, error = criteria.ratio_mean(torch.tensor([[6.0]]).double(), torch.tensor([3.0]).double())
    assert mean.item() == 2 and error.item() == float("inf")


def test_warmup_then_decay():
    factors = [warmup_linear(step, 20) for step in range(20)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[2:] == pytest.approx([(20 - s) / 18 for s in range(2, 20)])
    assert warmup_linear(0, 1) > 0 and all(0 < f <= 1 for f in factors)


def test_paired_differences_are_those_of_the_differences():
    draw = torch.Generator().manual_seed(0)
    seen, counts = torch.randn(4, 9, generator=draw).double(), torch.randint(1, 20, (9,), generator=draw).double()
    apart, error = criteria.paired(seen, counts)
    for a in range(4):
        mean, deviation = criteria.ratio_mean(seen - seen[a], counts)
        torch.testing.assert_close(apart[a], mean)
        torch.testing.assert_close(error[a], deviation)
    assert criteria.paired(seen[:, :1], counts[:1])[1].isinf().all()


@pytest.mark.parametrize(
    "freedom, t, normal, error", [(1, 6.3138, 1.6449, 0.05), (4, 2.7764, 1.96, 0.005), (9, -1.8331, -1.6449, 0.002)]
)
def test_t_as_a_normal_deviate_is_that_of_the_tables(freedom: int, t: float, normal: float, error: float):
    assert float(criteria.normal_of_t(torch.tensor(t), freedom)) == pytest.approx(normal, rel=error)
    assert criteria.normal_of_t(torch.tensor(t), 0) == 0 and criteria.normal_of_t(torch.tensor(torch.inf), 3).isinf()
