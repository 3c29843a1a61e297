"""What of a compression run goes into a checkpoint, and how a run goes on from one."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from transformers import PretrainedConfig

from tinygn_dist import load
from tinygn_dist.anatomy import Anatomy, Target, read_anatomy
from tinygn_dist.backends.base import Backend
from tinygn_dist.backends.pieces import Origin, Run, filled, hollow
from tinygn_dist.calibration import Splits
from tinygn_dist.checkpoint import Checkpoints, Saved, Writer
from tinygn_dist.config import Config
from tinygn_dist.errors import Stopped
from tinygn_dist.estimate.setting import Setting
from tinygn_dist.gathering import Parts
from tinygn_dist.gradual import GradualMasks
from tinygn_dist.load import Source
from tinygn_dist.masking import Masks
from tinygn_dist.recover import Course, InTraining
from tinygn_dist.report import Report
from tinygn_dist.schedule import Plan

log = logging.getLogger(__name__)

_NOT_OF_TRAINING = ("mask", "buffer", "random", "step_statistics")  # kinds of tensors that no optimizer's state has
_KEPT_OF_REPORT = ("before", "compressed", "selection", "earlier_rounds", "parameters", "notes")


class Resumable:
    """The part of a run that writes its checkpoints and goes on from one; the rest of it is in pipeline.py."""

    config: Config
    backend: Backend
    source: Source
    splits: Splits
    destination: Path
    digest: str
    model: nn.Module
    anatomy: Anatomy
    targets: tuple[Target, ...]
    plan: Plan
    masks: GradualMasks | None
    protected: tuple[int, ...]
    course: Course
    round: int
    report: Report
    stopping: Callable[[], bool]
    setting: Callable[..., Setting]
    checkpoints: Checkpoints
    best: Checkpoints
    """the weights of the best evaluation so far, named by its step"""
    parts: Parts | None
    saved: Saved | None = None

    @property
    def checkpoint_folder(self) -> Path:
        return Path(self.config.checkpoint.dir or f"{self.destination}.checkpoints").expanduser().resolve()

    def find_checkpoint(self) -> bool:
        """Whether there is one to go on from."""
        config, asked = self.config, self.config.checkpoint
        folder = self.checkpoint_folder
        identity = {
            "config": config.model_dump(mode="json", exclude={"output", "distributed", "checkpoint", "evaluate"}),
            "model": self.digest,
            "data": self.splits.fingerprint(),
        }
        self.checkpoints = Checkpoints(folder, identity, self.backend, asked.keep)
        self.best = Checkpoints(folder.with_name(f"{folder.name}.best"), identity, self.backend, keep=1)
        self.parts = None
        if asked.statistics_every:
            statistics = folder.with_name(f"{folder.name}.statistics")
            self.parts = Parts(asked.statistics_every, statistics, identity, self.backend)
            if asked.resume != "auto":
                self.parts.remove()
        if asked.resume == "auto":
            self.saved = self.checkpoints.newest()
        if self.saved is None:
            self.checkpoints.remove()
            self.best.remove()
        if self.saved:
            log.info("going on from %s", self.saved.path)
        return self.saved is not None

    def restore(self) -> None:
        """The model, masks and report as they were; what only training knows follows when it begins."""
        facts = self.saved.facts
        self.course, self.round = Course(**facts["course"]), facts["round"]
        for key, value in facts["report"].items():
            setattr(self.report, key, value)
        self.report.recovery["resumed_after_steps"] = [*facts["resumed"], self.course.step]
        if self.config.prune.unit_kinds:
            self.protected = tuple(facts["protected"])
            self.place_smaller(type(self.source.config).from_dict(facts["model_config"]))
        else:
            read_weights(self.saved, self.model, self.backend)
            setting = self.setting(self.model, self.splits.calibration)
            self.masks = GradualMasks(
                setting, self.targets, self.config.prune, self.config.schedule, self.plan, going_on=facts["masks"]
            )
            read_masks(self.saved, self.masks.masks, self.model, self.backend)

    def place_smaller(self, config: PretrainedConfig) -> None:
        """The model of the checkpoint, of which each rank reads the pieces that it holds."""
        bare = self.backend.unwrap(self.model)
        origin = saved_origin(self.saved, lambda: load.rebuild(self.source, config, bare.dtype), bare)
        self.model = self.backend.place(origin)
        self.anatomy = read_anatomy(load.skeleton(self.source, config), needs_units=True)

    def save_or_go_on(self, now: InTraining | None = None) -> None:
        """A checkpoint where one is due or the run is asked to stop, which ends it then."""
        every, step = self.config.checkpoint.every, self.course.step
        stops = now.stopping if now else any(self.backend.everyone(self.stopping()))
        if stops or (every and step % every == 0):
            self.save(now)
        if stops:
            raise Stopped(
                f"stopped after {step} of {self.plan.total} training steps; {self.checkpoints.folder} has it all"
            )

    def save(self, now: InTraining | None) -> None:
        with self.checkpoints.writing(f"{step_name(self.course.step)}-{self.round:03d}") as writer:
            write_weights(writer, self.model, now, self.backend)
            if self.masks:
                write_masks(writer, self.masks.masks, self.model, self.backend)
            if self.masks and (now or self.masks.knows_before_training):
                model, optimizer = (now.model, now.optimizer) if now else (self.model, None)
                write_step_statistics(writer, self.masks, model, optimizer, self.backend)
            writer.facts |= {
                "course": asdict(self.course),
                "round": self.round,
                "in_training": now is not None,
                "num_ranks": self.backend.num_ranks,
                "masks": self.masks.state() if self.masks else None,
                "protected": self.protected,
                "model_config": self.backend.unwrap(self.model).config.to_dict(),
                "report": {key: getattr(self.report, key) for key in _KEPT_OF_REPORT},
                "resumed": self.report.recovery.get("resumed_after_steps", []),
            }

    def remove_checkpoints(self) -> None:
        """At the end of a run."""
        for kept in (self.checkpoints, self.best, self.parts):
            if kept is not None:
                kept.remove()

    def go_on_training(self, now: InTraining) -> bool:
        """Take over what was saved from training, if it was; a best model that is no longer there is forgotten: the
        evaluations that replaced it come again."""
        resumed = self.saved is not None and self.saved.facts["in_training"]
        if self.saved is not None and self.masks and (resumed or self.masks.knows_before_training):
            read_step_statistics(self.saved, self.masks, now.model, now.optimizer)
        if resumed:
            read_training(self.saved, now, self.backend)
            if self.course.best is not None and not self.best.keep_only(step_name(self.course.best)):
                self.course.best = None
        self.saved = None
        return resumed

    def save_best(self, now: InTraining) -> None:
        with self.best.writing(step_name(self.course.step)) as writer:
            write_weights(writer, self.model, now, self.backend, states=False)

    def restore_best(self, now: InTraining) -> None:
        """Before a training ends: into the live weights and any masters behind them."""
        if self.course.best is not None and self.course.best != self.course.step:
            log.info("the best evaluation was that of step %d, whose weights are taken", self.course.best)
            read_weights(self.best.named(step_name(self.course.best)), now.model, self.backend)


def step_name(step: int) -> str:
    return f"{step:08d}"


def write_weights(
    writer: Writer, model: nn.Module, now: InTraining | None, backend: Backend, states: bool = True
) -> None:
    """Every parameter of a placed model and its buffers, and where it is in training (`now`) with `states` also those of
    the optimizer and of random numbers. Collectives; each parameter is written by one rank."""
    bare = backend.unwrap(model)
    parameters = dict(bare.named_parameters())
    owners = backend.deal([1.0] * len(parameters))
    for (name, parameter), owner in zip(parameters.items(), owners, strict=True):
        if now is not None and now.optimizer is not None and parameter.requires_grad:
            whole = backend.whole_training(now.model, now.optimizer, name)
        else:
            whole = {"weight": backend.whole(model, name)}
        assert not set(whole) & set(_NOT_OF_TRAINING), f"an optimizer has a state called one of {_NOT_OF_TRAINING}"
        if owner == backend.rank:
            for key, tensor in whole.items():
                if states or key == "weight":
                    writer.add(f"{key}|{name}", tensor)
    if backend.is_main:
        for name in _persistent(bare):
            writer.add(f"buffer|{name}", bare.get_buffer(name))
    for name, state in _random_states() if states else ():
        writer.add(f"random|{name}|{backend.rank}", state)


def write_masks(writer: Writer, masks: Masks, model: nn.Module, backend: Backend) -> None:
    """Collectives; each mask is written by one rank."""
    owners = backend.deal([1.0] * len(masks.targets))
    for (name, packed), owner in zip(masks.packed(model, backend), owners, strict=True):
        if owner == backend.rank:
            writer.add(f"mask|{name}", packed)


def saved_origin(saved: Saved, build: Callable[[], nn.Module], like: nn.Module) -> Origin:
    """The model that `build` makes, with a checkpoint's weights and buffers; generation settings are those of `like`."""

    def run(name: str, low: int, high: int) -> torch.Tensor:
        return saved.run(f"{'weight' if name in parameters else 'buffer'}|{name}", low, high)

    def empty() -> tuple[nn.Module, Run]:
        small = hollow(build)
        small.generation_config = getattr(like, "generation_config", None)
        parameters.update(name for name, _ in small.named_parameters())
        return small, run

    parameters: set[str] = set()
    return Origin(lambda: filled(*empty()), empty)


