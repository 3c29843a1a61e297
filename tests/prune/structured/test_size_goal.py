"""--goal: the whole model, not the layers, ends at the asked share."""

from __future__ import annotations

import pytest

from tests.family_cases import build
from tests.removing import plan_mixes
from tinygn_dist.config import PruneConfig
from tinygn_dist.errors import UserError
from tinygn_dist.models.anatomy import read_anatomy
from tinygn_dist.prune.structured import layers_heads_channels
from tinygn_dist.prune.structured.methods import method_of
from tinygn_dist.prune.structured.size_goal import sparsity_of


def planned(model, **asked):
    anatomy = read_anatomy(model, needs_units=True)
    options = PruneConfig(**asked)
    dense = method_of(anatomy, options).dense_params(anatomy)
    return anatomy, plan_mixes(anatomy, options, sparsity=sparsity_of(options, anatomy, model, dense))


@pytest.mark.parametrize("measure", ["params", "bytes"])
def test_at_most_the_asked_share_of_all_parameters_stays(measure: str):
    model = build("llama")
    anatomy, mixes = planned(model, pattern="channels", goal=f"{measure}=0.9", multiple_of=1)
    (mix,) = mixes
    gone, step = (layers_heads_channels.unit_sizes(anatomy).removed_params(m) for m in (mix, type(mix)(channels=1)))
    total = sum(p.numel() for p in model.parameters())
    assert 0.1 * total <= gone < 0.1 * total + step


def test_flops_count_the_head_and_not_the_embedding():
    model = build("llama")
    anatomy, (mix,) = planned(model, pattern="channels", goal="flops=0.9", multiple_of=1)
    multiplied = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n and n != "model.norm.weight")
    gone, step = (layers_heads_channels.unit_sizes(anatomy).removed_params(m) for m in (mix, type(mix)(channels=1)))
    assert 0.1 * multiplied <= gone < 0.1 * multiplied + step


def test_unreachable_targets_say_what_can_be_asked():
    with pytest.raises(UserError, match="lie outside its removable layers .* ask for more than params=0\\.[0-9]+"):
        planned(build("llama", vocab_size=20_000), pattern="layers", goal="params=0.5")
    with pytest.raises(UserError, match="tokens visit as many experts as before"):
        planned(build("mixtral"), pattern="experts", goal="flops=0.8")
    for goal in ("flops=0.8", "latency=0.8"):
        with pytest.raises(UserError, match="its stacks of layers read different numbers of positions"):
            planned(build("t5"), pattern="channels", goal=goal)


@pytest.mark.parametrize(
    "asked, part",
    [
        (dict(goal="params"), "such as params=0.8"),
        (dict(goal="seconds=0.7"), "accepted: params=, bytes=, flops= or latency="),
        (dict(goal="params=1.5"), "such as params=0.8"),
        (dict(goal="params=0.5", pattern="2:4"), "stores zeros densely"),
        (dict(goal="params=0.5", counts={"channels": 3}), "has counts"),
    ],
)
def test_bad_targets_are_refused(asked: dict, part: str):
    with pytest.raises(ValueError) as caught:
        PruneConfig(**asked)
    assert part in str(caught.value)
