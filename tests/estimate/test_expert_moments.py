"""Fused experts as targets and as units, from tiny mixtures of experts in every storage layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.family_cases import EXPERTS, MOE, TOP_K, build, close, gated, logits, make_setting, on_meta, shrunk
from tinygn_dist import compress
from tinygn_dist.backends.replicated import Replicated
from tinygn_dist.config import PruneConfig, load_config
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.backprop import gate_gradients, weight_gradients
from tinygn_dist.estimate.expert_moments import ExpertObserver, output_mass
from tinygn_dist.estimate.gates import gate_derivatives
from tinygn_dist.estimate.gradient_energy import loss_moments
from tinygn_dist.estimate.hooks import attached
from tinygn_dist.estimate.input_moments import input_moments
from tinygn_dist.estimate.probes import Probe
from tinygn_dist.estimate.problem import Setting
from tinygn_dist.maths.counts import mixes
from tinygn_dist.prune.sparsity.mask_selection import keep_n_of_m
from tinygn_dist.prune.sparsity.sparsify import sparsify
from tinygn_dist.prune.structured.layers_heads_channels import plan_mixes, remove_units, unit_sizes


@pytest.fixture(scope="module")
def backend() -> Replicated:
    return Replicated(Accelerator(cpu=True))


@pytest.fixture(params=MOE)
def moe(request, backend) -> Setting:
    return make_setting(build(request.param), backend)


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
@pytest.mark.parametrize("criterion", ["magnitude", "random", "taylor", "fisher", "wanda", "ria", "gblm"])
def test_experts_unstructured(moe, scope, criterion):
    asked = PruneConfig(pattern="unstructured", sparsity=0.5, criterion=criterion, scope=scope)
    targets = moe.anatomy.targets
    kept = sparsify(moe, targets, asked).kept(moe.backend)
    if scope == "global":
        assert sum(kept.values()) * 2 == sum(target.numel for target in targets)
        assert all(kept.values())
    else:
        assert all(kept[target.name] * 2 == target.numel for target in targets)
    held = [torch.count_nonzero(moe.model.get_parameter(name)) for name in {t.parameter for t in targets}]
    assert sum(kept.values()) == sum(held)


@pytest.mark.parametrize("criterion", ["wanda", "obs", "taylor"])
def test_unreached_experts_keep_their_largest(moe, criterion, caplog):
    starve_(moe, expert=3)
    targets = [target for target in moe.anatomy.targets if target.index == 3]
    before = {t.name: t.matrix(t.within(moe.model.get_parameter(t.parameter).detach())).clone() for t in targets}
    scope = "layer" if criterion == "obs" else "global"
    asked = PruneConfig(pattern="unstructured", sparsity=0.5, criterion=criterion, scope=scope)
    kept = sparsify(moe, moe.anatomy.targets, asked).kept(moe.backend)
    assert "no calibration token reached experts [3]" in caplog.text
    for target in targets:
        after = target.matrix(target.within(moe.model.get_parameter(target.parameter).detach()))
        assert kept[target.name] * 2 == target.numel
        staying = after != 0
        torch.testing.assert_close(after[staying], before[target.name][staying])
        if criterion != "obs":  # the solver spreads its quota over blocks of columns
            assert before[target.name][staying].abs().min() >= before[target.name][~staying].abs().max()


def starve_(setting: Setting, expert: int) -> None:
    """No token goes to one expert of any layer: the router's choice of it is turned to the next one."""
    for group in setting.anatomy.of_kind("experts"):
        router = setting.model.get_submodule(group.router)
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
        target = next(t for t in moe.anatomy.targets if t.name == f"{group.output}.down_proj[{routed.expert}]")
        down = target.matrix(target.within(experts.down_proj))
        bias = experts.down_proj_bias[routed.expert] if experts.has_bias else 0
        rebuilt.index_add_(0, routed.tokens, (routed.inner @ down.t() + bias) * routed.weights[:, None])
        torch.testing.assert_close(routed.rows, recorded["hidden"][routed.tokens])
    close(rebuilt, recorded["out"])

    found = input_moments(replace(moe, batches=[batch]), moe.anatomy.targets, full=True)
    real = batch["attention_mask"].flatten().bool()
    for routed in seen:
        for leaf, rows in (("gate_up_proj", routed.rows), ("down_proj", routed.inner)):
            name = f"{group.output}.{leaf}[{routed.expert}]"
            rows = rows[real[routed.tokens]]
            torch.testing.assert_close(found.moments.rounded(name), rows.t() @ rows, rtol=1e-4, atol=1e-4)


