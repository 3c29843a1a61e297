"""Runs on checkpoints that hold more than the model: the result holds it too, or says that it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.checkpoints.test_inventory import HEAD, MTP, with_tensors
from tests.pipeline.conftest import report_of
from tests.pipeline.test_end_to_end import PATTERNS, stored


@pytest.mark.parametrize("pattern", ["unstructured", "channels"])
def test_a_value_head_and_prediction_layers(compress, tinygn, tmp_path: Path, pattern: str):
    extra = {**HEAD, **MTP}
    folder = with_tensors(tiny.build("llama"), tmp_path / "model", extra, num_nextn_predict_layers=1)
    out = tmp_path / "out"
    done = compress(folder, out, *PATTERNS[pattern])
    assert done.code == 0, done.err
    found, report = stored(out), report_of(out)
    carried = extra if pattern == "unstructured" else HEAD
    for name in extra:
        assert (name in found) == (name in carried), name
    for name, tensor in carried.items():
        assert torch.equal(found[name], tensor), name
    model = sum(tensor.numel() for name, tensor in found.items() if name not in extra)
    assert report["after"]["num_params"] == model
    facts = json.loads((out / "config.json").read_text())
    assert facts["num_nextn_predict_layers"] == int(pattern == "unstructured")
    assert any("v_head.summary.bias" in note for note in report["notes"])
    figures = json.loads(tinygn("evaluate", out, "--json", "--no-latency").out)
    assert figures["perplexity"] == pytest.approx(report["after"]["perplexity"], rel=1e-6)
