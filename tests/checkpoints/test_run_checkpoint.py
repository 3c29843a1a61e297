"""A checkpoint is complete or it is not there, at whatever point of writing it the process dies."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from tests import tiny
from tinygn_dist.backends.base import Backend
from tinygn_dist.checkpoints import run_checkpoint
from tinygn_dist.checkpoints.run_checkpoint import Checkpoints, weights_digest
from tinygn_dist.errors import UserError

IDENTITY = {"config": {"prune": {"sparsity": 0.5}}, "model": "abc"}


def write(store: Checkpoints, step: int) -> None:
    with store.writing(f"{step:04d}") as writer:
        for number in range(4):
            writer.add(f"t{number}", torch.full((300,), float(step)))
        writer.facts["step"] = step


@pytest.fixture
def store(backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoints:
    monkeypatch.setattr(run_checkpoint, "_FILE_BYTES", 2000)  # two files
    return Checkpoints(tmp_path / "c", IDENTITY, backend, keep=2)


def test_the_newest_is_found_and_older_ones_go(store: Checkpoints):
    assert store.newest() is None
    for step in (1, 2, 3):
        write(store, step)
    saved = store.newest()
    assert saved.facts["step"] == 3 and saved.names("") == ["t0", "t1", "t2", "t3"]
    assert torch.equal(saved.tensor("t2"), torch.full((300,), 3.0))
    assert sorted(path.name for path in store.folder.iterdir()) == ["0002", "0003"]
    store.remove()
    assert not store.folder.exists()


def _dies_at(number: int, store: Checkpoints, step: int) -> bool:
    """Write in a child that kills itself at its number-th touch of the folder; whether it died."""
    child = os.fork()
    if child == 0:
        touched = 0

        def count(event: str, arguments: tuple) -> None:
            nonlocal touched
            if any(isinstance(a, str | os.PathLike) and str(store.folder) in os.fspath(a) for a in arguments):
                touched += 1
                if touched == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        write(store, step)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("keep", [2, 1])
def test_killed_at_every_file_boundary_leaves_the_newest_complete_one(store: Checkpoints, backend: Backend, keep: int):
    """One is kept of the best weights and of statistics."""
    store = Checkpoints(store.folder, IDENTITY, backend, keep)
    write(store, 1)
    write(store, 2)
    points, seen = 0, set()
    while _dies_at(points + 1, store, 3):
        points += 1
        saved = store.newest()
        seen.add(saved.facts["step"])
        assert saved.facts["step"] in (2, 3)
        wanted = torch.full((300,), float(saved.facts["step"]))
        assert all(torch.equal(saved.tensor(name), wanted) for name in ("t0", "t1", "t2", "t3"))
        if saved.facts["step"] == 3:  # it died while removing older ones: put things back for the next point
            assert not any(path.name.startswith(".partial") for path in store.folder.iterdir())
            for path in list(store.folder.iterdir()):
                os.rename(path, store.folder.parent / f"gone-{points}-{path.name}")
            write(store, 1)
            write(store, 2)
    assert points > 12 and seen == {2, 3}
    assert store.newest().facts["step"] == 3


@pytest.mark.parametrize("damage", ["manifest", "truncated", "missing"])
def test_a_damaged_one_is_passed_over(store: Checkpoints, damage: str):
    write(store, 1)
    write(store, 2)
    newest = store.folder / "0002"
    file = next(newest.glob("*.safetensors"))
    if damage == "manifest":
        (newest / "manifest.json").write_text("{", encoding="utf-8")
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    assert store.newest().facts["step"] == 1


def test_another_run_is_refused_and_the_difference_told(store: Checkpoints, backend: Backend):
    write(store, 1)
    other = json.loads(json.dumps(IDENTITY))
    other["config"]["prune"]["sparsity"] = 0.6
    with pytest.raises(UserError, match=r"config\.prune\.sparsity was 0\.5, is 0\.6"):
        Checkpoints(store.folder, other, backend, keep=2).newest()


def test_the_digest_of_a_model_follows_its_weights():
    model = tiny.build("llama")
    before = weights_digest(model.named_parameters())
    assert before == weights_digest(tiny.build("llama").named_parameters())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    assert weights_digest(model.named_parameters()) != before
