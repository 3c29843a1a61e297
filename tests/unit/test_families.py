"""Every model family, from tiny configs with random weights: removal is exact, checkpoints load, promises hold.

One row of CASES per model type that `families.py` lists; each test runs over all of them.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

from tinygn_dist.anatomy import Target, read_anatomy
from tinygn_dist.backends.replicated import Replicated
from tinygn_dist.budget import Mix, mixes
from tinygn_dist.config import UNIT_KINDS, Config, PruneConfig, load_config
from tinygn_dist.errors import Refused, UserError
from tinygn_dist.estimate.activations import input_moments
from tinygn_dist.estimate.backprop import gate_gradients
from tinygn_dist.estimate.experts import ExpertObserver, output_mass
from tinygn_dist.estimate.hooks import InputGate, LayerGate, attached
from tinygn_dist.estimate.probes import Probe, gate_derivatives, measure
from tinygn_dist.estimate.restart import PrefixCache, running_layers
from tinygn_dist.estimate.setting import Setting
from tinygn_dist.families import FAMILIES, supported
from tinygn_dist.objective import causal_lm, classification
from tinygn_dist.progress import Progress
from tinygn_dist.shrink import smaller_config, smaller_state
from tinygn_dist.units import KeptUnits, plan_mixes, remove_units, unit_sizes
from tinygn_dist.weights import sparsify

LAYERS, HEADS, KV_HEADS, HIDDEN, WIDTH, EXPERTS, TOP_K, VOCAB = 4, 4, 2, 32, 48, 5, 2, 96
_BASE = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    intermediate_size=WIDTH,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
_GROUPED = _BASE | dict(num_key_value_heads=KV_HEADS)
_OWN_HEAD_DIM = _GROUPED | dict(head_dim=16)  # not hidden / heads
_ENCODER = _BASE | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3)
_MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
_MOE = _OWN_HEAD_DIM | dict(num_experts_per_tok=TOP_K, moe_intermediate_size=24)

CASES = {
    "llama": _GROUPED | dict(attention_bias=True, mlp_bias=True),
    "mistral": _GROUPED | dict(sliding_window=6),
    "qwen2": _GROUPED,
    "qwen3": _OWN_HEAD_DIM,
    "gemma": _OWN_HEAD_DIM,
    "gemma2": _OWN_HEAD_DIM | dict(sliding_window=4, layer_types=_MIXED),
    "gemma3_text": _OWN_HEAD_DIM | dict(sliding_window=4, layer_types=_MIXED),
    "smollm3": _GROUPED | dict(no_rope_layers=[1, 0, 1, 1]),
    "granite": _GROUPED | dict(residual_multiplier=0.5, attention_multiplier=0.3),
    "olmo2": _GROUPED,
    "phi": _GROUPED,
    "phi3": _GROUPED,
    "gpt2": dict(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=64, n_inner=WIDTH)
    | dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2),
    "gpt_neox": _BASE,
    "bloom": dict(vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS, tie_word_embeddings=False),
    "falcon": _BASE | dict(ffn_hidden_size=WIDTH, new_decoder_architecture=True, num_kv_heads=KV_HEADS, bias=True),
    "opt": _BASE | dict(ffn_dim=WIDTH, word_embed_proj_dim=HIDDEN, dropout=0.0),
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "xlm-roberta": _ENCODER,
    "camembert": _ENCODER,
    "electra": _ENCODER | dict(embedding_size=16),
    "distilbert": dict(vocab_size=VOCAB, dim=HIDDEN, n_layers=LAYERS, n_heads=HEADS, hidden_dim=WIDTH, num_labels=3)
    | dict(dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0),
    "vit": _ENCODER | dict(image_size=8, patch_size=4),
    "mixtral": _OWN_HEAD_DIM | dict(num_local_experts=EXPERTS, num_experts_per_tok=TOP_K),
    "qwen2_moe": _MOE | dict(num_experts=EXPERTS, shared_expert_intermediate_size=20, mlp_only_layers=[1]),
    "qwen3_moe": _MOE | dict(num_experts=EXPERTS, norm_topk_prob=False),
    "gpt_oss": _OWN_HEAD_DIM
    | dict(num_local_experts=EXPERTS, num_experts_per_tok=TOP_K, sliding_window=4, layer_types=_MIXED)
    | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4)),
}
MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
NO_HEADS = ("olmo2", "gpt2", "gpt_neox", "bloom", "falcon", "opt", "bert", "roberta", "xlm-roberta", "camembert")
NO_HEADS += ("electra", "distilbert", "vit")


def removable(model_type: str) -> list[str]:
    """What must be removable from the tiny model, written down here rather than read from the product."""
    kinds = [] if model_type == "qwen2_moe" else ["layers"]  # one of its layers is dense
    kinds += [] if model_type in NO_HEADS else ["heads"]
    kinds += [] if model_type in (*MOE, "bloom") else ["channels"]
    return kinds + (["experts"] if model_type in MOE else [])


def auto_class(config):
    if config.model_type == "vit":
        return AutoModelForImageClassification
    return AutoModelForSequenceClassification if getattr(config, "num_labels", 2) == 3 else AutoModelForCausalLM


def build(model_type: str, **changes) -> nn.Module:
    """A tiny model in eval mode whose parameters (biases and norms too) are all random."""
    config = AutoConfig.for_model(model_type, **CASES[model_type] | changes)
    torch.manual_seed(1)
    model = auto_class(config).from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 and "norm" in name.lower() else 0.0, 0.2)
    return model


@pytest.fixture(scope="module")
def backend() -> Replicated:
    return Replicated(Accelerator(cpu=True))


@pytest.fixture(params=CASES)
def setting(request, backend) -> Setting:
    return make_setting(build(request.param), backend)


@pytest.fixture(params=MOE)
def moe(request, backend) -> Setting:
    return make_setting(build(request.param), backend)


def make_setting(model: nn.Module, backend: Replicated) -> Setting:
    anatomy = read_anatomy(model, needs_units=True)
    objective = causal_lm if auto_class(model.config) is AutoModelForCausalLM else classification
    return Setting(model, anatomy, objective, batches_for(model), backend, Progress(shown=False))


def batches_for(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(2)
    if model.config.model_type == "vit":
        return [{"pixel_values": torch.randn(3, 3, 8, 8), "labels": torch.tensor([0, 2, 1])} for _ in range(2)]
    batches = []
    for _ in range(2):
        tokens, mask = torch.randint(3, VOCAB, (3, 10)), torch.ones(3, 10, dtype=torch.int64)
        mask[1, 7:] = 0
        tokens[mask == 0] = 0
        if auto_class(model.config) is AutoModelForCausalLM:
            labels = tokens.masked_fill(mask == 0, -100)
        else:
            labels = torch.tensor([0, 2, 1])
        batches.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return batches


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of real tokens (of every sequence, for classifiers)."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        out = model(**inputs).logits
    return out[batch["attention_mask"].bool()] if out.dim() == 3 else out


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def choose(setting: Setting, kinds: list[str], seed: int = 0) -> tuple[KeptUnits, Mix]:
    """Some units to keep, other ones in every layer, and the mix that says how many went."""
    generator = torch.Generator().manual_seed(seed)
    anatomy = setting.anatomy
    layers = tuple(layer for layer in range(LAYERS) if "layers" not in kinds or layer != 1)
    kept, gone = {}, {"layers": LAYERS - len(layers)}
    for kind in set(kinds) - {"layers"}:
        for group in anatomy.of_kind(kind):
            stays = {"heads": 1, "channels": group.num_units - 16, "experts": group.num_units - 2}[kind]
            order = torch.randperm(group.num_units, generator=generator)[:stays]
            gone[kind] = group.num_units - stays
            if group.layer in layers:
                kept.setdefault(kind, {})[group.layer] = tuple(sorted(order.tolist()))
    return KeptUnits(layers, **kept), Mix(**gone)


@contextlib.contextmanager
def gated(setting: Setting, kept: KeptUnits):
    """The full model with everything that is not kept shut, by means of this test where the product has its own."""
    model, anatomy = setting.model, setting.anatomy
    hooks, handles = [], []
    for group in anatomy.groups:
        units = kept.of(group.kind).get(group.layer)
        if units is None:
            continue
        gone = torch.ones(group.num_units, dtype=torch.bool)
        gone[list(units)] = False
        if group.kind == "experts":
            router = model.get_submodule(group.router)
            handles.append(router.register_forward_hook(lambda m, _, out, gone=gone: route(m, out[0], gone)))
        else:
            hooks.append((model.get_submodule(group.output), InputGate((~gone).float(), group.output_width)))
    for layer in set(range(LAYERS)) - set(kept.layers):
        hooks.append((model.get_submodule(f"{anatomy.layers_path}.{layer}"), LayerGate(torch.tensor(0.0))))
    try:
        with attached(hooks):
            yield model
    finally:
        for handle in handles:
            handle.remove()


def route(router: nn.Module, scores: torch.Tensor, gone: torch.Tensor):
    """The routing rules of the four classes, with some experts' logits at -inf."""
    masked = scores.masked_fill(gone, -torch.inf)
    if "GptOss" in type(router).__name__:
        top, chosen = masked.topk(router.top_k)
        return scores, top.softmax(-1), chosen
    top, chosen = masked.float().softmax(-1).topk(router.top_k)
    if "Mixtral" in type(router).__name__ or router.norm_topk_prob:
        top = top / top.sum(-1, keepdim=True)
    return scores, top, chosen


