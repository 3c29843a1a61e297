"""fp32 matrix products on a CPU by the library that is faster there.

torch takes MKL, which keeps to AVX2 on processors that are not Intel's; oneDNN takes AVX-512 wherever it is there, at
the same rounding (100 and 228 GFLOP/s on a core of Zen 5). torch hands fp32 products to oneDNN only together with the
permission to round their inputs to bf16, of which oneDNN makes use where a processor has units for that. So it is asked
for only where it does not: where it returns a value exactly that bf16 does not have.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch

_found: list[str] = []
"""what the flag was before each `fast_matmul` that is open"""


@contextlib.contextmanager
def fast_matmul(device: torch.device) -> Iterator[None]:
    """Inside, fp32 products on a CPU may come from oneDNN, all of them or none. The flag is the process's; it is put
    back, and meanwhile `torch.get_float32_matmul_precision` refuses to answer. device: where the products are; nothing
    changes where that is no CPU."""
    if device.type != "cpu" or not _allowed_and_exact():
        yield
        return
    _found.append(torch.backends.mkldnn.matmul.fp32_precision)
    try:
        with _flag("bf16"):
            yield
    finally:
        _found.pop()


@contextlib.contextmanager
def stock_matmul() -> Iterator[None]:
    """Inside, products are those that the caller of the outermost `fast_matmul` has: for timing a model as others will
    run it."""
    if not _found:
        yield
        return
    with _flag(_found[0]):
        yield


@contextlib.contextmanager
def _flag(precision: str) -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


@functools.cache
def _allowed_and_exact() -> bool:
    """Whether oneDNN is there, may be asked, and keeps all bits of fp32 when it may round."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    with _flag("bf16"):
        return exact(torch.mm) and exact(torch.nn.functional.linear) and exact(_batched)


def _batched(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.bmm(left.expand(4, -1, -1), right.expand(4, -1, -1))[3]


def exact(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> bool:
    """Whether a product of fp32 matrices uses all 24 bits of both."""
    size = 256  # large enough for the kernels of large products
    fine = torch.full((size, size), 1 + 2**-23)
    alone = torch.eye(size)
    return torch.equal(product(fine, alone), fine) and torch.equal(product(alone, fine), fine)
