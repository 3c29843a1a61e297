"""The table of benchmarks/training.py: what a stopped run leaves behind is not computed again."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import ROOT


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("training")


def test_every_pattern_has_four_rows_and_the_dense_model_two(training: ModuleType) -> None:
    assert len(list(training.rows([]))) == 4 * 4 + 2
    assert list(training.rows(["2:4 gradual"])) == [("2:4", "gradual", "alone"), ("2:4", "gradual", "distilled")]


def test_a_table_goes_on_after_the_rows_it_holds(training: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "rows.md"
    table = training.Table(path, "settings", training.HEAD, 3)
    table.add("50%", "one-shot", "alone", "25.58", "37.08")
    again = training.Table(path, "settings", training.HEAD, 3)
    assert again.has("50%", "one-shot", "alone")
    assert not again.has("50%", "one-shot", "distilled")
    again.add("50%", "one-shot", "distilled", "25.58", "37.08")
    assert path.read_text().splitlines() == [
        "settings",
        "",
        *training.HEAD.splitlines(),
        "| 50% | one-shot | alone | 25.58 | 37.08 |",
        "| 50% | one-shot | distilled | 25.58 | 37.08 |",
    ]


def test_a_table_of_other_settings_is_not_mixed(training: ModuleType, tmp_path: Path) -> None:
    training.Table(tmp_path / "rows.md", "40 steps", training.HEAD, 3)
    with pytest.raises(SystemExit, match="is of '40 steps', asked was '80 steps'"):
        training.Table(tmp_path / "rows.md", "80 steps", training.HEAD, 3)
