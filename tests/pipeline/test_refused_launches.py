"""Launches that cannot work end in one line that names what to use, with a non-zero code, before weights load."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import Accelerator

from tests.conftest import Cli, told
from tests.pipeline.conftest import SMALL
from tinygn_dist import origin
from tinygn_dist.backends import make_backend
from tinygn_dist.config import DistributedConfig
from tinygn_dist.errors import Refused

MAGNITUDE = ("--pattern=unstructured", "--criterion=magnitude")


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin, "from_checkpoint", lambda *_: pytest.fail("weights were loaded"))


def test_training_by_gradients_of_weights_on_disk(compress, no_loading, saved_model, tmp_path: Path):
    words = (*MAGNITUDE, "--recover-steps=2", "--distributed.offload=disk")
    done = compress(saved_model("llama"), tmp_path / "out", *words)
    assert done.code == 2 and "use offload cpu" in done.told and "zo-sgd" in done.told


def test_offload_on_two_processes(cli: Cli, saved_model, tmp_path: Path):
    words = ("--model", saved_model("llama"), "--output", tmp_path / "out", *SMALL, *MAGNITUDE)
    line = told(done := cli.accelerate(*words, "--distributed.offload=cpu"))
    assert done.returncode != 0 and "on 2 processes, accepted: one" in line and "fsdp2.yaml" in line
    assert not (tmp_path / "out").exists()


def test_offload_in_a_loop_of_the_callers():
    with pytest.raises(Refused, match="use `tinygn compress`"):
        make_backend(DistributedConfig(offload="cpu"), Accelerator(cpu=True))
