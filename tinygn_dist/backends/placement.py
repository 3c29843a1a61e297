"""First part of the contract: where a model is, and how all of it is gathered.

The operations that are not abstract are right where every rank holds every weight whole; backends that shard the
weights override them.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tinygn_dist.backends import collectives
from tinygn_dist.backends.pieces import Origin, tensor_named, tensors_of
from tinygn_dist.backends.processes import Item, Processes
from tinygn_dist.backends.wrappers import refuse_spread, without, without_adapters


class Placement(Processes, ABC):
    shards_weights = False
    """whether a rank may hold only a piece of a weight, or a master copy beside it"""
    splits_weights = False
    """whether a rank holds only a piece of a weight"""
    weights_wait = False
    """whether weights are fetched to the device for each forward"""
    recomputes = True
    """whether a layer may run again inside of a backward"""
    wrappers: tuple[type[nn.Module], ...] = ()
    """what this backend puts around a model in training"""

    @abstractmethod
    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any: ...

    def place(self, origin: Origin) -> nn.Module:
        with self.together("loading the model"):
            model = origin.take_whole()
        return self.prepare(model)

    def running(self, model: nn.Module) -> nn.Module:
        """What forwards outside of training go through: adapters count, wrappers of training and torch.compile do
        not."""
        return without(model, *self.wrappers)

    def unwrap(self, model: nn.Module) -> nn.Module:
        return without_adapters(self.running(model))

    def refuse_spread(self, model: nn.Module) -> None:
        """Refused for a caller's model that something else than this backend has spread."""
        refuse_spread(self.running(model))

    def spread_buffers(self, model: nn.Module) -> None:
        """The main rank's buffers everywhere: running statistics of norms differ, because each rank saw its own
        data."""
        for buffer in self.unwrap(model).buffers():
            collectives.broadcast_(buffer.data, 0)

    @contextlib.contextmanager
    def in_fp32(self, model: nn.Module) -> Iterator[None]:
        """Afterwards every tensor has its own dtype again: buffers are often fp32 in a bf16 model, and must stay so."""
        before = {name: tensor.dtype for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        self._cast(model, {n: torch.float32 if dtype.is_floating_point else dtype for n, dtype in before.items()})
        yield
        self._cast(model, before)

    def _cast(self, model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.data = tensor.data.to(dtypes[name])

    def shape(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """Of a whole parameter or buffer of a placed model."""
        return tuple(tensor.shape)

    def whole(self, model: nn.Module, name: str) -> torch.Tensor:
        """To be read only, and dropped before the next: it may be a copy."""
        return tensor_named(self.unwrap(model), name).data

    def full_tensors(self, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        for name in tensors_of(self.unwrap(model)):
            yield name, self.whole(model, name)

    def pieces(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().reshape(-1) for name, tensor in tensors_of(self.unwrap(model)).items()}

    def dealt_over_replicas(self, items: Sequence[Item]) -> list[Item]:
        """What the model copy that this rank belongs to works on; ranks that share one copy get the same."""
        return list(items) if self.shards_weights else [item for item, _ in self.dealt(items)]

    def dealt_within_replica(self, items: Sequence[Item]) -> list[tuple[Item, bool]]:
        """What of its copy's work this rank does, as `dealt` says it."""
        return self.dealt(items) if self.shards_weights else [(item, True) for item in items]
