"""fp32 products by the faster library: only where they stay fp32, and nothing is left switched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tinygn_dist.config import Config
from tinygn_dist.pipeline import compress
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


def test_only_the_command_line_switches_them_on() -> None:
    """The flag is the process's, which inside a user's own script is not ours."""
    package = ROOT / "tinygn_dist"
    users = {path.relative_to(package) for path in package.rglob("*.py") if "fast_matmul(" in path.read_text()}
    assert users == {Path("cli/main.py"), Path("runtime/cpu_matmul.py")}


def test_the_library_leaves_the_products_alone(
    saved_model, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matmul, seen = torch.backends.mkldnn.matmul, set()
    before, forward = matmul.fp32_precision, torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda s, x: seen.add(matmul.fp32_precision) or forward(s, x))
    data = {"name": str(text_file), "num_samples": 4, "eval_samples": 2, "seq_len": 16}
    prune = {"pattern": "unstructured", "sparsity": 0.5}
    model, output = {"name": str(saved_model("llama"))}, {"dir": str(tmp_path / "out")}
    compress(Config(model=model, data=data, prune=prune, output=output, evaluate={"latency": False}))
    assert seen == {before} and matmul.fp32_precision == before
