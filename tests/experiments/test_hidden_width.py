"""The width of the residual stream: cut dimensions equal zeroed ones, the promise in parameters, refusals."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from tests.family_cases import CASES, HEADS, HIDDEN, auto_class, build, close, logits, make_problem, on_meta
from tests.pipeline.conftest import report_of
from tests.removing import plan_mixes, remove_units
from tinygn_dist import compress
from tinygn_dist.backends.replicated import Replicated
from tinygn_dist.config import PruneConfig, load_config
from tinygn_dist.errors import UserError
from tinygn_dist.experiments import hidden_width
from tinygn_dist.models.anatomy import read_anatomy
from tinygn_dist.prune.structured.shrink import smaller_config, smaller_origin
from tinygn_dist.prune.structured.size_goal import sparsity_of

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "phi3")
READERS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj")
UNREAD = [1, 2, 5, 8, 13, 21, 24, 31]
HALF = PruneConfig(pattern="hidden", sparsity=0.2, multiple_of=4)


@pytest.fixture(scope="module")
def backend() -> Replicated:
    return Replicated(Accelerator(cpu=True))


@torch.no_grad()
def never_read(model, dims: list[int]) -> None:
    """No matrix inside a layer listens to these dimensions."""
    for name, parameter in model.named_parameters():
        if name.split(".")[-2] in READERS and name.endswith("weight"):
            parameter[:, dims] = 0


@torch.no_grad()
def never_written(model, dims: list[int]) -> None:
    """Zeros wherever something writes these dimensions."""
    for name, parameter in model.named_parameters():
        if name.endswith("embed_tokens.weight"):
            parameter[:, dims] = 0
        elif ".o_proj." in name or ".down_proj." in name:
            parameter[dims] = 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_cut_dimensions_equal_zeroed_ones(model_type: str, tied: bool, backend, tmp_path):
    model = build(model_type, tie_word_embeddings=tied)
    never_read(model, UNREAD)
    problem = make_problem(model, backend)
    options = HALF.model_copy(update={"sparsity": len(UNREAD) / HIDDEN - 0.02})
    kept, *_ = remove_units(problem, plan_mixes(problem.anatomy, options), options)
    assert sorted(set(range(HIDDEN)) - set(kept.hidden[0])) == UNREAD
    before = [logits(model, batch) for batch in problem.batches]
    config = smaller_config(model.config, problem.anatomy, kept)
    small = smaller_origin(
        lambda: auto_class(config).from_config(config), model, problem.anatomy, kept, backend
    ).take_whole()
    assert problem.anatomy.total_params - sum(p.numel() for p in small.parameters()) == (
        len(UNREAD) * problem.anatomy.hidden.unit_params
    )
    never_written(model, UNREAD)
    for batch, dense in zip(problem.batches, before, strict=True):
        zeroed = logits(model, batch)
        close(logits(small, batch), zeroed)
        assert float((zeroed - dense).abs().max()) > 1e-3, "nothing was zeroed"
    small.save_pretrained(tmp_path)
    loaded = auto_class(config).from_pretrained(tmp_path).eval()
    prompt = problem.batches[0]["input_ids"][::2]
    asked = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    asked["attention_mask"] = torch.ones_like(prompt)
    cached, plain = (loaded.generate(prompt, use_cache=use, **asked) for use in (True, False))
    assert torch.equal(cached, plain) and torch.equal(cached, small.generate(prompt, **asked))


def test_a_run_ends_at_the_asked_share_of_all_parameters(saved_model, tmp_path):
    asked = {"model.name": str(saved_model("llama-tied")), "output.dir": str(tmp_path / "out")}
    asked |= {"prune.pattern": "hidden", "prune.goal": "params=0.8", "prune.multiple_of": 1}
    asked |= {"data.seq_len": 16, "data.num_samples": 2, "data.eval_samples": 1, "evaluate.latency": False}
    compress(load_config(None, asked))
    report = report_of(tmp_path / "out")
    full, step = report["before"]["num_params"], report["before"]["num_params"] * HEADS / HIDDEN
    assert 0.8 * full - step <= report["after"]["num_params"] <= 0.8 * full


@pytest.mark.parametrize("model_type", [t for t in CASES if t not in FAMILIES])
def test_other_norms_are_refused(model_type: str):
    with pytest.raises(UserError, match="hidden cannot be removed: its norms"):
        plan_mixes(on_meta(model_type), HALF)


def test_widths_are_multiples_of_the_heads():
    anatomy = on_meta("llama")
    assert hidden_width.step_of(anatomy, 6) == 12 and hidden_width.step_of(anatomy, 64) == HEADS
    assert plan_mixes(anatomy, HALF)[0].hidden % HEADS == 0
    for asked, reason in (
        (dict(sparsity=0.97), "a multiple of 4 stays"),
        (dict(criterion="removal"), "does not score hidden dimensions"),
        (dict(protect=(1,)), "hidden dimensions go from all"),
    ):
        with pytest.raises(UserError, match=reason):
            plan_mixes(anatomy, HALF.model_copy(update=asked))
    for goal in ("flops=0.8", "latency=0.8"):
        with pytest.raises(UserError, match="use params or bytes"):
            sparsity_of(PruneConfig(pattern="hidden", goal=goal), anatomy, None, 1)


def test_every_parameter_of_that_size_is_found():
    """Whatever has a dim of the stream's size in the smaller model's shapes, by building it."""
    anatomy = on_meta("llama", hidden_size=44, num_attention_heads=4, head_dim=16)
    with torch.device("meta"):
        model = auto_class(build("llama").config).from_config(build("llama", hidden_size=44, head_dim=16).config)
    expected = {n for n, p in model.named_parameters() if 44 in p.shape}
    assert {piece.tensor for piece in anatomy.hidden.slices} == expected
    assert read_anatomy(model, needs_units=True).hidden.num_units == 44
