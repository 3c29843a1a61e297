"""Distillation in whole runs: the teacher in memory, on disk, and by its hidden states."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.pipeline.test_resume import asked, stopped_after, weights
from tinygn_dist import pipeline
from tinygn_dist.backends.base import Backend
from tinygn_dist.checkpoints import sharded_load
from tinygn_dist.errors import Stopped
from tinygn_dist.run import loading, verified_export

SPARSE = {"prune.pattern": "2:4", "prune.criterion": "magnitude", "recover.distill": 0.8, "checkpoint.every": 0}
CACHED = {**SPARSE, "recover.teacher_cache_gib": 0.1, "recover.teacher_top_k": tiny.VOCAB}


def placed_models(config, backend: Backend) -> int:
    placed = mock.Mock(wraps=sharded_load.placed)
    with mock.patch.object(loading, "placed", placed), mock.patch.object(verified_export, "placed", placed):
        pipeline.compress(config, backend)
    return placed.call_count


def test_a_teacher_on_disk_teaches_the_same_and_is_not_in_memory(
    backend: Backend, saved_model, text_file: Path, tmp_path: Path
):
    model = saved_model("llama")
    assert placed_models(asked(model, text_file, tmp_path / "live", **SPARSE), backend) == 3  # also what was exported
    assert placed_models(asked(model, text_file, tmp_path / "disk", **CACHED), backend) == 2
    assert not (tmp_path / "disk.checkpoints.teacher").exists()
    live, disk = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("live", "disk"))
    for name, weight in live.items():
        torch.testing.assert_close(disk[name], weight, rtol=1e-2, atol=1e-5)


def test_a_run_that_goes_on_finds_what_the_teacher_said(backend: Backend, saved_model, text_file: Path, tmp_path: Path):
    model = saved_model("llama")
    pipeline.compress(asked(model, text_file, tmp_path / "whole", **CACHED), backend)
    config = asked(model, text_file, tmp_path / "parts", **CACHED, **{"checkpoint.resume": "auto"})
    with pytest.raises(Stopped):
        pipeline.compress(config, backend, stopped_after(3))
    written = (tmp_path / "parts.checkpoints.teacher/complete.json").stat().st_mtime_ns
    with pytest.raises(Stopped):
        pipeline.compress(config, backend, stopped_after(3))
    assert (tmp_path / "parts.checkpoints.teacher/complete.json").stat().st_mtime_ns == written
    pipeline.compress(config, backend)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_a_cap_that_is_too_small_is_refused_before_the_teacher_is_asked(
    compress, saved_model, text_file: Path, tmp_path: Path
):
    words = ["--pattern=2:4", "--recover-steps=4", "--recover.teacher_cache_gib=0.0000001"]
    done = compress(saved_model("llama"), tmp_path / "out", "--data", text_file, *words)
    assert done.code == 2 and "lower recover.teacher_top_k" in done.told
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("pattern", ["2:4", "channels"])
def test_hidden_states_bring_the_student_closer(pattern: str, backend: Backend, saved_model, text_file, tmp_path: Path):
    """To the teacher's hidden states, than logits alone do; also where FFNs are narrower."""
    dense = AutoModelForCausalLM.from_pretrained(saved_model("llama"))
    ids = torch.randint(3, tiny.VOCAB, (4, 24), generator=torch.Generator().manual_seed(0))
    away = {}
    for weight in (0.0, 5.0):
        changes = {"prune.pattern": pattern, "prune.criterion": "magnitude", "recover.distill_hidden": weight}
        changes |= {"recover.distill": 0.5, "recover.steps": 20, "recover.learning_rate": 3e-3, "checkpoint.every": 0}
        changes |= {"schedule.every": 100}
        pipeline.compress(asked(saved_model("llama"), text_file, tmp_path / str(weight), **changes), backend)
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(tmp_path / str(weight))
            own, wanted = (m(ids, output_hidden_states=True).hidden_states[1:] for m in (model, dense))
        away[weight] = sum(float((a - b).square().mean() / b.square().mean()) for a, b in zip(own, wanted, strict=True))
    assert away[5.0] < 0.9 * away[0.0], away
