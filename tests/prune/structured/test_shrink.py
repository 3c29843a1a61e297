"""Physical removal: the smaller model computes what the dense one computes with those units shut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

from tests import plain, tiny
from tests.removing import plan_mixes
from tinygn_dist.config import PruneConfig
from tinygn_dist.errors import UserError
from tinygn_dist.maths.counts import Mix
from tinygn_dist.models.anatomy import Anatomy, read_anatomy
from tinygn_dist.models.kept import KeptUnits
from tinygn_dist.prune.structured.layers_heads_channels import unit_sizes
from tinygn_dist.prune.structured.shrink import smaller_config

CHANNELS = {0: list(range(0, 16)), 1: list(range(20, 36)), 2: [0, *range(30, 45)]}  # what goes; layers differ
HEADS = {0: [0], 1: [1], 2: [0]}
CASES = [
    (f, kind)
    for f in tiny.CONFIGS
    for kind in ("layers", "heads", "channels", "all")
    if not (kind in ("heads", "all") and f in tiny.FIXED_HEADS)
]


def kept_without(anatomy: Anatomy, gone_layers: list[int], heads: dict, channels: dict) -> KeptUnits:
    def stay(gone: dict[int, list[int]], count: int) -> dict[int, tuple[int, ...]]:
        return {
            layer: tuple(u for u in range(count) if u not in units)
            for layer, units in gone.items()
            if layer not in gone_layers
        }

    layers = tuple(layer for layer in range(anatomy.num_layers) if layer not in gone_layers)
    return KeptUnits(layers, stay(heads, 2), stay(channels, 48))


def shrink(model: nn.Module, anatomy: Anatomy, kept: KeptUnits) -> nn.Module:
    small = type(model)(smaller_config(model.config, anatomy, kept)).eval()
    small.load_state_dict(tiny.smaller_state(model.state_dict(), anatomy, kept), strict=True)
    small.tie_weights()
    return small


def cut(family: str, kind: str) -> tuple[nn.Module, nn.Module, nn.Module, Mix]:
    """The dense model, the reference made by plain code, the shrunk model, and the mix that went."""
    model = tiny.build(family)
    anatomy = read_anatomy(model, needs_units=True)
    layers = [1] if kind in ("layers", "all") else []
    heads = HEADS if kind in ("heads", "all") else {}
    channels = CHANNELS if kind in ("channels", "all") else {}
    reference = plain.without_units(model, family, "channels", channels)
    reference = plain.without_units(reference, family, "heads", heads)
    if layers:
        reference = plain.without_layers(reference, family, layers)
    small = shrink(model, anatomy, kept_without(anatomy, layers, heads, channels))
    return model, reference, small, Mix(len(layers), 1 if heads else 0, 16 if channels else 0)


@pytest.mark.parametrize("family, kind", CASES)
def test_outputs_equal_the_dense_model_with_the_units_shut(family: str, kind: str):
    """Biases of removed units, kv groups, fused projections and layer indices all have to be right for this."""
    model, reference, small, _ = cut(family, kind)
    for batch in tiny.batches(family):
        wanted = plain.logits(reference, batch)
        torch.testing.assert_close(plain.logits(small, batch), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
        assert (plain.logits(model, batch) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("family, kind", CASES)
def test_the_parameters_that_go_are_those_that_were_promised(family: str, kind: str):
    model, _, small, mix = cut(family, kind)
    gone = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
    assert gone == unit_sizes(read_anatomy(model, needs_units=True)).removed_params(mix) > 0


@pytest.mark.parametrize("family, kind", CASES)
def test_stock_classes_load_what_was_cut(tmp_path: Path, family: str, kind: str):
    """Config and weights agree: no key is missing, unexpected or re-initialised."""
    _, _, small, _ = cut(family, kind)
    small.save_pretrained(tmp_path)
    loaded, info = type(small).from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    batch = tiny.batches(family)[0]
    assert torch.equal(plain.logits(loaded.eval(), batch), plain.logits(small, batch))
    anatomy = read_anatomy(loaded, needs_units=True)
    assert anatomy.num_layers == (2 if kind in ("layers", "all") else 3)
    assert {g.num_units for g in anatomy.of_kind("channels")} == ({32} if kind in ("channels", "all") else {48})


@pytest.mark.parametrize("family", tiny.GROUPED_HEADS)
@pytest.mark.parametrize("kind", ["heads", "all"])
def test_whole_kv_groups_go_and_head_dim_stays(family: str, kind: str):
    model, _, small, _ = cut(family, kind)
    before, after = model.config, small.config
    dim = getattr(before, "head_dim", None) or before.hidden_size // before.num_attention_heads
    assert after.head_dim == dim and after.hidden_size == before.hidden_size
    assert (after.num_attention_heads, after.num_key_value_heads) == (2, 1)
    assert before.num_attention_heads // before.num_key_value_heads == 2  # the ratio is kept


@pytest.mark.parametrize("family, kind", [case for case in CASES if case[0] in tiny.CAUSAL])
def test_generation_gives_the_same_tokens_with_and_without_cache(tmp_path: Path, family: str, kind: str):
    """A batch of two, left-padded, after a reload: head counts sized the cache, layer indices address it."""
    _, _, small, _ = cut(family, kind)
    small.save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(3, tiny.VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    asked = dict(attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    cached, plainly = (loaded.generate(ids, use_cache=flag, **asked) for flag in (True, False))
    assert torch.equal(cached, plainly) and cached.shape == (2, 13)


def test_tied_embeddings_stay_tied():
    _, _, small, _ = cut("llama-tied", "all")
    assert small.lm_head.weight is small.model.embed_tokens.weight


def test_gemma2_keeps_the_kind_of_each_layer_that_stays():
    model, _, small, _ = cut("gemma2", "layers")
    types = model.config.layer_types
    assert small.config.layer_types == [types[0], types[2]] and types[0] != types[1]


def test_gpt2_without_a_written_ffn_width(tmp_path: Path):
    """n_inner null means 4 * n_embd; after a cut the true number must be written."""
    model = tiny.build("gpt2", n_inner=None)
    anatomy = read_anatomy(model, needs_units=True)
    channels = {layer: tuple(range(layer, layer + 100)) for layer in range(3)}
    small = shrink(model, anatomy, KeptUnits((0, 1, 2), {}, channels))
    gone = {layer: [u for u in range(128) if u not in units] for layer, units in channels.items()}
    reference = plain.without_units(model, "gpt2", "channels", gone)
    batch = tiny.batches("gpt2")[0]
    torch.testing.assert_close(plain.logits(small, batch), plain.logits(reference, batch), rtol=1e-4, atol=1e-4)
    small.save_pretrained(tmp_path)
    assert hf.AutoConfig.from_pretrained(tmp_path).n_inner == 100


def test_a_single_layer_and_one_channel_block_may_stay():
    model = tiny.build("llama")
    anatomy = read_anatomy(model, needs_units=True)
    small = shrink(model, anatomy, KeptUnits((2,), {2: (1,)}, {2: (47,)}))
    reference = plain.without_units(model, "llama", "channels", {2: list(range(47))})
    reference = plain.without_units(reference, "llama", "heads", {2: [0]})
    reference = plain.without_layers(reference, "llama", [0, 1])
    batch = tiny.batches("llama")[0]
    torch.testing.assert_close(plain.logits(small, batch), plain.logits(reference, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", tiny.FIXED_HEADS)
def test_heads_that_no_config_can_express_are_refused_with_the_reason(family: str):
    anatomy = read_anatomy(tiny.build(family), needs_units=True)
    with pytest.raises(
        UserError, match="head_dim from hidden_size.*use --pattern .*(layers or channels|channels or layers)"
    ):
        plan_mixes(anatomy, PruneConfig(pattern="heads", sparsity=0.1))
    assert all(mix.heads == 0 for mix in plan_mixes(anatomy, PruneConfig(pattern="units", sparsity=0.2, multiple_of=8)))


@pytest.mark.parametrize(
    "asked, part",
    [
        (dict(pattern="layers", sparsity=0.9), "at least one of each"),
        (dict(pattern="heads", sparsity=0.5), "cannot remove 50%"),
        (dict(pattern="layers", protect=(5,)), "layers 0 to 2"),
        (dict(pattern="channels", protect=(0,)), "use --pattern layers"),
        (dict(pattern="layers", counts={"layers": 3}), "asks 3 layers to go, the model has 3"),
        (dict(pattern="layers", counts={"channels": 1}), "asks 1 channels to go, the model has 48"),
    ],
)
def test_impossible_plans_are_refused_before_weights_load(asked: dict, part: str):
    with torch.device("meta"):
        anatomy = read_anatomy(hf.AutoModelForCausalLM.from_config(tiny.CONFIGS["llama"]()), needs_units=True)
    with pytest.raises(UserError) as caught:
        plan_mixes(anatomy, PruneConfig(**asked))
    assert part in str(caught.value)
