"""Quantised checkpoints of others, packed here bit by bit as their formats say, read as weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tinygn_dist.checkpoints.formats import compressed_tensors
from tinygn_dist.checkpoints.formats.compressed_tensors import Stored
from tinygn_dist.checkpoints.formats.dequantised import Dequantised
from tinygn_dist.checkpoints.safetensors_io import Kind
from tinygn_dist.errors import Refused, UserError
from tinygn_dist.maths.grids import Grid
from tinygn_dist.maths.solve.quantise import round_to_nearest

OUT, IN, GROUP = 32, 64, 16


def packed(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Along the first dimension, one long number a column, lowest bits first; (rows * bits / 32, columns) int32."""
    rows, columns = values.shape
    words = torch.zeros(rows * bits // 32, columns, dtype=torch.int64)
    for column in range(columns):
        whole = sum(int(value) << (bits * place) for place, value in enumerate(values[:, column].tolist()))
        for word in range(len(words)):
            part = (whole >> (32 * word)) & 0xFFFFFFFF
            words[word, column] = part - (1 << 32) if part >> 31 else part
    return words.to(torch.int32)


def parts(bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (in, out) and zero points (groups, out) from 0 on, scales (groups, out)."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (IN, OUT), generator=generator)
    zeros = torch.randint(1, 2**bits, (IN // GROUP, OUT), generator=generator)
    return codes, zeros, torch.rand(IN // GROUP, OUT, generator=generator) + 0.1


def opened(folder: Path, facts: dict, **tensors: torch.Tensor) -> Dequantised:
    other = {"norm.weight": torch.ones(3)}
    save_file({f"up.{name}": tensor.contiguous() for name, tensor in tensors.items()} | other, folder / "m.safetensors")
    return Dequantised([folder / "m.safetensors"], facts)


def check(read: Dequantised, wanted: torch.Tensor) -> None:
    assert sorted(read.names) == ["norm.weight", "up.weight"] and torch.equal(read.whole("norm.weight"), torch.ones(3))
    assert read.kind("up.weight") == Kind((OUT, IN), torch.float32) and read.kind("norm.weight").shape == (3,)
    torch.testing.assert_close(read.whole("up.weight"), wanted)
    assert torch.equal(read.run("up.weight", 5, 70), read.whole("up.weight").reshape(-1)[5:70])
    assert read.run("up.weight", 5, 5).numel() == 0 and torch.equal(read.run("norm.weight", 1, 3), torch.ones(2))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("edition", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq(bits: int, edition: str, act_order: bool, tmp_path: Path):
    codes, zeros, scales = parts(bits)
    group = torch.arange(IN) // GROUP
    group = group[torch.randperm(IN, generator=torch.Generator().manual_seed(1))] if act_order else group
    stored = zeros - int(edition == "gptq")
    facts = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": edition}
    read = opened(
        tmp_path, facts, qweight=packed(codes, bits), qzeros=packed(stored.t(), bits).t(), scales=scales,
        g_idx=group.to(torch.int32),
    )  # fmt: skip
    check(read, ((codes - zeros[group]) * scales[group]).t())


def test_awq(tmp_path: Path):
    codes, zeros, scales = parts(4)

    def interleaved(values: torch.Tensor) -> torch.Tensor:
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # what lies in nibbles 0 to 7
        return packed(values.view(len(values), -1, 8)[..., order].reshape(len(values), -1).t(), 4).t()

    facts = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    read = opened(tmp_path, facts, qweight=interleaved(codes), qzeros=interleaved(zeros), scales=scales)
    group = torch.arange(IN) // GROUP
    check(read, ((codes - zeros[group]) * scales[group]).t())


@pytest.mark.parametrize(
    "how",
    [
        Stored(Grid(3, False, GROUP), "pack-quantized"),
        Stored(Grid(4, True, GROUP), "pack-quantized"),
        Stored(Grid(8), "int-quantized"),
        Stored(Grid(8, True, None, "float"), "float-quantized"),
    ],
    ids=str,
)
def test_our_own_files(how: Stored, tmp_path: Path):
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))
    found = round_to_nearest(weight, how.grid, torch.float32)
    tensors = compressed_tensors.encoded("weight", found.values(), found.scales(), how)
    facts = compressed_tensors.quantization_config({"up": how}, ["lm_head"])
    check(opened(tmp_path, facts, **tensors), found.values())


def test_what_cannot_be_read_is_refused(tmp_path: Path):
    with pytest.raises(
        Refused, match="quantised by bitsandbytes, which cannot be dequantised here; accepted: compressed"
    ):
        opened(tmp_path, {"quant_method": "bitsandbytes"})
    how = Stored(Grid(4, True, GROUP), "pack-quantized")
    found = round_to_nearest(torch.ones(OUT, IN), how.grid, torch.float32)
    tensors = compressed_tensors.encoded("weight", found.values(), found.scales(), how)
    tensors["weight_scale"][3, 1] = float("nan")
    read = opened(tmp_path, compressed_tensors.quantization_config({"up": how}, []), **tensors)
    with pytest.raises(UserError, match="scales of up hold NaN"):
        read.whole("up.weight")
