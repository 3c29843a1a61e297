"""A model in training as a checkpoint holds it: whole tensors by kind and name, written and read one at a time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
from torch import nn

from tinygn_dist.backends.base import Backend
from tinygn_dist.backends.pieces import Origin, Run, filled, hollow
from tinygn_dist.checkpoints.run_checkpoint import CONSTRAINT, Saved, Writer
from tinygn_dist.train.forward_only.loop import ForwardOnly
from tinygn_dist.train.loop import InTraining

_NOT_OF_TRAINING = ("buffer", "random", CONSTRAINT)
"""kinds of tensors that no optimizer's state has"""


def write_weights(
    writer: Writer, model: nn.Module, now: InTraining | None, backend: Backend, states: bool = True
) -> None:
    """Every parameter of a placed model and its buffers, and where it is in training (`now`) with `states` also those
    of the optimizer and of random numbers. Collectives; each parameter is written by one rank."""
    bare = backend.unwrap(model)
    parameters = dict(bare.named_parameters())
    owners = backend.owners_of([1.0] * len(parameters))
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


def saved_origin(saved: Saved, build: Callable[[], nn.Module], like: nn.Module) -> Origin:
    """The model that `build` makes, with a checkpoint's weights and buffers; generation settings are those of
    `like`."""

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
    """Masters, optimizer state and random state, into a model prepared for training."""
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
    _read_random_states(saved, backend)


def _read_random_states(saved: Saved, backend: Backend) -> None:
    """The random state of a rank that was not there is that of another one."""
    source = backend.rank % saved.facts["num_ranks"]
    _set_random_states({name: saved.tensor(f"random|{name}|{source}") for name, _ in _random_states()})


def write_forward_only(writer: Writer, training: ForwardOnly) -> None:
    """Numbers; weights and masks are written apart."""
    writer.facts["forward_only"] = training.state_dict()


def read_forward_only(saved: Saved, training: ForwardOnly) -> None:
    """At any world size on any backend. The weights have been rounded to the model's dtype, and are read again in
    fp32."""
    probes = training.probes
    read_weights(saved, probes.model, probes.backend)
    training.load_state_dict(saved.facts["forward_only"])
    _read_random_states(saved, probes.backend)


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
