"""A quantised checkpoint as the start of a run: refused, or the weights that its codes stand for."""

import json
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.conftest import save
from tinygn_dist.backends.base import Backend
from tinygn_dist.backends.pieces import tensors_of
from tinygn_dist.checkpoints import load
from tinygn_dist.checkpoints.formats import compressed_tensors
from tinygn_dist.checkpoints.formats.compressed_tensors import Stored
from tinygn_dist.checkpoints.inventory import take_inventory
from tinygn_dist.checkpoints.safetensors_io import Kind, ShardWriter
from tinygn_dist.checkpoints.sharded_load import from_checkpoint, placed
from tinygn_dist.config import ModelConfig
from tinygn_dist.errors import Refused, UserError
from tinygn_dist.maths.grids import Grid
from tinygn_dist.maths.solve.quantise import round_to_nearest

HOW = Stored(Grid(3, False, 16), "pack-quantized")


@pytest.fixture
def quantised(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder of int3 files, and the weights that they stand for."""
    model = save(tiny.build("llama-tied"), tmp_path) and tiny.build("llama-tied")
    wanted, stored, modules = {}, {}, {}
    for name, tensor in tensors_of(model).items():
        wanted[name], module = tensor.detach(), name.removesuffix(".weight")
        if ".layers." not in name or tensor.dim() != 2:
            stored[name] = tensor.detach()
            continue
        found = round_to_nearest(tensor.detach(), HOW.grid, torch.float32)
        wanted[name], modules[module] = found.values(), HOW
        stored |= compressed_tensors.encoded(name, found.values(), found.scales(), HOW)
    writer = ShardWriter(tmp_path, {n: Kind(tuple(t.shape), t.dtype) for n, t in stored.items()}, 20_000)
    for name, tensor in stored.items():
        writer.add(name, tensor)
    writer.finish()
    (tmp_path / "model.safetensors").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = compressed_tensors.quantization_config(modules, ["lm_head"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path, wanted


def test_its_weights_are_those_of_the_codes(quantised, backend: Backend):
    folder, wanted = quantised
    source = load.find_model(ModelConfig(name=str(folder), dequantize=True))
    model, dtypes = placed(source, backend)
    assert not hasattr(model.config, "quantization_config") and set(dtypes.values()) == {torch.float32}
    found = tensors_of(backend.unwrap(model))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    empty, run = from_checkpoint(source, backend).take_empty()  # as backends that shard the weights take it
    for name, tensor in tensors_of(empty).items():
        assert torch.equal(run(name, 3, tensor.numel() - 5), wanted[name].reshape(-1)[3:-5])
    assert take_inventory(source, load.skeleton(source)).other == ()


def test_without_being_asked_to_it_is_refused(quantised):
    with pytest.raises(Refused, match=r"already quantised \(compressed-tensors\).* --model.dequantize true"):
        load.find_model(ModelConfig(name=str(quantised[0])))


def test_a_checkpoint_that_lacks_a_scale_is_refused(quantised, backend: Backend):
    folder, _ = quantised
    index = folder / "model.safetensors.index.json"
    assert index.is_file()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"].append("model.layers.0.mlp.up_proj")
    (folder / "config.json").write_text(json.dumps(config))
    source = load.find_model(ModelConfig(name=str(folder), dequantize=True))
    with pytest.raises(UserError, match="codes do not make all weights"):
        placed(source, backend)
