"""Fixtures shared by every test: saved tiny models, data files, process groups, and the real command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)

if TYPE_CHECKING:  # imported where they are needed: `pytest -m pure` starts without transformers
    from tests.ranks import Ranks
    from tinygn_dist.backends.base import Backend

ROOT = Path(__file__).parents[1]
SUITES = ("contract", "pipeline", "gpu")
"""folders of tests that cross the package's folders; every other folder mirrors one of the package"""
PURE = ("maths", "config", "test_layering.py", "test_docs.py", "test_style.py")
CLI_SECONDS = 150


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Under `-m pure`, `-m unit` or `-m` and a suite, no folder without such tests is imported: that alone takes longer
    than the pure tests."""
    asked = config.option.markexpr
    if not collection_path.is_relative_to(ROOT / "tests") or collection_path == ROOT / "tests":
        return None
    first = collection_path.relative_to(ROOT / "tests").parts[0]
    without = {"pure": first not in PURE, "unit": first in SUITES} | {suite: first != suite for suite in SUITES}
    return True if without.get(asked) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Every test is `unit`, or of the suite whose folder it lies in; those of PURE are `pure` too. Slow ones run where
    -m names them."""
    for item in items:
        first = item.path.relative_to(ROOT / "tests").parts[0]
        item.add_marker(first if first in SUITES else "unit")
        if first in PURE:
            item.add_marker("pure")
    if "slow" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("slow")])
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(scope="session")
def backend() -> Backend:
    """One process."""
    from tinygn_dist.backends import make_backend
    from tinygn_dist.config import DistributedConfig

    made = make_backend(DistributedConfig(num_processes=1))
    assert made.num_ranks == 1
    return made


@pytest.fixture(scope="session")
def process_groups() -> Iterator[Callable[..., Ranks]]:
    """process_groups(n): n connected gloo processes that live as long as the session; with settings of the section
    `distributed`."""
    from tests.ranks import Ranks

    groups: dict[str, Ranks] = {}
    yield lambda size, **settings: groups.setdefault(f"{size} {settings}", Ranks(size, settings))
    for group in groups.values():
        group.stop()


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """saved_model(family): a folder as `save_pretrained` writes it, with a tokenizer or image processor."""
    from tests import tiny

    home, made = tmp_path_factory.mktemp("models"), {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = home / family
            save(tiny.build(family), made[family], family)
        return made[family]

    return folder


def save(model: torch.nn.Module, folder: Path, family: str = "llama") -> Path:
    from tests import tiny

    model.save_pretrained(folder)
    if family == "vit":
        facts = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
        (folder / "preprocessor_config.json").write_text(json.dumps(facts), encoding="utf-8")
    else:
        tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred paragraphs, one per line."""
    from tests import tiny

    path = tmp_path_factory.mktemp("data") / "rows.txt"
    path.write_text("\n".join(" ".join(text.split()) for text in tiny.texts()[:200]), encoding="utf-8")
    return path


class Cli:
    """Runs the real command line in a process of its own, with an outer time limit."""

    def tinygn(self, *words: object, seconds: float = CLI_SECONDS, **env: str) -> subprocess.CompletedProcess:
        return self._run([sys.executable, "-m", "tinygn_dist.cli", *map(str, words)], seconds, env)

    def python(self, code: str, *words: object, seconds: float = CLI_SECONDS) -> subprocess.CompletedProcess:
        """A few lines of Python in front of the same entry point, to break something on purpose."""
        return self._run([sys.executable, "-c", code, *map(str, words)], seconds, {})

    def accelerate(self, *words: object, launcher: tuple[str, ...] | None = None) -> subprocess.CompletedProcess:
        """`accelerate launch` of launch/compress.py; by default as configs/accelerate/cpu.yaml says (2 processes)."""
        how = launcher or ("--config_file", str(ROOT / "configs/accelerate/cpu.yaml"))
        start = [sys.executable, "-m", "accelerate.commands.launch", *how, str(ROOT / "launch/compress.py")]
        return self._run([*start, *map(str, words)], CLI_SECONDS, {})

    def _run(self, command: list[str], seconds: float, env: dict[str, str]) -> subprocess.CompletedProcess:
        surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=surroundings, cwd=ROOT)


@pytest.fixture(scope="session")
def cli() -> Cli:
    return Cli()


def told(done: subprocess.CompletedProcess) -> str:
    """The one line a failed run tells the user; fails when there is none, or more, or a traceback of ours."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("tinygn: ")]
    assert done.returncode != 0, f"expected a failure, got 0:\n{done.stdout}\n{done.stderr}"
    assert len(lines) == 1, f"expected one line, got {len(lines)}:\n{done.stderr[-3000:]}"
    assert "tinygn_dist/" not in done.stderr, f"a traceback of ours:\n{done.stderr[-3000:]}"
    return lines[0]
