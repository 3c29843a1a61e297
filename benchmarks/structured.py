"""Physically smaller models of equal size by several ways: perplexity before and after a fixed recovery budget,
parameters, bytes, speed, beside Torch-Pruning (pip install torch-pruning) and layers removed by block influence, as
ShortGPT does.

    python benchmarks/structured.py --data train.txt --evaluation dev.txt --table rows.md python
    benchmarks/structured.py --data train.txt --evaluation dev.txt --fractions 0.15 --recover-steps 0 --only channels

Every row is one `tinygn compress` on the same calibration and evaluation windows; its figures come from the report,
which was read back from disk. Torch-Pruning prunes the same model to the same number of channels on the same
calibration windows and saves it; that folder is then measured and trained by the same command, with nothing more
removed, and so is the dense model. No row distils, so that all are trained alike. With `--table` each row is appended
to a file as soon as it is known, and a later call leaves out the rows that it holds. `seconds` are of choosing and
re-fitting alone.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from job import Failed, report_of
from table import Table

from tinygn_dist.checkpoints import load
from tinygn_dist.config import DataConfig, ModelConfig, load_config
from tinygn_dist.data import splits as calibration
from tinygn_dist.models.anatomy import read_anatomy
from tinygn_dist.models.objective import objective_of
from tinygn_dist.prune.structured.layers_heads_channels import LayersHeadsChannels
from tinygn_dist.prune.structured.removal import UnitGoal

OURS = {  # row -> arguments of `tinygn compress`
    "channels": ["--pattern", "channels"],
    "units, best mix": ["--pattern", "units"],
    "layers, absorbed": ["--pattern", "layers"],
    "layers by block influence (ShortGPT)": ["--pattern", "layers", "--criterion", "activation"]
    + ["--prune.compensate", "false"],
}
PEERS = {"Torch-Pruning Taylor": "GroupTaylorImportance", "Torch-Pruning magnitude": "GroupMagnitudeImportance"}
AS_IT_IS = ["--pattern", "unstructured", "--sparsity", "0", "--criterion", "magnitude"]
HEAD = (
    "| fewer decoder parameters | method | parameters | MB | perplexity | after recovery | prefill tokens/s | decode "
    "tokens/s | seconds |\n|" + "---|" * 9
)
TAYLOR_SAMPLES = 16
"""calibration windows whose gradients Torch-Pruning sums"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="python-docs")
    parser.add_argument("--evaluation", help="a second dataset to evaluate on")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows of 512 tokens")
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows of 512 tokens")
    parser.add_argument("--fractions", type=float, nargs="*", default=[0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--recover-steps", type=int, default=30, help="steps of 4 x 256 tokens; 0 for none")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[], help="rows whose name holds one of these words")
    parser.add_argument("--table", type=Path, help="file that finished rows are appended to")
    parser.epilog = "What follows -- are further arguments for tinygn compress, as --section.key value."
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    asked = parser.parse_args(words[:cut], argparse.Namespace(rest=words[cut + 1 :]))
    table = Table(asked.table, _told(asked), HEAD, name_cells=2)
    for fraction, name in rows(asked.fractions, asked.only):
        if table.has(f"{fraction:.1%}", name):
            continue
        try:
            table.add(f"{fraction:.1%}", name, *_figures(fraction, name, asked))
        except Failed as failed:
            print(f"{fraction:.1%} {name} failed: {failed}", flush=True)


def rows(fractions: list[float], words: list[str]) -> Iterator[tuple[float, str]]:
    """Fraction and name of every row whose name holds one of the words; of all without any. The dense model comes
    first."""
    for fraction, name in [(0.0, "dense"), *((fraction, name) for fraction in fractions for name in (*OURS, *PEERS))]:
        if not words or any(word in name for word in words):
            yield fraction, name


def _told(asked: argparse.Namespace) -> str:
    told = (
        f"{asked.model}: {asked.samples} calibration and {asked.windows} evaluation windows of 512 tokens, recovery of "
        f"{asked.recover_steps} steps of 4 x 256 tokens, {asked.processes} processes"
    )
    return f"{told}; {' '.join(asked.rest)}" if asked.rest else told


def _figures(fraction: float, name: str, asked: argparse.Namespace) -> list[str]:
    if name in OURS:
        report = _compressed(asked, ["--sparsity", str(fraction), *OURS[name]])
        return _cells(report, report["seconds"]["prune"])
    if name == "dense":
        return _cells(_compressed(asked, AS_IT_IS), None)
    with tempfile.TemporaryDirectory() as folder:
        seconds = _prune_by_peer(fraction, PEERS[name], asked, folder)
        asked = argparse.Namespace(**vars(asked) | {"model": folder, "rest": []})
        return _cells(_compressed(asked, AS_IT_IS), seconds)


def _compressed(asked: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    sizes = ["--data.num_samples", str(asked.samples), "--data.eval_samples", str(asked.windows)]
    recovery = ["--recover-steps", str(asked.recover_steps), "--recover.distill", "0"]
    return report_of(asked, [*sizes, *recovery, *arguments, *asked.rest])


def _prune_by_peer(fraction: float, importance: str, asked: argparse.Namespace, folder: str) -> float:
    """FFN channels by Torch-Pruning, one width for all layers, as many as ours removes, saved in `folder`. Returns
    seconds."""
    import torch_pruning  # only these rows need it

    torch.set_num_threads(asked.processes * int(os.environ.get("OMP_NUM_THREADS", "1")))
    source = load.find_model(ModelConfig(name=asked.model))
    model, processor = load.load_model(source), load.load_processor(source)
    anatomy = read_anatomy(model, needs_units=True)
    data = DataConfig(name=asked.data, evaluation=asked.evaluation, num_samples=asked.samples)
    splits = calibration.load_splits(data, calibration.Reader(source.task, processor, source.config))
    given = dict(zip(asked.rest[::2], asked.rest[1::2], strict=True))
    given = {key.removeprefix("--"): value for key, value in given.items()}
    given |= {"model.name": asked.model, "prune.sparsity": fraction, "prune.pattern": "channels"}
    plan = LayersHeadsChannels().plan(anatomy, load_config(None, given).prune, UnitGoal(fraction))
    gone = plan.mixes[0].channels
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
    seconds = time.monotonic() - start
    model.config.intermediate_size = model.model.layers[0].mlp.down_proj.in_features
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return seconds


def _cells(report: dict[str, Any], seconds: float | None) -> list[str]:
    after, speed = report["after"], report["after"]["speed"]
    compressed, trained = report["compressed"] or after, bool(report["compressed"])
    return [
        f"{after['num_params'] / 1e6:.1f}M",
        f"{after['bytes'] / 1e6:.0f}",
        f"{compressed['perplexity']:.2f}",
        f"{after['perplexity']:.2f}" if trained else "",
        f"{speed['prefill_tokens_per_second']}",
        f"{speed['decode_tokens_per_second']}",
        "" if seconds is None else f"{seconds:.0f}",
    ]


if __name__ == "__main__":
    main()
