"""Latency as a budget: what a layer costs on this device at a few widths, measured before the weights load.

Seconds depend on shapes, not on values. So models of the same class with fresh weights are timed, on one forward of a
fixed batch (for language models the prefill, with its cache and the logits of the last token). They have as many layers
as weigh a GiB, at least four: fewer would stay in the processor's caches, and narrow ones more than wide ones. What is
compared runs in turns, one forward of each: a machine that is slower for a while is so for all of them.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig

from tinygn_dist.config import EvaluateConfig, PruneConfig
from tinygn_dist.errors import UserError
from tinygn_dist.maths.counts import Latency, Mix, channel_step
from tinygn_dist.models.anatomy import Anatomy
from tinygn_dist.models.kept import KeptUnits
from tinygn_dist.models.objective import Batch, last_logits_only
from tinygn_dist.prune.structured.layers_heads_channels import LayersHeadsChannels
from tinygn_dist.prune.structured.removal import UnitGoal, UnitPlan
from tinygn_dist.prune.structured.shrink import smaller_config
from tinygn_dist.runtime.cpu_matmul import stock_matmul
from tinygn_dist.step import Request

log = logging.getLogger(__name__)
_LEAST_LAYERS = 4
_LAYERS_BYTES = 2**30
_RUNS = 5
_KINDS = ("heads", "channels")
_SHARES = (0.75, 0.5, 0.25)


class LatencyGoal:
    """plan: the mixes that meet the goal by what layers cost on the main rank's device, the same on every rank.
    figures: for the report."""

    def __init__(self, request: Request, options: PruneConfig, goal: UnitGoal) -> None:
        """A collective. UserError when no mix meets the goal."""
        anatomy, backend, dtype = request.anatomy, request.backend, request.dtype
        self._backend, self._anatomy, self._options, self._goal = backend, anatomy, options, goal
        config = request.skeleton.config
        self._batch = inputs_of(config, request.task, request.evaluate)
        self._layers = Layers(
            lambda smaller: request.build(smaller, dtype),
            config,
            anatomy,
            dtype,
            self._batch,
            backend.device,
        )
        self.table = self._on_main(lambda: cost_table(self._layers, options))
        self.figures = {"timed": described(self._batch), "table": asdict(self.table), "looked_at": []}
        self._timed: dict[Mix, float] = {}
        with backend.together("checking the request"):
            self.plan = replace(self._plan(), replan=self.replanned)

    def _plan(self) -> UnitPlan:
        goal = replace(self._goal, latency=self.table)
        return LayersHeadsChannels().plan(self._anatomy, self._options, goal)

    def replanned(self, mix: Mix) -> list[Mix]:
        """The mixes that meet the goal once this one was timed beside the dense model, the table corrected by what was
        found: it is among them where it is still the least that does. What was timed and missed the goal is not. A
        collective."""
        whole, cut = self._on_main(lambda: self._layers.timed({}, self._layers.left_by(mix)))
        before = 1 - self.table.removed_seconds(mix) / self.table.total_seconds
        self.table = self.table.corrected(mix, whole.rest, whole.layer, cut.layer)
        after = 1 - self.table.removed_seconds(mix) / self.table.total_seconds
        self._timed[mix] = after
        self.figures["looked_at"].append({"mix": str(mix), "expected": before, "timed": after})
        self.figures["corrected_table"] = asdict(self.table)
        log.info("without %s: expected %.3f of the latency, timed %.3f", mix, before, after)
        try:
            met = self._plan().mixes
        except UserError as error:  # nothing meets it any more: the mix that came nearest stays, and the report says so
            self.figures["missed"] = str(error)
            return [mix]
        return [other for other in met if self._timed.get(other, 0.0) <= 1 - self._goal.sparsity]

    def time(self, which: str, model: nn.Module) -> None:
        """The latency of a model as the backend placed it. which: dense, then smaller, which runs beside a dense one
        where that is small enough to be built once more. A collective."""
        backend, bare, layers = self._backend, self._backend.unwrap(model), self._layers
        again = which == "smaller" and layers.num == self._anatomy.num_layers and not backend.shards_weights

        def seconds() -> list[float]:
            models = [layers.built({}), bare] if again else [bare]
            return forward_seconds(models, self._batch, backend.device)

        with stock_matmul():
            *beside, own = backend.everyone(backend.on_main(seconds))[0]
        self.figures[f"{which}_seconds"] = own
        if beside:
            self.figures["dense_seconds"] = beside[0]
        if which == "smaller":
            self.figures["ratio"] = own / self.figures["dense_seconds"]

    def _on_main(self, work: Callable[[], Any]) -> Any:
        """What the main rank measured, on every rank."""
        with self._backend.together("measuring latency"), stock_matmul():
            found = work() if self._backend.is_main else None
        return self._backend.everyone(found)[0]


def inputs_of(config: PretrainedConfig, task: str, options: EvaluateConfig) -> Batch:
    """The batch that is timed: random tokens (batch_size, prefill_tokens), no more than the model has positions for, or
    images of the model's size."""
    generator = torch.Generator().manual_seed(0)
    if task == "image-classification":
        side = getattr(config, "image_size", 224)
        return {"pixel_values": torch.randn(options.batch_size, config.num_channels, side, side, generator=generator)}
    length = min(options.prefill_tokens, (getattr(config, "max_position_embeddings", None) or 1 << 30) - 2)
    return {"input_ids": torch.randint(3, config.vocab_size, (options.batch_size, length), generator=generator)}


def described(batch: Batch) -> str:
    """The shape of what is timed, for people."""
    ((name, tensor),) = batch.items()
    return f"{len(tensor)} x " + (f"{tensor.shape[1]} tokens" if name == "input_ids" else "image")


