"""`tinygn export`: one file, one line; what cannot be written is refused in one line."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from tests import tiny
from tests.checkpoints.formats import gguf_cases
from tinygn_dist.checkpoints.formats import onnx
from tinygn_dist.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_cases.save(gguf_cases.model(), tmp_path_factory.mktemp("models") / "small")


def test_a_folder_becomes_a_gguf_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "deep" / "small.gguf"
    assert main(["export", str(folder), "--format", "gguf", "--type", "Q4_0", "--output", str(path)]) == 0
    assert f"{path.stat().st_size:,} bytes" in capsys.readouterr().out
    fields = gguf.GGUFReader(path).fields
    assert fields["general.name"].contents() == "small" and fields["general.architecture"].contents() == "llama"


def test_the_file_lies_in_the_folder_by_default(tmp_path: Path):
    own = gguf_cases.save(gguf_cases.model(), tmp_path / "mine")
    assert main(["export", str(own), "--format", "gguf"]) == 0
    assert (own / "mine-Q8_0.gguf").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--format", "gguf", "--type", "Q4"], 2, "--type Q4, accepted for gguf: Q8_0"),
        (["--format", "gguf", "--speed", "3"], 2, "unknown argument --speed"),
    ],
)
def test_bad_arguments(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, line: str):
    assert main(["export", str(folder), *arguments]) == code
    error = capsys.readouterr().err
    assert line in error and len(error.splitlines()) == 1


def test_a_model_without_a_place_in_the_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tiny.build("bert").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert main(["export", str(tmp_path), "--format", "gguf"]) == 3
    assert "feature-extraction" in capsys.readouterr().err


def test_a_missing_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(onnx, "EXTRA", ("onnx_that_is_not_there",))
    assert main(["export", str(folder), "--format", "onnx"]) == 2
    assert onnx.INSTALL in capsys.readouterr().err
