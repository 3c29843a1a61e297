"""Fused experts as matrices and as units, from tiny mixtures of experts in every storage layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.family_cases import EXPERTS, MOE, TOP_K, build, close, gated, logits, make_problem, on_meta, shrunk
from tests.options import pruning
from tests.removing import plan_mixes, remove_units
from tinygn_dist import compress
from tinygn_dist.backends.replicated import Replicated
from tinygn_dist.config import load_config
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.backprop import gate_gradients, weight_gradients
from tinygn_dist.estimate.expert_moments import ExpertObserver, output_mass
from tinygn_dist.estimate.gates import gate_derivatives
from tinygn_dist.estimate.gradient_energy import loss_moments
from tinygn_dist.estimate.hooks import attached
from tinygn_dist.estimate.input_moments import input_moments
from tinygn_dist.estimate.probes import Probe
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths.counts import mixes
from tinygn_dist.prune.sparsity.mask_selection import keep_n_of_m
from tinygn_dist.prune.sparsity.sparsify import sparsify
from tinygn_dist.prune.structured.layers_heads_channels import unit_sizes


@pytest.fixture(scope="module")
def backend() -> Replicated:
    return Replicated(Accelerator(cpu=True))


@pytest.fixture(params=MOE)
def moe(request, backend) -> Problem:
    return make_problem(build(request.param), backend)


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
@pytest.mark.parametrize("criterion", ["magnitude", "random", "taylor", "fisher", "wanda", "ria", "gblm"])
def test_experts_unstructured(moe, scope, criterion):
    asked = pruning(pattern="unstructured", sparsity=0.5, criterion=criterion, scope=scope)
    matrices = moe.anatomy.matrices
    kept = sparsify(moe, matrices, asked).kept(moe.backend)
    if scope == "global":
        assert sum(kept.values()) * 2 == sum(matrix.numel for matrix in matrices)
        assert all(kept.values())
    else:
        assert all(kept[matrix.name] * 2 == matrix.numel for matrix in matrices)
    held = [torch.count_nonzero(moe.model.get_parameter(name)) for name in {t.parameter for t in matrices}]
    assert sum(kept.values()) == sum(held)


@pytest.mark.parametrize("criterion", ["wanda", "obs", "taylor"])
def test_unreached_experts_keep_their_largest(moe, criterion, caplog):
    starve_(moe, expert=3)
    matrices = [matrix for matrix in moe.anatomy.matrices if matrix.index == 3]
    before = {t.name: t.oriented(t.within(moe.model.get_parameter(t.parameter).detach())).clone() for t in matrices}
    scope = "layer" if criterion == "obs" else "global"
    asked = pruning(pattern="unstructured", sparsity=0.5, criterion=criterion, scope=scope)
    kept = sparsify(moe, moe.anatomy.matrices, asked).kept(moe.backend)
    assert "no calibration token reached experts [3]" in caplog.text
    for matrix in matrices:
        after = matrix.oriented(matrix.within(moe.model.get_parameter(matrix.parameter).detach()))
        assert kept[matrix.name] * 2 == matrix.numel
        staying = after != 0
        torch.testing.assert_close(after[staying], before[matrix.name][staying])
        if criterion != "obs":  # the solver spreads its quota over blocks of columns
            assert before[matrix.name][staying].abs().min() >= before[matrix.name][~staying].abs().max()


def starve_(problem: Problem, expert: int) -> None:
    """No token goes to one expert of any layer: the router's choice of it is turned to the next one."""
    for group in problem.anatomy.of_kind("experts"):
        router = problem.model.get_submodule(group.router)
        router.register_forward_hook(
            lambda m, _, out: (out[0], out[1], torch.where(out[2] == expert, (expert + 1) % EXPERTS, out[2]))
        )


