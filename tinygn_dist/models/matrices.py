"""The weight matrices of a model that can be masked: of Linear and Conv1D modules, and of experts in fused 3-D
parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tinygn_dist.errors import Refused
from tinygn_dist.models.stacks import Stack, layer_of


@dataclass(frozen=True)
class Matrix:
    """A weight matrix that can be masked.

    `parameter` is its parameter's name without wrapper prefixes, `module` the module that holds it, `shape` is
    (out, in) whatever the storage, `input_dim` the storage dim along which inputs lie (1 for Linear, 0 for GPT-2's
    Conv1D). `index` is None where the matrix is the whole parameter, else which matrix of a 3-D parameter (an expert).
    """

    parameter: str
    module: str
    layer: int
    shape: tuple[int, int]
    input_dim: int
    index: int | None = None

    @property
    def name(self) -> str:
        """Unique among matrices."""
        return self.parameter if self.index is None else f"{self.parameter}[{self.index}]"

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def stored_shape(self) -> tuple[int, int]:
        return self.shape if self.input_dim == 1 else self.shape[::-1]

    @property
    def start(self) -> int:
        """Index of the matrix's first element in its flattened parameter; it ends `numel` later."""
        return (self.index or 0) * self.numel

    def within(self, parameter: torch.Tensor) -> torch.Tensor:
        """The matrix as stored, a view into its whole parameter (or the parameter's gradient)."""
        return parameter if self.index is None else parameter[self.index]

    def oriented(self, stored: torch.Tensor) -> torch.Tensor:
        """(out, in) view of the matrix as stored; in-place edits reach it."""
        return stored if self.input_dim == 1 else stored.t()

    def per_input(self, values: torch.Tensor, piece: torch.Tensor, offset: int) -> torch.Tensor:
        """values (in,), one per input feature, laid out like `piece`: a run of the stored elements from `offset` on."""
        return self._laid_out(self.input_dim, values, piece, offset)

    def per_output(self, values: torch.Tensor, piece: torch.Tensor, offset: int) -> torch.Tensor:
        """The same of values (out,), one per output feature."""
        return self._laid_out(1 - self.input_dim, values, piece, offset)

    def _laid_out(self, dim: int, values: torch.Tensor, piece: torch.Tensor, offset: int) -> torch.Tensor:
        """dim: of the stored matrix, along which the values lie."""
        values = values.to(piece.device)
        if dim == 1 and piece.dim() == 2:
            return values.expand(piece.shape)
        width = self.stored_shape[1]
        first, last = offset // width, -(-(offset + piece.numel()) // width)
        one_each = values.repeat(last - first) if dim == 1 else values[first:last].repeat_interleave(width)
        start = offset - first * width
        return one_each[start : start + piece.numel()].view(piece.shape)


def find_matrices(model: nn.Module, stacks: tuple[Stack, ...]) -> Iterator[Matrix]:
    """Weight matrices inside the layers; of an unknown family, all but the output head. Shared ones once."""
    seen, head = set(), model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    reached = set()
    for name, module in model.named_modules():
        layer = layer_of(stacks, name) if stacks else 0
        if layer is None:
            continue
        if is_fused_experts(module):
            for leaf in expert_weights(module):
                experts, *stored = module.get_parameter(leaf).shape
                reached.add(f"{name}.{leaf}")
                input_dim = 0 if module.is_transposed else 1
                shape = (stored[1 - input_dim], stored[input_dim])
                yield from (Matrix(f"{name}.{leaf}", name, layer, shape, input_dim, i) for i in range(experts))
        elif isinstance(module, (nn.Linear, Conv1D)) and id(module.weight) not in seen and module is not head:
            seen.add(id(module.weight))
            stored = tuple(module.weight.shape)
            input_dim = 1 if isinstance(module, nn.Linear) else 0
            yield Matrix(f"{name}.weight", name, layer, (stored[1 - input_dim], stored[input_dim]), input_dim)
    missed = [n for n, p in model.named_parameters() if p.dim() == 3 and "expert" in n and n not in reached]
    if missed:
        raise Refused(
            f"{missed[0]} is a fused expert tensor whose layout {type(model).__name__} does not declare; accepted: "
            "Linear, Conv1D, and experts classes made by transformers' use_experts_implementation"
        )
    if not seen and not reached:
        raise Refused(f"model type {model.config.model_type!r} has no Linear or Conv1D weight to prune")


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds all experts of a layer in 3-D parameters and says how they are stored: transformers'
    `use_experts_implementation` leaves these marks on every such class."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(module, "down_proj")


def expert_weights(module: nn.Module) -> tuple[str, str]:
    """Names of the first and second matrices of a module of fused experts."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def input_features(module: nn.Module) -> int:
    """Features a Linear or Conv1D reads."""
    return module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]
