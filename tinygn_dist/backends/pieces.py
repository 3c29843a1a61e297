"""What backends and stages hand to each other: models that are still to be placed, pieces of weights, row work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from tinygn_dist.backends.wrappers import plain_module, plain_names
from tinygn_dist.models.anatomy import Matrix


@dataclass(frozen=True)
class Shard:
    """This rank's piece of a matrix.

    weight: the live storage, any shape, possibly empty, where the weights lie: with offload not on the device that
    computes. offset: index of its first element in the flattened matrix *as stored* (which `matrix.start` places in a
    parameter that holds several); the piece is a run of consecutive elements. Masks and scores of a matrix have this
    shape, and lie there, on each rank. Edits go through `write`: there may be master copies.
    """

    weight: torch.Tensor
    offset: int


# run(name, low, high): flat elements of a parameter or persistent buffer
Run = Callable[[str, int, int], torch.Tensor]


@dataclass
class Origin:
    """A model that is still to be placed.

    whole(): the model, on the CPU, weights and all. empty(): the same with parameters on the meta device and real
    buffers, and where its values come from. Every rank asks `run` for every tensor of `tensors_of` in turn, for no
    elements where it holds none: it may be a collective. dtypes: of every tensor, known once one of the two was called.
    """

    whole: Callable[[], nn.Module]
    empty: Callable[[], tuple[nn.Module, Run]]
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def take_whole(self) -> nn.Module:
        return self._noted(self.whole())

    def take_empty(self) -> tuple[nn.Module, Run]:
        model, run = self.empty()
        return self._noted(model), run

    def _noted(self, model: nn.Module) -> nn.Module:
        self.dtypes |= {name: tensor.dtype for name, tensor in model.state_dict().items()}
        return model


def tensors_of(bare: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by the first of their names, in the order of the state dict: what a checkpoint
    holds. Tied weights come once, adapters not at all."""
    unique: dict[int, str] = {}
    state = bare.state_dict(keep_vars=True)
    plain = plain_names(bare, list(state))
    for name in plain:
        unique.setdefault(id(state[name]), name)
    return {plain[name]: state[name] for name in unique.values()}


def tensor_named(bare: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer itself, by its name in the checkpoint."""
    *path, leaf = name.split(".")
    module = plain_module(bare)
    for word in path:
        module = plain_module(getattr(module, word))
    return getattr(module, leaf)


def hollow(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes with parameters on the meta device and real buffers, in eval mode."""
    with init_empty_weights(include_buffers=False):
        model = build()
    model.tie_weights()
    return model.eval()


def without_storage(model: nn.Module, device: torch.device) -> list[nn.Parameter]:
    """Parameters on the meta device replaced by ones that repeat a single zero, which can be partitioned one by
    one; tied ones stay tied. Returns them."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in made:
                zeros = torch.zeros(1, dtype=parameter.dtype, device=device).expand(parameter.shape)
                made[parameter] = nn.Parameter(zeros, requires_grad=parameter.requires_grad)
            if parameter is not None:
                module._parameters[name] = made[parameter]
    return list(made.values())


def filled(model: nn.Module, run: Run) -> nn.Module:
    """An empty model with all its values, on the CPU."""
    made: dict[int, nn.Parameter] = {}
    for name, tensor in tensors_of(model).items():
        values = run(name, 0, tensor.numel()).to("cpu", tensor.dtype).reshape(tensor.shape)
        if isinstance(tensor, nn.Parameter):
            made[id(tensor)] = nn.Parameter(values.clone(), requires_grad=tensor.requires_grad)
        else:
            tensor.copy_(values)
    for module in model.modules():  # tied ones stay tied
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[leaf] = made[id(parameter)]
    return model


@dataclass
class Job:
    """Row work on matrices that share one input. moments: this rank's partial sums over its data, until `sum_for_jobs`
    completes them on the rank that solves the job and empties them elsewhere."""

    matrices: tuple[Matrix, ...]
    moments: list[torch.Tensor]
    cost: float
    extra: dict[str, Any] = field(default_factory=dict)


Extras = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Edited:
    """What a solver makes of one matrix. weight: (out, in), any float dtype. extras: by name, whatever else the format
    or the caller needs: a mask, codes, scales, zero points, units that stay.

    An extra shaped like the weight belongs to it, entry by entry: each rank gets its piece, shaped and placed like its
    shard. Any other arrives whole on every rank.
    """

    weight: torch.Tensor
    extras: Extras = field(default_factory=dict)


# solve(job, whole (out, in) weights) -> for each matrix what becomes of it
Solve = Callable[[Job, list[torch.Tensor]], list[Edited]]
Look = Callable[[Job, list[torch.Tensor]], None]
