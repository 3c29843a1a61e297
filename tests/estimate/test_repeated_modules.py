"""Modules that run several times in one forward (layers that share their weights): every time counts."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from tests import tiny
from tinygn_dist.backends import make_backend
from tinygn_dist.config import DistributedConfig, PruneConfig
from tinygn_dist.estimate.gradient_energy import TokenWeights, loss_moments, token_weights
from tinygn_dist.estimate.input_moments import input_moments
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths.sums import fill_below
from tinygn_dist.models.anatomy import read_anatomy
from tinygn_dist.models.objective import objective_of
from tinygn_dist.prune.sparsity.sparsify import sparsify
from tinygn_dist.runtime.progress import Progress


@pytest.fixture
def problem() -> Problem:
    """ALBERT: one layer that runs three times."""
    config = hf.AlbertConfig(
        vocab_size=tiny.VOCAB, embedding_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_labels=3, max_position_embeddings=32, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.AlbertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(0.05 * torch.randn_like(parameter))
    objective = objective_of("sequence-classification")
    backend = make_backend(DistributedConfig())
    anatomy, rows = read_anatomy(model, needs_units=False), tiny.batches("bert-classifier")
    return Problem(backend.prepare(model), anatomy, objective, rows, backend, Progress())


def shared(problem: Problem):
    return [matrix for matrix in problem.anatomy.matrices if "albert_layers" in matrix.name]


def test_moments_are_over_all_runs(problem):
    found = input_moments(problem, problem.anatomy.matrices, full=True)
    lost = loss_moments(problem, problem.anatomy.matrices, 4.0)
    plain, gram, rows, runs = {}, {}, {}, {}
    for batch in problem.batches:
        for name, x, dy in _seen_in(problem, batch):
            energy = dy.square().mean(1)
            weighted = x * (4.0 + energy / energy.mean()).bfloat16()[:, None]
            plain[name] = plain.get(name, 0) + x.t() @ x
            gram[name] = gram.get(name, 0) + weighted.t() @ x
            rows[name] = rows.get(name, 0) + dy.square().t() @ x.square().sum(1)
            runs[name] = runs.get(name, 0) + 1
    assert len(shared(problem)) == 6 and {runs[matrix.name] for matrix in shared(problem)} == {3 * len(problem.batches)}
    for matrix in problem.anatomy.matrices:
        close = dict(rtol=1e-4, atol=1e-6 * float(gram[matrix.name].abs().max()))
        torch.testing.assert_close(found.moments.sum(found.of(matrix)), plain[matrix.name], **close)
        torch.testing.assert_close(fill_below(lost.grams.sum(matrix.name)), gram[matrix.name], **close)
        torch.testing.assert_close(lost.rows.sum(matrix.name), rows[matrix.name], rtol=1e-4, atol=1e-6)


def test_tokens_weigh_what_they_did_in_that_run(problem):
    held = TokenWeights(problem, problem.anatomy.matrices, 4.0)
    for number, batch in enumerate(problem.batches):
        calls: dict[str, int] = {}
        for name, _, dy in _seen_in(problem, batch):
            call = calls[name] = calls.get(name, -1) + 1
            real = torch.arange(len(dy))
            found = held.of(name, number, real, call)
            torch.testing.assert_close(found, token_weights(dy.float().square().mean(1), 4.0), rtol=1e-2, atol=1e-2)
        assert {calls[matrix.name] for matrix in shared(problem)} == {2}


@pytest.mark.parametrize("criterion", ["obs", "wanda", "taylor", "magnitude"])
def test_every_criterion_masks_them(problem, criterion: str):
    options = PruneConfig(pattern="unstructured", sparsity=0.5, criterion=criterion)
    kept = sparsify(problem, problem.anatomy.matrices, options).kept(problem.backend)
    assert sum(kept.values()) == pytest.approx(sum(t.numel for t in problem.anatomy.matrices) / 2, abs=len(kept))


def _seen_in(problem: Problem, batch):
    """In the order of the forward, of the pooler and the classifier (which see one row of each sequence) too."""
    kept, handles, real = [], [], batch["attention_mask"].bool()

    def keep(name: str):
        def hook(module, inputs, output) -> None:
            output.retain_grad()
            kept.append((name, inputs[0], output))

        return hook

    for matrix in problem.anatomy.matrices:
        handles.append(problem.bare.get_submodule(matrix.module).register_forward_hook(keep(matrix.name)))
    problem.objective(problem.model, batch).total.sum().backward()
    for handle in handles:
        handle.remove()
    problem.bare.zero_grad()
    return [
        (name, *(part.detach()[real if part.dim() == 3 else slice(None)].double() for part in (x, out.grad)))
        for name, x, out in kept
    ]
