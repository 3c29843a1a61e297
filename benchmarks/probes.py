"""What removal probes cost, in plain forwards of the same tokens: a Markdown table.

    python benchmarks/probes.py --data text.txt --seq-len 512 --every 2

Probes take out every `--every`-th layer (blocks: its whole attention and its whole FFN, by gates), once with each probe
running all that is left of the model and once restarting from the cached input of its layer. The plain forward is that
of evaluation, loss included, timed before, between and after the rows: with the fp32 products that a compress run uses
(see tinygn_dist/products.py; the probes run with them), and with those of stock torch. One process of one thread, and
then `--ranks` connected ones, which share the probes of one window and the windows where there are more. Seconds are of
the rank with the most. Memory is the peak of the whole process (resident set) while it evaluates and while it probes.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from prepared import add_arguments, on_ranks, problem_of

from tinygn_dist.estimate.probes import Probe, measure
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.evaluate.quality import mean_loss
from tinygn_dist.runtime.cpu_matmul import fast_matmul, stock_matmul

MOST_PLAIN = 5
"""plain forwards of each window between two rows"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, windows=1, seq_len=512)
    parser.add_argument("--every", type=int, default=1, help="probe each so-many-th layer")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--skip", nargs="*", default=[], choices=["whole", "blocks"], help="rows to leave out")
    parser.add_argument("--measure", metavar="FOLDER", help=argparse.SUPPRESS)  # this process is one of the ranks
    asked = parser.parse_args()
    if asked.measure:
        return timed(Path(asked.measure), asked)
    words = ["--model", asked.model, "--data", asked.data, "--windows", str(asked.windows)]
    words += ["--seq-len", str(asked.seq_len), "--every", str(asked.every)]
    one = on_ranks(__file__, 1, [*words, "--skip", *asked.skip])
    many = on_ranks(__file__, asked.ranks, [*words, "--skip", "whole", "blocks"])
    print(
        "| ranks | probes | forwards | CPU s | s | CPU s per forward / plain | s per forward / plain | ... / stock "
        "torch's |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for ranks, facts in ((1, one), (asked.ranks, many)):
        for name, row in facts.items():
            if "forwards" in row:
                each = [_per_forward(row, clock) / _per_forward(one["plain"], clock) for clock in ("cpu", "wall")]
                each += [_per_forward(row, "wall") / _per_forward(one["plain, stock torch"], "wall")]
                told = f"{row['forwards']} | {row['cpu']:.1f} | {row['wall']:.1f} | " + " | ".join(
                    f"{x:.3f}" for x in each
                )
                print(f"| {ranks} | {name} | {told} |")
    speedup = one["layers, restarting"]["wall"] / many["layers, restarting"]["wall"]
    memory = one["memory"]
    print(f"\n{asked.ranks} ranks: {speedup:.3f} times as fast as one.")
    print(
        f"Peak memory {memory['probing'] / 2**20:.0f} MiB, of evaluation {memory['evaluation'] / 2**20:.0f} MiB: "
        f"{memory['probing'] / memory['evaluation']:.3f} times as much."
    )


def _per_forward(row: dict[str, float], clock: str) -> float:
    return row[clock] / row["forwards"]


def timed(folder: Path, asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    problem = problem_of(asked)
    layers = range(0, problem.anatomy.num_layers, asked.every)
    alone = [Probe(layer) for layer in layers]
    blocks = [
        Probe(group.layer, group, tuple(range(group.num_units)))
        for group in problem.anatomy.groups
        if group.layer in layers
    ]
    backend, few = problem.backend, [alone[0], alone[-1]]
    rows = {"layers, restarting": (alone, True)}
    if "whole" not in asked.skip:
        rows["layers, whole"] = (alone, False)
    if "blocks" not in asked.skip:
        rows["blocks, restarting"] = (blocks, True)
    with fast_matmul(backend.device):
        measure(problem, few)  # warm
        facts = {"memory": {"evaluation": peak(lambda: mean_loss(problem, "evaluation"))}}
        facts["memory"]["probing"] = peak(lambda: measure(problem, few))
        plain = Plain(problem, max(1, min(MOST_PLAIN, len(alone) // 2)))
        for name, (asked_probes, reuse) in rows.items():
            row = clocked(problem, lambda p=asked_probes, r=reuse: measure(problem, p, reuse=r))
            facts[name] = row | {"forwards": len(asked_probes) * len(problem.batches)}
            plain.again()
    everyone = backend.everyone(facts | plain.facts)
    if backend.is_main:
        worst = {
            name: {key: max(told[name][key] for told in everyone) for key in row} for name, row in everyone[0].items()
        }
        (folder / "facts.json").write_text(json.dumps(worst))
    backend.close()
    os._exit(0)


class Plain:
    """facts: seconds of plain forwards on one rank so far, with the products in use and with stock torch's. times:
    forwards of each window and kind at once."""

    def __init__(self, problem: Problem, times: int) -> None:
        self.problem, self.times = problem, times
        self.facts: dict[str, dict[str, float]] = {}
        self.again()

    def again(self) -> None:
        if self.problem.backend.num_ranks == 1:
            self._add("plain")
            with stock_matmul():
                self._add("plain, stock torch")

    def _add(self, name: str) -> None:
        row = clocked(self.problem, lambda: mean_loss(self.problem, "plain"), self.times)
        row["forwards"] = self.times * len(self.problem.batches)
        before = self.facts.get(name, {})
        self.facts[name] = {key: value + before.get(key, 0) for key, value in row.items()}


def clocked(problem: Problem, work: Callable[[], object], times: int = 1) -> dict[str, float]:
    problem.backend.barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(times):
        work()
    problem.backend.barrier()
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def peak(work: Callable[[], object]) -> int:
    """Bytes of the resident set at its largest during the work; what was freed before is given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
    work()
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    main()
