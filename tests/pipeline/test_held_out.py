"""Evaluation on the way: when, on what, and that the best model is the one that is kept."""

from __future__ import annotations

import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.pipeline.conftest import report_of
from tests.pipeline.test_resume import CASES, asked, stopped_after, weights
from tinygn_dist.backends.base import Backend
from tinygn_dist.config import DataConfig
from tinygn_dist.data.splits import Reader, Splits, load_splits
from tinygn_dist.errors import Stopped, UserError
from tinygn_dist.pipeline import compress

GRADUAL = {**CASES["gradual"], "checkpoint.every": 0, "recover.evaluate_every": 3, "recover.evaluate_samples": 2}
HARMFUL = {
    "prune.pattern": "2:4",
    "prune.criterion": "magnitude",
    "recover.learning_rate": 50.0,
    "recover.optimizer": "sgd",
}


def test_evaluations_are_of_sequences_that_are_not_trained_on(
    backend: Backend, saved_model, text_file: Path, tmp_path: Path
):
    """The last one is the loss of the exported model, computed here from its logits."""
    told = {}
    with mock.patch.object(
        type(backend), "track", lambda _, metrics, step=None: told.setdefault(step, {}).update(metrics)
    ):
        compress(asked(saved_model("llama"), text_file, tmp_path / "out", **GRADUAL), backend)
    recovery = report_of(tmp_path / "out")["recovery"]
    # cubic, every 2 of 8 steps, nothing in the last quarter: updates after 2, 4 and 6
    assert [seen["step"] for seen in recovery["evaluations"]] == [0, 2, 3, 4, 6, 8]
    options = DataConfig(name=str(text_file), seq_len=32, num_samples=4, eval_samples=3, micro_batch=2)
    held_out = load_splits(options, Reader("causal-lm", tiny.tokenizer()), 16).training[-2:]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        losses = [float(model(**batch).loss) for batch in held_out]
    last = recovery["evaluations"][-1]
    assert last["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert last["perplexity"] == pytest.approx(math.exp(last["loss"]))
    assert told[8]["held_out/loss"] == last["loss"] and told[8]["recover/learning_rate"] > 0
    assert {0, 2, 4, 6} == {step for step, metrics in told.items() if "mask/churn" in metrics}
    zeros = {name: float((w == 0).float().mean()) for name, w in model.named_parameters() if "_proj.weight" in name}
    assert all(told[6][f"sparsity/{name}"] == pytest.approx(share) for name, share in zeros.items())
    assert min(zeros.values()) > 0.18
    assert told[6]["mask/churn"] == recovery["updates"][-1]["removed"] + recovery["updates"][-1]["regrown"]


def test_the_best_model_is_kept_when_training_only_harms(
    backend: Backend, saved_model, text_file: Path, tmp_path: Path
):
    model = saved_model("llama")
    compress(asked(model, text_file, tmp_path / "untrained", **HARMFUL, **{"recover.steps": 0}), backend)
    more = {"recover.evaluate_every": 4, "recover.keep_best": True}
    report = compress(asked(model, text_file, tmp_path / "trained", **HARMFUL, **more), backend)
    losses = [seen["loss"] for seen in report.recovery["evaluations"]]
    assert min(losses) == losses[0] and report.recovery["best_step"] == 0
    assert weights(tmp_path / "trained") == weights(tmp_path / "untrained")
    assert not (tmp_path / "trained.checkpoints.best").exists()


def test_only_models_with_the_final_masks_may_be_the_best(
    backend: Backend, saved_model, text_file: Path, tmp_path: Path
):
    asked_for = {**GRADUAL, "recover.learning_rate": 50.0, "recover.optimizer": "sgd", "recover.keep_best": True}
    report = compress(asked(saved_model("llama"), text_file, tmp_path / "out", **asked_for), backend)
    by_step = {seen["step"]: seen["loss"] for seen in report.recovery["evaluations"]}
    assert min(by_step, key=by_step.get) < 6, "the case is of no use"
    assert report.recovery["best_step"] == min((6, 8), key=by_step.get)
    assert report.sparsity["zeros"] == report.parameters["set_to_zero"]


@pytest.mark.parametrize("rate", [50.0, 1e-3])
def test_the_best_model_survives_a_stop(rate: float, backend: Backend, saved_model, text_file: Path, tmp_path: Path):
    changes = {**HARMFUL, "recover.learning_rate": rate, "recover.evaluate_every": 2, "recover.keep_best": True}
    whole = compress(asked(saved_model("llama"), text_file, tmp_path / "whole", **changes), backend)
    config = asked(saved_model("llama"), text_file, tmp_path / "parts", **changes, **{"checkpoint.resume": "auto"})
    for steps in (2, 4):
        with pytest.raises(Stopped):
            compress(config, backend, stopped_after(steps))
    report = compress(config, backend)
    assert report.recovery["evaluations"] == whole.recovery["evaluations"]
    assert report.recovery["best_step"] == whole.recovery["best_step"] == (0 if rate == 50.0 else 8)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_checkpoints_of_a_run_that_is_not_done_are_not_mixed_with_new_ones(
    backend: Backend, saved_model, text_file: Path, tmp_path: Path
):
    config = asked(saved_model("llama"), text_file, tmp_path / "out", **HARMFUL)
    with pytest.raises(Stopped):
        compress(config, backend, stopped_after(2))
    with pytest.raises(UserError, match="go on with --resume auto"):
        compress(config, backend)
    again = asked(saved_model("llama"), text_file, tmp_path / "out", **HARMFUL, **{"output.overwrite": True})
    compress(again, backend)
    assert not (tmp_path / "out.checkpoints").exists()


def test_too_little_text_to_hold_some_out_is_refused(compress, saved_model, text_file: Path, tmp_path: Path):
    asked = ["--pattern=2:4", "--recover-steps=2", "--recover.evaluate_every=1", "--recover.evaluate_samples=10000"]
    done = compress(saved_model("llama"), tmp_path / "out", "--data", text_file, *asked)
    assert done.code == 2 and "accepted: at most half of them" in done.told


def test_what_is_held_out_does_not_train():
    rows = [{"input_ids": torch.full((1, 4), number)} for number in range(6)]
    splits = Splits([], [], list(rows))
    before = splits.fingerprint()
    splits.hold_out(2)
    assert [int(row["input_ids"][0, 0]) for row in splits.training] == [0, 1, 2, 3]
    assert [int(row["input_ids"][0, 0]) for row in splits.validation] == [4, 5]
    assert splits.fingerprint() == before
