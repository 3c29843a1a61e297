"""Physically smaller models of equal size by several ways: perplexity before and after a fixed recovery budget, parameters,
bytes, speed. Prints one Markdown table.

    python benchmarks/structured.py --data train.txt --evaluation dev.txt --recover-steps 30
    python benchmarks/structured.py --data train.txt --evaluation dev.txt --only taylor --peers   # needs torch-pruning

Rows of this package are `tinygn compress` runs; their figures come from the report, which was read back from disk. Rows of
Torch-Pruning (`--peers`, pip install torch-pruning) prune the same model to the same number of channels on the same
calibration windows, without recovery, and are evaluated on the same windows.
"""

from __future__ import annotations

import argparse
import resource
from typing import Any

import torch
from job import Failed, report_of

from tinygn_dist import calibration, load
from tinygn_dist.anatomy import read_anatomy
from tinygn_dist.backends import make_backend
from tinygn_dist.config import DataConfig, DistributedConfig, EvaluateConfig, ModelConfig, PruneConfig
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
HEAD = "| fewer decoder parameters | method | parameters | MB | perplexity | after recovery | prefill tokens/s | decode | CPU s |"


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
    asked = parser.parse_args()
    print(HEAD + "\n|" + "---|" * 9)
    for fraction in asked.fractions:
        rows = {name: lambda f=fraction, a=arguments: _ours(f, a, asked) for name, arguments in OURS.items()}
        if asked.peers:
            rows |= {name: lambda f=fraction, i=importance: _peer(f, i, asked) for name, importance in PEERS.items()}
        for name, row in rows.items():
            if not asked.only or any(word in name for word in asked.only):
                print(f"| {fraction:.0%} | {name} | {row()} |", flush=True)


def _ours(fraction: float, arguments: list[str], asked: argparse.Namespace) -> str:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    sizes = ["--data.num_samples", str(asked.samples), "--sparsity", str(fraction)]
    try:
        report = report_of(asked, [*sizes, "--recover-steps", str(asked.recover_steps), *arguments])
    except Failed as failed:
        return f"failed: {failed}"
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
    after, compressed = report["after"], report["compressed"] or report["after"]
    return _cells(
        {
            **after,
            "perplexity": compressed["perplexity"],
            "recovered": after["perplexity"] if asked.recover_steps else None,
            "cpu": cpu.ru_utime + cpu.ru_stime - used.ru_utime - used.ru_stime,
        }
    )


def _peer(fraction: float, importance: str, asked: argparse.Namespace) -> str:
    """FFN channels by Torch-Pruning, one width for all layers, as many as ours removes."""
    import torch_pruning  # only these rows need it

    used = resource.getrusage(resource.RUSAGE_SELF)
    source = load.find_model(ModelConfig(name=asked.model))
    model, processor, backend = load.load_model(source), load.load_processor(source), make_backend(DistributedConfig())
    anatomy = read_anatomy(model, needs_units=True)
    data = DataConfig(name=asked.data, evaluation=asked.evaluation, num_samples=asked.samples)
    splits = calibration.load_splits(data, source.task, processor, 0)
    gone = plan_mixes(anatomy, PruneConfig(pattern="channels", sparsity=fraction))[0].channels
    width = anatomy.of_kind("channels")[0].num_units
    example = splits.calibration[0]["input_ids"]
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
        for batch in splits.calibration[:8]:
            objective_of(source.task)(model, batch).mean().backward()
    pruner.step()
    model.zero_grad()
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    setting = Setting(model, anatomy, objective_of(source.task), splits.evaluation, backend, Progress(shown=False))
    parameters = list(model.parameters())
    return _cells(
        {
            **quality(setting, source.task, "evaluating"),
            "num_params": sum(p.numel() for p in parameters),
            "bytes": sum(p.numel() * p.element_size() for p in parameters),
            "speed": speed(model, source.task, splits.evaluation[0], EvaluateConfig(), backend),
            "recovered": None,
            "cpu": cpu.ru_utime + cpu.ru_stime - used.ru_utime - used.ru_stime,
        }
    )


def _cells(row: dict[str, Any]) -> str:
    recovered = "" if row["recovered"] is None else f"{row['recovered']:.2f}"
    return (
        f"{row['num_params'] / 1e6:.1f}M | {row['bytes'] / 1e6:.0f} | {row['perplexity']:.2f} | {recovered} | "
        f"{row['speed']['prefill_tokens_per_second']} | {row['speed']['decode_tokens_per_second']} | {row['cpu']:.0f}"
    )


if __name__ == "__main__":
    main()
