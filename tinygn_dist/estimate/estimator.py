"""Backpropagation where it fits in memory, else forward passes alone."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Literal

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tinygn_dist.estimate.backprop import gradients_of
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.runtime.memory import free_bytes
from tinygn_dist.runtime.stage_timer import give_back

Estimator = Literal["finite-difference", "backprop"]
SPARE = 0.8
"""of the free memory: what the allocator cannot use, and what other parts of the process take meanwhile"""


def resolve_estimator(problem: Problem, asked: str, held: int = 0) -> tuple[Estimator, str | None]:
    """The estimator, the same on every rank, and for `auto` a note that says why this one. held: bytes that the
    statistics of a backward take beside it."""
    return choose(problem, held) if asked == "auto" else (asked, None)


def choose(problem: Problem, held: int = 0) -> tuple[Estimator, str]:
    """The estimator, and a line that says why."""
    backend = problem.backend
    if (
        backend.shards_weights or backend.weights_wait
    ):  # a forward without its backward would leave fetched weights behind
        return (
            "backprop",
            "estimator backprop: memory is not measured where weights are gathered or fetched for each forward",
        )
    needed, free = backward_bytes(problem) + held, free_bytes(backend.device)
    ranks = backend.everyone((socket.gethostname(), free, needed))
    if any(free is None for _, free, _ in ranks):
        return (
            "finite-difference",
            f"estimator finite-difference: the free memory of {backend.device.type} is not known",
        )
    if backend.device.type == "cpu":  # ranks of one machine share its memory
        hosts = [host for host, _, _ in ranks]
        ranks = [(host, free / hosts.count(host), needed) for host, free, needed in ranks]
    _, free, needed = min(ranks, key=lambda facts: SPARE * facts[1] - facts[2])
    fits = needed <= SPARE * free
    return (
        "backprop" if fits else "finite-difference",
        f"estimator {'backprop' if fits else 'finite-difference'}: a backward pass takes {needed / 2**30:.2f} GiB, "
        f"{free / 2**30:.2f} GiB are free on the rank with the least room",
    )


def backward_bytes(problem: Problem) -> int:
    """What a backward takes beside a forward: all that autograd keeps for the largest micro-batch, and twice the
    largest of it, for gradients on their way. Measured by a forward in which autograd asks for each tensor and is given
    none to keep, so it takes no more than inference. Gradients of weights are not in it, but the inputs that they would
    need are."""
    batch = max(problem.batches, key=lambda batch: max(value.numel() for value in batch.values()))
    own = {p.untyped_storage().data_ptr() for p in problem.bare.parameters()}
    learning = [p for p in problem.bare.parameters() if p.is_floating_point()]
    with gradients_of(problem.bare, learning), saved_sizes(own) as sizes:
        problem.losses(problem.on_device(batch))
    give_back()  # what is free is asked next
    return sum(sizes) + 2 * max(sizes, default=0)


@contextlib.contextmanager
def saved_sizes(known: set[int]) -> Iterator[list[int]]:
    """The bytes of every storage that autograd wants to keep inside the context, once each; none is kept, so no
    backward can follow. known: data pointers that do not count (weights)."""
    sizes: list[int] = []
    alive: dict[int, StorageWeakRef] = {}

    def note(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        before = alive.get(pointer)  # memory that was freed in between is another tensor's
        if pointer not in known and (before is None or before.expired()):
            alive[pointer] = StorageWeakRef(storage)
            sizes.append(storage.nbytes())

    def gone(_: None) -> torch.Tensor:
        raise AssertionError("a backward pass in a forward that only counts")

    with torch.autograd.graph.saved_tensors_hooks(note, gone):
        yield sizes