def shrunk(setting: Setting, kept: KeptUnits) -> nn.Module:
    model, anatomy = setting.model, setting.anatomy
    config = smaller_config(model.config, anatomy, kept)
    small = auto_class(config).from_config(config)
    small.load_state_dict(smaller_state(model.state_dict(), anatomy, kept), strict=True)
    small.tie_weights()
    return small.eval()


def check_removal(setting: Setting, kinds: list[str], folder) -> None:
    kept, mix = choose(setting, kinds)
    small = shrunk(setting, kept)
    for batch in setting.batches:
        with gated(setting, kept):
            expected = logits(setting.model, batch)
        close(logits(small, batch), expected)
        assert not torch.allclose(expected, logits(setting.model, batch), atol=1e-3), "nothing was gated"

    before, after = (sum(p.numel() for p in m.parameters()) for m in (setting.model, small))
    assert before - after == unit_sizes(setting.anatomy).removed_params(mix)

    small.save_pretrained(folder)
    loaded = auto_class(small.config).from_pretrained(folder).eval()
    for name, tensor in small.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    batch = setting.batches[0]
    close(logits(loaded, batch), logits(small, batch))  # kernels of fused experts depend on where tensors lie in memory
    if setting.objective is causal_lm:
        prompt = batch["input_ids"][::2]  # without padding
        asked = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
        asked["attention_mask"] = torch.ones_like(prompt)
        cached, plain = (loaded.generate(prompt, use_cache=use, **asked) for use in (True, False))
        assert torch.equal(cached, plain)