@torch.no_grad()
def forward_seconds(models: Sequence[nn.Module], batch: Batch, device: torch.device) -> list[float]:
    """Least time of several forwards of each model, in turns: what else runs on a machine only ever adds."""
    runs = [_forward(model, batch, device) for model in models]
    return [min(each) for each in zip(*([_timed(run, device) for run in runs] for _ in range(_RUNS)), strict=True)]


class Timed(NamedTuple):
    """Seconds of everything but the layers, and of one layer."""

    rest: float
    layer: float


@dataclass(frozen=True)
class Layers:
    """Models of one class with fresh weights, to be timed at other widths. build: the model of a config, with any
    finite weights of `dtype`, on the CPU."""

    build: Callable[[PretrainedConfig], nn.Module]
    config: PretrainedConfig
    anatomy: Anatomy
    dtype: torch.dtype
    batch: Batch
    device: torch.device

    @property
    def num(self) -> int:
        """How many layers the timed models have."""
        enough = math.ceil(_LAYERS_BYTES / (max(self.anatomy.layer_params) * self.dtype.itemsize))
        return min(self.anatomy.num_layers, max(_LEAST_LAYERS, enough))

    def timed(self, *kept: Mapping[str, int]) -> list[Timed]:
        """Models of these widths, as of `built`, one forward of each in turn."""
        models = [self.built(one) for one in kept]
        found = _least_in_layers(models, self.anatomy.layers_path, self.batch, self.device)
        return [Timed(whole - in_layers, in_layers / self.num) for in_layers, whole in found]

    def built(self, kept: Mapping[str, int]) -> nn.Module:
        """kept: how many heads (KV groups) or channels every layer keeps; all of what is not named."""
        layers = tuple(range(self.num))
        units = {kind: dict.fromkeys(layers, tuple(range(count))) for kind, count in kept.items()}
        config = smaller_config(copy.deepcopy(self.config), self.anatomy, KeptUnits(layers, **units))
        return self.build(config).eval().to(self.device)

    def left_by(self, mix: Mix) -> dict[str, int]:
        """What a mix leaves of every layer."""
        gone = {kind: mix[kind] for kind in _KINDS}
        return {kind: self.anatomy.of_kind(kind)[0].num_units - count for kind, count in gone.items() if count}


def cost_table(layers: Layers, options: PruneConfig) -> Latency:
    """Seconds of a layer at a few counts of each kind that may go, each timed beside a whole one, and of the rest of
    the model. options: which kinds may go, and the multiple that channels are kept at."""
    wholes, shares = [], {}
    for kind in _KINDS:
        groups = layers.anatomy.of_kind(kind) if kind in options.unit_kinds else ()
        if groups and groups[0].num_units > 1:
            full, multiple = groups[0].num_units, options.multiple_of if kind == "channels" else 1
            counts = _counts(full, multiple, groups[0].counts)
            shares[kind] = {full: 1.0}
            for count in counts:
                whole, cut = layers.timed({}, {kind: count})
                wholes.append(whole)
                shares[kind][count] = cut.layer / whole.layer
    wholes = wholes or layers.timed({})
    rest, layer = (min(each) for each in zip(*wholes, strict=True))
    kinds = {kind: {n: layer * share for n, share in _rising(found).items()} for kind, found in shares.items()}
    table = Latency(layers.anatomy.num_layers, rest, layer, **kinds)
    log.info("measured %s", table)
    return table


def _rising(shares: Mapping[int, float]) -> dict[int, float]:
    """No more for fewer units: what seems so was measured while something else ran."""
    counts = sorted(shares, reverse=True)
    return dict(zip(counts, itertools.accumulate((shares[n] for n in counts), min), strict=True))


def _counts(full: int, multiple_of: int, accepted: Sequence[int] = ()) -> list[int]:
    """Counts below the full one at which a layer is timed: the least that can stay and some between. accepted: by the
    class; empty: any."""
    step = channel_step(full, multiple_of)
    found = {max(step, round(full * share / step) * step) for share in _SHARES} | {step}
    if accepted:
        found = {count for count in found if count in accepted} | {min(accepted)}
    return sorted(found - {full})


def _least_in_layers(
    models: Sequence[nn.Module], layers_path: str, batch: Batch, device: torch.device
) -> list[tuple[float, float]]:
    """Of each model the least seconds from the first layer's start to the last one's end, and of the whole forward."""
    inside: list[list[float]] = [[] for _ in models]
    starts, handles = [0.0], []

    def start(*_: Any) -> None:
        _wait(device)
        starts[0] = time.perf_counter()

    def end(own: list[float]) -> Callable[..., None]:
        def note(*_: Any) -> None:
            _wait(device)
            own.append(time.perf_counter() - starts[0])

        return note

    for model, own in zip(models, inside, strict=True):
        layers = model.get_submodule(layers_path)
        handles.append(layers[0].register_forward_pre_hook(start))
        handles.append(layers[len(layers) - 1].register_forward_hook(end(own)))
    whole = forward_seconds(models, batch, device)
    for handle in handles:
        handle.remove()
    return [(min(own[1:]), seconds) for own, seconds in zip(inside, whole, strict=True)]  # but for the warm-up


def _forward(model: nn.Module, batch: Batch, device: torch.device) -> Callable[[], Any]:
    """One forward, warmed up."""
    asked: Mapping[str, Any] = {name: value.to(device) for name, value in batch.items()} | last_logits_only(model)
    with torch.no_grad():
        model(**asked)
    return lambda: model(**asked)


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
