"""--goal latency: allocation from an injected table of costs with a known optimum. Nothing here is timed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from tests.family_cases import WIDTH, auto_class, build, on_meta
from tests.pipeline.conftest import report_of
from tests.removing import plan_mixes
from tinygn_dist import compress
from tinygn_dist.config import EvaluateConfig, PruneConfig, load_config
from tinygn_dist.errors import UserError
from tinygn_dist.maths.counts import Latency, Mix, UnitSizes, mixes
from tinygn_dist.prune.structured import latency
from tinygn_dist.prune.structured.methods import method_of
from tinygn_dist.prune.structured.removal import UnitGoal
from tinygn_dist.prune.structured.size_goal import sparsity_of
from tinygn_dist.step import Request

TABLE = Latency(layers=4, rest=20.0, layer=20.0, heads={1: 15.0, 2: 20.0}, channels={8: 10.0, 24: 16.0, 48: 20.0})
"""of a dense model that takes 100 seconds: 7/12 of a second per channel below 24, 1/6 above"""


@pytest.mark.parametrize(
    ("mix", "gone"),
    [
        (Mix(), 0),
        (Mix(layers=1), 20),
        (Mix(heads=1), 4 * 5),
        (Mix(channels=24), 4 * 4),
        (Mix(channels=12), 4 * 2),  # half-way between 48 and 24
        (Mix(channels=32), 4 * 7),  # 16 kept, half-way between 24 and 8
        (Mix(layers=2, heads=1, channels=40), 2 * 20 + 2 * (5 + 10)),
    ],
)
def test_what_a_mix_saves(mix: Mix, gone: float):
    assert TABLE.total_seconds == 100
    assert TABLE.removed_seconds(mix) == pytest.approx(gone)


@pytest.mark.parametrize("share", [0.1, 0.28, 0.3, 0.5, 0.7])
def test_mixes_are_the_cheapest_that_meet_the_latency(share: float):
    """Against enumeration: for each number of layers and heads the fewest channels, and none where fewer heads or
    layers alone were enough."""
    sizes = UnitSizes(layers=4, layer_params=1, heads=2, head_params=1, channels=48, channel_params=1)
    wanted, expected = 100 * share - 1e-6, set()
    for layers, heads in itertools.product(range(4), range(2)):
        fits = [c for c in (0, 8, 16, 24, 32, 40) if TABLE.removed_seconds(Mix(layers, heads, c)) >= wanted]
        spare = (layers and TABLE.removed_seconds(Mix(layers - 1)) >= wanted) or (
            heads and TABLE.removed_seconds(Mix(layers, heads - 1)) >= wanted
        )
        if fits and not spare:
            expected.add(Mix(layers, heads, min(fits)))
    assert expected
    assert set(mixes(sizes, share, ("layers", "heads", "channels"), 8, TABLE)) == expected


def test_the_table_is_measured_on_smaller_models_of_the_class(monkeypatch):
    """Seconds are counted instead of taken: so many per parameter inside the layers, 7 outside."""
    seen = []

    def count(models, layers_path, batch, device):
        insides = [float(sum(p.numel() for p in m.get_submodule(layers_path).parameters())) for m in models]
        assert all(model(**batch).logits.shape[:2] == (2, 10) for model in models)
        seen.extend(model.config for model in models)
        return [(inside, inside + 7.0) for inside in insides]

    monkeypatch.setattr(latency, "_least_in_layers", count)
    anatomy, model = on_meta("qwen3", num_hidden_layers=6), build("qwen3", num_hidden_layers=6)
    batch = latency.inputs_of(model.config, "causal-lm", EvaluateConfig(batch_size=2, prefill_tokens=10))
    layers = latency.Layers(
        lambda config: auto_class(config).from_config(config),
        model.config,
        anatomy,
        torch.float32,
        batch,
        torch.device("cpu"),
    )
    assert layers.num == 6  # they weigh far less than a GiB
    monkeypatch.setattr(latency, "_LAYERS_BYTES", 4 * 4 * max(anatomy.layer_params))
    table = latency.cost_table(layers, PruneConfig(pattern="units", multiple_of=16))
    layer, head, channel = anatomy.layer_params[0], *(anatomy.of_kind(k)[0].unit_params for k in ("heads", "channels"))
    assert table.layers == 6 and table.layer == layer and table.rest == 7
    assert table.heads == {2: layer, 1: layer - head}
    assert table.channels == {n: layer - (WIDTH - n) * channel for n in (16, 32, WIDTH)}
    assert {config.num_hidden_layers for config in seen} == {4}
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (6, WIDTH)
    seen.clear()
    (cut,) = layers.timed(layers.left_by(Mix(layers=2, heads=1, channels=16)))
    assert cut.layer == layer - head - 16 * channel and len(seen) == 1


def test_what_ran_while_the_machine_was_slow_does_not_bend_the_table(monkeypatch):
    """Both models of a pair take 3 times as long without 16 channels; without 32 the cut one alone is disturbed."""
    model, anatomy = build("llama"), on_meta("llama")

    def timed(_, whole, kept):
        count = kept["channels"]
        slower, alone = 3.0 if count == WIDTH - 16 else 1.0, 100.0 if count == WIDTH - 32 else 0.0
        return [latency.Timed(7.0, 40.0 * slower), latency.Timed(7.0, (20.0 + 20.0 * count / WIDTH) * slower + alone)]

    monkeypatch.setattr(latency.Layers, "timed", timed)
    monkeypatch.setattr(latency, "_counts", lambda full, *_: [full - 48, full - 32, full - 16])
    layers = latency.Layers(None, model.config, anatomy, torch.float32, None, torch.device("cpu"))
    table = latency.cost_table(layers, PruneConfig(pattern="channels", multiple_of=16))
    right = {n: 20.0 + 20.0 * n / WIDTH for n in (WIDTH, WIDTH - 16, WIDTH - 48)}
    assert table.layer == 40 and table.channels == pytest.approx(right | {WIDTH - 32: right[WIDTH - 16]})


def test_a_corrected_table_agrees_with_what_was_timed():
    """24 channels fewer were expected to save 4 of 20 seconds a layer and saved 2 of 18: so all savings are halved."""
    table = TABLE.corrected(Mix(layers=1, channels=24), rest=10.0, layer=18.0, cut=16.0)
    assert (table.rest, table.layer, table.layers) == (10, 18, 4)
    assert table.heads == {1: 15.5, 2: 18.0} and table.channels == {8: 13.0, 24: 16.0, 48: 18.0}
    assert table.removed_seconds(Mix(layers=1, channels=24)) == 18 + 3 * 2
    whole = TABLE.corrected(
        Mix(layers=2), rest=10.0, layer=10.0, cut=10.0
    )  # nothing of a layer was cut: all alike faster
    assert whole.channels == {8: 5.0, 24: 8.0, 48: 10.0}


def test_stamps_enclose_the_layers_of_every_forward(monkeypatch):
    """A clock that counts its own readings: the layers are read between the two readings of the whole."""
    readings = itertools.count()
    monkeypatch.setattr(latency.time, "perf_counter", lambda: float(next(readings)))
    model = build("llama")
    batch = latency.inputs_of(model.config, "causal-lm", EvaluateConfig(prefill_tokens=8))
    found = latency._least_in_layers([model, build("llama")], "model.layers", batch, torch.device("cpu"))
    assert found == [(1, 3), (1, 3)] and next(readings) == 2 * (2 + 4 * 5)  # the warm-up is not timed
    assert not model.model.layers[0]._forward_pre_hooks and not model.model.layers[-1]._forward_hooks


def test_images_and_positions_bound_what_is_timed():
    config = build("vit").config
    assert latency.inputs_of(config, "image-classification", EvaluateConfig(batch_size=3))["pixel_values"].shape == (
        (3, 3, 8, 8)
    )
    words = latency.inputs_of(build("roberta").config, "sequence-classification", EvaluateConfig(prefill_tokens=256))
    assert words["input_ids"].shape == (1, 62)
    assert latency.described(words) == "1 x 62 tokens"


TRUE_CURVES = {
    "as expected": lambda n: 10.0,
    "less is saved": lambda n: 14.0,  # and nothing is left to cut
    "more is saved": lambda n: 20 - 0.375 * (48 - n),  # 40 gone: 15 seconds, 32 gone: 12
    "bent": lambda n: 4.0 if n <= 8 else 12.5,  # 40 gone seem too many by far, and no fewer are enough
}


@pytest.mark.parametrize(
    ("curve", "looks", "kept"),
    [
        ("as expected", [40], 8),
        ("less is saved", [40], 8),
        ("more is saved", [40, 32], 16),
        ("bent", [40, 32, 40], 8),
    ],
)
def test_a_run_looks_until_the_best_mix_was_timed(
    monkeypatch, saved_model, tmp_path, curve: str, looks: list, kept: int
):
    """Of 80 seconds of 3 layers 24 must go, 8 of each: by the table 32 channels save 7, 40 save 10."""
    true = TRUE_CURVES[curve]

    def timed(_, *widths):
        return [latency.Timed(20.0, true(width["channels"]) if width else 20.0) for width in widths]

    monkeypatch.setattr(latency, "cost_table", lambda *_: replace(TABLE, layers=3))
    monkeypatch.setattr(latency.Layers, "timed", timed)
    asked = {"model.name": str(saved_model("llama")), "output.dir": str(tmp_path / "out")}
    asked |= {"prune.pattern": "channels", "prune.goal": "latency=0.7", "prune.multiple_of": 8}
    asked |= {"data.seq_len": 16, "data.num_samples": 2, "data.eval_samples": 1, "evaluate.latency": False}
    report = compress(load_config(None, asked))
    assert all(len(units) == kept for units in report.selection["kept"]["channels"].values())
    told = report_of(tmp_path / "out")["latency"]
    assert told["ratio"] == pytest.approx(told["smaller_seconds"] / told["dense_seconds"]) and told["dense_seconds"] > 0
    assert told["table"]["layer"] == 20 and told["timed"] == "1 x 126 tokens"
    assert [look["mix"] for look in told["looked_at"]] == [str(Mix(channels=gone)) for gone in looks]
    assert told["looked_at"][0]["expected"] == pytest.approx(50 / 80)
    assert [look["timed"] for look in told["looked_at"]] == pytest.approx([(20 + 3 * true(48 - n)) / 80 for n in looks])
    assert ("cannot reach" in told.get("missed", "")) == (curve == "less is saved")
    assert "latency of 1 x 126 tokens" in report.to_markdown() and report.asked() == "channels latency=0.7"


@pytest.mark.parametrize(
    ("model_type", "asked", "reason"),
    [
        ("mixtral", dict(pattern="experts", goal="latency=0.8"), "tokens visit as many experts"),
        ("llama", dict(pattern="channels", goal="latency=0.5", multiple_of=8), "of 100 s measured, 20% lie outside"),
    ],
)
def test_what_cannot_be_reached_is_refused_before_weights(model_type: str, asked: dict, reason: str):
    anatomy = on_meta(model_type)
    with pytest.raises(UserError, match=reason):
        options = PruneConfig(**asked)
        dense = method_of(anatomy, options).dense_params(anatomy)
        plan_mixes(anatomy, options, TABLE, sparsity_of(options, anatomy, None, dense))


def _table_of_rank(backend) -> tuple[Latency, list[Mix], Latency]:
    """What a rank holds when each would have measured something else."""
    config = load_config(
        None, {"model.name": "m", "prune.pattern": "channels", "prune.goal": "latency=0.7"} | {"prune.multiple_of": 8}
    )
    request = Request(
        skeleton=build("llama"),
        anatomy=on_meta("llama"),
        task="causal-lm",
        dtype=torch.float32,
        build=lambda smaller, dtype: auto_class(smaller).from_config(smaller, dtype=dtype),
        backend=backend,
        evaluate=config.evaluate,
    )

    def timed(_, *widths):
        return [latency.Timed(20.0 + backend.rank, 10.0 if width else 20.0) for width in widths]

    with (
        patch.object(latency, "cost_table", lambda *_: replace(TABLE, rest=20.0 + backend.rank)),
        patch.object(latency.Layers, "timed", timed),
    ):
        goal = latency.LatencyGoal(request, config.prune, UnitGoal(sparsity=0.3))
        return goal.table, goal.plan.replan(Mix(channels=40)), goal.table


def test_every_rank_uses_the_main_ranks_table(process_groups):
    one, two = process_groups(2).call(_table_of_rank)
    assert one == two and one[0] == TABLE and one[2].rest == 20


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"schedule.kind": "iterative", "recover.steps": 9}, "with schedule.kind iterative, accepted: one-shot"),
        ({"distributed.offload": "cpu"}, "with distributed.offload cpu, accepted: none"),
    ],
)
def test_one_measured_step_only(more: dict, reason: str):
    with pytest.raises(UserError, match=f"prune.goal latency=0.7 {reason}; use params="):
        load_config(None, {"model.name": "m", "prune.pattern": "channels", "prune.goal": "latency=0.7"} | more)
