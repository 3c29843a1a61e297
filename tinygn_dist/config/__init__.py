"""What can be asked for? Frozen pydantic models, every range checked once, before anything loads.

A recipe (YAML) has the same shape as `Config`; every key can be overridden as `--section.key value` on the command
line. The docstring under a field is its help text.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import model_validator

from tinygn_dist.config.checkpoint import CheckpointConfig
from tinygn_dist.config.prune import NM, UNIT_CRITERIA, UNIT_KINDS, WEIGHT_CRITERIA, PruneConfig
from tinygn_dist.config.recover import RecoverConfig
from tinygn_dist.config.run import DataConfig, DistributedConfig, EvaluateConfig, ModelConfig, OutputConfig
from tinygn_dist.config.schedule import ScheduleConfig
from tinygn_dist.config.section import Section, make
from tinygn_dist.config.solver import DEFAULT_SHARE, SolverConfig
from tinygn_dist.errors import UserError

__all__ = [
    "DEFAULT_SHARE",
    "NM",
    "UNIT_CRITERIA",
    "UNIT_KINDS",
    "WEIGHT_CRITERIA",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DistributedConfig",
    "EvaluateConfig",
    "ModelConfig",
    "OutputConfig",
    "PruneConfig",
    "RecoverConfig",
    "ScheduleConfig",
    "Section",
    "SolverConfig",
    "load_config",
    "make",
]


class Config(Section):
    model: ModelConfig
    data: DataConfig = DataConfig()
    prune: PruneConfig = PruneConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    recover: RecoverConfig = RecoverConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    output: OutputConfig = OutputConfig()
    distributed: DistributedConfig = DistributedConfig()

    @model_validator(mode="after")
    def _schedule_fits(self) -> Config:
        prune, schedule = self.prune, self.schedule
        if schedule.regrow != "none" and prune.pattern != "unstructured":
            raise ValueError(
                f"schedule.regrow {schedule.regrow!r} with pattern {prune.pattern!r}, accepted: pattern unstructured"
            )
        if prune.unit_kinds and schedule.criterion != "auto":
            raise ValueError(
                f"schedule.criterion {schedule.criterion!r} scores weights and pattern {prune.pattern!r} removes units; use "
                "prune.criterion"
            )
        if prune.unit_kinds and schedule.kind == "admm":
            raise ValueError(
                f"schedule.kind admm zeroes weights and pattern {prune.pattern!r} removes units; use iterative"
            )
        if prune.unit_kinds and prune.counts is not None and schedule.kind != "one-shot":
            raise ValueError("prune.counts fixes what goes, so it cannot go by a schedule; use prune.sparsity")
        if prune.asks_latency and (schedule.kind != "one-shot" or self.distributed.offload != "none"):
            raise ValueError(
                f"prune.goal {prune.goal} with schedule.kind {schedule.kind} and distributed.offload "
                f"{self.distributed.offload}, accepted: one-shot and none; use params="
            )
        batches = -(-self.data.num_samples // self.data.micro_batch)
        for asked, needed in (
            (f"solver.allocation {prune.solver.allocation}", prune.fewest_micro_batches),
            (f"reconstruct {prune.reconstruct}", 2 if prune.reconstruct else 1),
        ):
            if batches < needed:
                raise ValueError(
                    f"prune.{asked} with {batches} micro-batches of calibration data, accepted: {needed} or more, as some are "
                    "held out; raise data.num_samples or lower data.micro_batch"
                )
        if prune.reconstruct and schedule.changes:
            raise ValueError(
                f"prune.reconstruct {prune.reconstruct} with schedule.kind {schedule.kind} and regrow {schedule.regrow}, accepted: "
                "one-shot and none, as what is left must not change afterwards"
            )
        self._training_fits()
        return self

    def _training_fits(self) -> None:
        recover, schedule = self.recover, self.schedule
        if self.distributed.offload == "disk" and recover.steps and not recover.forward_only:
            raise ValueError(
                f"recover.optimizer {recover.optimizer} with distributed.offload disk: gradients and optimizer state need "
                "more memory than the weights; use offload cpu, or an optimizer that needs none (zo-sgd)"
            )
        if recover.train == "lora" and self.distributed.offload != "none":
            raise ValueError(
                f"recover.train lora with distributed.offload {self.distributed.offload}, accepted: none; use all"
            )
        if not recover.saved_on_the_way and self.checkpoint.every:
            raise ValueError(
                f"checkpoint.every {self.checkpoint.every} with recover.optimizer {recover.optimizer}, whose training is "
                "not saved on the way; use another optimizer, or leave it at 0"
            )
        if recover.distill_hidden and self.prune.pattern in ("layers", "units", "filters"):
            raise ValueError(
                f"recover.distill_hidden compares layer by layer, and pattern {self.prune.pattern} may remove layers; accepted: "
                "patterns that keep them all; set it to 0"
            )
        if not schedule.changes or self.prune.unit_kinds:
            return
        told = f"and schedule.kind {schedule.kind} with regrow {schedule.regrow} changes them"
        if recover.forward_only or not recover.saved_on_the_way:
            raise ValueError(
                f"recover.optimizer {recover.optimizer} keeps its masks, {told}; use adamw, sgd or nesterov"
            )
        looks = schedule.kind == "admm" or schedule.criterion == "movement" or schedule.regrow == "top-kast"
        if recover.train != "all" and looks:
            raise ValueError(
                f"schedule.kind {schedule.kind} with criterion {schedule.criterion} and regrow {schedule.regrow} looks at how matrices train, and "
                f"recover.train {recover.train} leaves them alone; use all"
            )
        if recover.train == "lora":
            raise ValueError(f"recover.train lora keeps its masks, {told}; use all, or kind one-shot")

    def fingerprint(self) -> str:
        """16 hex digits over everything that can change the result (not where it is written, how it is launched, or what is kept on the way)."""
        asked = self.model_dump(mode="json", exclude={"output", "distributed", "checkpoint"})
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def load_config(recipe: str | Path | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """Config from a YAML recipe and `{"section.key": value}` overrides (which win).

    Raises UserError for a missing or malformed file, an unknown key (with the nearest known one), or a bad value.
    """
    asked = _read_recipe(Path(recipe)) if recipe else {}
    for dotted, value in (overrides or {}).items():
        node = asked
        *path, key = dotted.split(".")
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UserError(f"{part}: got {node!r}, accepted: a mapping, which --{dotted} could then change")
        node[key] = value
    _refuse_unknown(asked, Config, "")
    return make(Config, asked)


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        asked = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"recipe {path}: {error.strerror}; shipped recipes lie in configs/recipes") from None
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(asked, dict):
        raise UserError(
            f"recipe {path}: got {type(asked).__name__}, accepted: a mapping of sections such as model, prune"
        )
    return asked


def _refuse_unknown(asked: dict[str, Any], section: type[Section], prefix: str) -> None:
    for key, value in asked.items():
        if key not in section.model_fields:
            near = difflib.get_close_matches(str(key), section.model_fields, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else "accepted: " + ", ".join(section.model_fields)
            raise UserError(f"unknown key {prefix}{key}; {hint}")
        inner = section.model_fields[key].annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            if not isinstance(value, dict):
                raise UserError(
                    f"{prefix}{key}: got {value!r}, accepted: a mapping with " + ", ".join(inner.model_fields)
                )
            _refuse_unknown(value, inner, f"{prefix}{key}.")
