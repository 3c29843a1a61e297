"""Convolutional nets: filters with everything that depends on them, from tiny configs with random weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from torch import nn

from tests import tiny
from tests.removing import plan_mixes, remove_units
from tinygn_dist.backends.replicated import Replicated
from tinygn_dist.config import PruneConfig
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.backprop import gate_gradients
from tinygn_dist.estimate.probes import single_units
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.models.anatomy import read_anatomy
from tinygn_dist.models.channel_graph import spaces
from tinygn_dist.models.kept import KeptUnits
from tinygn_dist.models.objective import classification
from tinygn_dist.models.vgg import VggConfig, VggForImageClassification
from tinygn_dist.prune.structured import filters
from tinygn_dist.prune.structured.scores import score_units
from tinygn_dist.prune.structured.shrink import smaller_config
from tinygn_dist.runtime.progress import Progress

SIDE = 16
RESNET = dict(embedding_size=16, hidden_sizes=[16, 24], depths=[2, 2], num_labels=3)
NETS = {
    "vgg": lambda: VggForImageClassification(
        VggConfig(filters=(8, 0, 16, 16, 0), hidden=(8,), pooled=2, image_size=SIDE, num_labels=3)
    ),
    "resnet-bottleneck": lambda: hf.ResNetForImageClassification(hf.ResNetConfig(layer_type="bottleneck", **RESNET)),
    "resnet-basic": lambda: hf.ResNetForImageClassification(hf.ResNetConfig(layer_type="basic", **RESNET)),
}


def build(name: str) -> nn.Module:
    """In eval mode; every parameter and statistic is random, so that a norm's shift shows where it is forgotten."""
    torch.manual_seed(0)
    model = NETS[name]().eval()
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dtype.is_floating_point:
            tensor.data.normal_(float("norm" in path and tensor.dim() == 1), 0.2)
        if "running_var" in path:
            tensor.data.abs_().add_(0.3)
    return model


def images() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"pixel_values": torch.randn(3, 3, SIDE, SIDE, generator=generator), "labels": torch.tensor([0, 2, 1])}
        for _ in range(2)
    ]


@pytest.fixture(scope="module")
def backend() -> Replicated:
    return Replicated(Accelerator(cpu=True))


def problem_of(model: nn.Module, backend: Replicated) -> Problem:
    anatomy = read_anatomy(model, needs_units=True)
    return Problem(model, anatomy, classification, images(), backend, Progress(shown=False))


def logits(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values=pixels).logits


def shrunk(model: nn.Module, kept: KeptUnits) -> nn.Module:
    anatomy = read_anatomy(model, needs_units=True)
    small = type(model)(smaller_config(model.config, anatomy, kept))
    small.load_state_dict(tiny.smaller_state(model.state_dict(), anatomy, kept), strict=True)
    return small.eval()


def params_left(anatomy, kept: KeptUnits) -> int:
    groups = anatomy.of_kind("filters")
    return filters.params_left(anatomy, {g: g.num_units - len(kept.filters[g.layer]) for g in groups})


