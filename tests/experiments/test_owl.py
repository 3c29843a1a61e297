"""OWL against its published formula, written down in plain torch on whole forwards."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.options import pruning
from tinygn_dist.experiments.owl import outlier_densities
from tinygn_dist.models.objective import model_inputs, real_tokens
from tinygn_dist.prune.sparsity.sparsify import sparsify


def published_densities(problem, sparsity: float, outliers: float, spread: float) -> list[float]:
    """Of each layer: outlier ratios of |W| ||X||_2 over all its matrices, mapped to [0, 2 spread], moved to the
    mean."""
    squares: dict[str, torch.Tensor] = {}

    def watch(name: str, batch: dict):
        def hook(module, inputs) -> None:
            rows = inputs[0].detach().flatten(0, -2)[real_tokens(batch)].double()
            squares[name] = squares.get(name, 0) + rows.square().sum(0)

        return hook

    for batch in problem.batches:
        handles = [
            problem.bare.get_submodule(t.module).register_forward_pre_hook(watch(t.name, batch))
            for t in problem.anatomy.matrices
        ]
        with torch.no_grad():
            problem.model(**model_inputs(batch))
        for handle in handles:
            handle.remove()
    ratios = []
    for layer in range(problem.anatomy.num_layers):
        scores = [
            (t.oriented(problem.bare.get_parameter(t.parameter).detach()).abs() * squares[t.name].sqrt()).flatten()
            for t in problem.anatomy.matrices
            if t.layer == layer
        ]
        all_of_them = torch.cat(scores)
        ratios.append(float((all_of_them > outliers * all_of_them.mean()).double().mean()))
    ratio = torch.tensor(ratios, dtype=torch.float64)
    steps = (ratio - ratio.min()) / (ratio.max() - ratio.min()) * 2 * spread
    return (steps - steps.mean() + 1 - sparsity).tolist()  # the layers of these models are of one size


def uneven(family: str):
    """A setting whose layers have different numbers of outliers."""
    problem = tiny.problem(family)
    for layer, share in ((1, 0.02), (2, 0.01)):
        for matrix in problem.anatomy.matrices:
            if matrix.layer == layer:
                weight = problem.bare.get_parameter(matrix.parameter).data
                weight.view(-1)[: int(share * weight.numel())] *= 30
    return problem


@pytest.mark.parametrize("criterion", ["obs", "wanda", "magnitude"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_keep_what_the_published_formula_says(family: str, criterion: str) -> None:
    problem = uneven(family)
    wanted = published_densities(problem, 0.6, 4.0, 0.1)
    assert max(wanted) - min(wanted) == pytest.approx(0.2) and len(set(wanted)) == 3
    options = pruning(
        pattern="unstructured", sparsity=0.6, criterion=criterion, allocation="owl", passes=1,
        experiments={"owl": {"outliers": 4.0, "spread": 0.1}}, scope="layer",
    )  # fmt: skip
    kept = sparsify(problem, problem.anatomy.matrices, options).kept(problem.backend)
    total = sum(matrix.numel for matrix in problem.anatomy.matrices)
    assert sum(kept.values()) == total - round(0.6 * total)
    for matrix in problem.anatomy.matrices:
        assert abs(kept[matrix.name] - wanted[matrix.layer] * matrix.numel) <= 1, matrix.name


def test_two_passes_at_owl_reach_the_exact_number() -> None:
    problem = uneven("llama")
    kept = sparsify(
        problem, problem.anatomy.matrices, pruning(pattern="unstructured", sparsity=0.7, allocation="owl")
    ).kept(problem.backend)
    total = sum(matrix.numel for matrix in problem.anatomy.matrices)
    assert sum(kept.values()) == total - round(0.7 * total)


def test_densities_stay_between_nothing_and_everything() -> None:
    outliers, sizes = torch.tensor([0.0, 0.5, 1.0]).double(), torch.tensor([1.0, 1.0, 2.0]).double()
    for density in (0.02, 0.1, 0.5, 0.97):
        found = outlier_densities(outliers, sizes, density, 0.08)
        assert float((found * sizes).sum() / 4) == pytest.approx(density)
        assert (found >= 0).all() and (found <= 1).all()
        assert float(found[2] - found[0]) == pytest.approx(min(0.16, density, 1 - density))
    assert outlier_densities(torch.zeros(3).double(), sizes, 0.3, 0.08).tolist() == [0.3] * 3
