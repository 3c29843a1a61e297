"""Every model family, from tiny configs with random weights: removal is exact, checkpoints load, promises hold."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from tests.family_cases import (
    CASES,
    LAYERS,
    NO_HEADS,
    SEVERAL_STACKS,
    auto_class,
    build,
    choose,
    close,
    gated,
    logits,
    make_problem,
    on_meta,
    removable,
    shrunk,
)
from tests.removing import plan_mixes, remove_units
from tinygn_dist import compress
from tinygn_dist.backends.replicated import Replicated
from tinygn_dist.config import Config, PruneConfig, load_config
from tinygn_dist.errors import Refused, UserError
from tinygn_dist.estimate.partial_forward import PrefixCache, running_layers
from tinygn_dist.estimate.probes import Probe, measure
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths.unit_kinds import UNIT_KINDS
from tinygn_dist.models.anatomy import Matrix
from tinygn_dist.models.families import FAMILIES
from tinygn_dist.models.kept import KeptUnits
from tinygn_dist.models.objective import causal_lm, seq2seq_lm
from tinygn_dist.prune.sparsity.sparsify import sparsify
from tinygn_dist.prune.structured.layers_heads_channels import unit_sizes


@pytest.fixture(scope="module")
def backend() -> Replicated:
    return Replicated(Accelerator(cpu=True))


@pytest.fixture(params=CASES)
def problem(request, backend) -> Problem:
    return make_problem(build(request.param), backend)


def check_removal(problem: Problem, kinds: list[str], folder) -> None:
    kept, mix = choose(problem, kinds)
    small = shrunk(problem, kept)
    for batch in problem.batches:
        with gated(problem, kept):
            expected = logits(problem.model, batch)
        close(logits(small, batch), expected)
        assert not torch.allclose(expected, logits(problem.model, batch), atol=1e-3), "nothing was gated"

    before, after = (sum(p.numel() for p in m.parameters()) for m in (problem.model, small))
    gone = set(range(LAYERS)) - set(kept.layers)
    if len(problem.anatomy.stacks) > 1:
        promised = sum(problem.anatomy.layer_params[layer] for layer in gone)
        for group in problem.anatomy.groups:
            units = kept.of(group.kind).get(group.layer, range(group.num_units))
            for piece in group.slices:  # of heads some lie in layers that are gone
                if problem.anatomy.layer_of(piece.tensor) not in gone:
                    shape = problem.model.get_parameter(piece.tensor).shape
                    promised += (group.num_units - len(units)) * piece.width * shape.numel() // shape[piece.dim]
    else:
        promised = unit_sizes(problem.anatomy).removed_params(mix)
    assert before - after == promised

    small.save_pretrained(folder)
    loaded = auto_class(small.config).from_pretrained(folder).eval()
    for name, tensor in small.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    batch = problem.batches[0]
    close(logits(loaded, batch), logits(small, batch))  # kernels of fused experts depend on where tensors lie in memory
    if problem.objective in (causal_lm, seq2seq_lm):
        prompt = batch["input_ids"][::2]  # without padding
        asked = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
        asked["attention_mask"] = torch.ones_like(prompt)
        cached, plain = (loaded.generate(prompt, use_cache=use, **asked) for use in (True, False))
        assert torch.equal(cached, plain)


def test_every_listed_type_has_a_case():
    assert sorted(CASES) == sorted(
        name for family in FAMILIES if family.layers for name in family.model_types
    )  # others: test_filters


def test_kinds(problem):
    found = [
        kind for kind in UNIT_KINDS if kind not in ("filters", "hidden") and unit_sizes(problem.anatomy).most(kind)
    ]
    by_count = ["heads"] if problem.anatomy.family.stack_heads else []
    assert by_count + found == removable(problem.model.config.model_type)
    whole = {"hidden"} if problem.anatomy.hidden else set()
    assert set(UNIT_KINDS) - set(found) - whole == set(problem.anatomy.fixed)


@pytest.mark.parametrize(("model_type", "kind"), [(t, kind) for t in CASES for kind in removable(t)])
def test_removed_equals_gated(model_type, kind, backend, tmp_path):
    check_removal(make_problem(build(model_type), backend), [kind], tmp_path)


@pytest.mark.parametrize("model_type", SEVERAL_STACKS)
def test_layers_of_every_stack_go_by_their_number(model_type, backend):
    problem = make_problem(build(model_type), backend)
    (mix,) = plan_mixes(problem.anatomy, PruneConfig(pattern="layers", counts={"layers": 2}))
    kept, *_ = remove_units(problem, [mix], PruneConfig(pattern="layers", counts={"layers": 2}))
    assert kept.layers == (0, 2), "the first layer of each stack stays"
    with pytest.raises(UserError, match="asks 3 layers to go"):
        plan_mixes(problem.anatomy, PruneConfig(pattern="layers", counts={"layers": 3}))
    with pytest.raises(UserError, match="its 2 stacks differ in size.*prune.counts"):
        plan_mixes(problem.anatomy, PruneConfig(pattern="layers", sparsity=0.3))


def test_all_kinds_at_once(problem, tmp_path):
    model_type = problem.model.config.model_type
    check_removal(problem, removable(model_type) + ["layers"] * (model_type in SEVERAL_STACKS), tmp_path)


def test_restart_equals_full_forward(problem):
    if not problem.anatomy.starts_anywhere:  # its layers read more of earlier ones: everything runs whole
        assert problem.model.config.model_type == "gemma3n_text" and problem.anatomy.layers_path == ""
        return
    everything, batch = range(LAYERS), problem.batches[0]
    cache = PrefixCache()
    with cache.recording(problem.model, problem.anatomy, everything):
        full = logits(problem.model, batch)
    for layer in everything:
        with running_layers(problem.model, problem.anatomy, range(layer, LAYERS), (cache, layer)):
            assert torch.equal(logits(problem.model, batch), full)
    assert torch.equal(logits(problem.model, batch), full)


def test_removal_probes_equal_recomputation(problem):
    layers, probes = tuple(range(LAYERS)), [Probe(2)] if problem.anatomy.starts_anywhere else []
    last = {group.kind: group for group in problem.anatomy.groups}
    for group in last.values():
        probes += [Probe(group.layer, group, (1,)), Probe(group.layer, group, (0, 2)[: group.num_units - 1])]
    seen = measure(problem, probes)
    assert seen.differences.abs().max() > 1e-3
    for probe, found in zip(probes, seen.differences, strict=True):
        if probe.group is None:
            kept = KeptUnits(tuple(layer for layer in layers if layer != probe.layer))
        else:
            stays = tuple(unit for unit in range(probe.group.num_units) if unit not in probe.units)
            kept = KeptUnits(layers, **{probe.group.kind: {probe.layer: stays}})
        with torch.no_grad(), gated(problem, kept):
            totals = torch.cat([problem.objective(problem.model, batch).total for batch in problem.batches])
        torch.testing.assert_close(found, totals - seen.base, rtol=1e-4, atol=2e-4)


def input_axis(model: nn.Module, matrix: Matrix) -> int:
    """Dim of the stored parameter along which inputs lie, from the kind of module."""
    module = model.get_submodule(matrix.module)
    if isinstance(module, nn.Linear):
        return 1
    if isinstance(module, Conv1D):
        return 0
    return 1 if "GptOss" in type(module).__name__ else 2


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "obs"])
def test_two_of_four_along_inputs(problem, criterion):
    model, anatomy = problem.model, problem.anatomy
    parameters = {matrix.parameter for matrix in anatomy.matrices}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = sparsify(problem, anatomy.matrices, PruneConfig(pattern="2:4", criterion=criterion))
    kept = masks.kept(problem.backend)
    for matrix in anatomy.matrices:
        weight = model.get_parameter(matrix.parameter)
        groups = weight.movedim(input_axis(model, matrix), -1).reshape(-1, 4)
        held = torch.count_nonzero(groups, 1)  # the solver also zeroes kept weights of inputs that are always 0
        assert (held <= 2).all() if criterion == "obs" else (held == 2).all(), matrix.name
        assert kept[matrix.name] * 2 == matrix.numel
    sizes = {matrix.parameter: 0 for matrix in anatomy.matrices}
    for matrix in anatomy.matrices:
        assert matrix.start == sizes[matrix.parameter]  # matrices tile their parameter
        sizes[matrix.parameter] += matrix.numel
    for name, parameter in model.named_parameters():
        assert sizes.get(name, parameter.numel()) == parameter.numel()
        assert name in parameters or torch.equal(parameter, before[name])


@pytest.mark.parametrize("model_type", NO_HEADS)
def test_fixed_heads_name_the_reason(model_type):
    reasons = dict(
        olmo2="run over all heads",
        olmoe="run over all heads",
        convnext="no attention",
        gemma3n_text="have queries alone",
    )
    reason = reasons.get(model_type, "derives head_dim from")
    with pytest.raises(UserError, match=f"heads cannot be removed: .*{reason}"):
        plan_mixes(on_meta(model_type), PruneConfig(pattern="heads", sparsity=0.1))


@pytest.mark.parametrize("criterion", ["auto", "obs", "activation", "magnitude", "gate"])
def test_heads_of_t5_go_from_every_layer_of_a_stack(criterion, backend):
    """By number only; what is left of the live model computes what the smaller one will, whichever heads of each stack
    went."""
    problem = make_problem(build("t5"), backend)
    asked = PruneConfig(pattern="heads", counts={"heads": 1}, criterion=criterion, estimator="finite-difference")
    kept, *_ = remove_units(problem, plan_mixes(problem.anatomy, asked), asked)
    assert {layer: len(units) for layer, units in kept.heads.items()} == {0: 3, 2: 3}
    small = shrunk(problem, kept)
    assert small.config.num_heads == 3 and small.config.d_kv == 16
    close(logits(small, problem.batches[0]), logits(problem.model, problem.batches[0]))


def test_the_head_of_t5_that_goes_is_the_one_whose_loss_is_least(backend):
    problem = make_problem(build("t5"), backend)
    asked = PruneConfig(pattern="heads", counts={"heads": 1}, compensate=False)
    kept, *_ = remove_units(problem, plan_mixes(problem.anatomy, asked), asked)
    problem = make_problem(build("t5"), backend)
    for stack in (0, 2):
        losses = {}
        for gone in range(4):
            stays = tuple(head for head in range(4) if head != gone)
            with torch.no_grad(), gated(problem, KeptUnits(tuple(range(LAYERS)), heads={stack: stays})):
                losses[stays] = sum(float(problem.objective(problem.model, b).total.sum()) for b in problem.batches)
        assert kept.heads[stack] == min(losses, key=losses.get)


@pytest.mark.parametrize("asked", [dict(sparsity=0.1), dict(counts={"heads": 4})])
def test_heads_of_t5_go_by_their_number(asked):
    with pytest.raises(UserError, match="share one position bias.*prune.counts|asks 4 heads to go"):
        plan_mixes(on_meta("t5"), PruneConfig(pattern="heads", **asked))


def test_some_configs_fix_heads():
    factors = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[2.0] * 4)
    for model_type, changes in (("phi3", dict(rope_parameters=factors)), ("phi", dict(qk_layernorm=True))):
        with pytest.raises(UserError, match="heads cannot be removed: its .*(longrope|qk_layernorm)"):
            plan_mixes(on_meta(model_type, **changes), PruneConfig(pattern="heads", sparsity=0.1))


@pytest.mark.parametrize(
    ("model_type", "pattern", "reason"),
    [
        ("llama", "experts", "its feed-forward layers are dense"),
        ("mixtral", "channels", "mixtures of experts"),
        ("bloom", "channels", "4 . hidden_size"),
        ("qwen2_moe", "layers", "1 of its 4 layers have no experts"),
    ],
)
def test_other_refusals(model_type, pattern, reason):
    with pytest.raises(UserError, match=reason):
        plan_mixes(on_meta(model_type), PruneConfig(pattern=pattern, sparsity=0.1))


def test_refusals_come_before_weights(tmp_path):
    """A folder that holds a config and no weights is refused for what cannot be cut, not for the missing weights."""

    def ask(model_type, pattern, **changes) -> Config:
        config = AutoConfig.for_model(model_type, **changes)
        config.architectures = ["AnyForCausalLM"]
        config.save_pretrained(tmp_path / model_type)
        overrides = {"model.name": str(tmp_path / model_type), "output.dir": str(tmp_path / "out")}
        return load_config(None, overrides | {"prune.pattern": pattern, "prune.sparsity": 0.75})

    with pytest.raises(Refused, match="'ctrl' cannot be removed, supported: bart, bert, bloom"):
        compress(ask("ctrl", "channels", n_layer=1, n_embd=16, n_head=2, dff=16, vocab_size=32))
    with pytest.raises(UserError, match="heads cannot be removed: its config derives head_dim"):
        compress(ask("gpt2", "heads", **CASES["gpt2"]))
    with pytest.raises(UserError, match="as many as the router chooses"):
        compress(ask("mixtral", "experts", **CASES["mixtral"]))
