"""Matrices that no data passes through stay dense and are named, whatever the criterion; scores of nothing are
refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers as hf
from torch import nn

from tests import tiny
from tests.options import pruning
from tinygn_dist.backends import make_backend
from tinygn_dist.config import DistributedConfig, ScheduleConfig
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.overflow import first_overflow
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.estimate.reach import reached_by_data
from tinygn_dist.maths.criteria import CRITERIA
from tinygn_dist.models.anatomy import read_anatomy
from tinygn_dist.models.objective import IGNORED, objective_of
from tinygn_dist.prune.sparsity.gradual_masks import GradualMasks, plan_of
from tinygn_dist.runtime.progress import Progress

SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
ATTENTION = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64)
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
)


def mamba() -> nn.Module:
    config = hf.MambaConfig(**SMALL, state_size=8, expand=2, use_mambapy=False)
    return hf.MambaForCausalLM(config)


def jamba() -> nn.Module:
    kinds = dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1)
    config = hf.JambaConfig(
        **SMALL, **ATTENTION, **kinds, num_experts=2, num_experts_per_tok=1, mamba_d_state=8, mamba_dt_rank=4,
        use_mamba_kernels=False,
    )  # fmt: skip
    return hf.JambaForCausalLM(config)


def siglip() -> nn.Module:
    text = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return hf.SiglipForImageClassification(hf.SiglipConfig(text_config=text, vision_config=VISION, num_labels=3))


def gemma3() -> nn.Module:
    text = {**SMALL, **ATTENTION, "head_dim": 8, "sliding_window": 8}
    config = hf.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=1, image_token_index=60)
    return hf.Gemma3ForConditionalGeneration(config)


UNREACHED = {"mamba": ("dt_proj",), "jamba": ("dt_proj",), "siglip": ("out_proj",), "gemma3": ("vision_tower",)}
BUILT = {"mamba": mamba, "jamba": jamba, "siglip": siglip, "gemma3": gemma3}


def problem_of(family: str) -> Problem:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BUILT[family]().eval()
    rows = tiny.batches("vit" if family == "siglip" else "llama", count=3)
    if family != "siglip":
        rows = [{**row, "input_ids": row["input_ids"] % 60} for row in rows]
        rows = [{**row, "labels": row["labels"].where(row["labels"] < 0, row["labels"] % 60)} for row in rows]
    backend = make_backend(DistributedConfig())
    objective = objective_of("image-classification" if family == "siglip" else "causal-lm")
    return Problem(backend.prepare(model), read_anatomy(model, needs_units=False), objective, rows, backend, Progress())


def never_called(problem: Problem) -> set[str]:
    """By plain hooks on every Linear."""
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name, module in problem.bare.named_modules()
    ]
    with torch.no_grad():
        for batch in problem.batches:
            problem.model(**batch)
    for handle in handles:
        handle.remove()
    return {matrix.name for matrix in problem.anatomy.matrices if matrix.module not in called}


@pytest.mark.parametrize("criterion", ["obs", "wanda", "magnitude"])
@pytest.mark.parametrize("family", BUILT)
def test_what_no_data_passes_through_stays_dense_and_is_named(family: str, criterion: str):
    problem, schedule = problem_of(family), ScheduleConfig()
    dense = tiny.state_bytes(problem.bare)
    prune = pruning(pattern="unstructured", sparsity=0.5, criterion=criterion)
    masks = GradualMasks(problem, problem.anatomy.matrices, prune, schedule, plan_of(schedule, prune, 0))
    missed, half = never_called(problem), 0
    assert missed and all(any(name.find(part) >= 0 for part in UNREACHED[family]) or "proj" in name for name in missed)
    for matrix in problem.anatomy.matrices:
        weight = problem.bare.get_parameter(matrix.parameter).detach()
        if matrix.name in missed:
            assert torch.equal(weight, dense[matrix.parameter]) and matrix.name not in masks.masks.by_name
        else:
            half += int((matrix.within(weight) == 0).sum())
    kept = masks.masks.kept(problem.backend)
    assert half == sum(t.numel for t in masks.masks.matrices) - sum(kept.values())
    assert half == pytest.approx(sum(t.numel for t in masks.masks.matrices) / 2, rel=0.01)
    said = [note for note in masks.notes if note.startswith("left dense: no calibration data passes through")]
    assert len(said) == 1 and all(part in said[0] for part in UNREACHED[family])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_runs_beside_a_matrix_without_statistics(criterion: str):
    problem, schedule = problem_of("mamba"), ScheduleConfig()
    prune = pruning(pattern="unstructured", sparsity=0.5, criterion=criterion)
    masks = GradualMasks(problem, problem.anatomy.matrices, prune, schedule, plan_of(schedule, prune, 0))
    assert not any("dt_proj" in matrix.name for matrix in masks.masks.matrices)
    assert masks.masks.violations(problem.model, problem.backend) == 0


def test_what_only_a_later_batch_reaches_counts():
    """The second micro-batch alone goes through an adapter that the first one skips."""
    problem = tiny.problem("llama")
    target, marked = problem.bare.model.layers[1].mlp, problem.batches[1]["input_ids"]
    plain, forward = target.forward, problem.bare.forward

    def chosen(*args, **kwargs):
        skips = not torch.equal(kwargs["input_ids"], marked)
        target.forward = (lambda hidden: hidden) if skips else plain
        return forward(*args, **kwargs)

    problem.bare.forward = chosen
    names = {matrix.name for matrix in reached_by_data(problem, problem.anatomy.matrices).matrices}
    assert names == {matrix.name for matrix in problem.anatomy.matrices}
    few = reached_by_data(replace(problem, batches=problem.batches[:1]), problem.anatomy.matrices)
    assert {t.name for t in few.matrices} == {n for n in names if "layers.1.mlp" not in n}
    assert "model.layers.*.mlp.gate_proj.weight" in few.notes[0]


def test_one_forward_is_enough_where_it_reaches_everything():
    problem, calls = tiny.problem("llama"), []
    problem.bare.register_forward_hook(lambda *_: calls.append(1))
    found = reached_by_data(problem, problem.anatomy.matrices)
    assert found == (problem.anatomy.matrices, ()) and len(calls) == problem.backend.num_ranks


def test_labels_that_are_all_ignored_are_refused_in_one_line():
    problem = tiny.problem("llama")
    nothing = [{**batch, "labels": torch.full_like(batch["labels"], IGNORED)} for batch in problem.batches]
    with pytest.raises(UserError, match="no calibration token or label counts in the loss .* give rows"):
        reached_by_data(replace(problem, batches=nothing), problem.anatomy.matrices)
    last = [*nothing[:2], problem.batches[2]]
    assert reached_by_data(replace(problem, batches=last), problem.anatomy.matrices).notes == ()


def test_masks_are_not_attached_to_a_model_without_a_loss():
    """Whatever the criterion; the module is named where the value arises."""
    problem, schedule = tiny.problem("llama"), ScheduleConfig()
    with torch.no_grad():
        problem.bare.get_submodule("model.layers.1.mlp.up_proj").weight[3] = torch.nan
    prune = pruning(pattern="unstructured", sparsity=0.5, criterion="magnitude")
    with pytest.raises(UserError, match="loss on calibration data is nan; model.layers.1.mlp.up_proj gives NaN or inf"):
        GradualMasks(problem, problem.anatomy.matrices, prune, schedule, plan_of(schedule, prune, 0))


def test_an_overflow_is_named_where_it_arises():
    """In fp16, 300 * 300 summed over a few inputs is more than 65504; what reads it is not to blame."""
    model = tiny.build("llama").half()
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight.fill_(60000)
        model.get_submodule("model.layers.1.mlp.up_proj").weight.mul_(50)
    problem = tiny.problem("llama", model=model)
    where = "model.layers.1.mlp.down_proj gives NaN or inf in float16 from finite inputs"
    assert first_overflow(problem) == where
    with pytest.raises(UserError, match=f"{where}; use another model.dtype"):
        reached_by_data(problem, problem.anatomy.matrices)
    assert first_overflow(tiny.problem("llama")) is None
