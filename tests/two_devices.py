"""A second device on a machine that has none: tensors are told apart by a mark, and mixing them fails as on a GPU.

`cpu:0` stands for the device: torch takes it for the same place as `cpu` but passes the index on. Every tensor made or
moved there carries a mark, results inherit it, and an operator that gets tensors of both places raises, with the
exceptions that CUDA makes (numbers of the processor, copies, indices). Two modes see to it: one at the level of Python
functions, where `.cpu()` and `.device` would do nothing, and one at the dispatcher, for what autograd calls too.
Tensors whose place is not known (constants inside torch) go with anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cpu", 0)
_ACROSS = {"aten.copy_.default", "aten._to_copy.default"}
_INDEXING = {"aten.index.Tensor", "aten.index_put_.default", "aten.index_put.default", "aten._index_put_impl_.default"}
_FACTORIES = {
    "arange", "empty", "eye", "frombuffer", "from_numpy", "full", "linspace", "ones", "rand", "randint", "randn",
    "randperm", "tensor", "zeros",
}  # fmt: skip


class MixedDevices(AssertionError):
    """An operator got tensors of both places."""


@contextlib.contextmanager
def two_devices() -> Iterator[None]:
    """Inside, `DEVICE` is another place than the processor."""
    dispatch = _Dispatch()
    with _Functions(dispatch), dispatch:
        yield


def _place(tensor: Any) -> str | None:
    return getattr(tensor, "_place", None)


def _mark(tensors: Any, place: str | None) -> Any:
    for tensor in tree_leaves(tensors):
        if isinstance(tensor, torch.Tensor) and place is not None:
            tensor._place = place
    return tensors


def _named(device: Any) -> str:
    return "device" if device is not None and torch.device(device).index is not None else "processor"


class _Dispatch(TorchDispatchMode):
    function = ""
    """the Python function that runs: torch's own factories inside of others do not say where they are"""

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, kwargs = str(operator), kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        places = {_place(tensor) for tensor in given if tensor.dim() or _place(tensor) == "device"} - {None}
        indexed = name in _INDEXING and _place(given[0]) == "device"
        if len(places) > 1 and name not in _ACROSS and not indexed:
            raise MixedDevices(f"{name} of {[(_place(tensor), tuple(tensor.shape)) for tensor in given]}")
        result = operator(*args, **kwargs)
        if kwargs.get("device") is not None and (torch.device(kwargs["device"]).index is not None or not given):
            place = _named(kwargs["device"]) if given or self.function in _FACTORIES else None
        elif name == "aten.copy_.default":
            place = _place(given[0])
        else:
            place = "device" if "device" in places else next(iter(places), _place(given[0]) if given else None)
        fresh = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor) and _place(value) is None]
        _mark(fresh, place)
        return result


class _Functions(TorchFunctionMode):
    def __init__(self, dispatch: _Dispatch) -> None:
        super().__init__()
        self._dispatch = dispatch

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        on_device = bool(args) and _place(args[0]) == "device"
        if name == "__get__":
            return self._property(function, args, on_device)
        if name == "__set__":
            result = function(*args, **kwargs)
            if function.__self__.__name__ == "data":
                _mark(args[0], _place(args[1]))
            return result
        if name == "numpy" and on_device:
            raise MixedDevices("numpy() of a tensor on the device")
        if name == "cpu" and on_device:
            return _mark(args[0].clone(), "processor")
        if name == "to" and len(args) > 1 and isinstance(args[1], torch.Tensor):  # as this one is
            args = (args[0], DEVICE if _place(args[1]) == "device" else torch.device("cpu"), args[1].dtype, *args[2:])
        if name == "to" and on_device:
            return self._moved(function, args, kwargs)
        before, self._dispatch.function = self._dispatch.function, name
        try:
            result = function(*args, **kwargs)
        finally:
            self._dispatch.function = before
        return _mark(result, "processor") if name in ("from_numpy", "frombuffer") else result

    def _property(self, function: Any, args: tuple, on_device: bool) -> Any:
        name = getattr(function.__self__, "__name__", "")
        if on_device and name in ("device", "is_cpu"):
            return DEVICE if name == "device" else False
        result = function(*args)
        return _mark(result, _place(args[0])) if isinstance(result, torch.Tensor) and _place(result) is None else result

    def _moved(self, function: Any, args: tuple, kwargs: dict) -> Any:
        """`to` of a tensor on the device."""
        values = [*args[1:], *kwargs.values()]
        device = next((value for value in values if isinstance(value, (str, torch.device))), None)
        if device is None or _named(device) == "processor":
            result = function(*args, **kwargs)
            return result if device is None else _mark(result.clone(), "processor")
        dtype = next((value for value in values if isinstance(value, torch.dtype)), None)
        copy = kwargs.get("copy", False)
        return args[0].to(dtype, copy=copy) if dtype else args[0].clone() if copy else args[0]