def test_every_listed_type_has_a_case():
    assert sorted(CASES) == sorted(name for family in FAMILIES for name in family.model_types)


def test_kinds(setting):
    found = [k for k in UNIT_KINDS if k == "layers" or setting.anatomy.of_kind(k)]
    assert [k for k in found if unit_sizes(setting.anatomy).most(k)] == removable(setting.model.config.model_type)
    for kind in set(UNIT_KINDS) - set(found):
        assert setting.anatomy.fixed[kind]


@pytest.mark.parametrize("kind", UNIT_KINDS)
def test_removed_equals_gated(setting, kind, tmp_path):
    if kind not in removable(setting.model.config.model_type):
        pytest.skip(f"{kind} stay: {setting.anatomy.fixed.get(kind, 'layers of two sizes')}")
    check_removal(setting, [kind], tmp_path)


def test_all_kinds_at_once(setting, tmp_path):
    check_removal(setting, removable(setting.model.config.model_type), tmp_path)


def test_restart_equals_full_forward(setting):
    everything, batch = range(LAYERS), setting.batches[0]
    cache = PrefixCache()
    with cache.recording(setting.model, setting.anatomy, everything):
        full = logits(setting.model, batch)
    for layer in everything:
        with running_layers(setting.model, setting.anatomy, range(layer, LAYERS), (cache, layer)):
            assert torch.equal(logits(setting.model, batch), full)
    assert torch.equal(logits(setting.model, batch), full)


