"""Physically smaller models of equal size by several ways: perplexity before and after a fixed recovery budget, parameters,
bytes, speed. Prints one Markdown table.

    python benchmarks/structured.py --data train.txt --evaluation dev.txt --recover-steps 30 --table rows.md
    python benchmarks/structured.py --data train.txt --evaluation dev.txt --fractions 0.15 --peers --only Torch channels

Rows of this package are `tinygn compress` runs; their figures come from the report, which was read back from disk. Rows of
Torch-Pruning (`--peers`, pip install torch-pruning) prune the same model to the same number of channels on the same
calibration windows, without recovery, and are evaluated on the same windows by one process that has as many threads as
ours have processes. With `--table` each row is appended to a file as soon as it is known, and a later call leaves out the
rows that it holds.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from job import Failed, report_of

from tinygn_dist import calibration, load
from tinygn_dist.anatomy import read_anatomy
from tinygn_dist.backends import make_backend
from tinygn_dist.config import DataConfig, DistributedConfig, EvaluateConfig, ModelConfig, load_config
from tinygn_dist.estimate.setting import Setting
from tinygn_dist.evaluate import quality, speed
from tinygn_dist.objective import objective_of
from tinygn_dist.progress import Progress
from tinygn_dist.units import plan_mixes

OURS = {  # row -> arguments of `tinygn compress`
    "channels, re-fitted": ["--pattern", "channels"],
    "units, best mix": ["--pattern", "units"],
    "units, magnitude": ["--pattern", "units", "--criterion", "magnitude"],
    "units, random": ["--pattern", "units", "--criterion", "random"],
    "layers by block influence (ShortGPT)": ["--pattern", "layers", "--criterion", "activation"],
}
PEERS = {"Torch-Pruning Taylor": "GroupTaylorImportance", "Torch-Pruning magnitude": "GroupMagnitudeImportance"}
HEAD = (
    "| fewer decoder parameters | method | parameters | MB | perplexity | after recovery | prefill tokens/s | decode | s | CPU s |"
    "\n|" + "---|" * 10
)
TAYLOR_SAMPLES = 16
"""calibration windows whose gradients Torch-Pruning sums"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="python-docs")
    parser.add_argument("--evaluation", help="a second dataset to evaluate on")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 512 tokens")
    parser.add_argument("--fractions", type=float, nargs="*", default=[0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--recover-steps", type=int, default=30, help="steps of 4 x 256 tokens; 0 for none")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[], help="rows whose name holds one of these words")
    parser.add_argument("--peers", action="store_true", help="also the rows of Torch-Pruning")
    parser.add_argument("--table", type=Path, help="file that finished rows are appended to")
    parser.epilog = "What follows -- are further arguments for tinygn compress, as --section.key value."
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    asked = parser.parse_args(words[:cut], argparse.Namespace(rest=words[cut + 1 :]))
    there = asked.table.read_text(encoding="utf-8") if asked.table and asked.table.exists() else ""
    if not there:
        _say(HEAD, asked)
    for fraction in asked.fractions:
        for name in (*OURS, *(PEERS if asked.peers else ())):
            label = f"| {fraction:.1%} | {name} |"
            if label in there or asked.only and not any(word in name for word in asked.only):
                continue
            try:
                cells = _ours(fraction, OURS[name], asked) if name in OURS else _peer(fraction, PEERS[name], asked)
            except Failed as failed:
                print(f"{label} failed: {failed}", flush=True)
            else:
                _say(f"{label} {cells} |", asked)


def _say(text: str, asked: argparse.Namespace) -> None:
    print(text, flush=True)
    if asked.table:
        with asked.table.open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")


def _ours(fraction: float, arguments: list[str], asked: argparse.Namespace) -> str:
    used = _cpu_seconds(resource.RUSAGE_CHILDREN)
    sizes = ["--data.num_samples", str(asked.samples), "--sparsity", str(fraction)]
    report = report_of(asked, [*sizes, "--recover-steps", str(asked.recover_steps), *arguments, *asked.rest])
    after, compressed = report["after"], report["compressed"] or report["after"]
    return _cells(
        {
            **after,
            "perplexity": compressed["perplexity"],
            "recovered": after["perplexity"] if asked.recover_steps else None,
            "seconds": report["seconds"]["compress"],
            "cpu": _cpu_seconds(resource.RUSAGE_CHILDREN) - used,
        }
    )


def _cpu_seconds(of: int) -> float:
    used = resource.getrusage(of)
    return used.ru_utime + used.ru_stime


def _peer(fraction: float, importance: str, asked: argparse.Namespace) -> str:
    """FFN channels by Torch-Pruning, one width for all layers, as many as ours removes."""
    import torch_pruning  # only these rows need it

    torch.set_num_threads(asked.processes * int(os.environ.get("OMP_NUM_THREADS", "1")))
    used = _cpu_seconds(resource.RUSAGE_SELF)
    source = load.find_model(ModelConfig(name=asked.model))
    model, processor, backend = load.load_model(source), load.load_processor(source), make_backend(DistributedConfig())
    anatomy = read_anatomy(model, needs_units=True)
    data = DataConfig(name=asked.data, evaluation=asked.evaluation, num_samples=asked.samples)
    splits = calibration.load_splits(data, source.task, processor, 0)
    options = load_config(None, _overrides(asked.rest) | {"model.name": asked.model, "prune.sparsity": fraction}).prune
    gone = plan_mixes(anatomy, options.model_copy(update={"pattern": "channels"}))[0].channels
    width = anatomy.of_kind("channels")[0].num_units
    start, example = time.monotonic(), splits.calibration[0]["input_ids"]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        {"input_ids": example, "use_cache": False},
        importance=getattr(torch_pruning.importance, importance)(),
        pruning_ratio_dict={layer.mlp.gate_proj: gone / width for layer in model.model.layers},
        pruning_ratio=0.0,
        ignored_layers=[m for layer in model.model.layers for m in layer.self_attn.modules()] + [model.lm_head],
        root_module_types=[torch.nn.Linear],
        output_transform=lambda out: out.logits,
    )
    if importance == "GroupTaylorImportance":
        for batch in splits.calibration[:TAYLOR_SAMPLES]:
            objective_of(source.task)(model, batch).mean().backward()
    pruner.step()
    model.zero_grad()
    seconds = time.monotonic() - start
    setting = Setting(model, anatomy, objective_of(source.task), splits.evaluation, backend, Progress(shown=False))
    parameters = list(model.parameters())
    return _cells(
        {
            **quality(setting, source.task, "evaluating"),
            "num_params": sum(p.numel() for p in parameters),
            "bytes": sum(p.numel() * p.element_size() for p in parameters),
            "speed": speed(model, source.task, splits.evaluation[0], EvaluateConfig(), backend),
            "recovered": None,
            "seconds": seconds,
            "cpu": _cpu_seconds(resource.RUSAGE_SELF) - used,
        }
    )


def _overrides(rest: list[str]) -> dict[str, str]:
    """`--section.key value` pairs as `load_config` takes them."""
    return {key.removeprefix("--"): value for key, value in zip(rest[::2], rest[1::2], strict=True)}


def _cells(row: dict[str, Any]) -> str:
    recovered = "" if row["recovered"] is None else f"{row['recovered']:.2f}"
    return (
        f"{row['num_params'] / 1e6:.1f}M | {row['bytes'] / 1e6:.0f} | {row['perplexity']:.2f} | {recovered} | "
        f"{row['speed']['prefill_tokens_per_second']} | {row['speed']['decode_tokens_per_second']} | {row['seconds']:.0f} | {row['cpu']:.0f}"
    )


if __name__ == "__main__":
    main()
