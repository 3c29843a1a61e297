"""What a run is asked to do: frozen pydantic models, every range checked once, before anything loads.

A recipe (YAML) has the same shape as `Config`; every key can be overridden as `--section.key value` on the command
line. The docstring under a field is its help text.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, field_validator, model_validator

from tinygn_dist.errors import UserError

UNIT_KINDS = ("layers", "heads", "channels", "experts")
WEIGHT_CRITERIA = ("magnitude", "wanda", "taylor", "fisher", "obs", "random")
UNIT_CRITERIA = ("removal", "gate", "obs", "magnitude", "activation", "random")


class NM(NamedTuple):
    """N:M sparsity: `n` weights kept of every `m` consecutive ones along the input dimension."""

    n: int
    m: int


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelConfig(Section):
    name: str
    """hub id, local folder, .gguf file, or the embedded name smollm2-135m"""
    revision: str | None = None
    """branch, tag or commit on the hub"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype of the loaded and exported weights; auto keeps the checkpoint's"""
    task: Literal["auto", "causal-lm", "sequence-classification", "image-classification", "feature-extraction"] = "auto"
    """which model class and which loss; auto reads the checkpoint's `architectures`"""
    trust_remote_code: bool = False
    """run the Python code that comes with the checkpoint"""


class DataConfig(Section):
    name: str = "python-docs"
    """hub id, txt/jsonl/csv/parquet/arrow file, folder, python-docs (the reference shipped with Python), or self
    (text sampled from the model)"""
    subset: str | None = None
    """configuration of a hub dataset"""
    split: str = "train"
    """split of a hub dataset"""
    column: str | None = None
    """column holding the text, chat messages or image; found when there is only one candidate"""
    label_column: str | None = None
    """column holding the class, for classification models"""
    evaluation: str | None = None
    """a second dataset to evaluate on; by default rows are split off and used for nothing else"""
    num_samples: int = Field(64, ge=1)
    """calibration sequences"""
    seq_len: int = Field(512, ge=2)
    """tokens per sequence"""
    eval_samples: int = Field(16, ge=1)
    """evaluation sequences"""
    micro_batch: int = Field(1, ge=1)
    """sequences per forward; part of the result's identity, not dealt differently at another world size"""
    packing: bool = True
    """join the rows and cut fixed windows; false pads each row and masks the padding"""
    separator: str = "\n\n"
    """what joins two rows when packing"""
    streaming: bool = False
    """read the dataset row by row instead of downloading it"""
    seed: int = Field(0, ge=0)
    """which windows are drawn"""


class PruneConfig(Section):
    pattern: str = "channels"
    """unstructured | N:M such as 2:4 (weights set to zero); layers | heads | channels | experts | units (removed whole;
    units searches a mix of all kinds the model has)"""
    sparsity: float = 0.2
    """fraction of the targeted weights to zero, or of the layers' parameters to remove; ignored for N:M"""
    criterion: Literal[
        "auto", "magnitude", "wanda", "taylor", "fisher", "obs", "removal", "gate", "activation", "random"
    ] = "auto"
    """what is scored; auto: obs for weights and channels, removal for heads, layers and experts (activation where a
    layer has more than 64 experts)"""
    scope: Literal["auto", "row", "layer", "global"] = "auto"
    """where unstructured weights compete: in one output row, one weight matrix, or the whole model"""
    estimator: Literal["auto", "finite-difference", "backprop"] = "auto"
    """where derivatives come from: forward passes only, or backpropagation; auto: forward only for units, backprop for
    weights (taylor, fisher, and the loss-aware weights of obs)"""
    allocation: float = Field(0.5, ge=0, le=1)
    """criterion obs with backprop: how far layers' budgets go from the same share everywhere (0) to one global cut of
    the saliency in units of loss (1)"""
    probe_samples: int = Field(8, ge=1)
    """calibration sequences each probe is measured on"""
    targets: tuple[str, ...] = (".*",)
    """regular expressions of weight names that may be masked"""
    ignore: tuple[str, ...] = ()
    """regular expressions of weight names that stay dense"""
    protect: tuple[int, ...] = ()
    """layers whose units are never removed"""
    compensate: bool = True
    """re-fit the remaining weights by least squares to the dense activations after units are removed"""
    multiple_of: int = Field(64, ge=1)
    """channel counts are kept at a multiple of this"""
    counts: dict[Literal["layers", "heads", "channels", "experts"], NonNegativeInt] | None = None
    """remove exactly these many layers, and KV groups, channels and experts of each other layer, instead of meeting
    sparsity"""
    probe_channels: int = Field(256, ge=1)
    """channels per removal probe"""
    damping: float = Field(0.01, gt=0, lt=1)
    """added to the Hessian's diagonal, as a fraction of its mean"""
    seed: int = Field(0, ge=0)
    """for criterion random"""

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, value: str) -> str:
        if value in ("unstructured", "units", *UNIT_KINDS):
            return value
        found = re.fullmatch(r"(\d+):(\d+)", value)
        if not found:
            raise ValueError(f"got {value!r}, accepted: unstructured, N:M such as 2:4, units, {', '.join(UNIT_KINDS)}")
        n, m = map(int, found.groups())
        if not 0 < n < m:
            raise ValueError(f"got {value!r}, N:M keeps N of every M weights, so 0 < N < M; try 2:4")
        return value

    @field_validator("sparsity")
    @classmethod
    def _fraction(cls, value: float) -> float:
        if not 0 <= value < 1:
            hint = f"; did you mean {value / 100:g}?" if 1 < value < 100 else ""
            raise ValueError(f"got {value:g}, accepted: 0 <= sparsity < 1{hint}")
        return value

    @model_validator(mode="after")
    def _criterion_fits(self) -> PruneConfig:
        allowed = UNIT_CRITERIA if self.unit_kinds else WEIGHT_CRITERIA
        if self.criterion != "auto" and self.criterion not in allowed:
            raise ValueError(
                f"criterion {self.criterion!r} does not score pattern {self.pattern!r}, accepted: auto, "
                + ", ".join(allowed)
            )
        if self.criterion in ("taylor", "fisher") and self.estimator == "finite-difference":
            raise ValueError(
                f"criterion {self.criterion!r} ranks single weights, which finite differences cannot resolve (relative "
                "error about d/K for K probes of d weights); use estimator backprop, or criterion obs"
            )
        return self

    @property
    def nm(self) -> NM | None:
        """The pattern as N:M, or None."""
        n, colon, m = self.pattern.partition(":")
        return NM(int(n), int(m)) if colon else None

    @property
    def unit_kinds(self) -> tuple[str, ...]:
        """The kinds of unit that may be removed; empty for weight patterns."""
        return UNIT_KINDS if self.pattern == "units" else (self.pattern,) if self.pattern in UNIT_KINDS else ()


