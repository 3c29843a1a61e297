"""fp32 products by the faster library: only where they stay fp32, and nothing is left switched."""

from __future__ import annotations

import pytest
import torch

from tinygn_dist.runtime import cpu_matmul


def test_products_that_round_their_inputs_are_seen() -> None:
    assert cpu_matmul.exact(torch.mm)
    assert not cpu_matmul.exact(lambda a, b: a.bfloat16().float() @ b)
    assert not cpu_matmul.exact(lambda a, b: a @ b.half().float())


def test_inside_products_are_fp32_and_afterwards_the_flag_is_as_before() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(300, 500, generator=generator), torch.randn(500, 200, generator=generator)
    wanted, before = left.double() @ right.double(), torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(KeyError), cpu_matmul.fast_matmul(torch.device("cpu")):
        found = torch.nn.functional.linear(left, right.t())
        raise KeyError
    assert float((found - wanted).norm() / wanted.norm()) < 1e-6  # bf16 inputs: 2e-3
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    with cpu_matmul.fast_matmul(torch.device("meta")):
        assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_what_is_timed_has_the_products_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_matmul, "_allowed_and_exact", lambda: True)
    matmul, cpu, before = torch.backends.mkldnn.matmul, torch.device("cpu"), torch.backends.mkldnn.matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        with cpu_matmul.fast_matmul(cpu), cpu_matmul.fast_matmul(cpu):
            with cpu_matmul.stock_matmul():
                assert matmul.fp32_precision == "ieee"
            assert matmul.fp32_precision == "bf16"
        with cpu_matmul.stock_matmul():
            assert matmul.fp32_precision == "ieee"
    finally:
        matmul.fp32_precision = before
