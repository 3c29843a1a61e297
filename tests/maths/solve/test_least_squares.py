"""Re-fit and elimination of whole input features, against torch.linalg.lstsq."""

import itertools

import pytest
import torch

from tests.maths.solve.test_obs import TINY, layer
from tinygn_dist.maths.solve import least_squares


def lstsq_error(weight: torch.Tensor, inputs: torch.Tensor, columns: list[int]) -> float:
    x = inputs.double()
    wanted = x @ weight.double().t()
    solved = torch.linalg.lstsq(x[:, columns], wanted).solution
    return float((x[:, columns] @ solved - wanted).square().sum())


def test_refit_is_least_squares():
    weight, inputs = layer(out=5, num_inputs=12)
    kept = torch.tensor([0, 2, 3, 7, 8, 11])
    x = inputs.double()
    wanted = torch.linalg.lstsq(x[:, kept], x @ weight.double().t()).solution.t()
    found = least_squares.refit(weight.double(), inputs.t() @ inputs, kept, TINY)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)
    well = torch.linalg.qr(inputs)[0] + 0.1 * inputs / inputs.norm()  # well-conditioned: full fp32 accuracy
    wanted = torch.linalg.lstsq(well.double()[:, kept], well.double() @ weight.double().t()).solution.t()
    found = least_squares.refit(weight, well.t() @ well, kept, TINY)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("damping", [1e-4, 0.01, 0.5])
def test_keeping_everything_changes_nothing(damping: float):
    """The damping pulls towards the present weights, not towards zero."""
    weight, inputs = layer(out=5, num_inputs=12)
    found = least_squares.refit(weight, inputs.t() @ inputs, torch.arange(12), damping)
    torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-3)


def test_refit_with_a_dead_input_and_few_tokens():
    weight, inputs = layer(out=5, num_inputs=12, tokens=3)
    inputs[:, 4] = 0
    kept = torch.tensor([0, 1, 4, 5, 9])
    found = least_squares.refit(weight, inputs.t() @ inputs, kept, 0.01)
    torch.testing.assert_close(found[:, 2], weight[:, 4])
    cut = (inputs[:, kept] @ weight[:, kept].t() - inputs @ weight.t()).square().sum()
    assert (inputs[:, kept] @ found.t() - inputs @ weight.t()).square().sum() < cut


def test_a_singular_gram_with_almost_no_damping_finishes():
    weight, inputs = layer(out=5, num_inputs=12, tokens=1)
    found = least_squares.refit(weight, inputs.t() @ inputs, torch.arange(6), 1e-12)
    order = least_squares.elimination_order(weight, inputs.t() @ inputs, 12, 6, damping=1e-12)
    assert found.isfinite().all() and len(set(order.tolist())) == 6


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_the_first_unit_to_go_is_the_best_of_all(width: int, seed: int):
    weight, inputs = layer(out=5, num_inputs=12, seed=seed)
    units = 12 // width
    order = least_squares.elimination_order(weight, inputs.t() @ inputs, units, 1, damping=TINY)

    def error_without(unit: int) -> float:
        return lstsq_error(weight, inputs, [j for j in range(12) if j // width != unit])

    assert order.tolist() == [min(range(units), key=error_without)]


@pytest.mark.parametrize("width", [1, 2])
def test_one_at_a_time_is_the_greedy_choice_of_brute_force(width: int):
    weight, inputs = layer(out=5, num_inputs=12, seed=7)
    units, gone = 12 // width, []
    for _ in range(4):
        left = [u for u in range(units) if u not in gone]
        columns = {u: [j for j in range(12) if j // width not in (*gone, u)] for u in left}
        gone.append(min(left, key=lambda u: lstsq_error(weight, inputs, columns[u])))
    order = least_squares.elimination_order(weight, inputs.t() @ inputs, units, 4, damping=TINY, rounds=4)
    assert order.tolist() == gone


def test_order_holds_each_unit_once_and_its_heads_are_choices():
    weight, inputs = layer(out=16, num_inputs=48, tokens=300)
    gram = inputs.t() @ inputs
    order = least_squares.elimination_order(weight, gram, 48, 40, damping=0.01)
    assert len(set(order.tolist())) == 40 and order.min() >= 0 and order.max() < 48
    assert torch.equal(order[:5], least_squares.elimination_order(weight, gram, 48, 40, damping=0.01)[:5])
    assert least_squares.elimination_order(weight, gram, 48, 0, damping=0.01).numel() == 0


def test_the_choice_is_close_to_the_best_of_all_choices():
    weight, inputs = layer(out=4, num_inputs=8, seed=5)
    order = least_squares.elimination_order(weight, inputs.t() @ inputs, 8, 3, damping=TINY, rounds=3)
    chosen = lstsq_error(weight, inputs, [j for j in range(8) if j not in order.tolist()])
    errors = sorted(lstsq_error(weight, inputs, list(kept)) for kept in itertools.combinations(range(8), 5))
    assert chosen <= errors[len(errors) // 10]


def test_unit_columns():
    assert least_squares.unit_columns(torch.tensor([2, 0]), 3).tolist() == [6, 7, 8, 0, 1, 2]


def test_refit_masked_reaches_the_best_kept_weights_row_by_row():
    """Against the normal equations of each row; the error falls from one iteration to the next."""
    generator = torch.Generator().manual_seed(3)
    inputs, weight = torch.randn(200, 12, generator=generator), torch.randn(7, 12, generator=generator)
    gram, keep = inputs.t() @ inputs, torch.rand(7, 12, generator=generator) > 0.5
    start = weight * keep
    solid = gram + torch.diag(torch.full((12,), 1e-4 * float(gram.diagonal().mean())))

    def error(values: torch.Tensor) -> float:
        away = weight - values
        return float(((away @ solid) * away).sum())

    errors = [error(least_squares.refit_masked(weight, start, keep, gram, n, 1e-4)) for n in range(13)]
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in zip(errors, errors[1:], strict=False))
    fitted = least_squares.refit_masked(weight, start, keep, gram, 12, 1e-4)
    assert torch.equal(fitted == 0, ~keep)
    for row in range(7):
        kept = keep[row].nonzero()[:, 0]
        best = torch.linalg.solve(solid[kept][:, kept].double(), (solid[kept] @ weight[row]).double())
        torch.testing.assert_close(fitted[row, kept].double(), best, rtol=1e-4, atol=1e-4)
