"""Means over sequences and their errors against numpy, resampling and tables."""

import numpy as np
import pytest
import torch

from tinygn_dist.maths import confidence


def test_ratio_mean_against_numpy_and_a_known_case():
    draw = np.random.default_rng(0)
    differences, counts = draw.normal(size=(4, 9)), draw.integers(1, 30, 9).astype(float)
    mean, error = confidence.ratio_mean(torch.tensor(differences), torch.tensor(counts))
    ratio = differences.sum(1) / counts.sum()
    residual = differences - ratio[:, None] * counts
    wanted = np.sqrt(9 * (residual**2).sum(1) / 8) / counts.sum()
    np.testing.assert_allclose(mean.numpy(), ratio)
    np.testing.assert_allclose(error.numpy(), wanted)
    equal, error = confidence.ratio_mean(torch.tensor([[1.0, 3.0]]).double(), torch.tensor([1.0, 1.0]).double())
    assert equal.item() == 2 and error.item() == pytest.approx(np.std([1, 3], ddof=1) / np.sqrt(2))


def test_ratio_mean_error_is_what_resampling_shows():
    draw = np.random.default_rng(1)
    counts = draw.integers(5, 50, (2000, 40)).astype(float)
    differences = 0.3 * counts + draw.normal(size=counts.shape) * 4
    found = [
        confidence.ratio_mean(torch.tensor(d)[None], torch.tensor(c)) for d, c in zip(differences, counts, strict=True)
    ]
    spread = np.std([m.item() for m, _ in found])
    assert np.mean([e.item() for _, e in found]) == pytest.approx(spread, rel=0.1)


def test_one_sequence_has_no_known_error():
    mean, error = confidence.ratio_mean(torch.tensor([[6.0]]).double(), torch.tensor([3.0]).double())
    assert mean.item() == 2 and error.item() == float("inf")


def test_paired_differences_are_those_of_the_differences():
    draw = torch.Generator().manual_seed(0)
    seen, counts = torch.randn(4, 9, generator=draw).double(), torch.randint(1, 20, (9,), generator=draw).double()
    apart, error = confidence.paired(seen, counts)
    for a in range(4):
        mean, deviation = confidence.ratio_mean(seen - seen[a], counts)
        torch.testing.assert_close(apart[a], mean)
        torch.testing.assert_close(error[a], deviation)
    assert confidence.paired(seen[:, :1], counts[:1])[1].isinf().all()


@pytest.mark.parametrize(
    "freedom, t, normal, error", [(1, 6.3138, 1.6449, 0.05), (4, 2.7764, 1.96, 0.005), (9, -1.8331, -1.6449, 0.002)]
)
def test_t_as_a_normal_deviate_is_that_of_the_tables(freedom: int, t: float, normal: float, error: float):
    assert float(confidence.normal_of_t(torch.tensor(t), freedom)) == pytest.approx(normal, rel=error)
    assert (
        confidence.normal_of_t(torch.tensor(t), 0) == 0 and confidence.normal_of_t(torch.tensor(torch.inf), 3).isinf()
    )
