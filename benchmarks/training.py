"""Perplexity after compression and a fixed budget of training, one-shot and gradual, with and without distillation,
beside the dense model trained the same way. (benchmarks/upkeep.py: what a step costs with masks and with a teacher.)

    python benchmarks/training.py --data wiki-train.txt --evaluation wiki-dev.txt
    python benchmarks/training.py --data ... --evaluation ... --only "50%" --table rows.md

Each row is one `tinygn compress` on two processes; figures are from the reports that were read back from disk. With
`--table` each row is appended to a file as soon as it is known, and a later call leaves out the rows that it holds.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from job import Failed, report_of
from table import Table

PATTERNS = {
    "dense": ["--pattern", "unstructured", "--sparsity", "0", "--criterion", "magnitude"],
    "50%": ["--pattern", "unstructured", "--sparsity", "0.5"],
    "2:4": ["--pattern", "2:4"],
    "70%": ["--pattern", "unstructured", "--sparsity", "0.7"],
    "structured 20%": ["--pattern", "channels", "--sparsity", "0.2"],
}
SCHEDULES = {"one-shot": [], "gradual": ["--schedule.kind", "cubic"]}
DISTILLED = {"alone": 0.0, "distilled": 0.5}
HEAD = (
    "| pattern | schedule | training | perplexity before | compressed | trained | parameters | zeros | prune s "
    "| train s per step |\n|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="python-docs")
    parser.add_argument("--evaluation", help="a second dataset to evaluate on")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose name holds one of these words")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of 2 sequences of 256 tokens")
    parser.add_argument("--every", type=int, default=10, help="steps between mask updates (cubic)")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 512 tokens")
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows of 512 tokens")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--table", type=Path, help="file that finished rows are appended to")
    parser.add_argument("rest", nargs="*", help="further arguments for tinygn compress, after --")
    asked = parser.parse_intermixed_args()
    table = Table(asked.table, _told(asked), HEAD, name_cells=3)
    for pattern, schedule, training in rows(asked.only):
        if table.has(pattern, schedule, training):
            continue
        try:
            figures = _figures(pattern, schedule, training, asked)
        except Failed as error:
            print(f"{pattern} {schedule} {training} failed: {error}", flush=True)
        else:
            table.add(pattern, schedule, training, *figures)


def rows(words: list[str]) -> Iterator[tuple[str, str, str]]:
    """Pattern, schedule and training of every row whose name holds one of the words; of all without any."""
    for row in itertools.product(PATTERNS, SCHEDULES, DISTILLED):
        name = " ".join(row)
        if row[:2] != ("dense", "gradual") and (not words or any(word in name for word in words)):
            yield row


def _told(asked: argparse.Namespace) -> str:
    told = (
        f"{asked.model}: {asked.steps} steps of 2 x 256 tokens, peak learning rate {asked.learning_rate:g}, gradual: "
        f"an update after every {asked.every} steps; {asked.samples} calibration and {asked.windows} evaluation "
        "windows of 512 tokens"
    )
    return f"{told}; {' '.join(asked.rest)}" if asked.rest else told


def _figures(pattern: str, schedule: str, training: str, asked: argparse.Namespace) -> list[str]:
    given: dict[str, Any] = {
        "recover-steps": asked.steps,
        "recover.batch_size": 2,
        "recover.seq_len": 256,
        "recover.learning_rate": asked.learning_rate,
        "recover.distill": DISTILLED[training],
        "schedule.every": asked.every,
        "data.num_samples": asked.samples,
        "data.eval_samples": asked.windows,
        "evaluate.latency": "false",
    }
    options = [str(word) for key, value in given.items() for word in (f"--{key}", value)]
    report = report_of(asked, [*PATTERNS[pattern], *SCHEDULES[schedule], *options, *asked.rest])
    perplexities = [f"{report[part]['perplexity']:.2f}" for part in ("before", "compressed", "after")]
    zeros, seconds = report["sparsity"]["targeted_weights"], report["seconds"]
    return [
        *perplexities,
        f"{report['after']['num_params']:,}",
        f"{zeros:.1%}",
        f"{seconds['prune']:.0f}",
        f"{seconds['recover'] / asked.steps:.2f}",
    ]


if __name__ == "__main__":
    main()
