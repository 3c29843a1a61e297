"""The rows of benchmarks/structured.py."""

from __future__ import annotations

import importlib

import pytest

from tests.conftest import ROOT


def test_every_fraction_has_a_row_of_every_method_and_the_dense_model_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    structured = importlib.import_module("structured")
    every = list(structured.rows([0.1, 0.5], []))
    assert every[0] == (0.0, "dense") and len(every) == len(set(every)) == 1 + 2 * 6
    assert structured.OURS["layers by block influence (ShortGPT)"][-2:] == [
        "--prune.compensate",
        "false",
    ]  # as its authors do
    assert list(structured.rows([0.1], ["Torch"])) == [(0.1, "Torch-Pruning Taylor"), (0.1, "Torch-Pruning magnitude")]