class RecoverConfig(Section):
    steps: int = Field(0, ge=0)
    """optimizer steps of fine-tuning after compression; 0 for none"""
    learning_rate: float = Field(1e-4, gt=0)
    """peak of a linear warm-up over a tenth of the steps, then linear decay to zero"""
    batch_size: int = Field(4, ge=1)
    """sequences per optimizer step, over all ranks"""
    seq_len: int = Field(256, ge=2)
    """tokens per training sequence"""
    distill: float = Field(0.5, ge=0, le=1)
    """share of the loss that is the divergence from the dense model's logits; the rest is the task loss"""
    temperature: float = Field(1.0, gt=0)
    """softens both distributions in the distillation term"""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay"""
    clip_norm: float = Field(1.0, gt=0)
    """largest norm of the whole gradient"""
    train_embeddings: bool = False
    """also update token embeddings (and a head tied to them)"""
    seed: int = Field(0, ge=0)
    """order of the training windows"""


class EvaluateConfig(Section):
    latency: bool = True
    """measure prefill and decode tokens per second"""
    prefill_tokens: int = Field(256, ge=8)
    """prompt length of the speed measurement"""
    decode_tokens: int = Field(32, ge=2)
    """tokens generated in the speed measurement"""


class OutputConfig(Section):
    dir: str = "compressed"
    """folder to write; it appears whole or not at all"""
    overwrite: bool = False
    """replace a folder that is not empty"""
    max_shard_gib: float = Field(5.0, gt=0)
    """largest size of one safetensors file"""


class DistributedConfig(Section):
    num_processes: int | None = Field(None, ge=1)
    """how many processes must be running; the run refuses to start on any other number"""
    timeout_seconds: int = Field(600, ge=1)
    """a collective that waits longer ends the run"""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """where Accelerate logs metrics"""


class Config(Section):
    model: ModelConfig
    data: DataConfig = DataConfig()
    prune: PruneConfig = PruneConfig()
    recover: RecoverConfig = RecoverConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    output: OutputConfig = OutputConfig()
    distributed: DistributedConfig = DistributedConfig()

    def fingerprint(self) -> str:
        """16 hex digits over everything that can change the result (not where it is written or how it is launched)."""
        asked = self.model_dump(mode="json", exclude={"output", "distributed"})
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
    try:
        return Config(**asked)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise UserError(f"{where} is missing; give it in the recipe or as --{where}") from None
        told = first["msg"].removeprefix("Value error, ")
        got = "" if "got " in told or first["type"] == "value_error" else f" (got {first['input']!r})"
        raise UserError(f"{where}: {told}{got}") from None


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