def read_weights(saved: Saved, model: nn.Module, backend: Backend) -> None:
    """Into a placed model, in training or not; what was saved from training is rounded to the model's dtype."""
    bare = backend.unwrap(model)
    with torch.no_grad():
        for name, _ in bare.named_parameters():
            backend.write_whole(model, name, saved.tensor(f"weight|{name}").to(backend.device))
        for name in _persistent(bare):
            bare.get_buffer(name).copy_(saved.tensor(f"buffer|{name}"))


def read_training(saved: Saved, now: InTraining, backend: Backend) -> None:
    """Masters, optimizer state and random state, into a model prepared for training. The random state of a rank
    that was not there is that of another one."""
    keys: dict[str, list[str]] = {}
    for full in saved.names(""):
        key, _, name = full.partition("|")
        if key not in _NOT_OF_TRAINING:
            keys.setdefault(name, []).append(key)
    with torch.no_grad():
        for name, parameter in backend.unwrap(now.model).named_parameters():
            if parameter.requires_grad:
                whole = {key: saved.tensor(f"{key}|{name}").to(backend.device) for key in keys[name]}
                backend.write_training(now.model, now.optimizer, name, whole)
    num_ranks = saved.facts["num_ranks"]
    _set_random_states(
        {name: saved.tensor(f"random|{name}|{backend.rank % num_ranks}") for name, _ in _random_states()}
    )


