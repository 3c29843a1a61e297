"""One-shot pruning of weights, method by pattern: each row is one `tinygn compress` on two processes.

    python benchmarks/one_shot.py --data train.txt --evaluation dev.txt python benchmarks/one_shot.py --data train.txt
    --evaluation dev.txt --patterns 50% 2:4 --methods wanda obs --seeds 0 1 2 python benchmarks/one_shot.py ...
    --llm-compressor ../peer/bin/python

Figures come from the report that each run read back from disk. Seconds and CPU seconds are those of calibration and
solving, and of block reconstruction where a method asks for it; CPU seconds over all processes. With the Python of an
environment that has llm-compressor (`pip install llmcompressor`), its SparseGPT runs on the same tokens, with as many
threads as we have processes, and its model is measured on the same windows.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from job import Failed, report_of, told

from tinygn_dist.checkpoints import load
from tinygn_dist.config import DataConfig, ModelConfig
from tinygn_dist.data import splits as calibration
from tinygn_dist.models.objective import causal_lm

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
    "sparsegpt": [
        "--estimator",
        "finite-difference",
        "--prune.solver.refine",
        "0",
        "--prune.solver.allocation",
        "0",
        "--prune.solver.passes",
        "1",
    ],
    "sparsegpt owl": [
        "--estimator",
        "finite-difference",
        "--prune.solver.refine",
        "0",
        "--prune.solver.allocation",
        "owl",
        "--prune.solver.passes",
        "1",
    ],
    "obs forward-only": ["--estimator", "finite-difference"],
    "obs layer by layer": ["--prune.solver.gram_gib", "0"],
    "obs admm": ["--prune.solver.method", "admm"],
    "obs one pass": ["--prune.solver.passes", "1"],
    "obs reconstructed": ["--prune.solver.passes", "2", "--reconstruct.epochs", "2"],
    "obs": [],
}
PEER = "llm-compressor SparseGPT"
STAGES = ("prune", "reconstruct")
"""of a report, whose seconds are told"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="python-docs")
    parser.add_argument("--evaluation", help="a second dataset to evaluate on")
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="which calibration windows are drawn")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--llm-compressor", metavar="PYTHON", help="python of an environment that has it")
    parser.add_argument("rest", nargs="*", help="further arguments for tinygn compress, after --")
    asked = parser.parse_args()
    print("| method | pattern | seed | zeros | perplexity before | after | s | CPU s | peak GiB of a process |")
    print("|---|---|---|---|---|---|---|---|---|")
    methods = [*([PEER] if asked.llm_compressor else []), *asked.methods]
    for pattern, seed, method in itertools.product(asked.patterns, asked.seeds, methods):
        try:
            figures = _peer(pattern, seed, asked) if method == PEER else _ours(pattern, method, seed, asked)
        except Failed as failed:
            figures = f"failed: {failed}"
        print(f"| {method} | {pattern} | {seed} | {figures} |", flush=True)


def _ours(pattern: str, method: str, seed: int, asked: argparse.Namespace) -> str:
    fixed = ["--data.seed", str(seed), "--evaluate.latency", "false"]
    report = report_of(asked, [*PATTERNS[pattern], *METHODS[method], *fixed, *asked.rest])
    return _row(
        report["sparsity"]["targeted_weights"],
        report["before"]["perplexity"],
        report["after"]["perplexity"],
        *(sum(report[of].get(stage, 0.0) for stage in STAGES) for of in ("seconds", "cpu_seconds")),
        max(report["peak_memory_gib"]),
    )


def _peer(pattern: str, seed: int, asked: argparse.Namespace) -> str:
    model, processor = _dense(asked.model)
    splits = calibration.load_splits(
        DataConfig(name=asked.data, evaluation=asked.evaluation, seed=seed), calibration.Reader("causal-lm", processor)
    )
    with tempfile.TemporaryDirectory() as folder:
        dense, tokens, output = (Path(folder) / name for name in ("dense", "tokens.json", "pruned"))
        model.save_pretrained(dense)
        processor.save_pretrained(dense)
        tokens.write_text(json.dumps([row.tolist() for batch in splits.calibration for row in batch["input_ids"]]))
        script = Path(__file__).with_name("llm_compressor.py")
        command = [asked.llm_compressor, str(script), str(dense), str(tokens), str(output), pattern]
        environment = os.environ | {"OMP_NUM_THREADS": str(asked.processes), "HF_HUB_OFFLINE": "1"}
        told(done := subprocess.run(command, capture_output=True, text=True, check=False, env=environment))
        spent = json.loads(done.stdout.splitlines()[-1])
        pruned = load.load_model(load.find_model(ModelConfig(name=str(output))))
    weights = [p for name, p in pruned.named_parameters() if ".layers." in name and p.dim() == 2]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    before, after = (_perplexity(each, splits) for each in (model, pruned))
    return _row(zeros, before, after, spent["seconds"], spent["cpu_seconds"], spent["peak_gib"])


def _row(zeros: float, before: float, after: float, seconds: float, cpu_seconds: float, peak_gib: float) -> str:
    return f"{zeros:.1%} | {before:.2f} | {after:.2f} | {seconds:.0f} | {cpu_seconds:.0f} | {peak_gib:.2f}"


@functools.cache
def _dense(name: str) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    source = load.find_model(ModelConfig(name=name))
    return load.load_model(source), load.load_processor(source)


@torch.no_grad()
def _perplexity(model: Any, splits: calibration.Splits) -> float:
    losses = [causal_lm(model.eval(), batch) for batch in splits.evaluation]
    return math.exp(float(sum(one.total.sum() for one in losses)) / int(sum(one.count.sum() for one in losses)))


if __name__ == "__main__":
    main()
