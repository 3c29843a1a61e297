"""Launches that cannot work end in one line that names what to use, with a non-zero code, before weights load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig as Spread

from tests.conftest import ROOT, Cli, told
from tests.pipeline.conftest import SMALL
from tests.ranks import Ranks
from tinygn_dist import Compressor, load_config
from tinygn_dist.backends import make_backend
from tinygn_dist.backends.base import Backend
from tinygn_dist.checkpoints import sharded_load
from tinygn_dist.config import DistributedConfig
from tinygn_dist.errors import Refused

MAGNITUDE = ("--pattern=unstructured", "--criterion=magnitude")


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_load, "from_checkpoint", lambda *_: pytest.fail("weights were loaded"))


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


@pytest.mark.parametrize(
    "changes, part",
    [
        (
            {"fsdp_config": {"fsdp_version": 1, "fsdp_sharding_strategy": "FULL_SHARD"}},
            "FSDP version 1, accepted: version 2",
        ),
        (
            {"parallelism_config": {"parallelism_config_tp_size": 2, "parallelism_config_dp_shard_size": 1}},
            "tensor parallelism of 2, accepted: tp_size 1",
        ),
    ],
)
def test_sharding_that_is_broken_upstream(cli: Cli, saved_model, tmp_path: Path, changes: dict, part: str):
    asked = yaml.safe_load((ROOT / "configs/accelerate/fsdp2.yaml").read_text(encoding="utf-8"))
    (section, settings), launch = *changes.items(), tmp_path / "launch.yaml"
    launch.write_text(yaml.safe_dump(asked | {section: asked.get(section, {}) | settings}), encoding="utf-8")
    words = ("--model", saved_model("llama"), "--output", tmp_path / "out", *SMALL, *MAGNITUDE)
    line = told(cli.accelerate(*words, launcher=("--config_file", str(launch))))
    assert part in line and "configs/accelerate/fsdp2.yaml" in line
    assert not (tmp_path / "out").exists()


def _of_spread_model(backend: Backend, folder: Path, how: dict[str, int]) -> list[str]:
    """What a Compressor says to a model that transformers has spread over the ranks, before and after prepare."""
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=Spread(**how))
    compressor = Compressor(load_config(overrides={"model.name": str(folder)}), Accelerator(cpu=True))
    found = []
    for ask in (
        lambda: compressor.compress(model, None),
        lambda: compressor.backend.adopt(model, torch.optim.SGD(model.parameters())),
    ):
        with pytest.raises(Refused) as refused:
            ask()
        found.append(str(refused.value))
    return found


@pytest.mark.parametrize("how", [{"tp_size": 2}, {"fsdp_size": 2}])
def test_models_that_transformers_has_spread(process_groups, saved_model, how: dict[str, int]):
    pair: Ranks = process_groups(2)
    for lines in pair.call(_of_spread_model, saved_model("llama"), how):
        for line in lines:
            assert "is spread as" in line and "configs/accelerate/fsdp2.yaml" in line and "\n" not in line