def read_masks(saved: Saved, masks: Masks, model: nn.Module, backend: Backend) -> None:
    for full in saved.names("mask|"):
        masks.unpack(full.removeprefix("mask|"), saved.tensor(full), model, backend)


def write_step_statistics(
    writer: Writer, masks: GradualMasks, model: nn.Module, optimizer: Any, backend: Backend
) -> None:
    """What was summed up since the last mask update. Collectives; the main rank writes it."""
    for name, whole in masks.step_statistics.whole(model, optimizer) if masks.step_statistics else ():
        if backend.is_main:
            writer.add(f"step_statistics|{name}", whole)


def read_step_statistics(saved: Saved, masks: GradualMasks, model: nn.Module, optimizer: Any) -> None:
    if masks.step_statistics:
        found = {name.removeprefix("step_statistics|"): saved.tensor(name) for name in saved.names("step_statistics|")}
        masks.step_statistics.take(model, optimizer, found)


def _persistent(model: nn.Module) -> list[str]:
    state = model.state_dict()
    return [name for name, _ in model.named_buffers() if name in state]


def _random_states() -> Iterator[tuple[str, torch.Tensor]]:
    yield "torch", torch.get_rng_state()
    if torch.cuda.is_available():
        yield "cuda", torch.cuda.get_rng_state()
    kind, words, place, has_gauss, cached = numpy.random.get_state()
    yield "numpy", torch.from_numpy(words.astype(numpy.int64))
    yield "numpy rest", torch.tensor([place, has_gauss, cached], dtype=torch.float64)
    version, numbers, gauss = random.getstate()
    yield "python", torch.tensor(numbers)
    yield "python rest", torch.tensor([version, float("nan") if gauss is None else gauss], dtype=torch.float64)


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    place, has_gauss, cached = states["numpy rest"].tolist()
    words = states["numpy"].numpy().astype(numpy.uint32)
    numpy.random.set_state(("MT19937", words, int(place), int(has_gauss), cached))
    version, gauss = states["python rest"].tolist()
    random.setstate((int(version), tuple(states["python"].tolist()), None if gauss != gauss else gauss))
