"""The files people copy: Accelerate configs, DeepSpeed settings, Slurm and torchrun scripts, Kubeflow manifests.

That each Accelerate config really starts its job is seen in test_sharded.py, which launches with them; here are the
parsers, the refusals, and the scripts with stubs in place of the cluster.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from tinygn_dist.backends import make_backend
from tinygn_dist.cli.main import ALIASES
from tinygn_dist.config import DistributedConfig, load_config
from tinygn_dist.errors import Refused

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs/accelerate").glob("*.yaml"))
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch").glob("*.sbatch")])


# -- configs -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_its_config(path: Path):
    """Its own reader refuses unknown keys."""
    config = load_config_from_file(str(path))
    assert config.num_processes >= 2
    sizes = config.parallelism_config or {}
    replicas, shards = (sizes.get(f"parallelism_config_dp_{axis}_size", 1) for axis in ("replicate", "shard"))
    assert replicas * shards in (1, config.num_processes)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_zero_config_names_its_stage(stage: int):
    config = load_config_from_file(str(ROOT / f"configs/accelerate/zero{stage}.yaml"))
    settings = json.loads((ROOT / config.deepspeed_config["deepspeed_config_file"]).read_text())
    assert settings["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize(
    "env, named",
    [
        ({"FSDP_VERSION": "1"}, "version 1"),
        ({}, "version 1"),  # what Accelerate takes when nothing is said
        ({"FSDP_VERSION": "2", "PARALLELISM_CONFIG_TP_SIZE": "2"}, "tensor parallelism of 2"),
        ({"FSDP_VERSION": "2", "PARALLELISM_CONFIG_CP_SIZE": "2"}, "context parallelism of 2"),
    ],
)
def test_what_is_broken_upstream_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch, env: dict, named: str):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for key in ("FSDP_VERSION", "PARALLELISM_CONFIG_TP_SIZE", "PARALLELISM_CONFIG_CP_SIZE"):
        monkeypatch.delenv(key, raising=False)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(Refused) as refused:
        make_backend(DistributedConfig())
    told = str(refused.value)
    assert named in told and "accepted" in told and "configs/accelerate/fsdp2.yaml" in told and "\n" not in told


# -- scripts -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_every_script(path: Path):
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
    assert os.access(path, os.X_OK)


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """Programs of a cluster: srun runs its command once per node, the launchers print what they were asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    show = (
        'printf "%s\\n" "CALL $(basename "$0")" "$@"; env | grep -E "^(ACCELERATE|FSDP|OMP|WORLD_SIZE|RANK)" || true\n'
    )
    programs = {
        "accelerate": show,
        "torchrun": show,
        "scontrol": "printf 'node7\\nnode8\\n'\n",
        "nvidia-smi": "exit 1\n",
        "srun": 'echo "SRUN $1"; shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || exit; done\n',
    }
    for name, body in programs.items():
        (folder / name).write_text("#!/bin/bash\n" + body)
        (folder / name).chmod(0o755)
    return folder


def ran(script: str, *words: str, stubs: Path, **env: str) -> subprocess.CompletedProcess:
    path = f"{stubs}:{os.environ['PATH']}"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE", "SLURM", "FSDP", "OMP", "PET"))}
    return subprocess.run(
        ["bash", ROOT / "launch" / script, *words],
        cwd=ROOT,
        env={**clean, "PATH": path, **env},
        capture_output=True,
        text=True,
    )  # fmt: skip


SLURM = {
    "SLURM_NNODES": "2",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_JOB_NODELIST": "node[7-8]",
    "SLURM_JOB_ID": "123456",
    "SLURM_CPUS_PER_TASK": "32",
}


def test_slurm_starts_one_launcher_per_node_that_agree_on_all_but_the_rank(stubs: Path):
    done = ran("slurm.sbatch", "--model", "a b", "--output=out", stubs=stubs, **SLURM)
    assert done.returncode == 0, done.stderr
    head, first, second = done.stdout.split("CALL accelerate\n")
    assert head == "SRUN --kill-on-bad-exit=1\n"
    words = first.splitlines()
    asked = dict(zip(words[1:], words[2:], strict=False))
    assert words[0] == "launch" and asked["--config_file"] == "configs/accelerate/fsdp2.yaml"
    assert (asked["--num_machines"], asked["--num_processes"], asked["--machine_rank"]) == ("2", "8", "0")
    assert (asked["--main_process_ip"], asked["--main_process_port"]) == ("node7", "29956")
    place = words.index("launch/compress.py")
    assert words[place + 1 : place + 4] == ["--model", "a b", "--output=out"]  # a word with a space stays one
    assert "OMP_NUM_THREADS=8" in words
    assert second == first.replace("--machine_rank\n0\n", "--machine_rank\n1\n")


@pytest.mark.parametrize("words", [["--output"], ["--output.dir"], ["--output={}"], ["--output.dir={}"]])
def test_a_requeued_job_that_had_finished_does_nothing(stubs: Path, tmp_path: Path, words: list[str]):
    (tmp_path / "tinygn_report.json").touch()
    words = [words[0].format(tmp_path)] if "{" in words[0] else [words[0], str(tmp_path)]
    done = ran("slurm.sbatch", "--model", "m", *words, stubs=stubs, **SLURM, SLURM_RESTART_COUNT="1")
    assert done.returncode == 0 and "complete" in done.stdout and "SRUN" not in done.stdout
    again = ran("slurm.sbatch", "--model", "m", *words, stubs=stubs, **SLURM)
    assert "SRUN" in again.stdout  # asked for anew, the program itself decides about a full folder


