"""Backpropagation where it fits in memory, else forward passes alone: what a backward takes, and what is free."""

from __future__ import annotations

import contextlib
import logging
import resource
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tinygn_dist.config import PruneConfig
from tinygn_dist.estimate.backprop import gradients_of
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.runtime.stage_timer import give_back

log = logging.getLogger(__name__)
Estimator = Literal["finite-difference", "backprop"]
SPARE = 0.8
"""of the free memory: what the allocator cannot use, and what other parts of the process take meanwhile"""
_CGROUPS = (  # limit, usage and page cache that the system takes back, of cgroup v2 and v1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file "),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file ",
    ),
)


def resolve_estimator(problem: Problem, options: PruneConfig, held: int = 0) -> PruneConfig:
    """The options with `estimator: auto` replaced by what fits, the same on every rank; says which and why in the log
    and the report. held: bytes that the statistics of a backward take beside it."""
    if options.estimator != "auto":
        return options
    chosen, why = choose(problem, held)
    if not any(note.startswith(f"estimator {chosen}") for note in problem.notes):  # at every update of masks that grow
        log.info("%s", why)
        problem.notes.append(why)
    return options.model_copy(update={"estimator": chosen})


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
    told = backend.everyone((socket.gethostname(), free, needed))
    if any(free is None for _, free, _ in told):
        return (
            "finite-difference",
            f"estimator finite-difference: the free memory of {backend.device.type} is not known",
        )
    if backend.device.type == "cpu":  # ranks of one machine share its memory
        hosts = [host for host, _, _ in told]
        told = [(host, free / hosts.count(host), needed) for host, free, needed in told]
    _, free, needed = min(told, key=lambda facts: SPARE * facts[1] - facts[2])
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


def free_bytes(device: torch.device) -> int | None:
    """What this process could still take on a device; None where nobody says. On a CPU the least of the machine's
    available memory, the control group's and the process's own limit."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    available = _number_after(Path("/proc/meminfo"), "MemAvailable:")
    rooms = [room for room in (available and 1024 * available, *map(_group_room, _CGROUPS)) if room is not None]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    mapped = _number_after(Path("/proc/self/status"), "VmSize:")
    if limit != resource.RLIM_INFINITY and mapped is not None:
        rooms.append(max(limit - 1024 * mapped, 0))
    return min(rooms, default=None)


def peak_gib(device: torch.device) -> dict[str, float]:
    """The most that this process held so far, by the names in the report."""
    found = {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if device.type == "cuda":
        found["peak_device_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return found


def _group_room(files: Sequence[str]) -> int | None:
    limit, usage, stat, cache = files
    try:
        most, used = Path(limit).read_text().strip(), int(Path(usage).read_text())
    except (OSError, ValueError):
        return None
    reclaimed = _number_after(Path(stat), cache) or 0
    return max(int(most) - used + reclaimed, 0) if most.isdigit() else None


def _number_after(file: Path, word: str) -> int | None:
    try:
        found = file.read_text().partition(word)[2].split()
    except OSError:
        return None
    return int(found[0]) if found else None