def test_removal_probes_equal_recomputation(setting):
    layers, probes = tuple(range(LAYERS)), [Probe(2)]
    last = {group.kind: group for group in setting.anatomy.groups}
    for group in last.values():
        probes += [Probe(group.layer, group, (1,)), Probe(group.layer, group, (0, 2)[: group.num_units - 1])]
    seen = measure(setting, probes)
    assert seen.differences.abs().max() > 1e-3
    for probe, found in zip(probes, seen.differences, strict=True):
        if probe.group is None:
            kept = KeptUnits(tuple(layer for layer in layers if layer != probe.layer))
        else:
            stays = tuple(unit for unit in range(probe.group.num_units) if unit not in probe.units)
            kept = KeptUnits(layers, **{probe.group.kind: {probe.layer: stays}})
        with torch.no_grad(), gated(setting, kept):
            totals = torch.cat([setting.objective(setting.model, batch).total for batch in setting.batches])
        torch.testing.assert_close(found, totals - seen.base, rtol=1e-4, atol=2e-4)


def input_axis(model: nn.Module, target: Target) -> int:
    """Dim of the stored parameter along which inputs lie, from the kind of module."""
    module = model.get_submodule(target.module)
    if isinstance(module, nn.Linear):
        return 1
    if isinstance(module, Conv1D):
        return 0
    return 1 if "GptOss" in type(module).__name__ else 2


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "obs"])
def test_two_of_four_along_inputs(setting, criterion):
    model, anatomy = setting.model, setting.anatomy
    parameters = {target.parameter for target in anatomy.targets}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = sparsify(setting, anatomy.targets, PruneConfig(pattern="2:4", criterion=criterion))
    kept = masks.kept(setting.backend)
    for target in anatomy.targets:
        weight = model.get_parameter(target.parameter)
        groups = weight.movedim(input_axis(model, target), -1).reshape(-1, 4)
        held = torch.count_nonzero(groups, 1)  # the solver also zeroes kept weights of inputs that are always 0
        assert (held <= 2).all() if criterion == "obs" else (held == 2).all(), target.name
        assert kept[target.name] * 2 == target.numel
    sizes = {target.parameter: 0 for target in anatomy.targets}
    for target in anatomy.targets:
        assert target.start == sizes[target.parameter]  # targets tile their parameter
        sizes[target.parameter] += target.numel
    for name, parameter in model.named_parameters():
        assert sizes.get(name, parameter.numel()) == parameter.numel()
        assert name in parameters or torch.equal(parameter, before[name])


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
@pytest.mark.parametrize("criterion", ["magnitude", "random", "taylor", "fisher", "wanda"])
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