def test_expert_inputs_rebuild_the_output(moe):
    """What the observer reports is what the module computes, and moments are over real tokens only."""
    group, batch = moe.anatomy.of_kind("experts")[-1], moe.batches[0]
    experts, seen = moe.model.get_submodule(group.output), []
    recorded = {}
    handle = experts.register_forward_hook(lambda m, args, out: recorded.update(hidden=args[0], out=out))
    with attached([(experts, ExpertObserver(seen.append))]):
        logits(moe.model, batch)
    handle.remove()
    rebuilt = torch.zeros_like(recorded["out"])
    for routed in seen:
        matrix = next(t for t in moe.anatomy.matrices if t.name == f"{group.output}.down_proj[{routed.expert}]")
        down = matrix.oriented(matrix.within(experts.down_proj))
        bias = experts.down_proj_bias[routed.expert] if experts.has_bias else 0
        rebuilt.index_add_(0, routed.tokens, (routed.inner @ down.t() + bias) * routed.weights[:, None])
        torch.testing.assert_close(routed.rows, recorded["hidden"][routed.tokens])
    close(rebuilt, recorded["out"])

    found = input_moments(replace(moe, batches=[batch]), moe.anatomy.matrices, full=True)
    real = batch["attention_mask"].flatten().bool()
    for routed in seen:
        for leaf, rows in (("gate_up_proj", routed.rows), ("down_proj", routed.inner)):
            name = f"{group.output}.{leaf}[{routed.expert}]"
            rows = rows[real[routed.tokens]]
            torch.testing.assert_close(found.moments.rounded(name), rows.t() @ rows, rtol=1e-4, atol=1e-4)


def test_expert_gradients(moe):
    """One sample per micro-batch, each expert with its own part of the fused parameter's gradient."""
    matrices = [matrix for matrix in moe.anatomy.matrices if matrix.index is not None]
    found = weight_gradients(moe, matrices, squares=True)
    expected = dict.fromkeys((matrix.name for matrix in matrices), 0)
    for batch in moe.batches:
        moe.model.zero_grad()
        moe.objective(moe.model, batch).mean().backward()
        for matrix in matrices:
            grad = moe.model.get_parameter(matrix.parameter).grad[matrix.index]
            expected[matrix.name] = expected[matrix.name] + grad.square()
    for name, squares in expected.items():
        torch.testing.assert_close(found.rounded(name), squares)


def test_expert_loss_moments(moe):
    """Against gradients that torch keeps for us, in a plain forward of the last layer's experts."""
    path = moe.anatomy.of_kind("experts")[-1].output
    experts, kept = moe.model.get_submodule(path), []

    def plain(hidden, chosen, weights):
        out = torch.zeros_like(hidden)
        for expert in range(EXPERTS):
            tokens, slot = torch.where(chosen == expert)
            x = hidden[tokens]
            for leaf in ("gate_up_proj", "down_proj"):
                matrix = getattr(experts, leaf)[expert]
                y = x @ (matrix if experts.is_transposed else matrix.t())
                y = y + getattr(experts, f"{leaf}_bias")[expert] if experts.has_bias else y
                y.retain_grad()
                kept.append((f"{path}.{leaf}[{expert}]", tokens, x, y))
                x = experts._apply_gate(y) if leaf == "gate_up_proj" else y
            out.index_add_(0, tokens, x * weights[tokens, slot][:, None])
        return out

    found = loss_moments(moe, [matrix for matrix in moe.anatomy.matrices if matrix.module == path], 4.0)
    sums: dict[str, list[torch.Tensor]] = {}
    experts.forward = plain
    for batch in moe.batches:
        kept.clear()
        moe.objective(moe.model, batch).total.sum().backward()
        real = batch["attention_mask"].flatten().bool()
        for name, tokens, x, y in kept:
            x, dy = x.detach()[real[tokens]], y.grad[real[tokens]]
            gram, rows = sums.setdefault(name, [torch.zeros(()), torch.zeros(())])
            energy = dy.square().mean(1, keepdim=True)
            sums[name] = [
                gram + (x * ((4 + energy / energy.mean()).bfloat16() if len(x) else 1)).t() @ x,
                rows + dy.square().t() @ x.square().sum(1),
            ]
    del experts.forward
    assert len(sums) == 2 * EXPERTS
    for name, (gram, rows) in sums.items():
        close(found.grams.rounded(name), gram)
        close(found.rows.rounded(name), rows)


