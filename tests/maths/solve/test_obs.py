"""The OBS layer solver against the definition: brute-force least squares over the kept weights."""

import itertools

import pytest
import torch

from tinygn_dist.maths.solve import obs
from tinygn_dist.maths.solve.obs import LayerGoal

TINY = 1e-9  # so little damping that the closed forms hold


def layer(out: int = 4, num_inputs: int = 8, tokens: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(num_inputs, num_inputs, generator=generator)
    inputs = torch.randn(tokens, num_inputs, generator=generator) @ (mix + 2 * torch.eye(num_inputs))
    return torch.randn(out, num_inputs, generator=generator), inputs


def output_error(dense: torch.Tensor, pruned: torch.Tensor, inputs: torch.Tensor) -> float:
    return float((inputs.double() @ (dense - pruned).double().t()).square().sum())


def best_fit_error(row: torch.Tensor, kept: list[int], inputs: torch.Tensor) -> float:
    """Least squares of a row's output on the kept inputs alone."""
    x, wanted = inputs.double(), inputs.double() @ row.double()
    if not kept:
        return float(wanted.square().sum())
    solved = torch.linalg.lstsq(x[:, kept], wanted[:, None]).solution[:, 0]
    return float((x[:, kept] @ solved - wanted).square().sum())


def test_saliency_is_the_error_of_removing_one_weight_with_the_rest_refitted():
    weight, inputs = layer()
    found = obs.saliency(weight, inputs.t() @ inputs, TINY)
    for row, column in itertools.product(range(4), range(8)):
        others = [j for j in range(8) if j != column]
        wanted = best_fit_error(weight[row], others, inputs) / 2
        assert float(found[row, column]) == pytest.approx(wanted, rel=2e-3), (row, column)


def test_one_pruned_weight_of_the_first_column_is_updated_by_the_closed_form():
    """W - w_q / [H^-1]_qq * H^-1_q: nothing is frozen yet, so one pass is exact."""
    _, inputs = layer(out=1)
    weight = torch.full((1, 8), 50.0)
    weight[0, 0] = 5.0  # sure to be the one, and large enough to move the others
    inverse = (inputs.t() @ inputs).double().inverse()
    wanted = weight.double() - weight[0, 0] / inverse[0, 0] * inverse[0]
    solved = obs.prune(weight, inputs.t() @ inputs, LayerGoal(1, damping=TINY))
    assert solved.keep.tolist() == [[False] + [True] * 7]
    torch.testing.assert_close(solved.weight.double(), wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - weight).abs()[0, 1:].max() > 0.5


def test_left_to_right_update_is_least_squares_on_columns_to_the_right():
    """After the pass, each row's kept weights right of the first pruned one are the best for the frozen rest when
    only one weight goes."""
    _, inputs = layer(out=1, seed=3)
    weight = torch.full((1, 8), 50.0)
    weight[0, 2] = 5.0
    solved = obs.prune(weight, inputs.t() @ inputs, LayerGoal(1, damping=TINY))
    assert not solved.keep[0, 2]
    frozen, free = weight[0, :2].double(), inputs[:, 3:].double()
    wanted = inputs.double() @ weight[0].double() - inputs[:, :2].double() @ frozen
    best = torch.linalg.lstsq(free, wanted[:, None]).solution[:, 0]
    torch.testing.assert_close(solved.weight[0, 3:].double(), best, rtol=1e-3, atol=1e-4)
    assert (best - weight[0, 3:]).abs().max() > 0.5
    assert torch.equal(solved.weight[0, :2], weight[0, :2])


@pytest.mark.parametrize("nm", [None, (2, 4), (3, 5)])
def test_a_sweep_over_several_blocks_is_the_closed_form_column_by_column(nm: tuple[int, int] | None):
    """In fp64: w -= w_q / [P]_qq P_q for every pruned w_q, with P the inverse Hessian of the columns from q on; of N:M
    the mask too, by w_q^2 / [P]_qq when the sweep comes to the group."""
    weight, inputs = layer(out=6, num_inputs=180, tokens=900)
    solved = obs.prune(weight, inputs.t() @ inputs, LayerGoal(500, nm=nm), block_size=100)
    values, keep = weight.double(), solved.keep.clone()
    hessian = obs.damped(inputs.t() @ inputs, 0.01).double()
    inverses = [hessian[q:, q:].inverse()[0] for q in range(180)]
    for q, inverse in enumerate(inverses):
        if nm and q % nm[1] == 0:
            group = slice(q, q + nm[1])
            saliency = values[:, group].square() / torch.stack([row[0] for row in inverses[group]])
            keep[:, group] = saliency >= saliency.topk(nm[0], dim=1).values[:, -1:]
        values[:, q:] -= (values[:, q] * ~keep[:, q])[:, None] * inverse / inverse[0]
    assert torch.equal(solved.keep, keep)
    torch.testing.assert_close(solved.weight.double(), values * keep, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("how", ["unstructured", "per row", "2:4"])
def test_never_worse_than_the_same_mask_without_update(seed: int, how: str):
    weight, inputs = layer(out=16, num_inputs=32, seed=seed)
    nm = (2, 4) if how == "2:4" else None
    solved = obs.prune(weight, inputs.t() @ inputs, LayerGoal(256, nm=nm, per_row=how == "per row"))
    assert output_error(weight, solved.weight, inputs) < output_error(weight, weight * solved.keep, inputs)
    best = sum(best_fit_error(weight[r], solved.keep[r].nonzero()[:, 0].tolist(), inputs) for r in range(16))
    assert output_error(weight, solved.weight, inputs) >= best * (1 - 1e-6)  # no solver beats least squares


def test_better_than_magnitude_on_correlated_inputs():
    """On average over layers: a single pass from the left is not the best for every one of them."""
    ratios = []
    for seed in range(8):
        weight, inputs = layer(out=16, num_inputs=32, seed=seed)
        solved = obs.prune(weight, inputs.t() @ inputs, LayerGoal(256))
        plain = weight.clone().flatten()
        plain[plain.abs().argsort()[:256]] = 0
        ratios.append(output_error(weight, solved.weight, inputs) / output_error(weight, plain.view_as(weight), inputs))
    assert torch.tensor(ratios).log().mean() < -0.05, ratios


@pytest.mark.parametrize("num_pruned", [0, 1, 37, 511, 512])
@pytest.mark.parametrize("block_size", [5, 16, 128])
def test_exact_counts_and_exact_zeros(num_pruned: int, block_size: int):
    weight, inputs = layer(out=16, num_inputs=32)
    solved = obs.prune(weight, inputs.t() @ inputs, LayerGoal(num_pruned), block_size=block_size)
    assert int((~solved.keep).sum()) == num_pruned
    assert not solved.weight[~solved.keep].any() and not torch.signbit(solved.weight[~solved.keep]).any()
    if num_pruned == 0:
        torch.testing.assert_close(solved.weight, weight)


@pytest.mark.parametrize("num_inputs", [32, 128, 192, 260])
@pytest.mark.parametrize("kept", [1, 5, 13, 20])
def test_per_row_takes_the_same_number_from_every_row(num_inputs: int, kept: int):
    weight, inputs = layer(out=7, num_inputs=num_inputs, tokens=600)
    solved = obs.prune(weight, inputs.t() @ inputs, LayerGoal(7 * (num_inputs - kept), per_row=True))
    assert solved.keep.sum(1).tolist() == [kept] * 7


@pytest.mark.parametrize("nm, num_inputs", [((2, 4), 32), ((1, 4), 256), ((4, 8), 136), ((1, 3), 192), ((3, 5), 260)])
def test_n_of_m_is_exact_also_where_blocks_of_columns_meet(nm: tuple[int, int], num_inputs: int):
    weight, inputs = layer(out=6, num_inputs=num_inputs, tokens=600)
    solved = obs.prune(weight, inputs.t() @ inputs, LayerGoal(0, nm=nm))
    assert (solved.keep.view(6, -1, nm[1]).sum(2) == nm[0]).all()
    assert not solved.weight[~solved.keep].any()


def test_row_energy_moves_the_budget_to_quiet_rows():
    weight, inputs = layer(out=4, num_inputs=16)
    weight = weight.sign()  # alike
    energy = torch.tensor([1e-6, 1.0, 1.0, 1.0])
    solved = obs.prune(weight, inputs.t() @ inputs, LayerGoal(16, row_energy=energy))
    assert solved.keep.sum(1).tolist() == [0, 16, 16, 16]


def test_dead_inputs_go_first_and_change_nothing():
    weight, inputs = layer(out=8, num_inputs=16)
    inputs[:, [3, 9]] = 0
    solved = obs.prune(weight, inputs.t() @ inputs, LayerGoal(16))
    assert not solved.keep[:, [3, 9]].any() and int((~solved.keep).sum()) == 16
    torch.testing.assert_close(inputs @ solved.weight.t(), inputs @ weight.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 4])
def test_fewer_tokens_than_inputs_still_finish(tokens: int):
    """Singular Hessian: the damping is raised until it factorises, and told."""
    weight, inputs = layer(out=8, num_inputs=64, tokens=tokens)
    solved = obs.prune(weight, inputs.t() @ inputs, LayerGoal(256, damping=1e-10))
    assert solved.weight.isfinite().all() and int((~solved.keep).sum()) == 256
    assert solved.damping > 1e-10
    assert output_error(weight, solved.weight, inputs) < output_error(weight, weight * solved.keep, inputs) * 1.001


def test_no_live_input_at_all():
    solved = obs.prune(torch.ones(2, 4), torch.zeros(4, 4), LayerGoal(4))
    assert int(solved.keep.sum()) == 4 and solved.weight.isfinite().all()


def test_nan_hessian_is_refused_with_its_cause():
    with pytest.raises(ValueError, match="NaN or inf"):
        obs.prune(torch.ones(2, 4), torch.full((4, 4), torch.nan), LayerGoal(4))


@pytest.mark.parametrize("num_inputs", [8, 300])
def test_inverse_factor_is_a_factor_of_the_inverse(num_inputs: int):
    _, inputs = layer(num_inputs=num_inputs, tokens=25 * num_inputs)
    hessian = inputs.t() @ inputs
    upper, used = obs.inverse_factor(hessian, 0.01)
    wanted = (hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(num_inputs).double()).inverse()
    torch.testing.assert_close((upper.t() @ upper).double(), wanted, rtol=1e-3, atol=1e-6)
    assert used == 0.01 and torch.equal(upper, upper.triu())


@pytest.mark.parametrize("num_pruned", [0, 1, 7, 500, 999, 1000])
def test_the_lowest_go_and_of_equals_the_first(num_pruned: int):
    """As a stable sort of everything would have it."""
    saliency = torch.randint(0, 9, (20, 50), generator=torch.Generator().manual_seed(0)).float()
    wanted = torch.ones(1000, dtype=torch.bool)
    wanted[saliency.flatten().argsort(stable=True)[:num_pruned]] = False
    assert torch.equal(obs.drop_lowest(saliency, num_pruned), wanted.view(20, 50))
