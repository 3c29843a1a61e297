"""Counter-based random numbers: the value of an element depends on (seed, tensor, global element index) alone.

Any rank can make any piece of a direction without communication, and every sharding sees the same one.
"""

from __future__ import annotations

import functools
import hashlib

import torch

_MASK = (1 << 64) - 1


def key_of(seed: int, name: str) -> int:
    """64-bit key of one tensor's stream."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")


def hash64(index: torch.Tensor, key: int) -> torch.Tensor:
    """splitmix64 (Steele et al. 2014) of an int64 tensor of indices: 64 well-mixed bits as int64, wrapping mod 2^64."""
    mixed = index * _signed(0x9E3779B97F4A7C15) + _signed(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= (mixed >> shift) & ((1 << (64 - shift)) - 1)
        mixed *= _signed(factor)
    return mixed ^ ((mixed >> 31) & ((1 << 33) - 1))


def uniform(start: int, stop: int, key: int) -> torch.Tensor:
    """fp32 in [0, 1) for flat elements start..stop of a tensor."""
    bits = hash64(torch.arange(start, stop, dtype=torch.int64), key)
    return ((bits >> 40) & 0xFFFFFF).float() / (1 << 24)


def signs(start: int, stop: int, key: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """fp32 +1 or -1 for flat elements start..stop of a tensor (a Rademacher direction): one bit each of hash64 of
    index // 64, lowest bit first."""
    words = hash64(torch.arange(start // 64, -(-stop // 64), dtype=torch.int64, device=device), key)
    table = _byte_signs().to(device)
    each = table.index_select(0, words.view(torch.uint8).int()).view(
        -1
    )  # little-endian, as every machine torch runs on
    return each[start % 64 : start % 64 + stop - start]


@functools.cache
def _byte_signs() -> torch.Tensor:
    """(256, 8) fp32: the bits of every byte as signs."""
    return (torch.arange(256)[:, None] >> torch.arange(8) & 1).float() * 2 - 1


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value
