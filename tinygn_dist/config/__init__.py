"""What can be asked for? Frozen pydantic models, every range checked once, before anything loads.

A recipe (YAML) has the same shape as `Config`; every key can be overridden as `--section.key value` on the command
line. The docstring under a field is its help text.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import model_validator

from tinygn_dist.config.checkpoint import CheckpointConfig
from tinygn_dist.config.probes import ProbeConfig
from tinygn_dist.config.prune import NM, UNIT_CRITERIA, WEIGHT_CRITERIA, PruneConfig
from tinygn_dist.config.quantize import QuantizeConfig
from tinygn_dist.config.reconstruct import ReconstructConfig
from tinygn_dist.config.recover import RecoverConfig
from tinygn_dist.config.run import DataConfig, DistributedConfig, EvaluateConfig, ModelConfig, OutputConfig
from tinygn_dist.config.schedule import ScheduleConfig
from tinygn_dist.config.section import Section, make
from tinygn_dist.config.solver import DEFAULT_SHARE, SolverConfig
from tinygn_dist.config.steps import StepConfig, check_order, check_schedule, usual_order
from tinygn_dist.errors import UserError

__all__ = [
    "DEFAULT_SHARE",
    "FLAT",
    "NM",
    "UNIT_CRITERIA",
    "WEIGHT_CRITERIA",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DistributedConfig",
    "EvaluateConfig",
    "ModelConfig",
    "OutputConfig",
    "ProbeConfig",
    "PruneConfig",
    "QuantizeConfig",
    "ReconstructConfig",
    "RecoverConfig",
    "ScheduleConfig",
    "Section",
    "SolverConfig",
    "StepConfig",
    "inner_section",
    "load_config",
    "make",
]


FLAT = frozenset({"prune", "schedule", "reconstruct", "recover", "quantize"})
"""sections that stand for the usual order of steps"""


class Config(Section):
    """model, data, evaluate, checkpoint, output and distributed are of the whole run. What is done is a list of
    `steps`, or the sections prune, schedule, reconstruct, recover and quantize, which stand for the usual order.
    `recipe` is the list of both."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    steps: tuple[StepConfig, ...] = ()
    """the recipe as a list, such as [{prune: {pattern: units}}, {prune: {pattern: "2:4"}}, {recover: {steps: 100}}]; in
    place of the sections prune, schedule, reconstruct, recover and quantize"""
    prune: PruneConfig = PruneConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    reconstruct: ReconstructConfig = ReconstructConfig()
    recover: RecoverConfig = RecoverConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    output: OutputConfig = OutputConfig()
    distributed: DistributedConfig = DistributedConfig()

    @property
    def recipe(self) -> tuple[StepConfig, ...]:
        """The steps, in order."""
        return self.steps or usual_order(self)

    @property
    def trainings(self) -> tuple[RecoverConfig, ...]:
        return tuple(step.recover for step in self.recipe if step.recover and step.recover.steps)

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.steps and (both := self.model_fields_set & FLAT):
            raise ValueError(f"got steps and {', '.join(sorted(both))}, accepted: steps alone, or the sections alone")
        check_order(self.recipe)
        for number, step in enumerate(self.recipe):
            self._calibration_suffices(step)
            if step.prune:
                after = self.recipe[number + 1 :][:1]
                recover = (after[0].recover if after else None) or self.recover
                check_schedule(step.prune, step.schedule, recover)
                if step.prune.asks_latency and self.distributed.offload != "none":
                    raise ValueError(
                        f"prune.goal {step.prune.goal} with distributed.offload {self.distributed.offload}, accepted: "
                        "none; use params="
                    )
            if step.recover:
                self._training_fits(step.recover)
        return self

    def _calibration_suffices(self, step: StepConfig) -> None:
        batches = -(-self.data.num_samples // self.data.micro_batch)
        asked, needed = "", 1
        if step.prune:
            asked = f"prune.solver.allocation {step.prune.solver.allocation}"
            needed = step.prune.fewest_micro_batches
        if step.reconstruct:
            asked, needed = f"reconstruct.epochs {step.reconstruct.epochs}", 2
        if batches < needed:
            raise ValueError(
                f"{asked} with {batches} micro-batches of calibration data, accepted: {needed} or more, as some are "
                "held out; raise data.num_samples or lower data.micro_batch"
            )

    def _training_fits(self, recover: RecoverConfig) -> None:
        if self.distributed.offload == "disk" and recover.steps and not recover.forward_only:
            raise ValueError(
                f"recover.optimizer {recover.optimizer} with distributed.offload disk: gradients and optimizer state "
                "need more memory than the weights; use offload cpu, or an optimizer that needs none (zo-sgd)"
            )
        if recover.train == "lora" and self.distributed.offload != "none":
            raise ValueError(
                f"recover.train lora with distributed.offload {self.distributed.offload}, accepted: none; use all"
            )
        if not recover.saved_on_the_way and self.checkpoint.every:
            raise ValueError(
                f"checkpoint.every {self.checkpoint.every} with recover.optimizer {recover.optimizer}, whose training "
                "is not saved on the way; use another optimizer, or leave it at 0"
            )

    def fingerprint(self) -> str:
        """16 hex digits over everything that can change the result (not where it is written, how it is launched, or
        what is kept on the way)."""
        asked = self.model_dump(mode="json", exclude={"output", "distributed", "checkpoint"})
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def load_config(recipe: str | Path | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """Config from a YAML recipe and `{"section.key": value}` overrides (which win).

    Raises UserError for a missing or malformed file, an unknown key (with the nearest known one), or a bad value.
    """
    asked = _read_recipe(Path(recipe)) if recipe else {}
    for dotted, value in (overrides or {}).items():
        *path, key = dotted.split(".")
        node = _step_of(asked, path[0]) if asked.get("steps") and path and path[0] in FLAT else asked
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UserError(f"{part}: got {node!r}, accepted: a mapping, which --{dotted} could then change")
        node[key] = value
    _refuse_unknown(asked, Config, "")
    return make(Config, asked)


def _step_of(asked: dict[str, Any], name: str) -> dict[str, Any]:
    """The only step of a recipe's list that a short argument such as --recover.steps can mean."""
    named = [step for step in asked["steps"] if isinstance(step, dict) and name in step]
    if len(named) != 1:
        raise UserError(
            f"--{name}.* with a recipe of {len(named)} {name} steps, accepted: exactly one; change the recipe's file"
        )
    return named[0]


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


def inner_section(section: type[Section], key: str) -> type[Section] | None:
    """The section that a key of another one holds, None for a plain value."""
    annotation = section.model_fields[key].annotation
    kinds = (
        typing.get_args(annotation)
        if typing.get_origin(annotation) in (typing.Union, types.UnionType)
        else (annotation,)
    )
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _refuse_unknown(asked: dict[str, Any], section: type[Section], prefix: str) -> None:
    for key, value in asked.items():
        if key not in section.model_fields:
            near = difflib.get_close_matches(str(key), section.model_fields, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else "accepted: " + ", ".join(section.model_fields)
            raise UserError(f"unknown key {prefix}{key}; {hint}")
        if key == "steps" and section is Config:
            _refuse_unknown_steps(value)
        inner = inner_section(section, key)
        if inner is not None:
            if not isinstance(value, dict):
                raise UserError(
                    f"{prefix}{key}: got {value!r}, accepted: a mapping with " + ", ".join(inner.model_fields)
                )
            _refuse_unknown(value, inner, f"{prefix}{key}.")


def _refuse_unknown_steps(steps: Any) -> None:
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise UserError(
            f"steps: got {steps!r}, accepted: a list such as [{{prune: {{pattern: units}}}}, {{recover: {{steps: "
            f"100}}}}]"
        )
    for number, step in enumerate(steps):
        _refuse_unknown(step, StepConfig, f"steps.{number}.")
