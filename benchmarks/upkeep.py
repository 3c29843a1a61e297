"""What holding masks costs in a training step: a Markdown table.

    python benchmarks/upkeep.py --layouts cpu fsdp2 zero2 zero3

Each layout is one `accelerate launch` (two processes) of one model and one AdamW, whose steps are taken with and without
the masks in turn (with, without, without, with, ...), so that what else the machine does falls on both alike. A step is
recovery's own at its default size (4 sequences of 256 tokens over all ranks): backward, clipping, AdamW on every matrix of
the layers. What masks cost does not depend on the tokens, so their share of a larger step is smaller. CPU
seconds are those of a process (all its threads), means over the ranks and medians over the steps; "more" is the mean
difference of neighbouring steps in units of the plain step, with its standard error, which a busy machine raises to a
percent or two. So zeroing and checking are timed by themselves too, between the steps, as a share of the plain step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tinygn_dist import load
from tinygn_dist.anatomy import read_anatomy
from tinygn_dist.backends import make_backend
from tinygn_dist.config import DistributedConfig, ModelConfig, PruneConfig, RecoverConfig
from tinygn_dist.estimate.setting import Setting
from tinygn_dist.objective import objective_of
from tinygn_dist.origin import placed
from tinygn_dist.progress import Progress
from tinygn_dist.recover import Recovery, freeze, make_optimizer
from tinygn_dist.schedule import Plan
from tinygn_dist.weights import sparsify

ROOT = Path(__file__).parents[1]
KINDS = ("masks", "plain", "plain", "masks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layouts", nargs="*", default=["cpu"], help="names in configs/accelerate")
    parser.add_argument("--seq-len", type=int, default=RecoverConfig().seq_len)
    parser.add_argument("--batch-size", type=int, default=RecoverConfig().batch_size, help="sequences over all ranks")
    parser.add_argument("--rounds", type=int, default=4, help="of four steps each, after one that is not counted")
    parser.add_argument("--measure", metavar="FOLDER", help=argparse.SUPPRESS)  # this process is one of the ranks
    asked = parser.parse_args()
    if asked.measure:
        return measure(Path(asked.measure), asked)
    print(
        "| backend | plain, CPU s | with masks, CPU s | more | zeroing + check, CPU s | share | plain, s | with masks, s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for layout in asked.layouts:
        with tempfile.TemporaryDirectory() as folder:
            facts = launch(Path(folder), layout, asked)
        cpu, wall, itself = facts["cpu"], facts["wall"], facts["cpu"]["itself"]
        print(
            f"| {facts['backend']} | {cpu['plain']:.3f} | {cpu['masks']:.3f} | {cpu['more']:+.1%} +- {cpu['error']:.1%} | {itself:.3f} "
            f"| {itself / cpu['plain']:.1%} | {wall['plain']:.2f} | {wall['masks']:.2f} |",
            flush=True,
        )


def launch(folder: Path, layout: str, asked: argparse.Namespace) -> dict:
    start = ["-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{layout}.yaml"]
    words = [__file__, "--measure", str(folder), "--model", asked.model]
    words += ["--seq-len", str(asked.seq_len), "--batch-size", str(asked.batch_size), "--rounds", str(asked.rounds)]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *start, *words], cwd=ROOT, env=surroundings, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads((folder / "facts.json").read_text())


def measure(folder: Path, asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    backend = make_backend(DistributedConfig(timeout_seconds=300))
    source = load.find_model(ModelConfig(name=asked.model))
    model, _ = placed(source, backend)
    anatomy = read_anatomy(load.skeleton(source), needs_units=False)
    shape = (asked.batch_size, 1, asked.seq_len)
    rows = torch.randint(3, source.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    batch = [{"input_ids": row, "labels": row} for row in rows]
    options = RecoverConfig(steps=1, batch_size=asked.batch_size, distill=0.0, learning_rate=1e-5)
    recovery = Recovery(None, "causal-lm", (), options, Plan(1), backend, Progress())
    setting = Setting(model, anatomy, objective_of("causal-lm"), batch, backend, Progress())
    masks = sparsify(setting, anatomy.targets, PruneConfig(pattern="unstructured", criterion="magnitude", sparsity=0.5))
    seconds = {clock: {kind: [] for kind in [*KINDS, "itself"]} for clock in ("cpu", "wall")}
    with backend.in_fp32(model):
        freeze(model, options)
        optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], options)
        model.train()
        wrapped, prepared = backend.prepare(model, optimizer)
        for number, kind in enumerate(KINDS[:1] + KINDS * asked.rounds):
            masks._hold(wrapped, backend)  # now it is as after a step with masks; a plain one moves what was masked
            handle = masks.enforce(wrapped, prepared, backend) if kind == "masks" else None
            backend.barrier()
            cpu, wall = time.process_time(), time.perf_counter()
            recovery._one_step(wrapped, prepared, batch)
            if number:
                seconds["cpu"][kind].append(time.process_time() - cpu)
                seconds["wall"][kind].append(time.perf_counter() - wall)
            if handle is not None:
                assert masks.violations(wrapped, backend) == 0
                handle.remove()
                cpu, wall = time.process_time(), time.perf_counter()
                masks.check(wrapped, backend)
                masks._hold(wrapped, backend)
                seconds["cpu"]["itself"].append(time.process_time() - cpu)
                seconds["wall"]["itself"].append(time.perf_counter() - wall)
        backend.release(model, wrapped, prepared)
    everyone = backend.everyone(seconds)
    if backend.is_main:
        facts = {clock: summary([told[clock] for told in everyone]) for clock in seconds}
        (folder / "facts.json").write_text(json.dumps({"backend": type(backend).__name__, **facts}))
    backend.close()
    os._exit(0)


def summary(ranks: list[dict[str, list[float]]]) -> dict[str, float]:
    """Means over ranks, medians over steps. The n-th step with masks and the n-th without are neighbours."""
    steps = {
        name: [statistics.mean(each) for each in zip(*(rank[name] for rank in ranks), strict=True)] for name in ranks[0]
    }
    medians = {name: statistics.median(values) for name, values in steps.items()}
    more = [(m - p) / medians["plain"] for m, p in zip(steps["masks"], steps["plain"], strict=True)]
    return medians | {"more": statistics.mean(more), "error": statistics.stdev(more) / len(more) ** 0.5}


if __name__ == "__main__":
    main()
