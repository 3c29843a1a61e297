"""Small integers in 32-bit words, as compressed-tensors packs them: no bit is left over between two codes.

32 codes of b bits fill b words exactly; code i of a row starts at bit i * b, lowest bits first, and may lie in two
words. Codes are stored unsigned: 2^(b-1) is added.
"""

from __future__ import annotations

import torch

RUN = 32
"""codes that fill whole words, whatever their bits"""


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(rows, ceil(n * bits / 32)) int32 of (rows, n) int8 codes, each within its bits."""
    rows, count = codes.shape
    padded = torch.zeros(rows, -(-count // RUN) * RUN, dtype=torch.int64, device=codes.device)
    padded[:, :count] = codes.long() + 2 ** (bits - 1)
    runs = padded.view(rows, -1, RUN)
    words = torch.zeros(rows, runs.shape[1], bits, dtype=torch.int64, device=codes.device)
    for at in range(RUN):
        word, shift = divmod(at * bits, 32)
        words[..., word] |= runs[..., at] << shift
        if shift + bits > 32:
            words[..., word + 1] |= runs[..., at] >> (32 - shift)
    words &= 0xFFFFFFFF
    words -= (words >> 31) << 32  # the same bits, signed
    return words.view(rows, -1)[:, : -(-count * bits // 32)].to(torch.int32).contiguous()


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """(rows, count) int8 codes of what `pack` made."""
    rows = len(words)
    num_runs = -(-count // RUN)
    padded = torch.zeros(rows, num_runs * bits, dtype=torch.int64, device=words.device)
    padded[:, : words.shape[1]] = words.long() & 0xFFFFFFFF
    runs = padded.view(rows, num_runs, bits)
    codes = torch.empty(rows, num_runs, RUN, dtype=torch.int8, device=words.device)
    for at in range(RUN):
        word, shift = divmod(at * bits, 32)
        value = runs[..., word] >> shift
        if shift + bits > 32:
            value |= runs[..., word + 1] << (32 - shift)
        codes[..., at] = ((value & (2**bits - 1)) - 2 ** (bits - 1)).to(torch.int8)
    return codes.view(rows, -1)[:, :count].contiguous()
