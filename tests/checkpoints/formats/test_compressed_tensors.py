"""What is written against transformers with the package compressed-tensors, where it is there, and against our own
reader."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests import tiny
from tinygn_dist.checkpoints.formats.compressed_tensors import (
    Modules,
    Stored,
    decoded,
    encoded,
    kinds,
    quantization_config,
)
from tinygn_dist.checkpoints.safetensors_io import Kind, ShardWriter
from tinygn_dist.errors import Refused
from tinygn_dist.maths.grids import Grid
from tinygn_dist.maths.solve.quantise import round_to_nearest

WAYS = {f"int{bits}": Stored(Grid(bits, True, 16), "pack-quantized") for bits in range(2, 9)}
WAYS |= {f"int{bits} zero points": Stored(Grid(bits, False, 16), "pack-quantized") for bits in (2, 3, 4, 8)}
WAYS |= {
    "int8 rows": Stored(Grid(8), "pack-quantized"),
    "int8 zero points rows": Stored(Grid(8, False), "pack-quantized"),
    "W8A8": Stored(Grid(8), "int-quantized", "int8"),
    "fp8": Stored(Grid(8, True, None, "float"), "float-quantized"),
    "fp8 dynamic": Stored(Grid(8, True, None, "float"), "float-quantized", "fp8"),
}


def quantised(weight: torch.Tensor, how: Stored, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A weight with half of its entries zero, on the grid, and what is written of it."""
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    found = round_to_nearest(weight * keep, how.grid, dtype)
    values = found.values().to(dtype)
    scales = found.scales()
    assert not values[~keep].any()
    return values, encoded("up.weight", values, scales, how)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_as_laid_out_and_comes_back_to_the_bit(way: str, dtype: torch.dtype):
    how, weight = WAYS[way], torch.randn(40, 48, generator=torch.Generator().manual_seed(1))
    values, stored = quantised(weight, how, dtype)
    layout = kinds("up.weight", Kind((40, 48), dtype), how)
    assert {name: Kind(tuple(t.shape), t.dtype) for name, t in stored.items()} == layout
    back = decoded("up.weight", stored, how)
    assert back.dtype == dtype and torch.equal(back, values)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_gives_the_logits_of_the_dequantised_model(way: str, dtype: torch.dtype, tmp_path: Path):
    pytest.importorskip("compressed_tensors")
    how, model = WAYS[way], tiny.build("llama").to(dtype)
    written: dict[str, torch.Tensor] = dict(model.state_dict())
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    inside = {name: how for name in linear if ".layers." in name}
    for name in inside:
        weight = model.get_parameter(f"{name}.weight")
        weight.data, stored = quantised(weight.data.float(), how, dtype)
        del written[f"{name}.weight"]
        written |= {key.replace("up.weight", f"{name}.weight"): tensor for key, tensor in stored.items()}
    model.save_pretrained(tmp_path, state_dict={})
    writer = ShardWriter(tmp_path, {n: Kind(tuple(t.shape), t.dtype) for n, t in written.items()}, 1e9)
    for name, tensor in written.items():
        writer.add(name, tensor)
    writer.finish()
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = quantization_config(inside, ["lm_head"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    model.save_pretrained(tmp_path / "dense")
    dense, loaded = (AutoModelForCausalLM.from_pretrained(each) for each in (tmp_path / "dense", tmp_path))
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        wanted, found = dense(ids).logits, loaded(ids).logits
    if how.activations is None:
        assert torch.equal(found, wanted)
    else:  # inputs are rounded, too
        assert not torch.equal(found, wanted)
        torch.testing.assert_close(found, wanted, rtol=0.3, atol=0.3 * float(wanted.abs().max()))
    for name in inside:
        assert torch.equal(loaded.get_submodule(name).weight, model.get_submodule(name).weight)


def test_config_says_which_modules_are_stored_how():
    four, eight = Stored(Grid(4, False, 32), "pack-quantized"), Stored(Grid(8), "pack-quantized")
    written = quantization_config({"m.a.0": four, "m.a.1": eight, "m.a.10": four}, ["m.b", "lm_head"])
    read = Modules(json.loads(json.dumps(written)))
    assert [read.how(name) for name in ("m.a.0", "m.a.1", "m.a.10", "m.b", "lm_head")] == [
        four,
        eight,
        four,
        None,
        None,
    ]
    alone = Modules(json.loads(json.dumps(quantization_config({"m.a.0": four}, ["lm_head"]))))
    assert alone.how("m.a.0") == four and alone.how("lm_head") is None


@pytest.mark.parametrize(
    "weights",
    [
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    ],
)
def test_other_strategies_are_refused(weights: dict):
    config = {
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    with pytest.raises(Refused, match="accepted: pack-quantized"):
        Modules(config)
