"""Run a suite of compressions through the real command line and print one table from their reports.

    python benchmarks/table.py one-shot --data train.txt --evaluation dev.txt
    python benchmarks/table.py one-shot --data train.txt --evaluation dev.txt --only wanda

Each row is one `tinygn compress` on two processes; figures come from the report that was read back from disk.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SUITES: dict[str, dict[str, list[str]]] = {
    "one-shot": {
        "magnitude 50%": ["--pattern", "unstructured", "--sparsity", "0.5", "--criterion", "magnitude"],
        "wanda 50%": ["--pattern", "unstructured", "--sparsity", "0.5", "--criterion", "wanda"],
        "obs 50% forward-only": [
            "--pattern", "unstructured", "--sparsity", "0.5", "--estimator", "finite-difference"
        ],
        "obs 50% loss-aware": ["--pattern", "unstructured", "--sparsity", "0.5"],
        "obs 60% loss-aware": ["--pattern", "unstructured", "--sparsity", "0.6"],
        "obs 70% loss-aware": ["--pattern", "unstructured", "--sparsity", "0.7"],
        "wanda 2:4": ["--pattern", "2:4", "--criterion", "wanda"],
        "obs 2:4": ["--pattern", "2:4"],
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="python-docs")
    parser.add_argument("--evaluation", help="a second dataset to evaluate on")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose name holds one of these words")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("rest", nargs="*", help="further arguments for tinygn compress, after --")
    asked = parser.parse_args()
    print(
        "| method | parameters | zeros | perplexity before | perplexity after | tokens/s prefill | decode | compress s | CPU s | GiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, arguments in SUITES[asked.suite].items():
        if not asked.only or any(word in name for word in asked.only):
            print(_row(name, arguments, asked), flush=True)


def _row(name: str, arguments: list[str], asked: argparse.Namespace) -> str:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model"
        command = [sys.executable, "-m", "tinygn_dist.cli", "compress", "--model", asked.model, "--data", asked.data]
        command += ["--data.evaluation", asked.evaluation] if asked.evaluation else []
        command += ["--output", str(output), "--num-processes", str(asked.processes), *arguments, *asked.rest]
        start, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"| {name} | failed: {done.stderr.strip().splitlines()[-1]} |"
        cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
        report = json.loads((output / "tinygn_report.json").read_text())
    after, speed = report["after"], report["after"]["speed"]
    seconds = report["seconds"]["compress"]
    cpu_seconds = cpu.ru_utime + cpu.ru_stime - used.ru_utime - used.ru_stime
    return (
        f"| {name} | {after['num_params']:,} | {report['sparsity']['targeted_weights']:.1%} | "
        f"{report['before']['perplexity']:.2f} | {after['perplexity']:.2f} | "
        f"{speed.get('prefill_tokens_per_second', '')} | {speed.get('decode_tokens_per_second', '')} | {seconds:.0f} of "
        f"{time.monotonic() - start:.0f} | {cpu_seconds:.0f} | {max(report['peak_memory_gib']):.2f} |"
    )


if __name__ == "__main__":
    main()
