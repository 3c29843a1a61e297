"""The verbs that only look: `inspect` (structure, no weights) and `evaluate` (quality, size, speed)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tinygn_dist import calibration, load
from tinygn_dist.anatomy import read_anatomy
from tinygn_dist.backends import make_backend
from tinygn_dist.config import UNIT_KINDS, DataConfig, DistributedConfig, EvaluateConfig, ModelConfig
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.setting import Setting
from tinygn_dist.evaluate import quality, speed
from tinygn_dist.families import family_of
from tinygn_dist.objective import objective_of
from tinygn_dist.progress import Progress
from tinygn_dist.report import REPORT_FILE, Report


def inspect(arguments: argparse.Namespace) -> int:
    """What can be removed from a model: built on the meta device, no weights are read."""
    source = load.find_model(_model(arguments))
    skeleton = load.skeleton(source)
    family = family_of(source.config.model_type)
    anatomy = read_anatomy(skeleton, needs_units=False)
    total = anatomy.total_params
    facts: dict[str, Any] = {
        "model": arguments.model,
        "model_type": source.config.model_type,
        "task": source.task,
        "num_params": total,
        "in_layers": sum(anatomy.layer_params),
        "tied": [list(pair) for pair in anatomy.tied],
        "units": {},
        "targets": {},
    }
    if family:
        facts["units"]["layers"] = {
            "count": anatomy.num_layers,
            "params_each": max(anatomy.layer_params),
            "removable": True,
        }
        for kind in UNIT_KINDS:
            groups = anatomy.of_kind(kind)
            if groups:
                facts["units"][kind] = {
                    "count": groups[0].num_units,
                    "params_each": groups[0].unit_params,
                    "removable": True,
                    "share": sum(g.num_units * g.unit_params for g in groups) / total,
                }
            elif kind in anatomy.fixed:
                facts["units"][kind] = {"removable": False, "why": anatomy.fixed[kind]}
    for target in anatomy.targets:
        kind = target.parameter.removesuffix(".weight").rpartition(".")[2]
        shape = f"{target.shape[0]}x{target.shape[1]}"
        entry = facts["targets"].setdefault(
            f"{kind} {shape}", {"count": 0, "share": 0.0, "multiple_of_4_inputs": target.shape[1] % 4 == 0}
        )
        entry["count"] += 1
        entry["share"] += target.numel / total
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        _print_inspection(facts)
    return 0


def _print_inspection(facts: dict[str, Any]) -> None:
    console = Console()
    console.print(
        f"{facts['model']}: {facts['model_type']}, {facts['task']}, {facts['num_params']:,} parameters, "
        f"{facts['in_layers'] / facts['num_params']:.1%} in its layers",
        soft_wrap=True,
    )
    units = Table("unit", "count", "parameters each", "note", title="can be removed whole")
    for kind, unit in facts["units"].items():
        name = {"heads": "heads (KV groups, per layer)", "layers": "layers"}.get(kind, f"{kind} (per layer)")
        if unit["removable"]:
            units.add_row(name, str(unit["count"]), f"{unit['params_each']:,}", "")
        else:
            units.add_row(name, "-", "-", f"no: {unit['why']}")
    if facts["units"]:
        console.print(units)
    else:
        console.print("no unit of this family can be removed; its weights can be masked")
    targets = Table("weight", "count", "share of parameters", "2:4", title="can be masked")
    for name, entry in facts["targets"].items():
        targets.add_row(
            name, str(entry["count"]), f"{entry['share']:.1%}", "yes" if entry["multiple_of_4_inputs"] else "no"
        )
    console.print(targets)
    rest = 1 - sum(entry["share"] for entry in facts["targets"].values())
    console.print(f"kept dense: {rest:.1%} (embeddings, norms, biases, heads)")
    for name, other in facts["tied"]:
        console.print(f"tied: {name} = {other}", soft_wrap=True)


def evaluate(arguments: argparse.Namespace) -> int:
    """Quality on held-out text, size and speed of any checkpoint, on the same rows as its report where it has one."""
    backend = make_backend(DistributedConfig())
    options = _model(arguments)
    report = Report.read(Path(arguments.model)) if (Path(arguments.model) / REPORT_FILE).is_file() else None
    recipe = report.recipe if report else {}
    data = DataConfig(**recipe.get("data", {}))
    if arguments.data:
        data = data.model_copy(update={"name": arguments.data, "evaluation": arguments.data, "column": None})
    if data.name == "self":
        raise UserError("the model was evaluated on text it wrote itself; name a dataset with --data")
    data = data.model_copy(
        update={k: v for k, v in (("eval_samples", arguments.samples), ("seq_len", arguments.seq_len)) if v}
    )
    source = load.find_model(options)
    if source.task == "feature-extraction":
        raise UserError(
            f"{arguments.model} has no head whose quality could be measured alone; its report has the distance "
            "to the dense model's features"
        )
    model, processor = load.load_model(source), load.load_processor(source)
    model = backend.prepare(model)
    train_len = recipe.get("recover", {}).get("seq_len", 0) if recipe.get("recover", {}).get("steps") else 0
    splits = calibration.load_splits(data, source.task, processor, train_len)
    figures: dict[str, Any] = {
        "num_params": sum(p.numel() for p in model.parameters()),
        "bytes": sum(file.stat().st_size for file in Path(source.path).glob(source.gguf_file or "*.safetensors"))
        if Path(source.path).is_dir()
        else None,
    }
    progress = Progress(shown=backend.is_main)
    anatomy = read_anatomy(model, needs_units=False)
    setting = Setting(model, anatomy, objective_of(source.task), splits.evaluation, backend, progress)
    figures |= quality(setting, source.task, "evaluating")
    if not arguments.no_latency:
        figures |= speed(
            model, source.task, splits.evaluation[0], EvaluateConfig(**recipe.get("evaluate", {})), backend
        )
    figures["evaluation"] = splits.used["evaluation"]
    if backend.is_main:
        _print_figures(figures, arguments.json)
    backend.close()
    return 0


def _print_figures(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    table = Table("figure", "value")
    for name, value in figures.items():
        if not isinstance(value, dict):
            table.add_row(
                name.replace("_", " "),
                f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value),
            )
    console = Console()
    console.print(table)
    told = figures["evaluation"]
    console.print(f"on {told['sequences']} sequences of {told.get('source', 'the dataset')}", soft_wrap=True)


def _model(arguments: argparse.Namespace) -> ModelConfig:
    return ModelConfig(
        name=arguments.model,
        revision=arguments.revision,
        task=arguments.task,
        trust_remote_code=arguments.trust_remote_code,
        dtype=getattr(arguments, "dtype", "auto"),
    )