def test_expert_gates_agree(moe):
    """Finite differences and backpropagation measure the same gates on experts' outputs."""
    group = moe.anatomy.of_kind("experts")[-1]  # no later router whose choice a step could flip
    gates = [Probe(group.layer, group, (unit,)) for unit in range(EXPERTS)]
    differences, _ = gate_derivatives(moe, gates, 1e-2)
    (exact,), _, _ = gate_gradients(moe, [group], [])
    torch.testing.assert_close(differences, exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("criterion", ["auto", "removal", "activation", "magnitude", "random", "gate"])
def test_experts_are_removed(moe, criterion):
    """The pipeline's own path, from the plan to the smaller model; the report has every score."""
    options = PruneConfig(pattern="experts", counts={"experts": 2}, criterion=criterion, estimator="backprop")
    plan = plan_mixes(moe.anatomy, options)
    kept, scores, _ = remove_units(moe, plan, options)
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
    kept, _, _ = remove_units(moe, plan_mixes(moe.anatomy, options), options)
    assert all(3 not in units for units in kept.experts.values())
    assert "no calibration token was routed to experts [3]" in caplog.text


def test_units_tries_mixes_with_experts(backend):
    """Candidates are measured with their experts taken from the router, and the live weights come back."""
    moe = make_setting(build("mixtral"), backend)
    options = PruneConfig(pattern="units", sparsity=0.4)
    plan = plan_mixes(moe.anatomy, options)
    assert any(mix.experts for mix in plan) and any(mix.layers for mix in plan)
    kept, _, trials = remove_units(moe, plan, options)
    best = min(trials, key=lambda trial: trial.loss)
    small = shrunk(moe, kept)
    with torch.no_grad():
        totals = [moe.objective(small, batch) for batch in moe.batches]
    loss = float(sum(t.total.sum() for t in totals) / sum(t.count.sum() for t in totals))
    assert loss == pytest.approx(best.loss, abs=1e-4)


def test_fewer_experts_than_the_router_chooses(backend):
    anatomy = on_meta("qwen3_moe")
    with pytest.raises(UserError, match="2 of 5 experts, as many as the router chooses"):
        plan_mixes(anatomy, PruneConfig(pattern="experts", counts={"experts": 4}))
    with pytest.raises(UserError, match="2 of 5 experts, as many as the router chooses"):
        plan_mixes(anatomy, PruneConfig(pattern="experts", sparsity=0.75))
    largest = max(mixes(unit_sizes(anatomy), 0.3, ("experts",), 64))
    assert 0 < largest.experts <= EXPERTS - TOP_K


def on_meta(model_type: str, **changes):
    """Anatomy without weights: a refusal from it comes before weights load."""
    config = AutoConfig.for_model(model_type, **CASES[model_type] | changes)
    with torch.device("meta"):
        return read_anatomy(auto_class(config).from_config(config), needs_units=True)


@pytest.mark.parametrize("model_type", NO_HEADS)
def test_fixed_heads_name_the_reason(model_type):
    reason = "run over all heads" if model_type == "olmo2" else "derives head_dim from"
    with pytest.raises(UserError, match=f"heads cannot be removed: its .*{reason}"):
        plan_mixes(on_meta(model_type), PruneConfig(pattern="heads", sparsity=0.1))


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
    from tinygn_dist import compress

    def ask(model_type, pattern, **changes) -> Config:
        config = AutoConfig.for_model(model_type, **changes)
        config.architectures = ["CtrlForCausalLM"]
        config.save_pretrained(tmp_path / model_type)
        overrides = {"model.name": str(tmp_path / model_type), "output.dir": str(tmp_path / "out")}
        return load_config(None, overrides | {"prune.pattern": pattern, "prune.sparsity": 0.75})

    with pytest.raises(Refused, match="'ctrl' cannot be removed, supported: bert, bloom"):
        compress(ask("ctrl", "channels", n_layer=1, n_embd=16, n_head=2, dff=16, vocab_size=32))
    with pytest.raises(UserError, match="gpt2.*|heads cannot be removed"):
        compress(ask("gpt2", "heads", **CASES["gpt2"]))
    with pytest.raises(UserError, match="as many as the router chooses"):
        compress(ask("mixtral", "experts", **CASES["mixtral"]))
    assert "gpt_oss" in supported()
