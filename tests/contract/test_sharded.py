"""The same masks, units, weights and training whatever the model is spread over: DDP, FSDP2, HSDP, ZeRO-1/2/3,
or one process with a device too small for it.

Each layout is one real launch with the config file people copy, running tests/contract/sharded_job.py, and is compared
with one plain process. Gradients are the one thing a backend may change: ZeRO-3's hooks make autograd add
the gradients that meet at a tensor in another order, so they differ in the last bit. No mask here does; the weights
that the loss-aware solver computes from them may, and are compared by their norm.
"""

from __future__ import annotations

import functools
import json
import os
import pydoc_data.topics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.contract import sharded_models
from tests.ranks import free_port

ROOT = Path(__file__).parents[2]
JOB = str(ROOT / "tests/contract/sharded_job.py")
SECONDS = 900
"""of one job; four processes of ZeRO-3 wait for each other thousands of times, on few cores for minutes"""
# config file -> (class, processes, ranks that hold the weights once between them)
LAYOUTS = {
    "cpu": ("Replicated", 2, 1),
    "fsdp2": ("FSDP2", 2, 2),
    "hsdp": ("FSDP2", 4, 2),
    "zero1": ("ZeroOptimizer", 2, 1),
    "zero2": ("ZeroOptimizer", 2, 1),
    "zero3": ("ZeroParameters", 2, 2),
    "offload-cpu": ("Offloaded", 1, 1),
    "offload-disk": ("Offloaded", 1, 1),
}
QUICK = ("fsdp2", "zero3", "offload-disk")
AT_FOUR = {"cpu": 1, "fsdp2": 4, "zero1": 1, "zero2": 1, "zero3": 4}
"""the same on four processes (hsdp has them already), for masks and units only: ranks that hold the weights once"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """run(layout): the facts of that layout's job, launched once; `alone` is one plain process."""
    home = tmp_path_factory.mktemp("sharded")

    @functools.cache
    def facts(layout: str) -> dict[str, Any]:
        folder = home / layout
        write_inputs(folder)
        if layout.endswith("-4"):
            return launched(layout.removesuffix("-4"), folder, 4, AT_FOUR[layout.removesuffix("-4")], "masks", "units")
        return launched(layout, folder, None, LAYOUTS.get(layout, (0, 0, 1))[2])

    return facts


def config(layout: str) -> str:
    return str(ROOT / f"configs/accelerate/{layout}.yaml")


def launched(
    layout: str, folder: Path, processes: int | None, sharded: int, *checks: str, device: str = "cpu"
) -> dict[str, Any]:
    """The facts of a job with a launch file's layout; `alone` is one plain process, `offload-cpu` one that offloads."""
    name, _, offload = layout.partition("-")
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        config(layout),
        "--main_process_port",
        str(free_port()),
    ]
    launch = [] if name in ("alone", "offload") else launch
    launch += ["--num_processes", str(processes)] if processes and launch else []
    more = [*(["--offload", offload] if offload else []), *checks]
    return job([*launch, JOB, str(folder), str(sharded), *more], folder, device)


def job(words: list[str], folder: Path, device: str = "cpu") -> dict[str, Any]:
    surroundings = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    # where sums must not depend on the order of threads; and these tests are of CPUs on machines with GPUs too
    surroundings |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    surroundings |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=surroundings, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / "facts.json").read_text())


def write_inputs(folder: Path) -> None:
    """A saved model with a tokenizer, and a text file."""
    topics = pydoc_data.topics.topics
    texts = [" ".join(p.split()) for key in sorted(topics)[:12] for p in topics[key].split("\n\n")]
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<s>", "</s>"]
    words.train_from_iterator(
        texts, trainers.WordLevelTrainer(vocab_size=sharded_models.VOCAB, special_tokens=special, show_progress=False)
    )
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    with torch.random.fork_rng():
        sharded_models.llama().save_pretrained(folder / "model")
        sharded_models.llama(tied=True).save_pretrained(folder / "tied")
        sharded_models.mixtral().save_pretrained(folder / "experts")
    tokenizer.save_pretrained(folder / "model")
    (folder / "rows.txt").write_text("\n".join(texts[:200]), encoding="utf-8")


def marked(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


layouts = pytest.mark.parametrize("layout", marked(LAYOUTS))
spread = pytest.mark.parametrize("layout", marked(name for name in LAYOUTS if "offload" not in name))

and_four = pytest.mark.parametrize(
    "layout",
    marked(LAYOUTS) + [pytest.param(f"{name}-4", marks=pytest.mark.slow) for name in AT_FOUR],
)


@pytest.mark.parametrize("layout", marked(name for name in LAYOUTS if name != "zero3"))
def test_a_few_weights_in_another_dtype(run: Any, layout: str):
    """Routers in fp32 beside bf16: the masks of one process, and training goes on from there."""
    found, alone = run(layout)["two dtypes"], run("alone")["two dtypes"]
    assert found["wanda"] == alone["wanda"] and found["obs"] == alone["obs"]
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-3)


