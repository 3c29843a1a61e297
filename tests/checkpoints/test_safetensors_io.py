"""Checkpoint files tensor by tensor: what is written is what safetensors and transformers read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tinygn_dist.checkpoints.safetensors_io import Kind, ShardWriter, StoredTensors, written

STATE = {
    "a.weight": torch.arange(15, dtype=torch.float32).view(5, 3),
    "b.weight": torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "c": torch.tensor(3, dtype=torch.int64),
    "d.bias": torch.zeros(7, dtype=torch.float16),
    "e": torch.tensor([[True, False]]),
}
LAYOUT = {name: Kind(tuple(tensor.shape), tensor.dtype) for name, tensor in STATE.items()}


def write(folder: Path, max_bytes: float) -> ShardWriter:
    writer = ShardWriter(folder, LAYOUT, max_bytes)
    for name in reversed(STATE):  # in any order
        writer.add(name, STATE[name])
    return writer


def test_safetensors_reads_what_was_written(tmp_path: Path):
    done = write(tmp_path, 1e9).finish()
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == STATE.keys() and all(torch.equal(found[n], t) for n, t in STATE.items())
    assert all(found[name].dtype == tensor.dtype for name, tensor in STATE.items())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert (done["a.weight"].size, done["a.weight"].zeros, done["a.weight"].is_matrix) == (15, 1, True)
    assert (done["d.bias"].zeros, done["d.bias"].is_matrix) == (7, False)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_several_files_with_an_index(tmp_path: Path):
    write(tmp_path, 70).finish()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in STATE.values())
    assert index["weight_map"].keys() == STATE.keys()
    files = sorted(set(index["weight_map"].values()))
    assert (
        files == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)] and len(files) > 1
    )
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], STATE[name])
    for file in files:
        tensors = load_file(tmp_path / file).values()
        assert len(tensors) == 1 or sum(t.numel() * t.element_size() for t in tensors) <= 70


def test_a_tensor_that_never_came_is_seen(tmp_path: Path):
    writer = ShardWriter(tmp_path, LAYOUT, 1e9)
    writer.add("c", STATE["c"])
    with pytest.raises(AssertionError, match="never written"):
        writer.finish()


@pytest.mark.parametrize("name", STATE)
def test_every_run_is_that_part_of_the_flat_tensor(tmp_path: Path, name: str):
    write(tmp_path, 70).finish()
    stored, flat = StoredTensors(sorted(tmp_path.glob("*.safetensors"))), STATE[name].reshape(-1)
    assert stored.kind(name) == LAYOUT[name] and torch.equal(stored.whole(name), STATE[name])
    for low in range(len(flat) + 1):
        for high in range(low, len(flat) + 1):
            assert torch.equal(stored.run(name, low, high), flat[low:high])


def test_the_digest_sees_one_bit():
    changed = STATE["a.weight"].clone()
    changed[0, 0] = -0.0
    assert torch.equal(changed, STATE["a.weight"])
    assert written("a", changed) != written("a", STATE["a.weight"])
