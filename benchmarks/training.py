"""Perplexity after compression and a fixed budget of training, one-shot and gradual, with and without distillation,
beside the dense model trained the same way; step time with and without masks and teacher.

    python benchmarks/training.py quality --data wiki-train.txt --evaluation wiki-dev.txt
    python benchmarks/training.py quality --data ... --evaluation ... --only "50%"
    python benchmarks/training.py steps

`quality` runs `tinygn compress` on two processes per row; figures are from the reports that were read back from disk.
`steps` times the optimizer steps of one process in turn, each kind three times, and takes the best.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

PATTERNS = {
    "dense": ["--pattern", "unstructured", "--sparsity", "0", "--criterion", "magnitude"],
    "50%": ["--pattern", "unstructured", "--sparsity", "0.5"],
    "2:4": ["--pattern", "2:4"],
    "70%": ["--pattern", "unstructured", "--sparsity", "0.7"],
    "structured 20%": ["--pattern", "channels", "--sparsity", "0.2"],
}
SCHEDULES = {"one-shot": [], "gradual": ["--schedule.kind", "cubic"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("quality", "steps"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="python-docs")
    parser.add_argument("--evaluation", help="a second dataset to evaluate on")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose name holds one of these words")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of 2 sequences of 256 tokens")
    parser.add_argument("--every", type=int, default=10, help="steps between mask updates (cubic)")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 512 tokens")
    asked = parser.parse_args()
    quality(asked) if asked.what == "quality" else steps(asked)


def quality(asked: argparse.Namespace) -> None:
    print(f"{asked.steps} steps of 2 x 256 tokens, peak learning rate {asked.learning_rate:g}\n")
    print(
        "| pattern | schedule | distillation | perplexity before | compressed | trained | parameters | zeros | compress s | train s per step |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for pattern, words in PATTERNS.items():
        for schedule, more in SCHEDULES.items():
            if pattern == "dense" and more:
                continue
            for distill in (0.0, 0.5):
                name = f"{pattern} {schedule} {'distilled' if distill else 'alone'}"
                if not asked.only or any(word in name for word in asked.only):
                    print(_row(pattern, schedule, distill, [*words, *more], asked), flush=True)


def _row(pattern: str, schedule: str, distill: float, words: list[str], asked: argparse.Namespace) -> str:
    with tempfile.TemporaryDirectory() as home:
        given = {
            "model": asked.model,
            "data": asked.data,
            "output": f"{home}/out",
            "recover-steps": asked.steps,
            "num-processes": 2,
            "recover.batch_size": 2,
            "recover.seq_len": 256,
            "recover.learning_rate": asked.learning_rate,
            "recover.distill": distill,
            "schedule.every": asked.every,
            "data.num_samples": asked.samples,
            "evaluate.latency": "false",
        } | ({"data.evaluation": asked.evaluation} if asked.evaluation else {})
        command = [sys.executable, "-m", "tinygn_dist.cli", "compress", *words]
        command += [str(word) for key, value in given.items() for word in (f"--{key}", value)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"| {pattern} | {schedule} | {distill} | failed: {done.stderr.strip().splitlines()[-1][:120]} | | | | | | |"
        report = json.loads(Path(home, "out", "tinygn_report.json").read_text(encoding="utf-8"))
    figures = (report[part]["perplexity"] for part in ("before", "compressed", "after"))
    told = " | ".join(f"{figure:.2f}" for figure in figures)
    zeros, seconds = report["sparsity"]["targeted_weights"], report["seconds"]
    return (
        f"| {pattern} | {schedule} | {distill:g} | {told} | {report['after']['num_params']:,} | {zeros:.1%} "
        f"| {seconds['compress']:.0f} | {seconds['recover'] / asked.steps:.2f} |"
    )


def steps(asked: argparse.Namespace) -> None:
    from tinygn_dist import load
    from tinygn_dist.anatomy import read_anatomy
    from tinygn_dist.backends import make_backend
    from tinygn_dist.config import DistributedConfig, ModelConfig, PruneConfig, RecoverConfig, ScheduleConfig
    from tinygn_dist.estimate.setting import Setting
    from tinygn_dist.gradual import GradualMasks
    from tinygn_dist.objective import objective_of
    from tinygn_dist.progress import Progress
    from tinygn_dist.recover import Course, Recovery
    from tinygn_dist.schedule import Plan

    source, backend = load.find_model(ModelConfig(name=asked.model)), make_backend(DistributedConfig())
    teacher, count = load.load_model(source), 4
    rows = torch.randint(3, 1000, (8, 1, 256), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": row, "labels": row} for row in rows]
    kinds = {"plain": (False, False), "masks": (True, False), "masks and teacher": (True, True)}
    best = dict.fromkeys(kinds, float("inf"))
    options, plan = RecoverConfig(steps=count, batch_size=2, distill=0.5), Plan(count, (), (0.5,))
    for _ in range(3):
        for name, (masked, taught) in kinds.items():
            model = load.load_model(source)
            anatomy = read_anatomy(model, needs_units=False)
            setting = Setting(model, anatomy, objective_of("causal-lm"), batches, backend, Progress())
            prune = PruneConfig(pattern="unstructured", criterion="magnitude", sparsity=0.5)
            masks = GradualMasks(setting, anatomy.targets, prune, ScheduleConfig(), plan) if masked else None
            marks: list[float] = []
            recovery = Recovery(
                teacher if taught else None, "causal-lm", batches, options, plan, backend, Progress(),
                stepped=lambda _, marks=marks: marks.append(time.process_time()),
            )  # fmt: skip
            recovery.run(model, masks, Course())
            best[name] = min(best[name], *(b - a for a, b in zip(marks[:-1], marks[1:], strict=True)))
    print("| step of 2 x 256 tokens | CPU s | beside plain |\n|---|---|---|")
    for name, seconds in best.items():
        print(f"| {name} | {seconds:.3f} | {seconds / best['plain'] - 1:+.1%} |")


if __name__ == "__main__":
    main()