@layouts
def test_the_backend_asked_for_runs_and_its_pieces_fit(run: Any, layout: str):
    """Partition, gather and cut, and both sums are asserted inside the job."""
    facts = run(layout)
    assert (facts["backend"], facts["ranks"]) == LAYOUTS[layout][:2]


@and_four
def test_the_same_masks_as_one_process(run: Any, layout: str):
    wanted, found = run("alone")["masks"], run(layout)["masks"]
    assert wanted.keys() == found.keys() and len(wanted) > 25
    for name, facts in wanted.items():
        exact = ("mask", "kept") if " obs " in name else ("mask", "kept", "weights")
        assert {key: found[name][key] for key in exact} == {key: facts[key] for key in exact}, name
        assert found[name]["norm"] == pytest.approx(facts["norm"], rel=1e-6), name


@and_four
def test_the_same_units_as_one_process(run: Any, layout: str):
    assert run(layout)["ranks"] == (4 if layout.endswith("-4") else LAYOUTS[layout][1])
    assert run(layout)["units"] == run("alone")["units"]


@layouts
def test_the_same_block_reconstruction(run: Any, layout: str):
    """That zeros stay, and that no layer gets worse on held-out sequences, is asserted inside the job."""
    wanted, found = run("alone")["reconstructed"], run(layout)["reconstructed"]
    for name, facts in wanted.items():
        assert found[name]["zeros"] == facts["zeros"]
        assert found[name] == pytest.approx(facts, rel=2e-2 if "bf16" in name else 1e-4), name


@layouts
def test_the_same_units_of_several_stacks_as_one_process(run: Any, layout: str):
    """T5, BART, ConvNeXt, and Gemma 3n and BART with uneven widths: what stays, every bit of the smaller model, and its
    loss."""
    wanted, found = run("alone")["stacks"], run(layout)["stacks"]
    assert len(wanted) == 5 and wanted.keys() == found.keys()
    for name, (kept, weights, loss) in wanted.items():
        assert found[name] == [kept, weights, pytest.approx(loss, rel=1e-6)], name


@spread
def test_the_same_units_to_a_latency_as_one_process(run: Any, layout: str):
    """A parameter takes a second, so what the table says is what is built: 0.6 or less is left."""
    wanted = run("alone")["latency"]
    assert run(layout)["latency"] == wanted
    assert 0 < wanted["left"] <= 0.6 and wanted["tried"] > 2


@layouts
@pytest.mark.parametrize("kind", ["training", "training tied", "training bf16"])
def test_the_same_training_with_zeros_kept(run: Any, layout: str, kind: str):
    """That no masked weight and no master regrows is asserted inside the job, after each of the five steps."""
    wanted, found = run("alone")[kind], run(layout)[kind]
    assert found["zeros"] == wanted["zeros"]
    assert found == pytest.approx(wanted, rel=1e-3 if "bf16" in kind else 1e-5)
    assert wanted["loss after"] < wanted["loss 0"] - 0.5


REGROWN = ("RigL", "Top-KAST", "cubic obs")


@layouts
@pytest.mark.parametrize("kind", ["gradual", "gradual bf16"])
def test_the_same_growing_sparsity(run: Any, layout: str, kind: str):
    """Zeros after every step, counts and the optimizer's state after every update are asserted inside the job."""
    wanted, found = run("alone")[kind], run(layout)[kind]
    for name, case in wanted.items():
        assert found[name]["kept"] == case["kept"], name
        assert found[name]["losses"] == pytest.approx(case["losses"], rel=2e-2 if "bf16" in kind else 1e-3), name
        assert found[name]["regrown"] == case["regrown"] == (name in REGROWN), name


@layouts
def test_training_goes_on_from_what_was_saved(run: Any, layout: str):
    """Bit by bit, asserted inside the job."""
    assert run(layout)["resumed"] is None


@layouts
def test_a_stopped_run_goes_on(run: Any, layout: str):
    """Bit by bit on one backend, asserted inside the job; within rounding on all. Offload refuses lora."""
    wanted = run("alone")["stopped"]
    found = run(layout)["stopped"]
    assert found == pytest.approx({name: wanted[name] for name in found}, rel=1e-3)
    assert wanted.keys() - found.keys() == ({"lora"} if layout.startswith("offload") else set())


