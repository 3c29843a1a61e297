"""Launches that cannot work end in one line that names what to use, with a non-zero code, before weights load."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig as Spread

from tests.conftest import CLI_SECONDS, ROOT, Cli, told
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


CPU, FSDP2, ZERO2 = (ROOT / f"configs/accelerate/{name}.yaml" for name in ("cpu", "fsdp2", "zero2"))
OWN = ROOT / "tests/pipeline/launched_script.py"


def in_own_script(cli: Cli, launcher: tuple[object, ...], *words: str, **env: str) -> str:
    """What a user's script of two ranks is told; the same on both."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, launcher), str(OWN), *words]
    done = cli._run(command, CLI_SECONDS, env)
    lines = {line for line in done.stdout.splitlines() if "ranks" in line or ";" in line}
    assert done.returncode == 0 and len(lines) == 1, done.stdout + done.stderr[-3000:]
    return lines.pop()


@pytest.mark.parametrize(
    "refused, advice, then, started",
    [
        (((CPU,),), "Accelerator(cpu=True)", ((CPU,), "cpu"), "2 ranks, Replicated"),
        (
            ((CPU,),),
            "ACCELERATE_USE_CPU=true in front",
            ((CPU,), {"ACCELERATE_USE_CPU": "true"}),
            "2 ranks, Replicated",
        ),
        (((CPU,), "trainer"), "TrainingArguments(use_cpu=True)", ((CPU,), "trainer", "cpu"), "2 ranks, Replicated"),
        (((FSDP2,),), "with sharding_on_cpu():", ((FSDP2,), "sharding"), "2 ranks, FSDP2"),
        (
            ((FSDP2,), {"ACCELERATE_USE_CPU": "true"}),
            "leave ACCELERATE_USE_CPU, cpu=True and use_cpu unset",
            ((FSDP2,), "sharding"),
            "2 ranks, FSDP2",
        ),
        (
            ((CPU,), "cpu", "3"),
            "--num_processes 3` and Accelerator(cpu=True)",
            ((CPU, "--num_processes", "3"), "cpu", "3"),
            "3 ranks, Replicated",
        ),
    ],
)
def test_in_a_users_own_script_the_advice_works(cli: Cli, refused: tuple, advice: str, then: tuple, started: str):
    found = []
    for launcher, *words in (refused, then):
        env = {name: value for word in words if isinstance(word, dict) for name, value in word.items()}
        plain = [word for word in words if isinstance(word, str)]
        found.append(in_own_script(cli, ("--config_file", *launcher), *plain, **env))
    assert advice in found[0] and found[1] == started


def test_deepspeed_in_a_users_own_script(cli: Cli):
    assert "with sharding_on_cpu():" in in_own_script(cli, ("--config_file", ZERO2))
    assert in_own_script(cli, ("--config_file", ZERO2), "sharding") == "2 ranks, ZeroOptimizer"


@pytest.mark.parametrize(
    "launcher",
    [
        ("--config_file", CPU, "--num_processes", "1"),
        ("--config_file", CPU, "--num_processes", "3"),
        ("--num_processes", "3", "--config_file", CPU),
    ],
)
def test_on_the_command_line_valid_launches_start(cli: Cli, tmp_path: Path, launcher: tuple):
    """What starts gets as far as the model that is not there."""
    words = ("--model", tmp_path / "nowhere", "--output", tmp_path / "out", *SMALL, *MAGNITUDE)
    line = told(cli.accelerate(*words, launcher=tuple(map(str, launcher))))
    assert "nowhere" in line and "processes" not in line


def test_on_the_command_line_the_advice_works(cli: Cli, tmp_path: Path):
    words = ("--model", tmp_path / "nowhere", "--output", tmp_path / "out", *SMALL, *MAGNITUDE)
    line = told(cli.accelerate(*words, launcher=("--cpu", "--num_processes", "2")))
    assert "2 processes were asked for, 1 are running" in line
    assert "`accelerate launch --config_file configs/accelerate/cpu.yaml --num_processes 2`" in line
    followed = ("--config_file", "configs/accelerate/cpu.yaml", "--num_processes", "2")
    assert "nowhere" in told(cli.accelerate(*words, launcher=followed))
    assert "tinygn compress --num-processes 2" in line
    assert "nowhere" in told(cli.tinygn("compress", *words, "--num-processes", 2))
