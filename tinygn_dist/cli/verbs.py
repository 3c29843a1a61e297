"""The verbs that only look: `inspect` (structure, no weights) and `evaluate` (quality, size, speed)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tinygn_dist.backends import make_backend
from tinygn_dist.checkpoints import load
from tinygn_dist.checkpoints.sharded_load import placed
from tinygn_dist.config import DataConfig, DistributedConfig, EvaluateConfig, ModelConfig, make
from tinygn_dist.data import splits as calibration
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.evaluate.engines import verdicts
from tinygn_dist.evaluate.quality import quality, speed
from tinygn_dist.maths.unit_kinds import UNIT_KINDS
from tinygn_dist.models.anatomy import Anatomy, UnitGroup, read_anatomy
from tinygn_dist.models.families import family_of
from tinygn_dist.models.objective import decoder_start, needs_reference, objective_of
from tinygn_dist.run.report import REPORT_FILE, Report
from tinygn_dist.runtime.progress import Progress


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
        "matrices": {},
    }
    if family and anatomy.num_layers:
        facts["units"]["layers"] = {
            "count": anatomy.num_layers,
            "params_each": max(anatomy.layer_params),
            "removable": True,
        }
    if family:
        for kind in UNIT_KINDS:
            groups = (anatomy.hidden,) if kind == "hidden" and anatomy.hidden else anatomy.of_kind(kind)
            if groups:
                counts = [group.num_units for group in groups]
                facts["units"][kind] = {
                    "count": min(counts),
                    "params_each": groups[0].unit_params,
                    "removable": True,
                    "share": sum(g.num_units * g.unit_params for g in groups) / total,
                }
                if max(counts) > min(counts):
                    facts["units"][kind]["most"] = max(counts)
                if note := _note(kind, anatomy, groups):
                    facts["units"][kind]["note"] = note
            elif kind in anatomy.fixed:
                facts["units"][kind] = {"removable": False, "why": anatomy.fixed[kind]}
    for matrix in anatomy.matrices:
        kind = matrix.parameter.removesuffix(".weight").rpartition(".")[2]
        shape = f"{matrix.shape[0]}x{matrix.shape[1]}"
        entry = facts["matrices"].setdefault(
            f"{kind} {shape}", {"count": 0, "share": 0.0, "multiple_of_4_inputs": matrix.shape[1] % 4 == 0}
        )
        entry["count"] += 1
        entry["share"] += matrix.numel / total
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        _print_inspection(facts)
    return 0


def _note(kind: str, anatomy: Anatomy, groups: Sequence[UnitGroup]) -> str:
    told = []
    if kind == "channels" and len(groups) < anatomy.num_layers:
        told.append(f"in {len(groups)} of {anatomy.num_layers} layers")
    if kind == "filters" or kind == "channels" and any(ffn.uneven for ffn in anatomy.family.feed_forwards):
        told.append("layers may differ (prune.uneven)")
    return "; ".join(told)


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
            least, most = unit["count"], unit.get("most", unit["count"])
            count = str(least) if least == most else f"{least} to {most}"
            units.add_row(name, count, f"{unit['params_each']:,}", unit.get("note", ""))
        else:
            units.add_row(name, "-", "-", f"no: {unit['why']}")
    if facts["units"]:
        console.print(units)
    else:
        console.print("no unit of this family can be removed; its weights can be masked")
    matrices = Table("weight", "count", "share of parameters", "2:4", title="can be masked")
    for name, entry in facts["matrices"].items():
        matrices.add_row(
            name, str(entry["count"]), f"{entry['share']:.1%}", "yes" if entry["multiple_of_4_inputs"] else "no"
        )
    console.print(matrices)
    rest = 1 - sum(entry["share"] for entry in facts["matrices"].values())
    console.print(f"kept dense: {rest:.1%} (embeddings, norms, biases, heads)")
    for name, other in facts["tied"]:
        console.print(f"tied: {name} = {other}", soft_wrap=True)


def evaluate(arguments: argparse.Namespace) -> int:
    """Quality on held-out text, size and speed of any checkpoint, on the same rows as its report where it has one."""
    backend = make_backend(DistributedConfig())
    options = _model(arguments)
    recipe = _recipe(Path(arguments.model))
    asked = dict(recipe.get("data", {}))
    if arguments.data:
        asked |= {"name": arguments.data, "evaluation": arguments.data, "column": None}
    asked |= {k: v for k, v in (("eval_samples", arguments.samples), ("seq_len", arguments.seq_len)) if v is not None}
    data = make(DataConfig, asked)
    if data.name == "self":
        raise UserError("the model was evaluated on text it wrote itself; name a dataset with --data")
    source = load.find_model(options)
    if source.task == "feature-extraction":
        raise UserError(
            f"{arguments.model} has no head whose quality could be measured alone; its report has the distance "
            "to the dense model's features"
        )
    processor = load.load_processor(source)
    anatomy = read_anatomy(load.skeleton(source), needs_units=False)
    trainings = [step["recover"] for step in recipe.get("steps", ()) if step["recover"]]
    train_len = trainings[0]["seq_len"] if trainings else 0
    splits = calibration.load_splits(data, calibration.Reader(source.task, processor, source.config), train_len)
    if needs_reference(source.task, splits.evaluation):
        raise UserError(
            f"data {data.name} has no labels, and without them only a distance to the dense model's scores could be "
            "measured; name data with a label column"
        )
    model, _ = placed(source, backend)
    figures: dict[str, Any] = {
        "num_params": anatomy.total_params,
        "bytes": sum(file.stat().st_size for file in Path(source.path).glob(source.gguf_file or "*.safetensors"))
        if Path(source.path).is_dir()
        else None,
    }
    progress = Progress(shown=backend.is_main)
    problem = Problem(model, anatomy, objective_of(source.task), splits.evaluation, backend, progress)
    figures |= quality(problem, source.task, "evaluating")
    if not arguments.no_latency:
        figures |= speed(
            model, source.task, splits.evaluation[0], EvaluateConfig(**recipe.get("evaluate", {})), backend
        )
    figures["evaluation"] = splits.used["evaluation"]
    if backend.is_main:
        _print_figures(figures, arguments.json)
    backend.close()
    return 0


def servable(arguments: argparse.Namespace) -> int:
    """Which engines take a checkpoint, and why not."""
    source = load.find_model(_model(arguments))
    model, processor = load.load_model(source), load.load_processor(source)
    if source.task == "image-classification":
        inputs = processor(images=torch.zeros(3, 64, 64, dtype=torch.uint8), return_tensors="pt")
    else:
        inputs = processor(["Which engines will take this model, and which will not?"], return_tensors="pt")
    accepted = signature(model.forward).parameters
    tensors = {name: value for name, value in inputs.items() if name in accepted}
    if source.task == "seq2seq-lm":
        tensors["decoder_input_ids"] = torch.full((1, 2), decoder_start(source.config))
    found = verdicts(model, source.task, read_anatomy(model, needs_units=False), tensors, source.path)
    if arguments.json:
        print(json.dumps([verdict._asdict() for verdict in found], indent=2))
        return 0
    table = Table("engine", "takes it", "why")
    for verdict in found:
        table.add_row(verdict.engine, {True: "yes", False: "no", None: "not tried"}[verdict.takes], verdict.why)
    Console().print(table)
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


def _recipe(folder: Path) -> dict[str, Any]:
    """What the report in a folder was made with; nothing where there is none."""
    if not (folder / REPORT_FILE).is_file():
        return {}
    try:
        return Report.read(folder).recipe
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{folder / REPORT_FILE} cannot be read ({error}); delete it and name the dataset with --data"
        ) from None


def _model(arguments: argparse.Namespace) -> ModelConfig:
    asked = {key: getattr(arguments, key) for key in ("revision", "task", "trust_remote_code")}
    return make(ModelConfig, asked | {"name": arguments.model, "dtype": getattr(arguments, "dtype", "auto")})