def test_a_failing_node_fails_the_slurm_job(stubs: Path):
    (stubs / "accelerate").write_text("#!/bin/bash\nexit 3\n")
    assert ran("slurm.sbatch", "--model", "m", stubs=stubs, **SLURM).returncode == 3


def test_torchrun_takes_what_kubeflow_says_about_the_pod(stubs: Path):
    pod = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "8", "PET_MASTER_ADDR": "head"}
    done = ran("torchrun.sh", "--model", "m", stubs=stubs, **pod, SHARDING="fsdp2", WORLD_SIZE="2", RANK="1")
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    asked = dict(zip(words, words[1:], strict=False))
    assert (asked["--nnodes"], asked["--node_rank"], asked["--nproc_per_node"]) == ("2", "1", "8")
    assert (asked["--master_addr"], asked["--master_port"]) == ("head", "29400")
    assert words[words.index("--model") : words.index("--model") + 2] == ["--model", "m"]
    assert {"ACCELERATE_USE_FSDP=true", "FSDP_VERSION=2"} <= set(words)
    assert not any(word.startswith(("WORLD_SIZE=", "RANK=")) for word in words)  # counts of pods, not processes


@pytest.mark.parametrize("sharding", ["zero1", "zero2", "zero3"])
def test_torchrun_points_deepspeed_at_a_file_that_is_there(stubs: Path, sharding: str):
    words = ran("torchrun.sh", stubs=stubs, SHARDING=sharding).stdout.splitlines()
    path = next(word for word in words if word.startswith("ACCELERATE_DEEPSPEED_CONFIG_FILE=")).partition("=")[2]
    assert Path(path).is_file() and sharding in path and "ACCELERATE_USE_DEEPSPEED=true" in words


def test_torchrun_alone_is_two_processes_without_a_gpu_and_refuses_a_typo(stubs: Path):
    words = ran("torchrun.sh", stubs=stubs).stdout.splitlines()
    assert words[words.index("--nproc_per_node") + 1] == "2" and not any("ACCELERATE_USE" in word for word in words)
    typo = ran("torchrun.sh", stubs=stubs, SHARDING="fdsp2")
    assert typo.returncode == 2 and typo.stderr.count("\n") == 1 and "accepted" in typo.stderr


# -- manifests ---------------------------------------------------------------------------------------------------------
MANIFESTS = {"pytorchjob": "PyTorchJob", "trainjob": "TrainJob"}
KUBEFLOW = json.loads((ROOT / "tests/contract/schemas/kubeflow.json").read_text())


def faults(manifest: dict, kind: str) -> list[str]:
    """Where a manifest does not fit its resource's schema."""
    checker = jsonschema.Draft202012Validator({**KUBEFLOW, "$ref": f"#/$defs/{kind}"})
    return [".".join(map(str, fault.absolute_path)) for fault in checker.iter_errors(manifest)]


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_manifest_fits_the_schema_of_its_resource(name: str):
    assert faults(yaml.safe_load((ROOT / f"launch/k8s/{name}.yaml").read_text()), MANIFESTS[name]) == []


@pytest.mark.parametrize(
    "name, wrong, right, place",
    [
        ("pytorchjob", 'nprocPerNode: "8"', "nprocPerNode: 8", "spec.nprocPerNode"),
        ("pytorchjob", "restartPolicy: Never", "restartPolicy: never", "spec.pytorchReplicaSpecs.Master.restartPolicy"),
        (
            "pytorchjob",
            "claimName",
            "claim",
            "spec.pytorchReplicaSpecs.Master.template.spec.volumes.0.persistentVolumeClaim",
        ),
        ("trainjob", "numProcPerNode: 8", "numProcPerNode: auto", "spec.trainer.numProcPerNode"),
        ("trainjob", "runtimePatches", "podTemplateOverrides", "spec"),
        ("trainjob", "v1alpha1", "v2alpha1", "apiVersion"),
    ],
)
def test_the_schema_sees_a_mistake(name: str, wrong: str, right: str, place: str):
    text = (ROOT / f"launch/k8s/{name}.yaml").read_text()
    assert place in faults(yaml.safe_load(text.replace(wrong, right)), MANIFESTS[name])


def test_the_pytorchjob_runs_the_same_pod_on_master_and_workers():
    job = yaml.safe_load((ROOT / "launch/k8s/pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["replicas"] == 1 and replicas["Master"]["template"] == replicas["Worker"]["template"]
    pod = replicas["Master"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"  # the operator looks for this name
    assert job["spec"]["nprocPerNode"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    check_container(container, pod["volumes"])


def test_the_trainjob_mounts_what_its_arguments_name():
    job = yaml.safe_load((ROOT / "launch/k8s/trainjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    trainer, (patch,) = job["spec"]["trainer"], job["spec"]["runtimePatches"]
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert node["name"] == container["name"] == "node"  # as the stock runtime calls them
    check_container({**trainer, **container}, pod["volumes"])


def check_container(container: dict, volumes: list[dict]) -> None:
    """The command is a script of ours, its arguments are ones we take, and folders they name are mounted."""
    (command,) = container["command"]
    assert (ROOT / "launch" / Path(command).name).is_file()
    overrides = dict(word.removeprefix("--").split("=", 1) for word in container["args"])
    load_config(None, {ALIASES.get(name, name): yaml.safe_load(value) for name, value in overrides.items()})
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == {volume["name"] for volume in volumes}
    for name in ("model", "output"):
        assert any(overrides[name].startswith(place + "/") for place in mounts)
    assert {"name": "SHARDING", "value": "fsdp2"} in container["env"]
