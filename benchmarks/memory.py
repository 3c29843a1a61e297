"""What each rank holds of a model that is spread over ranks: a Markdown table.

    python benchmarks/memory.py --model smollm2-135m --ranks 1 2 4

Loads the model as `tinygn compress` does, makes Taylor scores on short text, writes the checkpoint and reads the memory
of each rank: what it still holds (bytes of its tensors, and the process's own anonymous memory over what it was before
loading), and the peaks of loading, of a forward and of writing. CPU only, where a rank's memory is its process's. A
model that is not stored as safetensors is stored so first, outside the measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml

from tinygn_dist.backends import make_backend
from tinygn_dist.checkpoints import export, load
from tinygn_dist.checkpoints.companions import Companions
from tinygn_dist.checkpoints.formats.form import Form
from tinygn_dist.checkpoints.sharded_load import from_checkpoint
from tinygn_dist.config import DistributedConfig, ModelConfig
from tinygn_dist.estimate.backprop import weight_gradients
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.evaluate.quality import mean_loss
from tinygn_dist.maths.criteria import taylor
from tinygn_dist.models.anatomy import read_anatomy
from tinygn_dist.models.objective import objective_of
from tinygn_dist.runtime.progress import Progress

ROOT = Path(__file__).parents[1]
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument(
        "--layouts",
        nargs="*",
        default=["cpu", "fsdp2", "zero3"],
        help="names in configs/accelerate, offload-cpu, offload-disk",
    )
    parser.add_argument("--seq-len", type=int, default=32, help="tokens of the text that is scored on")
    parser.add_argument("--measure", metavar="FOLDER", help=argparse.SUPPRESS)  # this process is one of the ranks
    parser.add_argument("--offload", default="none", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        return measure(Path(asked.measure), asked.seq_len, asked.offload)
    columns = ("parameters", "gradient sums", "scores", "all three", "process after scoring")
    columns += ("load peak", "forward peak", "write peak")
    print("| backend | ranks | " + " | ".join(f"{name} MiB" for name in columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    with tempfile.TemporaryDirectory() as folder:
        store(asked.model, Path(folder) / "model")
        for layout in asked.layouts:
            alone = layout == "cpu" or layout.startswith("offload")
            for ranks in [1] if alone else asked.ranks:
                if alone or ranks > 1:  # one rank does not shard
                    worst = launch(Path(folder), layout, ranks, asked.seq_len)
                    values = " | ".join(f"{worst[name] / MIB:,.0f}" for name in columns)
                    print(f"| {'one process' if layout == 'cpu' else layout} | {ranks} | {values} |", flush=True)


def store(model: str, folder: Path) -> None:
    """The checkpoint as one safetensors file, made in a process of its own."""
    code = (
        "import sys; from tinygn_dist import load; from tinygn_dist.config import ModelConfig\n"
        "load.load_model(load.find_model(ModelConfig(name=sys.argv[1]))).save_pretrained(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, model, str(folder)], check=True, capture_output=True)


def launch(folder: Path, layout: str, ranks: int, seq_len: int) -> dict[str, int]:
    """The largest figure of any rank."""
    _, _, offload = layout.partition("offload-")
    config = yaml.safe_load((ROOT / f"configs/accelerate/{'cpu' if offload else layout}.yaml").read_text())
    (folder / "launch.yaml").write_text(yaml.safe_dump(config | {"num_processes": ranks}))
    start = [] if ranks == 1 else ["-m", "accelerate.commands.launch", "--config_file", str(folder / "launch.yaml")]
    words = [*start, __file__, "--measure", str(folder), "--seq-len", str(seq_len), "--offload", offload or "none"]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    surroundings["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=surroundings, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads((folder / "facts.json").read_text())


def measure(folder: Path, seq_len: int, offload: str) -> None:
    torch.set_num_threads(1)
    backend = make_backend(DistributedConfig(timeout_seconds=300, offload=offload))
    source = load.find_model(ModelConfig(name=str(folder / "model")))
    anatomy = read_anatomy(load.skeleton(source), needs_units=False)
    facts, before = {}, anonymous()
    with peak_of(facts, "load peak", before):
        model = backend.place(from_checkpoint(source, backend))
    facts["parameters"] = size_of(backend.pieces(model).values())
    ids = torch.randint(0, source.config.vocab_size, (backend.num_ranks, 1, seq_len))
    ids = backend.everyone(ids)[0]
    batches = [{"input_ids": row, "labels": row} for row in ids]
    here = Problem(model, anatomy, objective_of("causal-lm"), batches, backend, Progress())
    with peak_of(facts, "forward peak", before):
        mean_loss(here, "a forward")
    sums = weight_gradients(here, anatomy.matrices, squares=False)
    facts["gradient sums"] = size_of(sums.tensors())
    scores = [taylor(backend.shard(model, t).weight, sums.rounded(t.name)) for t in anatomy.matrices]
    facts["scores"] = size_of(scores)
    facts["all three"] = sum(facts[name] for name in ("parameters", "gradient sums", "scores"))
    facts["process after scoring"] = anonymous() - before
    del sums, scores
    (folder / "out").mkdir(exist_ok=True)
    before_writing = anonymous()
    with peak_of(facts, "write peak", before_writing):
        export.write_checkpoint(folder / "out", model, Form(), Companions(), 4.0, backend)
    worst = [max(values) for values in zip(*(told.values() for told in backend.everyone(facts)), strict=True)]
    if backend.is_main:
        (folder / "facts.json").write_text(json.dumps(dict(zip(facts, worst, strict=True))))
    backend.close()
    os._exit(0)


def size_of(tensors: Iterator[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def anonymous() -> int:
    """Bytes of the process's own memory, without files it maps; freed memory is given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _anonymous_now()


def _anonymous_now() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


@contextlib.contextmanager
def peak_of(facts: dict[str, int], name: str, before: int) -> Iterator[None]:
    """The most anonymous memory over `before`, looked at every few milliseconds."""
    done, highest = threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.002):
            highest[0] = max(highest[0], _anonymous_now())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield
    done.set()
    watcher.join()
    facts[name] = max(highest[0] - before, 0)


if __name__ == "__main__":
    main()
