"""What people put around a model or into it, and the model under it with the names of its checkpoint.

torch.compile wraps a model or its layers, DDP and DeepSpeed the whole of it, PEFT the model and each layer that has an
adapter, activation checkpointing every layer. Modules of all of them hand unknown attributes on to what they wrap, so
names without prefixes find their way; what has to be done is to leave the prefixes out where names are listed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from tinygn_dist.errors import Refused

_PREFIXES = ("_orig_mod", "_checkpoint_wrapped_module")
_ADAPTED = ("token_adapter", "original_module", "base_layer")
"""under these names PEFT keeps what it wraps: token rows, modules that train whole, layers and bare parameters"""


def without(model: nn.Module, *kinds: type[nn.Module]) -> nn.Module:
    """What runs under torch.compile and wrappers of these kinds, which keep it as `.module`, in any order."""
    while (compiled := "_orig_mod" in model._modules) or isinstance(model, kinds):
        model = model._orig_mod if compiled else model.module
    return model


def without_adapters(model: nn.Module) -> nn.Module:
    """The transformers model that PEFT's wrapper holds; its layers still have their adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def plain_class(bare: nn.Module) -> type[nn.Module]:
    """The class that wrote the model's code: FSDP2 gives the live object another one."""
    return next(kind for kind in type(bare).__mro__ if not issubclass(kind, FSDPModule))


def _base_of(module: nn.Module) -> str | None:
    """The child that is the module of the checkpoint, where PEFT has wrapped it."""
    return next((name for name in _ADAPTED if module._modules.get(name) is not None), None)


def plain_module(module: nn.Module) -> nn.Module:
    """The module of the checkpoint under what PEFT put around it."""
    while (name := _base_of(module)) is not None:
        module = module._modules[name]
    return module


def plain_names(bare: nn.Module, names: list[str]) -> dict[str, str]:
    """{name: name in the checkpoint} of parameters and buffers; those of adapters are left out: low-rank pairs, trained
    copies of whole modules, trained token rows."""
    bases = {name: base for name, module in bare.named_modules() if (base := _base_of(module)) is not None}
    found = {}
    for name in names:
        path = name.split(".")
        inside = {i: bases[parent] for i in range(1, len(path)) if (parent := ".".join(path[:i])) in bases}
        if all(path[i] == base for i, base in inside.items()):
            kept = [word for i, word in enumerate(path) if i not in inside and word not in _PREFIXES]
            found[name] = ".".join(kept)
    return found


@contextlib.contextmanager
def running_plainly(bare: nn.Module) -> Iterator[None]:
    """Inside, nothing is compiled and nothing computed twice: hooks see every module of a forward once."""
    wrapped = [module for module in bare.modules() if isinstance(module, CheckpointWrapper)]
    before = [module.checkpoint_fn for module in wrapped]
    try:
        for module in wrapped:
            module.checkpoint_fn = _called
        compiles = "torch._dynamo" in sys.modules  # whose import takes seconds
        with torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext():
            yield
    finally:
        for module, function in zip(wrapped, before, strict=True):
            module.checkpoint_fn = function


def _of_rows(placement: Placement) -> bool:
    return isinstance(placement, Replicate) or type(placement) is Shard and placement.dim == 0


def _called(function: Any, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def refuse_spread(model: nn.Module, *, rows_are_ours: bool = False) -> None:
    """Refused for a model whose weights something else has spread already: tensor parallelism, or a device_map.
    rows_are_ours: DTensors of whole rows are what the backend itself makes."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and not (rows_are_ours and all(map(_of_rows, parameter.placements))):
            raise Refused(
                f"{name} is spread as {parameter.placements}, by from_pretrained(distributed_config=...) or the like, "
                "accepted: a whole model, which accelerator.prepare shards; launch with configs/accelerate/fsdp2.yaml"
            )
    places = set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
    if len(places) > 1 or "disk" in places or any(parameter.is_meta for parameter in model.parameters()):
        raise Refused(
            f"the model was loaded with a device_map ({', '.join(sorted(places)) or 'meta'}), accepted: a whole model; "
            "use `tinygn compress --distributed.offload cpu`, or launch with configs/accelerate/fsdp2.yaml"
        )
