"""Second moments of what linear layers read: sums over real tokens of x^2 or of x x^T, and layers' block influence.

Layers that read the same tensor (q, k, v; gate, up) share one sum. Padding is left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tinygn_dist.estimate.hooks import Observer, attached, first
from tinygn_dist.estimate.setting import Setting
from tinygn_dist.moments import Moments
from tinygn_dist.objective import Batch, model_inputs


@dataclass
class InputMoments:
    """moments: this rank's sums, by source. source_of: module path -> the module whose name the shared sum carries.
    num_tokens: real tokens seen by this rank."""

    moments: Moments = field(default_factory=Moments)
    source_of: dict[str, str] = field(default_factory=dict)
    num_tokens: int = 0

    def of(self, module: str) -> str:
        return self.source_of[module]


def input_moments(setting: Setting, modules: Sequence[str], *, full: bool) -> InputMoments:
    """Sums over this rank's batches, not yet reduced: a Gram matrix (in, in) per source with `full`, else (in,)
    sums of squares. The caller reduces them, to every rank or to the one that needs them."""
    found = InputMoments()
    inputs: dict[str, torch.Tensor] = {}
    hooks = [(setting.bare.get_submodule(name), Observer(_keep_in(inputs, name))) for name in modules]
    mine = setting.backend.share(setting.batches)
    with torch.no_grad(), attached(hooks), setting.progress.bar("input statistics", len(mine)) as advance:
        for batch, real in mine:
            batch = setting.on_device(batch)
            inputs.clear()
            setting.model(**model_inputs(batch), **_without_logits(setting.bare))
            if real:
                _add(found, inputs, real_tokens(batch), full)
            advance()
    # a rank without batches still takes part in the sums: names and shapes from a rank that had some
    names = next((seen for seen in setting.backend.everyone(_layout(found)) if seen), ([], {}))
    for name, shape in names[0]:
        found.moments.reserve(name, shape, setting.backend.device)
    found.source_of = names[1]
    return found


def block_influence(setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    """(layers,) fp64 sums over tokens of the cosine between each layer's input and output, and the token count."""
    sums = torch.zeros(setting.anatomy.num_layers, dtype=torch.float64)
    tokens = torch.zeros(1, dtype=torch.float64)
    cosines: dict[int, torch.Tensor] = {}
    layers = setting.bare.get_submodule(setting.anatomy.layers_path)
    hooks = [(layer, Observer(_cosine_in(cosines, index), output=True)) for index, layer in enumerate(layers)]
    mine = setting.backend.share(setting.batches)
    with torch.no_grad(), attached(hooks), setting.progress.bar("block influence", len(mine)) as advance:
        for batch, real in mine:
            batch = setting.on_device(batch)
            setting.model(**model_inputs(batch), **_without_logits(setting.bare))
            mask = real_tokens(batch)
            if real:
                for index, cosine in cosines.items():
                    cosine = cosine.flatten() if mask is None else cosine.flatten()[mask]
                    sums[index] += cosine.double().sum().cpu()
                tokens += len(cosine)
            advance()
    setting.backend.sum_over_data([sums, tokens])
    return sums, tokens


def _without_logits(model: nn.Module) -> dict[str, int]:
    """A causal LM can be told to compute the logits of one position only."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _keep_in(inputs: dict[str, torch.Tensor], name: str):
    def seen(hidden: torch.Tensor, _: Any) -> None:
        inputs[name] = hidden

    return seen


def _cosine_in(pairs: dict[int, torch.Tensor], index: int):
    def seen(hidden: torch.Tensor, output: Any) -> None:
        pairs[index] = F.cosine_similarity(hidden.float(), first(output).float(), dim=-1)

    return seen


def real_tokens(batch: Batch) -> torch.Tensor | None:
    mask = batch.get("attention_mask")
    return None if mask is None else mask.flatten().bool()


def _add(found: InputMoments, inputs: dict[str, torch.Tensor], mask: torch.Tensor | None, full: bool) -> None:
    sources: dict[int, str] = {}
    for name, hidden in inputs.items():
        source = sources.setdefault(id(hidden), name)  # `inputs` keeps every tensor alive, so ids are unique
        found.source_of.setdefault(name, source)
        if source != name:
            continue
        rows = hidden.flatten(0, -2).float()
        rows = rows if mask is None else rows[mask]
        found.moments.add(name, rows.t() @ rows if full else rows.square().sum(0))
    found.num_tokens += rows.shape[0]


def _layout(found: InputMoments) -> tuple[list[tuple[str, tuple[int, ...]]], dict[str, str]] | None:
    names = found.moments.names()
    return ([(n, tuple(found.moments.sum(n).shape)) for n in names], found.source_of) if names else None
