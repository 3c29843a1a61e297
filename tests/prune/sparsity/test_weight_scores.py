"""Scores of every criterion from what plain hooks and plain autograd see in a model."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from tests import plain, tiny
from tinygn_dist.config import PruneConfig, ScheduleConfig
from tinygn_dist.errors import UserError
from tinygn_dist.maths.criteria import CRITERIA, STATISTICS
from tinygn_dist.models.objective import real_tokens
from tinygn_dist.prune.sparsity.sparsify import sparsify
from tinygn_dist.prune.sparsity.weight_scores import GATHERED, scores


def test_every_statistic_can_be_gathered():
    assert GATHERED.keys() == STATISTICS.keys()
    assert all(need in STATISTICS for row in CRITERIA.values() for need in row.needs)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-classifier", "vit"])
def test_kfac_of_a_model_is_that_of_plain_hooks(family: str):
    """bf16 rounding of the gradients' energy is all that differs (see `coarse`)."""
    problem = tiny.problem(family)
    inputs, grads = defaultdict(lambda: 0), defaultdict(lambda: 0)
    modules = {matrix.name: problem.bare.get_submodule(matrix.module) for matrix in problem.anatomy.matrices}
    for batch in problem.batches:
        mask, seen = real_tokens(batch), {}

        def of_real(values: torch.Tensor, mask=mask) -> torch.Tensor:
            rows = values.detach().flatten(0, -2)
            return rows if mask is None or len(mask) != len(rows) else rows[mask]

        def look(module, args, output, seen=seen):
            output.retain_grad()
            seen[module] = args[0], output

        handles = [module.register_forward_hook(look) for module in modules.values()]
        plain.loss(problem.model, batch, family).total.sum().backward()
        for handle in handles:
            handle.remove()
        for name, module in modules.items():
            x, y = seen[module]
            inputs[name] += of_real(x).square().sum(0)
            grads[name] += of_real(y.grad).square().sum(0)
    found = scores(problem, problem.anatomy.matrices, "kfac")
    for matrix in problem.anatomy.matrices:
        weight = matrix.oriented(problem.bare.get_parameter(matrix.name).detach())
        wanted = weight.square() * inputs[matrix.name] * grads[matrix.name][:, None] / 2
        torch.testing.assert_close(matrix.oriented(found[matrix.name]), wanted, rtol=5e-3, atol=1e-9)


@pytest.mark.parametrize("pattern, scope", [("unstructured", "auto"), ("unstructured", "global"), ("2:4", "auto")])
def test_kfac_masks_have_the_exact_number(pattern: str, scope: str):
    problem = tiny.problem("llama")
    asked = PruneConfig(pattern=pattern, criterion="kfac", scope=scope, sparsity=0.5)
    kept = sparsify(problem, problem.anatomy.matrices, asked).kept(problem.backend)
    assert sum(kept.values()) == sum(matrix.numel for matrix in problem.anatomy.matrices) // 2


@pytest.mark.parametrize("name", CRITERIA)
def test_config_knows_every_row(name: str):
    row = CRITERIA[name]
    assert PruneConfig(pattern="unstructured", criterion=name).criterion == name
    assert ScheduleConfig(kind="cubic", criterion=name).criterion == name
    if row.needs_backprop:
        with pytest.raises(ValueError, match="finite differences cannot resolve"):
            PruneConfig(pattern="unstructured", criterion=name, estimator="finite-difference")


def test_a_typo_is_answered_with_the_nearest_criterion():
    from tinygn_dist.config import load_config

    with pytest.raises(UserError, match="criterion.*'wnda', accepted: auto, magnitude.*did you mean wanda"):
        load_config(None, {"model.name": "m", "prune.pattern": "unstructured", "prune.criterion": "wnda"})