def some(model: nn.Module) -> KeptUnits:
    """Half of every group, other filters in each."""
    generator = torch.Generator().manual_seed(2)
    groups = read_anatomy(model, needs_units=True).of_kind("filters")
    chosen = {g.layer: torch.randperm(g.num_units, generator=generator)[: g.num_units // 2] for g in groups}
    return KeptUnits((), filters={index: tuple(sorted(units.tolist())) for index, units in chosen.items()})


def shut(model: nn.Module, kept: KeptUnits) -> list:
    """Forward pre-hooks in plain torch that zero the removed channels where they are read."""
    handles = []
    for group in read_anatomy(model, needs_units=True).of_kind("filters"):
        gone = [unit for unit in range(group.num_units) if unit not in kept.filters[group.layer]]
        for path, width in group.readers:

            def zero(module, args, gone=gone, width=width):
                hidden = args[0].clone()
                hidden[:, [unit * width + offset for unit in gone for offset in range(width)]] = 0
                return (hidden,)

            handles.append(model.get_submodule(path).register_forward_pre_hook(zero))
    return handles


@pytest.mark.parametrize("name", NETS)
def test_removed_equals_gated_and_the_promise_is_kept(name: str, tmp_path: Path):
    model = build(name)
    kept, pixels = some(model), images()[0]["pixel_values"]
    small, dense = shrunk(model, kept), logits(model, pixels)
    handles = shut(model, kept)
    expected = logits(model, pixels)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(logits(small, pixels), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(dense, expected, atol=1e-3)
    anatomy = read_anatomy(model, needs_units=True)
    left = params_left(anatomy, kept)
    assert left == sum(p.numel() for p in small.parameters()) < anatomy.total_params
    small.save_pretrained(tmp_path)
    loaded = hf.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in small.state_dict().items())
    torch.testing.assert_close(logits(loaded, pixels), expected, rtol=1e-4, atol=1e-5)


def test_a_pruned_vgg_carries_its_code(tmp_path: Path):
    small = shrunk(build("vgg"), some(build("vgg")))
    small.save_pretrained(tmp_path)
    assert (tmp_path / "vgg.py").is_file() and small.config.filters == [4, 0, 8, 8, 0]
    assert small.config.auto_map["AutoModelForImageClassification"] == "vgg.VggForImageClassification"


def test_residual_sums_tie_filters_together_and_norms_go_with_them():
    found = spaces(build("resnet-basic"), {"pixel_values": torch.zeros(2, 3, SIDE, SIDE)})
    stem = found[0]  # the stem and both blocks of the first stage, which add to it
    convolutions = [name for name, dim, _ in stem.slices if name.endswith("convolution.weight") and dim == 0]
    assert len(convolutions) == 3 and sum("running_var" in name for name, _, _ in stem.slices) == 3
    assert len(stem.readers) == 4 and found[-1].fixed == "they are the model's outputs"


def test_flattened_channels_own_a_block_of_the_linear_layer():
    group = read_anatomy(build("vgg"), needs_units=True).of_kind("filters")[2]
    assert group.readers == (("classifier.0", 4),)  # 2 x 2 pixels each


@pytest.mark.parametrize(
    "changed, reason",
    [
        (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), "a depthwise convolution reads them"),
        (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2), "a grouped convolution reads them"),
        (lambda: nn.GroupNorm(2, 8), "its norm runs over all of them"),
        (lambda: nn.PixelShuffle(2), "the walk does not know pixel_shuffle"),
    ],
)
def test_what_the_walk_does_not_know_freezes_its_channels(changed, reason: str):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), changed()

        def forward(self, pixel_values):
            return (self.second(self.first(pixel_values)).relu().mean((2, 3)),)

    assert spaces(Net(), {"pixel_values": torch.zeros(2, 3, 8, 8)})[0].fixed == reason


@pytest.mark.parametrize("name", NETS)
def test_removal_scores_are_the_loss_without_the_filter(name: str, backend):
    problem = problem_of(build(name), backend)
    mix = plan_mixes(problem.anatomy, PruneConfig(pattern="filters", sparsity=0.3, multiple_of=1))[0]
    scores = score_units(problem, mix, PruneConfig(pattern="filters"), None)
    group = problem.anatomy.of_kind("filters")[-1]
    every = {g.layer: tuple(range(g.num_units)) for g in problem.anatomy.of_kind("filters")}
    for unit in (0, 3):
        kept = KeptUnits((), filters=every | {group.layer: tuple(u for u in range(group.num_units) if u != unit)})
        dense = torch.cat([classification(problem.model, b).total for b in problem.batches])
        handles = shut(problem.model, kept)
        without = torch.cat([classification(problem.model, b).total for b in problem.batches])
        for handle in handles:
            handle.remove()
        expected = float((without - dense).detach().mean())
        assert math.isclose(float(scores.by_group["filters", group.layer][unit]), expected, rel_tol=1e-3, abs_tol=1e-6)
    assert scores.forwards == 2 * len(list(single_units(problem.anatomy.of_kind("filters"))))