@pytest.mark.parametrize("allocation", [0.0, 0.5])
def test_solver_counts_are_exact(moe, allocation):
    starve_(moe, expert=3)
    options = pruning(pattern="unstructured", sparsity=0.6, allocation=allocation)
    matrices = moe.anatomy.matrices
    kept = sparsify(moe, matrices, options).kept(moe.backend)
    reached = [matrix for matrix in matrices if matrix.index != 3]
    if allocation == 0:
        assert all(kept[matrix.name] == matrix.numel - round(0.6 * matrix.numel) for matrix in matrices)
    else:
        total = sum(matrix.numel for matrix in reached)
        assert sum(kept[matrix.name] for matrix in reached) == total - round(0.6 * total)
    for matrix in set(matrices) - set(reached):
        assert kept[matrix.name] == matrix.numel - round(0.6 * matrix.numel)


def test_wanda_weighs_each_expert_by_its_own_inputs(moe):
    group, seen = moe.anatomy.of_kind("experts")[-1], {}
    matrices = [matrix for matrix in moe.anatomy.matrices if matrix.module == group.output]
    found = input_moments(moe, matrices, full=False)
    for matrix in matrices:
        weight = matrix.oriented(moe.model.get_parameter(matrix.parameter)[matrix.index]).detach()
        norms = found.moments.rounded(matrix.name).sqrt()
        seen[matrix.name] = keep_n_of_m(weight.abs() * norms, 2, 4) if norms.any() else None
    sparsify(moe, matrices, pruning(pattern="2:4", criterion="wanda"))
    for matrix in matrices:
        weight = matrix.oriented(moe.model.get_parameter(matrix.parameter)[matrix.index])
        assert seen[matrix.name] is None or torch.equal(weight != 0, seen[matrix.name])


