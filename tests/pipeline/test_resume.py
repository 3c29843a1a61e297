"""A run that dies or is stopped goes on where it was, with the identical result."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import CLI_SECONDS, ROOT
from tests.pipeline.conftest import SMALL, report_of
from tinygn_dist.backends.base import Backend
from tinygn_dist.config import Config, load_config
from tinygn_dist.errors import Stopped
from tinygn_dist.pipeline import compress
from tinygn_dist.run.report import Report

STEPS = 8
TRAINED = {
    "recover.seq_len": 16,
    "recover.batch_size": 2,
    "recover.steps": STEPS,
    "schedule.every": 2,
    "checkpoint.every": 1,
    "data.seq_len": 32,
    "data.num_samples": 4,
    "data.eval_samples": 3,
    "data.micro_batch": 2,
    "prune.multiple_of": 8,
    "evaluate.latency": False,
}
CASES = {
    "gradual": {"prune.pattern": "unstructured", "prune.criterion": "wanda", "schedule.kind": "cubic"},
    "movement": {
        "prune.pattern": "unstructured",
        "prune.criterion": "magnitude",
        "schedule.kind": "linear",
        "schedule.criterion": "movement",
    },
    "admm": {"prune.pattern": "2:4", "schedule.kind": "admm", "schedule.experiments.elsa.penalty": 0.5},
    "regrown": {"prune.pattern": "unstructured", "prune.criterion": "magnitude", "schedule.regrow": "gradient"},
    "top-kast": {"prune.pattern": "unstructured", "prune.criterion": "magnitude", "schedule.regrow": "top-kast"},
    "one-shot, bf16": {"prune.pattern": "2:4", "model.dtype": "bfloat16"},
    "units": {"prune.pattern": "channels", "prune.sparsity": 0.3, "schedule.kind": "iterative", "schedule.every": 3},
    "lora": {"prune.pattern": "2:4", "prune.criterion": "magnitude", "recover.train": "lora"},
    "zo-nesterov, bf16": {
        "prune.pattern": "2:4",
        "prune.criterion": "magnitude",
        "model.dtype": "bfloat16",
        "recover.optimizer": "zo-nesterov",
        "recover.directions": 2,
        "recover.learning_rate": 0.01,
        "recover.keep_best": True,
        "recover.evaluate_every": 3,
    },
    "zo-adam, its rate measured": {
        "prune.pattern": "channels",
        "prune.sparsity": 0.3,
        "recover.optimizer": "zo-adam",
        "recover.directions": 2,
    },
    "sgd": {"prune.pattern": "2:4", "recover.optimizer": "sgd", "prune.criterion": "magnitude"},
}


def asked(model: Path, data: Path, out: Path, **changes: object):
    fixed = {"model.name": str(model), "data.name": str(data), "output.dir": str(out), **TRAINED}
    return load_config(overrides=fixed | changes)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def stopped_after(steps: int):
    """A `stopping` that is asked before the first step and then in every one, or only the latter when going on."""
    seen = iter(range(10**6))
    return lambda: next(seen) >= steps


@pytest.mark.parametrize("case", CASES)
def test_stopped_runs_end_bit_by_bit_as_one_that_was_not(
    case: str, backend: Backend, saved_model, text_file: Path, tmp_path: Path
):
    model = saved_model("llama")
    compress(asked(model, text_file, tmp_path / "whole", **CASES[case]), backend)
    config = asked(model, text_file, tmp_path / "parts", **CASES[case], **{"checkpoint.resume": "auto"})
    for steps in (0, 3, 2):
        with pytest.raises(Stopped, match="training steps"):
            compress(config, backend, stopped_after(steps))
        assert not (tmp_path / "parts").exists()
    report = compress(config, backend)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    # a run of rounds is also asked after the units of a round are gone
    assert report.recovery["resumed_after_steps"] == ([0, 3, 6] if case == "units" else [0, 4, 7])
    whole = report_of(tmp_path / "whole")
    assert report.before == whole["before"] and report.compressed == whole["compressed"]
    assert {k: report.recovery[k] for k in ("steps", "tokens", "first_loss", "last_loss")} == {
        k: whole["recovery"][k] for k in ("steps", "tokens", "first_loss", "last_loss")
    }
    assert report.recovery.get("updates") == whole["recovery"].get("updates")
    assert not (tmp_path / "parts.checkpoints").exists(), "checkpoints outlive a finished run"


def test_what_differs_is_told(backend: Backend, saved_model, text_file: Path, tmp_path: Path):
    config = asked(saved_model("llama"), text_file, tmp_path / "out", **CASES["gradual"])
    with pytest.raises(Stopped):
        compress(config, backend, stopped_after(2))
    (tmp_path / "other.txt").write_text(text_file.read_text(encoding="utf-8")[500:], encoding="utf-8")
    for changes, message in (
        ({"prune.sparsity": 0.7}, "config.prune.sparsity was 0.2, is 0.7"),
        ({"data.name": str(tmp_path / "other.txt")}, "config.data.name was"),
        ({"model.name": str(saved_model("llama-tied"))}, "config.model.name was"),
    ):
        again = asked(saved_model("llama"), text_file, tmp_path / "out", **CASES["gradual"], **changes)
        again = again.model_copy(update={"checkpoint": again.checkpoint.model_copy(update={"resume": "auto"})})
        with pytest.raises(ValueError, match="is of another run: ") as refused:
            compress(again, backend)
        assert message in str(refused.value)


def words(model: Path, data: Path, out: Path, *more: object) -> list[str]:
    flags = [f"--{key}={value}" for key, value in {**TRAINED, **CASES["gradual"]}.items()]
    start = [sys.executable, "-m", "tinygn_dist.cli", "compress", "--model", model, "--data", data, "--output", out]
    return [str(word) for word in (*start, *SMALL, *flags, "--resume=auto", *more)]


def started(command: list[str]) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + CLI_SECONDS
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)


def test_sigterm_saves_and_another_world_size_goes_on(saved_model, text_file: Path, tmp_path: Path, backend: Backend):
    """Two processes are stopped, one finishes: as many zeros, the loss within rounding."""
    model, many = saved_model("llama"), {"recover.steps": 40, "schedule.every": 10}
    changes = [f"--{key}={value}" for key, value in many.items()]
    process = started(words(model, text_file, tmp_path / "out", *changes, "--num-processes=2"))
    wait_for(tmp_path / "out.checkpoints" / "001-00000004", process)
    os.killpg(process.pid, signal.SIGTERM)
    told = process.communicate(timeout=CLI_SECONDS)[0]
    assert process.returncode == 75, told
    assert "go on with --resume auto" in told and not (tmp_path / "out").exists()
    config = asked(model, text_file, tmp_path / "out", **{**CASES["gradual"], **many, "checkpoint.resume": "auto"})
    report = compress(config, backend)
    whole = compress(asked(model, text_file, tmp_path / "whole", **{**CASES["gradual"], **many}), backend)
    assert report.recovery["resumed_after_steps"][0] >= 4
    assert report.parameters == whole.parameters
    assert report.after["loss"] == pytest.approx(whole.after["loss"], rel=1e-3)


def killed_at_random(command: list[str], checkpoints: Path, kills: int) -> None:
    """Start it again and again, and kill every process of it `kills` times, each at a random time after a
    checkpoint."""
    chance = random.Random(0)
    for _ in range(30):
        if kills == 0:
            return
        process = started(command)
        wait_for(checkpoints, process)
        time.sleep(chance.uniform(0, 0.8))
        kills -= process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=CLI_SECONDS)
    raise AssertionError("the runs ended before they could be killed")


def finished(command: list[str]) -> None:
    process = started(command)
    log = process.communicate(timeout=CLI_SECONDS)[0]
    assert process.returncode == 0, log


@pytest.mark.slow
def test_killed_five_times_at_random_points_the_result_is_the_same(saved_model, text_file: Path, tmp_path: Path):
    model, more = saved_model("llama"), ("--num-processes=2", "--recover.steps=60", "--schedule.every=10")
    finished(words(model, text_file, tmp_path / "whole", *more))
    again = words(model, text_file, tmp_path / "parts", *more)
    killed_at_random(again, tmp_path / "parts.checkpoints", 5)
    finished(again)
    assert report_of(tmp_path / "parts")["recovery"]["resumed_after_steps"], "it began anew"
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_killed_on_two_ranks_and_finished_on_one_the_masks_are_the_same(saved_model, text_file: Path, tmp_path: Path):
    model, more = saved_model("llama"), ("--schedule.kind=one-shot", "--prune.pattern=2:4", "--recover.steps=60")
    finished(words(model, text_file, tmp_path / "whole", *more))
    killed_at_random(
        words(model, text_file, tmp_path / "parts", *more, "--num-processes=2"), tmp_path / "parts.checkpoints", 2
    )
    finished(words(model, text_file, tmp_path / "parts", *more))
    parts, whole = report_of(tmp_path / "parts"), report_of(tmp_path / "whole")
    assert parts["recovery"]["resumed_after_steps"] and parts["selection"] == whole["selection"]
    assert parts["after"]["loss"] == pytest.approx(whole["after"]["loss"], rel=1e-4)


EVERYTHING = {
    **CASES["movement"],
    "prune.criterion": "wanda",
    "checkpoint.statistics_every": 2,
    "recover.evaluate_every": 2,
    "recover.keep_best": True,
    "checkpoint.resume": "auto",
}


def touches(config: Config, backend: Backend, home: Path, last: int) -> int:
    """Compress in a child that kills itself at its `last`-th touch of any file it keeps on the way; how many there
    were."""
    counted = home / "touches"
    child = os.fork()
    if child == 0:
        count, folders = 0, f"{config.output.dir}.checkpoints"

        def seen(event: str, arguments: tuple) -> None:
            nonlocal count
            if any(isinstance(a, str | os.PathLike) and folders in os.fspath(a) for a in arguments):
                count += 1
                if count == last:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(seen)
        compress(config, backend)
        counted.write_text(str(count), encoding="utf-8")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return last if os.WIFSIGNALED(status) else int(counted.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_killed_at_file_boundaries_of_everything_kept_on_the_way(
    backend: Backend, saved_model, text_file: Path, tmp_path: Path
):
    """Statistics, checkpoints and best weights: twelve points among all, and the result is that of a whole run."""
    config = asked(saved_model("llama"), text_file, tmp_path / "whole", **EVERYTHING)
    count = touches(config, backend, tmp_path, 0)
    assert count > 100
    for point in sorted(random.Random(0).sample(range(2, count + 1), 12)):
        out = tmp_path / f"killed-{point}"
        config = asked(saved_model("llama"), text_file, out, **EVERYTHING)
        assert touches(config, backend, tmp_path, point) == point
        compress(config, backend)
        assert weights(out) == weights(tmp_path / "whole"), point


def stopped_forward_only(backend: Backend, config: Config) -> list[int]:
    with pytest.raises(Stopped):
        compress(config, backend, stopped_after(3))
    return [backend.num_ranks]


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_forward_only_training_goes_on_at_another_world_size(
    first: int, then: int, process_groups, backend: Backend, saved_model, text_file: Path, tmp_path: Path
):
    more = {"recover.optimizer": "zo-nesterov", "recover.directions": 2, "recover.learning_rate": 0.05}
    more |= {"prune.pattern": "2:4", "prune.criterion": "magnitude", "checkpoint.resume": "auto"}
    model = saved_model("llama")
    whole = compress(asked(model, text_file, tmp_path / "whole", **more), backend)
    config = asked(model, text_file, tmp_path / "parts", **more)
    process_groups(first).call(stopped_forward_only, config)
    report, *_ = process_groups(then).call(compressed, config)
    assert report.recovery["resumed_after_steps"] and report.selection == whole.selection
    assert report.after["loss"] == pytest.approx(whole.after["loss"], rel=1e-5)


def compressed(backend: Backend, config: Config) -> Report:
    return compress(config, backend)
