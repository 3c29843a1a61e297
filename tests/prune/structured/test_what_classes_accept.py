"""Smaller models that the class itself accepts: head counts, layers whose number matters, and dtypes of every
tensor."""

from __future__ import annotations

import inspect
import re
import sys

import pytest
import torch
import transformers as hf
from accelerate import Accelerator

from tests.family_cases import CASES, auto_class, build, choose, gated, logits, make_problem, on_meta, shrunk
from tests.removing import plan_mixes
from tinygn_dist.backends.replicated import Replicated
from tinygn_dist.config import PruneConfig
from tinygn_dist.errors import UserError
from tinygn_dist.models.kept import KeptUnits
from tinygn_dist.prune.structured.shrink import in_dtypes, smaller_config, smaller_origin

EIGHT_GROUPS = dict(num_attention_heads=16, num_key_value_heads=8, hidden_size=64, head_dim=4)
GROUPED = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text", "granite", "phi", "phi3")
GROUPED += ("mixtral", "qwen3_moe", "gpt_oss")
DIVIDES_HIDDEN_SIZE = ("llama", "gemma2", "gemma3_text")
"""classes whose config wants the hidden size to be a multiple of the number of heads (transformers 5.24)"""


@pytest.fixture(scope="module")
def backend() -> Replicated:
    return Replicated(Accelerator(cpu=True))


@pytest.mark.parametrize("model_type", GROUPED)
def test_only_head_counts_that_the_class_accepts_are_offered(model_type: str, tmp_path):
    """Every count that is offered survives a round trip through the files; no count that would is left out."""
    anatomy = on_meta(model_type, **EIGHT_GROUPS)
    config = hf.AutoConfig.for_model(model_type, **CASES[model_type] | EIGHT_GROUPS)
    layers = range(anatomy.num_layers)
    writable = []
    for count in range(1, 9):
        kept = KeptUnits(tuple(layers), heads=dict.fromkeys(layers, tuple(range(count))))
        small = smaller_config(config, anatomy, kept)
        try:
            small.save_pretrained(tmp_path / str(count))
            read = hf.AutoConfig.from_pretrained(tmp_path / str(count))
            with torch.device("meta"):
                auto_class(read).from_config(read)
        except Exception:
            continue
        assert read.num_key_value_heads == count and read.num_attention_heads == 2 * count
        writable.append(count)
    assert [count for count in range(1, 9) if anatomy.of_kind("heads")[0].accepts(count)] == writable
    assert writable == ([1, 2, 4, 8] if model_type in DIVIDES_HIDDEN_SIZE else list(range(1, 9)))


@pytest.mark.parametrize("sparsity, left", [(0.01, 4), (0.2, 4), (0.3, 2)])
def test_a_sparsity_is_reached_by_a_count_that_can_be_written(sparsity: float, left: int):
    anatomy = on_meta("llama", **EIGHT_GROUPS)
    (mix,) = plan_mixes(anatomy, PruneConfig(pattern="heads", sparsity=sparsity))
    assert 8 - mix.heads == left
    units = PruneConfig(pattern="units", sparsity=0.4, multiple_of=8)
    assert {8 - mix.heads for mix in plan_mixes(anatomy, units)} <= {1, 2, 4, 8}


def test_a_count_that_cannot_be_written_is_refused_before_weights_load():
    with pytest.raises(UserError, match="leaves 7 KV groups of 8, accepted: 1, 2, 4, 8"):
        plan_mixes(on_meta("llama", **EIGHT_GROUPS), PruneConfig(pattern="heads", counts={"heads": 1}))


# -- facts computed from a layer's number ------------------------------------------------------------------------------
BY_NUMBER = {
    "gpt2": "scale_attn_by_inverse_layer_idx: layers are fixed where it is set",
    "qwen2_moe": "decoder_sparse_step: where only some layers have experts, layers are fixed",
    "qwen3_moe": "decoder_sparse_step, likewise",
    "gemma3n_text": "keys and values of earlier layers: layers are fixed",
}
_ARITHMETIC = re.compile(
    r"layer_(?:idx|index|number)\s*(?:\+|-|\*|/|%|//)|(?:\*|/|%|//|-)\s*(?:float\()?(?:self\.)?layer_(?:idx|id)"
)


@pytest.mark.parametrize("model_type", [name for name in CASES if "layers" not in on_meta(name).fixed])
def test_no_class_computes_with_a_layers_number_unseen(model_type: str):
    """Read in the source of the class: arithmetic with a layer's index changes its meaning when a layer before it
    goes."""
    config = hf.AutoConfig.for_model(model_type, **CASES[model_type])
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    source = inspect.getsource(sys.modules[type(model).__module__])
    lines = [line.strip() for line in source.splitlines() if _ARITHMETIC.search(line)]
    assert not lines or model_type in BY_NUMBER, f"{model_type}: {lines}"


def test_layers_that_know_their_number_stay():
    anatomy = on_meta("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UserError, match="layers cannot be removed: its class divides the attention scores"):
        plan_mixes(anatomy, PruneConfig(pattern="layers", sparsity=0.2))
    assert all(mix.layers == 0 for mix in plan_mixes(anatomy, PruneConfig(pattern="units", sparsity=0.2)))
    assert on_meta("gpt2").fixed.get("layers") is None


def test_where_layers_stay_the_scaling_changes_nothing(backend):
    """Channels of a model that scales by the number: the smaller one computes what the gated one does."""
    problem = make_problem(build("gpt2", scale_attn_by_inverse_layer_idx=True), backend)
    kept, _ = choose(problem, ["channels"])
    small = shrunk(problem, kept)
    for batch in problem.batches:
        with gated(problem, kept):
            torch.testing.assert_close(logits(small, batch), logits(problem.model, batch), rtol=1e-4, atol=1e-4)


# -- dtypes ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "model_type, kinds, fp32",
    [
        ("t5", ["channels"], ".wo.weight"),
        ("llama", ["layers", "heads"], "norm.weight"),
        ("gpt2", ["layers", "channels"], ".bias"),
        ("qwen3_moe", ["experts"], "gate.weight"),
    ],
)
def test_every_tensor_keeps_its_dtype(backend, model_type: str, kinds: list[str], fp32: str):
    """Some in fp32 among fp16, as classes and checkpoints have them; the bits that stay are those of the dense
    model."""
    model = build(model_type).half()
    for name, parameter in model.named_parameters():
        if name.endswith(fp32):
            parameter.data = parameter.data.float()
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    problem = make_problem(model, backend)
    kept, _ = choose(problem, kinds)
    config = smaller_config(model.config, problem.anatomy, kept)
    plain = lambda: auto_class(config).from_config(config, dtype=torch.float16)  # noqa: E731
    built = in_dtypes(plain, problem.anatomy, kept, dtypes)
    origin = smaller_origin(built, model, problem.anatomy, kept, backend)
    small = origin.take_whole()
    found = {name: tensor.dtype for name, tensor in small.state_dict().items() if tensor.is_floating_point()}
    assert set(found.values()) == {torch.float16, torch.float32}
    for name, dtype in found.items():
        assert (dtype == torch.float32) == name.endswith(fp32), name
        assert origin.dtypes[name] == dtype