@layouts
def test_the_same_checkpoint_as_one_process(run: Any, layout: str):
    wanted, found = run("alone")["runs"], run(layout)["runs"]
    for name in (
        "units",
        "best kept",
    ):  # the one to the last bit of the file, of the other nothing that training did is left
        assert found[name] == wanted[name], name
    assert "lora" in found or layout.startswith("offload")
    for name in ("units recovered", "sparse recovered", "norms", *(("lora",) if "lora" in found else ())):
        assert found[name]["loss"] == pytest.approx(wanted[name]["loss"], rel=1e-4)
        assert {k: v for k, v in found[name].items() if k != "loss"} == {
            k: v for k, v in wanted[name].items() if k != "loss"
        }


# name -> (layout, changes of its Accelerate config, changes of its DeepSpeed settings)
CPU = {"device": "cpu"}
VARIANTS: dict[str, tuple[str, dict, dict]] = {
    "fsdp2 bf16": ("fsdp2", {"mixed_precision": "bf16"}, {}),
    "zero2 bf16": ("zero2", {}, {"bf16": {"enabled": True}}),
    "zero3 bf16": ("zero3", {}, {"bf16": {"enabled": True}}),
    "fsdp2 offload": ("fsdp2", {"fsdp_config": {"fsdp_offload_params": True}}, {}),
    "zero2 offload": ("zero2", {}, {"zero_optimization": {"offload_optimizer": CPU}}),
    "zero3 offload": ("zero3", {}, {"zero_optimization": {"offload_optimizer": CPU, "offload_param": CPU}}),
}


@pytest.fixture(scope="module")
def run_variant(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """run_variant(name, *checks): the facts of a job launched with changed settings."""
    home = tmp_path_factory.mktemp("variants")

    @functools.cache
    def facts(variant: str, *checks: str) -> dict[str, Any]:
        (layout, changes, engine), folder = VARIANTS[variant], home / variant.replace(" ", "-")
        write_inputs(folder)
        asked = merged(yaml.safe_load(Path(config(layout)).read_text()), changes)
        if engine:
            settings = json.loads((ROOT / f"configs/deepspeed/{layout}.json").read_text())
            (folder / "engine.json").write_text(json.dumps(merged(settings, engine)))
            asked["deepspeed_config"]["deepspeed_config_file"] = str(folder / "engine.json")
        (folder / "launch.yaml").write_text(yaml.safe_dump(asked))
        words = ["-m", "accelerate.commands.launch", "--config_file", str(folder / "launch.yaml"), JOB, str(folder)]
        return job([*words, str(LAYOUTS[layout][2]), *checks], folder)

    return facts


def merged(settings: dict, changes: dict) -> dict:
    inner = {key: merged(settings.get(key, {}), value) for key, value in changes.items() if isinstance(value, dict)}
    return settings | changes | inner


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "bf16" in name])
def test_zeros_hold_in_mixed_precision(run: Any, run_variant: Any, variant: str):
    """bf16 compute with fp32 masters: near the fp32 training, and still exactly sparse."""
    found = run_variant(variant, "training", "training bf16", "runs")
    for kind in ("training", "training bf16"):
        assert found[kind]["zeros"] == run("alone")[kind]["zeros"]
        assert found[kind]["loss after"] == pytest.approx(run("alone")[kind]["loss after"], abs=0.05)
    assert found["runs"]["sparse recovered"]["zeros"] == run("alone")["runs"]["sparse recovered"]["zeros"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "offload" in name])
def test_shards_in_cpu_memory_change_nothing(run: Any, run_variant: Any, variant: str):
    """Where the shards lie, which optimizer steps them and its state; on a CPU, so the moves between devices are not
    seen here."""
    alone, found = (
        run("alone"),
        run_variant(variant, "pieces", "masks", "reconstructed", "training", "gradual", "resumed", "runs"),
    )
    assert {name: facts["mask"] for name, facts in found["masks"].items()} == {
        name: facts["mask"] for name, facts in alone["masks"].items()
    }
    assert found["training"] == pytest.approx(alone["training"], rel=1e-5)
    assert found["reconstructed"]["llama"] == pytest.approx(alone["reconstructed"]["llama"], rel=1e-4)
    for name, case in alone["gradual"].items():
        assert found["gradual"][name]["losses"] == pytest.approx(case["losses"], rel=1e-3), name
    assert found["runs"]["units"] == alone["runs"]["units"]
    assert found["runs"]["sparse recovered"]["zeros"] == alone["runs"]["sparse recovered"]["zeros"]