def test_expert_gates_agree(moe):
    """Finite differences and backpropagation measure the same gates on experts' outputs."""
    group = moe.anatomy.of_kind("experts")[-1]  # no later router whose choice a step could flip
    gates = [Probe(group.layer, group, (unit,)) for unit in range(EXPERTS)]
    differences = gate_derivatives(moe, gates, step=2**-7).slopes
    (exact,), _, _ = gate_gradients(moe, [group], [])
    torch.testing.assert_close(differences, exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("criterion", ["auto", "removal", "activation", "magnitude", "random", "gate"])
def test_experts_are_removed(moe, criterion):
    """The pipeline's own path, from the plan to the smaller model; the report has every score."""
    options = pruning(pattern="experts", counts={"experts": 2}, criterion=criterion, estimator="backprop")
    plan = plan_mixes(moe.anatomy, options)
    kept, scores, *_ = remove_units(moe, plan, options)
    groups = moe.anatomy.of_kind("experts")
    assert set(kept.experts) == {group.layer for group in groups}
    assert all(len(units) == EXPERTS - 2 for units in kept.experts.values())
    assert len(scores.table) == len(groups) * EXPERTS
    small = shrunk(moe, kept)
    assert small.config.num_experts_per_tok == TOP_K
    assert getattr(small.config, moe.anatomy.family.experts.count) == EXPERTS - 2
    with gated(moe, kept):
        close(logits(small, moe.batches[0]), logits(moe.model, moe.batches[0]))


def test_unrouted_experts_go_first(moe, caplog):
    starve_(moe, expert=3)
    mass, reached = output_mass(moe, moe.anatomy.of_kind("experts"))
    for values, tokens in zip(mass, reached, strict=True):
        assert values[3] == 0 and tokens[3] == 0 and (values[tokens > 0] > 0).all()
        real = sum(int(batch["attention_mask"].sum()) for batch in moe.batches)
        assert tokens.sum() == real * TOP_K
    options = pruning(pattern="experts", counts={"experts": 1}, criterion="activation")
    kept, *_ = remove_units(moe, plan_mixes(moe.anatomy, options), options)
    assert all(3 not in units for units in kept.experts.values())
    assert "no calibration token was routed to experts [3]" in caplog.text


def test_units_tries_mixes_with_experts(backend):
    """Candidates are measured with their experts taken from the router, and the live weights come back. (On one
    micro-batch, which serves for the fit and for the comparison.)"""
    moe = make_problem(build("mixtral"), backend)
    moe = replace(moe, batches=moe.batches[:1])
    options = pruning(pattern="units", sparsity=0.4)
    plan = plan_mixes(moe.anatomy, options)
    assert any(mix.experts for mix in plan) and any(mix.layers for mix in plan)
    kept, _, trials, _, _ = remove_units(moe, plan, options)
    best = min(trials, key=lambda trial: trial.loss)
    small = shrunk(moe, kept)
    with torch.no_grad():
        totals = [moe.objective(small, batch) for batch in moe.batches]
    loss = float(sum(t.total.sum() for t in totals) / sum(t.count.sum() for t in totals))
    assert loss == pytest.approx(best.loss, abs=1e-4)


def test_fewer_experts_than_the_router_chooses(backend):
    anatomy = on_meta("qwen3_moe")
    with pytest.raises(
        UserError, match="asks 4 experts to go, the model has 5 .* of which 2 stay, as many as the router"
    ):
        plan_mixes(anatomy, pruning(pattern="experts", counts={"experts": 4}))
    with pytest.raises(UserError, match="of 5 experts 2 stay, as many as the router chooses"):
        plan_mixes(anatomy, pruning(pattern="experts", sparsity=0.75))
    largest = max(mixes(unit_sizes(anatomy), 0.3, ("experts",), 64))
    assert 0 < largest.experts <= EXPERTS - TOP_K


def write_checkpoint(folder: Path, model_type: str) -> None:
    """A tiny mixture of experts with a tokenizer of one word per id, and text in it."""
    build(model_type).save_pretrained(folder)
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(93))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    drawn = torch.randint(0, 93, (20, 30), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "text.txt").write_text("\n\n".join(" ".join(f"w{i}" for i in row) for row in drawn))


@pytest.mark.parametrize(
    ("model_type", "pattern", "criterion"),
    [("mixtral", "2:4", "wanda"), ("gpt_oss", "2:4", "magnitude"), ("qwen3_moe", "experts", "auto")],
)
def test_end_to_end(model_type, pattern, criterion, tmp_path):
    """From a folder to a folder: the report counts experts in whatever names the checkpoint has them."""
    write_checkpoint(tmp_path / "dense", model_type)
    asked = {
        "model.name": str(tmp_path / "dense"),
        "data.name": str(tmp_path / "dense" / "text.txt"),
        "data.num_samples": 3,
        "data.seq_len": 16,
        "data.eval_samples": 2,
        "evaluate.latency": False,
        "prune.pattern": pattern,
        "prune.criterion": criterion,
        "prune.counts": {"experts": 2} if pattern == "experts" else None,
        "output.dir": str(tmp_path / "small"),
    }
    report = compress(load_config(None, asked))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    parameters, left = report.parameters, sum(p.numel() for p in loaded.parameters())
    assert report.after["num_params"] == left
    if pattern == "experts":
        assert loaded.config.num_experts == EXPERTS - 2
        assert parameters["removed"] == parameters["dense"] - left > 0
        return
    parts = ("set_to_zero", "kept_by_pattern", "kept_not_a_layer_matrix")
    assert parameters["dense"] == left == sum(parameters[part] for part in parts) + parameters["targeted"] // 2
    assert report.sparsity["targeted_weights"] == 0.5
    zeros = sum(int((p == 0).sum()) for p in loaded.parameters())
    assert report.sparsity["zeros"] == parameters["set_to_zero"] == zeros
    experts = sum(p.numel() for n, p in loaded.named_parameters() if "experts" in n and "bias" not in n)
    assert parameters["targeted"] > experts > 0.5 * parameters["dense"]
