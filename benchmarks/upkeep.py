"""What holding masks, and asking a teacher, cost in a training step: a Markdown table.

    python benchmarks/upkeep.py --layouts cpu fsdp2 zero2 zero3
    python benchmarks/upkeep.py --teacher

Each layout is one `accelerate launch` (two processes) of one model and one AdamW, whose steps are taken with masks,
plainly, and with a teacher in turn (masks, plain, taught, taught, plain, masks, ...), so that what else the machine
does falls on all alike. A step is recovery's own at its default size (4 sequences of 256 tokens over all ranks):
backward, clipping, AdamW on every matrix of the layers; the teacher is the same model, and half of the loss is the
distance from its logits. What masks cost does not depend on the tokens, so their share of a larger step is smaller. CPU
seconds are those of a process (all its threads), means over the ranks and medians over the steps. "zeroing + check" is
the time spent there inside the steps, "more" the mean difference of neighbouring steps in units of the plain step, with
its standard error, which a busy machine raises to a percent or two: it bounds what masks cost elsewhere, the former
says what they cost there.
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

from tinygn_dist.backends import make_backend
from tinygn_dist.backends.base import Backend
from tinygn_dist.checkpoints import load
from tinygn_dist.checkpoints.sharded_load import placed
from tinygn_dist.config import DistributedConfig, ModelConfig, PruneConfig, RecoverConfig
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths.schedules import Plan
from tinygn_dist.models.anatomy import read_anatomy
from tinygn_dist.models.objective import objective_of
from tinygn_dist.prune.sparsity.masks import Masks
from tinygn_dist.prune.sparsity.sparsify import sparsify
from tinygn_dist.runtime.progress import Progress
from tinygn_dist.train.loop import Recovery, freeze, make_optimizer

ROOT = Path(__file__).parents[1]
KINDS = ("masks", "plain", "taught")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layouts", nargs="*", default=["cpu"], help="names in configs/accelerate")
    parser.add_argument("--seq-len", type=int, default=RecoverConfig().seq_len)
    parser.add_argument("--batch-size", type=int, default=RecoverConfig().batch_size, help="sequences over all ranks")
    parser.add_argument(
        "--rounds", type=int, default=4, help="of two steps of each kind, after one of each that is not counted"
    )
    parser.add_argument("--teacher", action="store_true", help="also steps with a teacher")
    parser.add_argument("--measure", metavar="FOLDER", help=argparse.SUPPRESS)  # this process is one of the ranks
    asked = parser.parse_args()
    if asked.measure:
        return measure(Path(asked.measure), asked)
    head = ["backend", "plain, CPU s", "with masks", "more", "zeroing + check", "share"]
    head += ["with a teacher", "more"] if asked.teacher else []
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for layout in asked.layouts:
        with tempfile.TemporaryDirectory() as folder:
            facts = launch(Path(folder), layout, asked)
        cells = [facts["backend"], *(f"{facts[kind]:.3f}" for kind in ("plain", "masks")), facts["more masks"]]
        cells += [f"{facts['itself']:.3f}", f"{facts['itself'] / facts['plain']:.2%}"]
        cells += [f"{facts['taught']:.3f}", facts["more taught"]] if asked.teacher else []
        print(f"| {' | '.join(cells)} |", flush=True)


def launch(folder: Path, layout: str, asked: argparse.Namespace) -> dict:
    start = ["-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{layout}.yaml"]
    words = [__file__, "--measure", str(folder), "--model", asked.model]
    words += ["--seq-len", str(asked.seq_len), "--batch-size", str(asked.batch_size), "--rounds", str(asked.rounds)]
    words += ["--teacher"] if asked.teacher else []
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
    options = RecoverConfig(steps=1, batch_size=asked.batch_size, distill=0.5, learning_rate=1e-5)
    teacher = placed(source, backend)[0] if asked.teacher else None
    recoveries = {
        kind: Recovery(teacher if kind == "taught" else None, "causal-lm", (), options, Plan(1), backend, Progress())
        for kind in KINDS
    }
    problem = Problem(model, anatomy, objective_of("causal-lm"), batch, backend, Progress())
    prune = PruneConfig(pattern="unstructured", criterion="magnitude", sparsity=0.5)
    masks = TimedMasks(anatomy.matrices, sparsify(problem, anatomy.matrices, prune).by_name)
    kinds = KINDS if asked.teacher else KINDS[:2]
    seconds: dict[str, list[float]] = {kind: [] for kind in [*kinds, "itself"]}
    with backend.in_fp32(model):
        freeze(model, options, backend)
        optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], options)
        model.train()
        wrapped, prepared = backend.prepare(model, optimizer)
        for number, kind in enumerate(kinds + (kinds[::-1] + kinds) * asked.rounds):
            masks._hold(wrapped, backend)  # now it is as after a step with masks; a plain one moves what was masked
            masks.seconds = 0.0
            handle = masks.enforce(wrapped, prepared, backend) if kind == "masks" else None
            backend.barrier()
            start = time.process_time()
            recoveries[kind]._one_step(wrapped, prepared, batch)
            taken = time.process_time() - start
            if number >= len(kinds):
                seconds[kind].append(taken)
            if handle is not None:
                assert masks.violations(wrapped, backend) == 0
                handle.remove()
                seconds["itself"].append(masks.seconds)
        backend.release(model, wrapped, prepared)
    everyone = backend.everyone(seconds)
    if backend.is_main:
        (folder / "facts.json").write_text(json.dumps({"backend": type(backend).__name__, **summary(everyone)}))
    backend.close()
    os._exit(0)


class TimedMasks(Masks):
    """seconds: CPU time spent on zeroing and checking since it was set to 0."""

    seconds = 0.0

    def check(self, model: torch.nn.Module, backend: Backend) -> None:
        start = time.process_time()
        super().check(model, backend)
        self.seconds += time.process_time() - start

    def _hold(self, model: torch.nn.Module, backend: Backend) -> None:
        start = time.process_time()
        super()._hold(model, backend)
        self.seconds += time.process_time() - start


def summary(ranks: list[dict[str, list[float]]]) -> dict[str, float | str]:
    """Means over ranks, medians over steps. The n-th steps of all kinds are neighbours."""
    steps = {
        name: [statistics.mean(each) for each in zip(*(rank[name] for rank in ranks), strict=True)] for name in ranks[0]
    }
    facts: dict[str, float | str] = {name: statistics.median(values) for name, values in steps.items()}
    for name in steps.keys() & {"masks", "taught"}:
        more = [(other - plain) / facts["plain"] for other, plain in zip(steps[name], steps["plain"], strict=True)]
        error = statistics.stdev(more) / len(more) ** 0.5
        facts[f"more {name}"] = f"{statistics.mean(more):+.1%} +- {error:.1%}"
    return facts


if __name__ == "__main__":
    main()