def test_gate_derivatives_reach_every_reader_of_a_filter(backend):
    """The stem of a residual net is read by four convolutions: one factor multiplies what all of them see."""
    problem = problem_of(build("resnet-basic"), backend)
    group = problem.anatomy.of_kind("filters")[0]
    found, _, _ = gate_gradients(problem, [group], [])
    factors = torch.ones(group.num_units, requires_grad=True)
    handles = [
        problem.model.get_submodule(path).register_forward_pre_hook(lambda _, args: (args[0] * factors[:, None, None],))
        for path, _ in group.readers
    ]
    sum(classification(problem.model, batch).total.sum() for batch in problem.batches).backward()
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found[0].sum(1), factors.grad.double(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NETS)
def test_uneven_widths_cost_less_by_their_own_scores_and_meet_the_budget(name: str, backend):
    problem = problem_of(build(name), backend)
    asked = PruneConfig(pattern="filters", sparsity=0.4, multiple_of=2, criterion="magnitude")
    losses = {}
    for uneven in (False, True):
        options = asked.model_copy(update={"uneven": uneven})
        mixes = plan_mixes(problem.anatomy, options)
        kept, scores, *_ = remove_units(problem, mixes, options)
        left = params_left(problem.anatomy, kept)
        assert left <= round(0.6 * problem.anatomy.total_params)
        lost = [
            float(value.sum() - value[list(kept.filters[index])].sum()) for (_, index), value in scores.by_group.items()
        ]
        losses[uneven] = sum(lost)
        if name != "resnet-bottleneck":  # where a part is one filter of some groups and four of others
            assert all(len(units) % 2 == 0 for units in kept.filters.values())
        if name.startswith("resnet"):
            check_one_share_per_stage(problem, kept)
    assert losses[True] <= losses[False]
    small, pixels = shrunk(problem.model, kept), images()[0]["pixel_values"]
    handles = shut(problem.model, kept)
    torch.testing.assert_close(logits(small, pixels), logits(problem.model, pixels), rtol=1e-4, atol=1e-4)
    for handle in handles:
        handle.remove()


def check_one_share_per_stage(problem: Problem, kept: KeptUnits) -> None:
    """One width of the config is that of the stage's convolutions, of the inner ones a quarter in a bottleneck."""
    shares: dict[str, set[float]] = {}
    for group in problem.anatomy.of_kind("filters"):
        for piece in group.slices:
            if piece.dim == 0 and ".stages." in piece.tensor:
                stage = piece.tensor.split(".stages.")[1][0]
                shares.setdefault(stage, set()).add(len(kept.filters[group.layer]) / group.num_units)
    assert sorted(shares) == ["0", "1"] and all(len(found) == 1 for found in shares.values())


def test_the_stage_that_does_nothing_goes_first(backend):
    """What its filters give is nothing, so the other stage keeps all; an even cut takes of both."""
    model = build("resnet-bottleneck")
    for path, parameter in model.named_parameters():
        if "stages.1" in path:
            parameter.data.mul_(1e-6)
    problem = problem_of(model, backend)
    options = PruneConfig(pattern="filters", sparsity=0.2, multiple_of=1, uneven=True, criterion="magnitude")
    kept, *_ = remove_units(problem, plan_mixes(problem.anatomy, options), options)
    config = smaller_config(model.config, problem.anatomy, kept)
    assert config.hidden_sizes[0] == 16 and config.embedding_size == 16 and config.hidden_sizes[1] < 24


def test_norms_get_the_statistics_of_what_they_see(backend):
    model = build("vgg")
    problem = problem_of(model, backend)
    filters.reestimate_norms(problem)
    means, variances = [], []
    for batch in problem.batches:
        seen = model.convolutions[0](batch["pixel_values"])
        means.append(seen.mean((0, 2, 3)))
        variances.append(seen.var((0, 2, 3)))
    torch.testing.assert_close(model.norms[0].running_mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.norms[0].running_var, torch.stack(variances).mean(0), rtol=1e-4, atol=1e-5)
    assert not model.norms[0].training and model.norms[0].momentum == 0.1


@pytest.mark.parametrize(
    "name, asked, part",
    [
        ("resnet-basic", dict(pattern="heads"), "it is a convolutional net; use --pattern filters"),
        ("vgg", dict(pattern="filters", sparsity=0.999), "filters cannot lose 100% of the"),
        ("vgg", dict(pattern="filters", criterion="obs"), "criterion obs does not score filters"),
        ("vgg", dict(pattern="filters", protect=(1,)), "filters are cut by sparsity"),
    ],
)
def test_refusals_come_before_weights(name: str, asked: dict, part: str):
    with torch.device("meta"):
        anatomy = read_anatomy(NETS[name](), needs_units=True)
    with pytest.raises(UserError) as caught:
        plan_mixes(anatomy, PruneConfig(**asked))
    assert part in str(caught.value)
