"""One-shot pruning of weights, method by pattern: each row is one `tinygn compress` on two processes.

    python benchmarks/one_shot.py --data train.txt --evaluation dev.txt
    python benchmarks/one_shot.py --data train.txt --evaluation dev.txt --patterns 50% 2:4 --methods wanda obs --seeds 0 1 2

Figures come from the report that each run read back from disk.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

PATTERNS = {
    "50%": ["--pattern", "unstructured", "--sparsity", "0.5"],
    "60%": ["--pattern", "unstructured", "--sparsity", "0.6"],
    "70%": ["--pattern", "unstructured", "--sparsity", "0.7"],
    "2:4": ["--pattern", "2:4"],
    "4:8": ["--pattern", "4:8"],
}
METHODS = {
    "magnitude": ["--criterion", "magnitude"],
    "wanda": ["--criterion", "wanda"],
    "ria": ["--criterion", "ria"],
    "gblm": ["--criterion", "gblm"],
    "taylor": ["--criterion", "taylor"],
    "fisher": ["--criterion", "fisher"],
    "sparsegpt": ["--estimator", "finite-difference", "--prune.refine", "0"],
    "obs forward-only": ["--estimator", "finite-difference"],
    "obs": [],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="python-docs")
    parser.add_argument("--evaluation", help="a second dataset to evaluate on")
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="which calibration windows are drawn")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("rest", nargs="*", help="further arguments for tinygn compress, after --")
    asked = parser.parse_args()
    print(
        "| method | pattern | seed | zeros | perplexity before | after | compress s | CPU s, whole command | peak GiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for pattern, method, seed in itertools.product(asked.patterns, asked.methods, asked.seeds):
        print(f"| {method} | {pattern} | {seed} | {_figures(pattern, method, seed, asked)} |", flush=True)


def _figures(pattern: str, method: str, seed: int, asked: argparse.Namespace) -> str:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model"
        command = [sys.executable, "-m", "tinygn_dist.cli", "compress", "--model", asked.model, "--data", asked.data]
        command += ["--data.evaluation", asked.evaluation] if asked.evaluation else []
        command += [*PATTERNS[pattern], *METHODS[method], "--data.seed", str(seed), "--evaluate.latency", "false"]
        command += ["--output", str(output), "--num-processes", str(asked.processes), *asked.rest]
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"failed: {done.stderr.strip().splitlines()[-1]}"
        cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
        report = json.loads((output / "tinygn_report.json").read_text())
    cpu_seconds = cpu.ru_utime + cpu.ru_stime - used.ru_utime - used.ru_stime
    return " | ".join(
        (
            f"{report['sparsity']['targeted_weights']:.1%}",
            f"{report['before']['perplexity']:.2f}",
            f"{report['after']['perplexity']:.2f}",
            f"{report['seconds']['compress']:.0f}",
            f"{cpu_seconds:.0f}",
            f"{max(report['peak_memory_gib']):.2f}",
        )
    )


if __name__ == "__main__":
    main()
