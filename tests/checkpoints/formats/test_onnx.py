"""ONNX files run by ONNX Runtime: logits of torch, with and without keys and values of earlier tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.checkpoints.formats import gguf_cases
from tinygn_dist.checkpoints.formats import onnx
from tinygn_dist.errors import UserError

for package in onnx.EXTRA:
    pytest.importorskip(package, reason=f"run: {onnx.INSTALL}")
IDS = torch.arange(4, 24)[None]


def run(path: Path, ids: torch.Tensor, past: list[torch.Tensor]) -> list[torch.Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    fed = dict(zip(names, (ids.numpy(), *(tensor.numpy() for tensor in past)), strict=True))
    return [torch.from_numpy(each) for each in session.run(None, fed)]


def test_layers_of_different_widths_in_two_steps(tmp_path: Path):
    model = gguf_cases.model(num_hidden_layers=2)
    gguf_cases.make_uneven(model, (96, 32), (2, 1))
    onnx.write_onnx(tmp_path / "out" / "m.onnx", model, None, "F32")
    with torch.no_grad():
        logits = model(IDS).logits
    found, *past = run(tmp_path / "out" / "m.onnx", IDS[:, :12], onnx.empty_cache(model, 1, 0))
    torch.testing.assert_close(found, logits[:, :12], rtol=1e-4, atol=1e-4)
    assert [tensor.shape[1] for tensor in past] == [2, 2, 1, 1]
    found, *_ = run(tmp_path / "out" / "m.onnx", IDS[:, 12:], past)
    torch.testing.assert_close(found, logits[:, 12:], rtol=1e-4, atol=1e-4)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"m.onnx", "m.onnx.data"}


def test_blocks_of_four_bits_are_nodes(tmp_path: Path):
    import onnx as package

    model = gguf_cases.model(num_hidden_layers=1)
    onnx.write_onnx(tmp_path / "m.onnx", model, None, "Q4")
    nodes = package.load(tmp_path / "m.onnx", load_external_data=False).graph.node
    assert sum(node.op_type == "MatMulNBits" for node in nodes) == 7  # the output is tied to the embedding, which stays
    found = run(tmp_path / "m.onnx", IDS, onnx.empty_cache(model, 1, 0))[0]
    assert found.shape == (1, 20, gguf_cases.VOCAB) and found.isfinite().all()


def test_an_encoder_in_int8_keeps_its_directions(tmp_path: Path):
    model = tiny.build("bert")
    inputs = {"input_ids": torch.arange(3, 13)[None], "attention_mask": torch.ones(1, 10, dtype=torch.int64)}
    onnx.write_onnx(tmp_path / "m.onnx", model, inputs, "INT8")
    with torch.no_grad():
        features = model(**inputs).last_hidden_state
    found = run(tmp_path / "m.onnx", inputs["input_ids"], [inputs["attention_mask"]])[0]
    assert torch.nn.functional.cosine_similarity(found, features, dim=-1).min() > 0.97


def test_refusals_before_work(tmp_path: Path):
    with pytest.raises(UserError, match="accepted: F32"):
        onnx.write_onnx(tmp_path / "m.onnx", gguf_cases.model(), None, "Q3")
    (tmp_path / "m.onnx").touch()
    with pytest.raises(UserError, match="exists"):
        onnx.write_onnx(tmp_path / "m.onnx", gguf_cases.model(), None, "F32")