def test_expert_gradients(moe):
    """One sample per micro-batch, each expert with its own part of the fused parameter's gradient."""
    targets = [target for target in moe.anatomy.targets if target.index is not None]
    found = weight_gradients(moe, targets, squares=True)
    expected = dict.fromkeys((target.name for target in targets), 0)
    for batch in moe.batches:
        moe.model.zero_grad()
        moe.objective(moe.model, batch).mean().backward()
        for target in targets:
            grad = moe.model.get_parameter(target.parameter).grad[target.index]
            expected[target.name] = expected[target.name] + grad.square()
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

    found = loss_moments(moe, [target for target in moe.anatomy.targets if target.module == path], 4.0)
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
    options = PruneConfig(pattern="unstructured", sparsity=0.6, allocation=allocation)
    targets = moe.anatomy.targets
    kept = sparsify(moe, targets, options).kept(moe.backend)
    reached = [target for target in targets if target.index != 3]
    if allocation == 0:
        assert all(kept[target.name] == target.numel - round(0.6 * target.numel) for target in targets)
    else:
        total = sum(target.numel for target in reached)
        assert sum(kept[target.name] for target in reached) == total - round(0.6 * total)
    for target in set(targets) - set(reached):
        assert kept[target.name] == target.numel - round(0.6 * target.numel)


def test_wanda_weighs_each_expert_by_its_own_inputs(moe):
    group, seen = moe.anatomy.of_kind("experts")[-1], {}
    targets = [target for target in moe.anatomy.targets if target.module == group.output]
    found = input_moments(moe, targets, full=False)
    for target in targets:
        weight = target.matrix(moe.model.get_parameter(target.parameter)[target.index]).detach()
        norms = found.moments.rounded(target.name).sqrt()
        seen[target.name] = keep_n_of_m(weight.abs() * norms, 2, 4) if norms.any() else None
    sparsify(moe, targets, PruneConfig(pattern="2:4", criterion="wanda"))
    for target in targets:
        weight = target.matrix(moe.model.get_parameter(target.parameter)[target.index])
        assert seen[target.name] is None or torch.equal(weight != 0, seen[target.name])


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
    options = PruneConfig(pattern="experts", counts={"experts": 2}, criterion=criterion, estimator="backprop")
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
    options = PruneConfig(pattern="experts", counts={"experts": 1}, criterion="activation")
    kept, *_ = remove_units(moe, plan_mixes(moe.anatomy, options), options)
    assert all(3 not in units for units in kept.experts.values())
    assert "no calibration token was routed to experts [3]" in caplog.text


def test_units_tries_mixes_with_experts(backend):
    """Candidates are measured with their experts taken from the router, and the live weights come back. (On one micro-batch, which
    serves for the fit and for the comparison.)"""
    moe = make_setting(build("mixtral"), backend)
    moe = replace(moe, batches=moe.batches[:1])
    options = PruneConfig(pattern="units", sparsity=0.4)
    plan = plan_mixes(moe.anatomy, options)
    assert any(mix.experts for mix in plan) and any(mix.layers for mix in plan)
    kept, _, trials, _ = remove_units(moe, plan, options)
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
        plan_mixes(anatomy, PruneConfig(pattern="experts", counts={"experts": 4}))
    with pytest.raises(UserError, match="of 5 experts 2 stay, as many as the router chooses"):
        plan_mixes(anatomy, PruneConfig(pattern="experts", sparsity=0.75))
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
