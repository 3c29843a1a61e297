"""One value that says what happened, as JSON for machines, Markdown for the model card, a table for the terminal."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

REPORT_FILE = "tinygn_report.json"


@dataclass
class Report:
    """Every `after` figure is of the checkpoint re-read from disk."""

    model: str
    task: str
    output: str
    recipe: dict[str, Any]
    fingerprint: str
    num_processes: int
    before: dict[str, Any] = field(default_factory=dict)
    compressed: dict[str, Any] = field(default_factory=dict)
    """quality after compression, before recovery"""
    after: dict[str, Any] = field(default_factory=dict)
    sparsity: dict[str, Any] = field(default_factory=dict)
    selection: dict[str, Any] = field(default_factory=dict)
    """mask or unit fingerprint, kept counts, scores with standard errors, tried mixes"""
    earlier_selections: list[dict[str, Any]] = field(default_factory=list)
    """the selections before the last one, each by index in the model it was made of"""
    parameters: dict[str, Any] = field(default_factory=dict)
    """all parameters accounted for: pruned, kept and why"""
    latency: dict[str, Any] = field(default_factory=dict)
    """of a goal latency=...: the table of costs, and least seconds of the dense and of the smaller model"""
    reconstruction: dict[str, Any] = field(default_factory=dict)
    """of each layer, the relative error of its output on held-out sequences before and after"""
    recovery: dict[str, Any] = field(default_factory=dict)
    """of the last training"""
    quantization: dict[str, Any] = field(default_factory=dict)
    """scheme, fingerprint of codes and scales, and stored bits for each quantised weight"""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """a row for each step of the recipe that ran, in order"""
    data: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    """over all ranks"""
    peak_memory_gib: list[float] = field(default_factory=list)
    """per rank, resident"""
    peak_device_gib: list[float] = field(default_factory=list)
    """per rank, what torch held on its GPU; empty where there is none"""
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def add(self, step: str, facts: Mapping[str, Any]) -> None:
        """What a step found, by field. Fields hold the last step's; selections before it are kept, parameters add
        up."""
        if step == "prune" and self.selection and "selection" in facts:
            self.earlier_selections.append(self.selection)
        for name, value in facts.items():
            setattr(self, name, self.parameters | value if name == "parameters" else value)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, default=str)

    @classmethod
    def read(cls, folder: Path) -> Report:
        return cls(**json.loads((folder / REPORT_FILE).read_text(encoding="utf-8")))

    def rows(self) -> list[tuple[str, str, str]]:
        """(figure, before, after) as people read them."""
        rows = [
            ("parameters", f"{self.before['num_params']:,}", f"{self.after['num_params']:,}"),
            ("bytes on disk", f"{self.before['bytes']:,}", f"{self.after['bytes']:,}"),
        ]
        if self.sparsity.get("targeted_weights", 0) > 0.001:
            rows.append(("zeros in pruned weights", "", f"{self.sparsity['targeted_weights']:.2%}"))
        for key, name in (
            ("perplexity", "perplexity"),
            ("accuracy", "accuracy"),
            ("feature_distance", "feature distance"),
            ("embedding_similarity", "embedding similarity"),
        ):
            if key in self.after:
                if self.recovery:
                    rows.append((f"{name} before recovery", "", _number(self.compressed[key])))
                rows.append((name, _number(self.before[key]), _number(self.after[key])))
        for task, metrics in self.after.get("tasks", {}).items():
            for metric, value in metrics.items():
                if "_stderr" not in metric and metric != "sample_len":
                    rows.append((f"{task} {metric}", _number(self.before["tasks"][task][metric]), _number(value)))
        if "smaller_seconds" in self.latency:
            seconds = (f"{self.latency[f'{which}_seconds'] * 1e3:.4g}" for which in ("dense", "smaller"))
            rows.append((f"latency of {self.latency['timed']}, ms", *seconds))
        for key, name in (
            ("prefill_tokens_per_second", "prefill tokens/s"),
            ("decode_tokens_per_second", "decode tokens/s"),
            ("items_per_second", "items/s"),
        ):
            if key in self.after.get("speed", {}):
                rows.append((name, _number(self.before["speed"][key]), _number(self.after["speed"][key])))
        return rows

    def asked(self) -> str:
        """The steps of the recipe: of each pruning its pattern, and the goal or sparsity where it has one."""
        return ", then ".join(filter(None, map(_asked, self.recipe["steps"])))

    def print(self, console: Console | None = None) -> None:
        console = console or Console()
        table = Table(title=f"{self.model}: {self.asked()}")
        for heading in ("", "before", "after"):
            table.add_column(heading, justify="left" if not heading else "right")
        for row in self.rows():
            table.add_row(*row)
        console.print(table)
        for note in self.notes:
            console.print(f"note: {note}", soft_wrap=True)
        console.print(f"model:  {self.output}\nreport: {Path(self.output) / REPORT_FILE}", soft_wrap=True)

    def to_markdown(self) -> str:
        """The model card."""
        data = self.data
        table = "\n".join(f"| {name} | {before} | {after} |" for name, before, after in self.rows())
        notes = "".join(f"\n- {note}" for note in self.notes)
        recovery = f"{self.recovery['steps']} steps on {self.recovery['tokens']:,} tokens" if self.recovery else "none"
        front = f"---\nbase_model: {self.model}\ntags:\n- pruned\n- tinygn_dist\n---\n"
        return (
            f"{front}\n# {Path(self.output).name}\n\n`{self.model}` compressed with tinygn_dist: {self.asked()}.\n\n| "
            f"| before | after |\n|---|---|---|\n{table}\n\n- calibration: {data['calibration']['sequences']} "
            f"sequences of {data['calibration']['source']}\n- evaluation: {data['evaluation']['sequences']} "
            f"sequences, used for nothing else\n- recovery: {recovery}\n- selection fingerprint: "
            f"`{self.selection.get('fingerprint')}`, {self.num_processes} processes{notes}\n\nLoads with plain "
            "`from_pretrained`. Every figure was measured on the files in this folder; the full record is "
            f"`{REPORT_FILE}`.\n"
        )


def _asked(step: Mapping[str, Any]) -> str:
    prune, recover = step["prune"], step["recover"]
    if step.get("quantize"):
        return step["quantize"]["scheme"]
    if prune is None:
        return f"{recover['steps']} steps of recovery" if recover else "block reconstruction"
    amount = "" if ":" in prune["pattern"] else prune["goal"] or f"{prune['sparsity']:.0%}"
    return f"{prune['pattern']} {amount}".strip()


def versions() -> dict[str, str]:
    """Of everything that can change a figure."""
    found = {"python": platform.python_version()}
    for package in ("tinygn-dist", "torch", "accelerate", "transformers", "datasets", "deepspeed", "lm_eval"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _number(value: float) -> str:
    return f"{value:,.2f}" if value >= 10 else f"{value:.4g}"
