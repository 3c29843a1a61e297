"""Which tensors make up a model's units and matrices. Reads module structure only, so it works on the meta device.

A *unit group* is all units of one kind in one layer (`unit_groups.py`). A *matrix* is one linear weight matrix that can
be masked: the weight of a Linear or Conv1D, or one expert's matrix in a fused 3-D parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from tinygn_dist.errors import Refused, UserError
from tinygn_dist.models.families import family_of, fixed_units, supported
from tinygn_dist.models.family_schema import Family
from tinygn_dist.models.matrices import Matrix, find_matrices
from tinygn_dist.models.stacks import Stack, find_stacks, layer_of
from tinygn_dist.models.unit_groups import Slice, UnitGroup, hidden_group, unit_groups

__all__ = ["Anatomy", "Matrix", "Slice", "UnitGroup", "read_anatomy"]


@dataclass(frozen=True)
class Anatomy:
    family: Family | None
    stacks: tuple[Stack, ...]
    layer_params: tuple[int, ...]
    groups: tuple[UnitGroup, ...]
    matrices: tuple[Matrix, ...]
    tied: tuple[tuple[str, str], ...]
    total_params: int
    fixed: Mapping[str, str] = field(default_factory=dict)
    """unit kinds that cannot be removed, each with the reason"""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """of every parameter of a convolutional net"""
    model_class: str = ""
    hidden: UnitGroup | None = None
    """the dimensions of the residual stream; `least`: their number is a multiple of it"""

    @property
    def num_layers(self) -> int:
        return len(self.layer_params)

    @property
    def layers_path(self) -> str:
        """The list of layers; nothing where there is none, or several, or a forward cannot start at any of them."""
        return self.stacks[0].path if len(self.stacks) == 1 and self.starts_anywhere else ""

    @property
    def starts_anywhere(self) -> bool:
        """Whether a forward may begin at any layer (`Family.starts_anywhere`)."""
        return self.family is None or self.family.starts_anywhere

    def path_of(self, layer: int) -> str:
        """The module of a layer."""
        stack = next(stack for stack in self.stacks if layer in stack.layers)
        return f"{stack.path}.{layer - stack.first}"

    def layer_of(self, name: str) -> int | None:
        """The layer that a module or parameter lies in, if any."""
        return layer_of(self.stacks, name)

    @property
    def lasting(self) -> frozenset[int]:
        """Layers that stay: of several stacks each keeps its first, which in T5 holds the position bias of all."""
        return frozenset(stack.first for stack in self.stacks) if len(self.stacks) > 1 else frozenset()

    def of_kind(self, kind: str) -> tuple[UnitGroup, ...]:
        """The unit groups of one kind, in layer order."""
        return tuple(group for group in self.groups if group.kind == kind)

    def matrix_of(self, module: str) -> Matrix:
        """The matrix that is the weight of a module."""
        return next(matrix for matrix in self.matrices if matrix.module == module)

    def choose_matrices(self, wanted: Iterable[str], ignored: Iterable[str]) -> tuple[Matrix, ...]:
        """Targets whose name matches a `wanted` and no `ignored` regular expression. A pattern that matches nothing
        is a UserError, so a typo cannot end in an untouched model."""
        names = [matrix.name for matrix in self.matrices]
        for pattern in (*wanted, *ignored):
            try:
                hit = any(re.search(pattern, name) for name in names)
            except re.error as error:
                raise UserError(f"pattern {pattern!r} is not a regular expression ({error})") from None
            if not hit:
                raise UserError(f"pattern {pattern!r} matches no weight; weights are named like {', '.join(names[:3])}")
        chosen = tuple(
            matrix
            for matrix in self.matrices
            if any(re.search(p, matrix.name) for p in wanted) and not any(re.search(p, matrix.name) for p in ignored)
        )
        if not chosen:
            raise UserError("matrices and ignore together leave no weight to prune; narrow ignore")
        return chosen


def read_anatomy(model: nn.Module, *, needs_units: bool) -> Anatomy:
    """Anatomy of a transformers model, on any device.

    Raises Refused when `needs_units` and the family is not known, or when the model has no maskable weight.
    """
    model_type = model.config.model_type
    family = family_of(model_type)
    if family is None and needs_units:
        raise Refused(f"units of model type {model_type!r} cannot be removed, supported: {supported()}")
    stacks = find_stacks(model, family) if family and family.layers else ()
    layers = [layer for stack in stacks for layer in model.get_submodule(stack.path)]
    groups = list(unit_groups(model, family, stacks)) if family else []
    layer_params = tuple(sum(p.numel() for p in layer.parameters()) for layer in layers)
    fixed = fixed_units(family, model.config) if family else {}
    sparse = {group.layer for group in groups if group.kind == "experts"}
    if 0 < len(sparse) < len(layers):
        fixed["layers"] = (
            f"{len(layers) - len(sparse)} of its {len(layers)} layers have no experts, so what goes with a layer "
            "depends on which one it is, and their positions are part of its config"
        )
    if len(stacks) > 1:
        fixed["layers"] = (
            f"layers of its {len(stacks)} stacks differ in size, so what goes with a number of parameters depends on "
            "which ones go; say how many with prune.counts"
        )
    if family and family.stack_heads:
        fixed["heads"] = (
            "the layers of a stack share one position bias per head, so a head goes from all of them at once, and how "
            "much that is depends on the stack; say how many with prune.counts"
        )
    return Anatomy(
        family=family,
        stacks=stacks,
        layer_params=layer_params,
        groups=tuple(groups),
        matrices=tuple(find_matrices(model, stacks)),
        tied=tuple(sorted((getattr(model, "all_tied_weights_keys", None) or {}).items())),
        total_params=sum(p.numel() for p in model.parameters()),
        fixed=fixed,
        model_class=type(model).__name__,
        hidden=hidden_group(model, family, stacks) if family and family.residual else None,
        shapes={n: tuple(p.shape) for n, p in model.named_parameters()} if family and family.filters else {},
    )
