"""What keeps weights on their grids: the scales, while the weights themselves say which codes they are.

A weight on its grid is (code - zero point) * scale, so its code is what it rounds to, also where the product was
rounded to bf16 (whose 8 bits tell codes of 8 bits around zero apart). Nothing the size of a weight is held beside the
model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from tinygn_dist.backends.base import Backend
from tinygn_dist.backends.pieces import Shard
from tinygn_dist.maths.counter_rng import hash64, key_of
from tinygn_dist.maths.grids import Grid, Scales
from tinygn_dist.models.anatomy import Matrix

_CHUNK = 1 << 20
_CODES = 512
"""more than there are codes"""


class Quantiser:
    """grids, scales: by matrix name; scales whole on every rank, where the weights lie."""

    def __init__(self, matrices: Sequence[Matrix], grids: Mapping[str, Grid], scales: Mapping[str, Scales]) -> None:
        self.matrices, self.grids, self.scales = tuple(matrices), dict(grids), dict(scales)

    def apply_(self, model: nn.Module, backend: Backend) -> None:
        """Every weight, and any master copy behind it, becomes the nearest value of its grid."""
        for matrix in self.matrices:
            shard = backend.shard(model, matrix)
            nearest = torch.empty_like(shard.weight).reshape(-1)
            for (_, values), into in zip(self._rounded(matrix, shard), nearest.split(_CHUNK), strict=True):
                into.copy_(values)
            backend.write(model, matrix, nearest.view(shard.weight.shape))

    def violations(self, model: nn.Module, backend: Backend) -> int:
        """Weights that are no value of their grid, over all shards."""
        count = torch.zeros(1, dtype=torch.int64)
        for matrix in self.matrices:
            shard = backend.shard(model, matrix)
            for (_, values), weight in zip(self._rounded(matrix, shard), _chunks(shard), strict=True):
                count += int((values.to(weight.dtype) != weight).sum())
        return int(backend.sum_over_shards(count))

    def fingerprint(self, model: nn.Module, backend: Backend) -> str:
        """16 hex digits, the same for equal codes and scales however the weights are sharded: a wrapping sum over codes
        of a hash of (matrix, global index, code), and a digest of the scales."""
        total = torch.zeros(1, dtype=torch.int64)
        digest = hashlib.sha256()
        for matrix in self.matrices:
            shard, key = backend.shard(model, matrix), key_of(0, matrix.name)
            for number, (codes, _) in enumerate(self._rounded(matrix, shard)):
                first = shard.offset + number * _CHUNK
                index = torch.arange(first, first + len(codes))
                total += hash64(index * _CODES + self.grids[matrix.name].numbers(codes).cpu(), key).sum()
            for each in self.scales[matrix.name]:
                digest.update(each.cpu().contiguous().numpy().tobytes())
        scales = int.from_bytes(digest.digest()[:8], "little")
        return f"{(int(backend.sum_over_shards(total)) + scales) & ((1 << 64) - 1):016x}"

    def _rounded(self, matrix: Matrix, shard: Shard) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(codes, values) of a rank's piece, flat, fp32, so many at a time."""
        grid, (scale, zero_point) = self.grids[matrix.name], self.scales[matrix.name]
        out, num_inputs = matrix.shape
        width, start = num_inputs // scale.shape[1], shard.offset
        for weight in _chunks(shard):
            index = torch.arange(start, start + len(weight), device=weight.device)
            row, column = (
                (index // num_inputs, index % num_inputs) if matrix.input_dim == 1 else (index % out, index // out)
            )
            place = row * scale.shape[1] + column // width
            scales, zeros = (each.to(weight.device).reshape(-1)[place] for each in (scale, zero_point))
            codes = grid.nearest(weight.float() / scales + zeros)
            yield codes, (codes - zeros) * scales
            start += len(weight)


def _chunks(shard: Shard) -> Iterator[torch.Tensor]:
    flat = shard.weight.reshape(-1)
    return iter(flat.split(_CHUNK) if flat.numel() else ())
