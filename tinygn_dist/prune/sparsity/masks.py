"""Masks of the live weights: applied in place, enforced after each optimizer step, counted, hashed.

A mask is a bool tensor shaped like this rank's shard of its matrix, True = keep. Masks are plain tensors beside the
model, not buffers: DDP would broadcast buffers and a checkpoint would carry them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import nn

from tinygn_dist.backends.base import Backend
from tinygn_dist.maths.bit_zeros import checksum, num_nonzero
from tinygn_dist.maths.counter_rng import hash64, key_of
from tinygn_dist.models.anatomy import Matrix

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Enforced:
    """What holds masks in a training. hooks: with a `remove()` each."""

    hooks: tuple[Any, ...]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


class Masks:
    """masks: matrix name -> bool, the shape of this rank's shard. notes: sentences for the report on how they were
    chosen."""

    def __init__(
        self, matrices: Sequence[Matrix], masks: Mapping[str, torch.Tensor], notes: Iterable[str] = ()
    ) -> None:
        self.matrices, self.notes = tuple(matrices), tuple(dict.fromkeys(notes))
        self.by_name = {matrix.name: masks[matrix.name] for matrix in matrices}
        self._sums: dict[str, torch.Tensor] = {}

    def apply_(self, model: nn.Module, backend: Backend) -> None:
        """Zero what is not kept, in the live weights and in any master copy behind them."""
        for matrix in self.matrices:
            backend.write_mask(model, matrix, self.by_name[matrix.name])

    def enforce(self, model: nn.Module, optimizer: object, backend: Backend) -> Enforced:
        """Apply after every step of the optimizer, and `check` before the next one.

        After, not before: momentum and weight decay move weights whose gradient is zero.
        """
        held = backend.after_step(model, optimizer, lambda: self._hold(model, backend))
        return Enforced((held, backend.before_step(model, optimizer, lambda: self.check(model, backend))))

    def _hold(self, model: nn.Module, backend: Backend) -> None:
        for matrix in self.matrices:  # one after the other: the checksum then finds the matrix in the cache
            backend.write_mask(model, matrix, self.by_name[matrix.name])
            self._sums[matrix.name] = checksum(backend.shard(model, matrix).weight)

    def _checksums(self, model: nn.Module, backend: Backend) -> dict[str, torch.Tensor]:
        return {matrix.name: checksum(backend.shard(model, matrix).weight) for matrix in self.matrices}

    def check(self, model: nn.Module, backend: Backend) -> None:
        """RuntimeError when a masked weight of this rank is not zero. No collective: it runs in every step.

        Only matrices that are not as the last `enforce` left them are looked at closely: others may be written to as
        long as the zeros stay (a checkpoint that is loaded).
        """
        for matrix in self._changed(model, backend):
            if wrong := num_nonzero(backend.shard(model, matrix).weight, self.by_name[matrix.name]):
                raise RuntimeError(
                    f"rank {backend.rank}: {wrong} masked weights of {matrix.name} are not zero, but they were after "
                    "the last step: something else writes to the model's weights"
                )

    def _changed(self, model: nn.Module, backend: Backend) -> list[Matrix]:
        if not self._sums:
            return list(self.matrices)
        now, by_device = self._checksums(model, backend), {}
        for matrix in self.matrices:  # offloaded weights may lie in two places
            by_device.setdefault(now[matrix.name].device, []).append(matrix)
        changed = []
        for matrices in by_device.values():  # one look at a device, not one a matrix
            before, here = (torch.stack([sums[matrix.name] for matrix in matrices]) for sums in (self._sums, now))
            changed += [matrix for matrix, differs in zip(matrices, (before != here).tolist(), strict=True) if differs]
        return changed

    def violations(self, model: nn.Module, backend: Backend) -> int:
        """Masked weights that are not zero, over all shards."""
        count = torch.zeros(1, dtype=torch.int64)
        for matrix in self.matrices:
            count += num_nonzero(backend.shard(model, matrix).weight, self.by_name[matrix.name])
        return int(backend.sum_over_shards(count))

    def kept(self, backend: Backend) -> dict[str, int]:
        """Number kept per matrix, over all shards."""
        counts = torch.tensor([int(self.by_name[t.name].sum()) for t in self.matrices], dtype=torch.int64)
        return dict(zip((t.name for t in self.matrices), backend.sum_over_shards(counts).tolist(), strict=True))

    def packed(self, model: nn.Module, backend: Backend) -> Iterator[tuple[str, torch.Tensor]]:
        """(matrix name, its whole mask as stored, eight entries per byte), on the CPU of every rank. Collectives."""
        for matrix in self.matrices:
            whole = backend.gather(model, matrix, self.by_name[matrix.name])
            yield matrix.name, torch.from_numpy(numpy.packbits(whole.reshape(-1).cpu().numpy()))

    def unpack(self, name: str, packed: torch.Tensor, model: nn.Module, backend: Backend) -> None:
        """Replace one mask by a whole one from `packed`, made at any world size on any backend."""
        matrix = next(matrix for matrix in self.matrices if matrix.name == name)
        whole = torch.from_numpy(numpy.unpackbits(packed.numpy(), count=matrix.numel)).bool()
        held = self.by_name[name]
        piece = backend.shard_of(model, matrix, whole.view(matrix.stored_shape).to(held.device))
        self.by_name[name] = piece.reshape(held.shape)

    def apply_to_copy(self, copy: nn.Module, model: nn.Module, backend: Backend) -> None:
        """Zero what is not kept in a copy of the whole model (an average of its weights), which training does not
        reach."""
        for matrix in self.matrices:
            keep = backend.gather(model, matrix, self.by_name[matrix.name])
            weight = matrix.within(backend.unwrap(copy).get_parameter(matrix.parameter).data)
            weight.masked_fill_(~keep.to(weight.device), 0)

    def fingerprint(self, model: nn.Module, backend: Backend) -> str:
        """16 hex digits, the same for equal masks however they are sharded: a wrapping sum over kept elements of a
        hash of (matrix, global index)."""
        total = torch.zeros(1, dtype=torch.int64)
        for matrix in self.matrices:
            key, start = key_of(0, matrix.name), backend.shard(model, matrix).offset
            for number, chunk in enumerate(self.by_name[matrix.name].reshape(-1).split(_CHUNK)):
                kept = chunk.nonzero().squeeze(1).cpu() + (start + number * _CHUNK)
                total += hash64(kept, key).sum()
        return f"{int(backend.sum_over_shards(total)) & ((1 << 64) - 1):016x}"
