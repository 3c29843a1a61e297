"""The formatter and the linter have nothing to say. 120 columns are one of their rules, comments included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("words", [("check", "--output-format", "concise"), ("format", "--check")], ids=lambda w: w[0])
def test_ruff_has_nothing_to_say(words: tuple[str, ...]):
    done = subprocess.run([sys.executable, "-m", "ruff", *words, "."], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr}"
