"""Where the layers of a model lie: one list of them, or several that run one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tinygn_dist.models.family_schema import Family


@dataclass(frozen=True)
class Stack:
    """`num` layers that run one after the other: the entries of the module list `path`, the model's layers from `first`
    on. depth: the config's entry that says how many there are, or (entry, place) in a list."""

    path: str
    first: int
    num: int
    depth: str | tuple[str, int]

    @property
    def layers(self) -> range:
        return range(self.first, self.first + self.num)

    def kept(self, layers: Iterable[int]) -> list[int]:
        """Those of the model's layers that are of this stack."""
        return [layer for layer in layers if layer in self.layers]

    def set_depth(self, config: Any, num: int) -> None:
        """In place."""
        if isinstance(self.depth, str):
            setattr(config, self.depth, num)
        else:
            entry, place = self.depth
            counts = list(getattr(config, entry))
            counts[place] = num
            setattr(config, entry, counts)


def find_stacks(model: nn.Module, family: Family) -> tuple[Stack, ...]:
    base = model.base_model
    names = {id(module): name for name, module in model.named_modules()}
    stacks: list[Stack] = []
    for path, entry in family.stacks:
        before, star, after = path.partition(".*.")
        count = len(base.get_submodule(before)) if star else 1
        for place in range(count):
            layers = base.get_submodule(f"{before}.{place}.{after}" if star else path)
            first = stacks[-1].layers.stop if stacks else 0
            stacks.append(Stack(names[id(layers)], first, len(layers), (entry, place) if star else entry))
    return tuple(stacks)


def layer_of(stacks: Iterable[Stack], name: str) -> int | None:
    """The layer that a module or parameter lies in, if any."""
    for stack in stacks:
        if name.startswith(f"{stack.path}."):
            return stack.first + int(name.removeprefix(f"{stack.path}.").split(".")[0])
    return None


def keep_layers(config: Any, stacks: tuple[Stack, ...], layers: Sequence[int]) -> None:
    """So many layers of each stack; lists with an entry for each layer (such as layer_types) keep those of `layers`. In
    place."""
    before = sum(stack.num for stack in stacks)
    for key, value in config.to_dict().items():
        if isinstance(value, list) and "layer" in key and len(value) == before:
            setattr(config, key, [value[layer] for layer in layers])
    for stack in stacks:
        stack.set_depth(config, len(stack.kept(layers)))
