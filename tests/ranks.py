"""Real connected processes for tests (gloo, or NCCL where each has a GPU): one group of N per session, each test sends
it a function.

A launch costs 6 to 10 seconds, a call in a running group milliseconds. A group in which a rank failed is thrown away.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.multiprocessing as mp

COLLECTIVE_SECONDS = 60
CALL_SECONDS = 180


class RankFailed(AssertionError):
    """A worker raised: its traceback."""


class Ranks:
    """`call(function, *arguments)` runs function(backend, *arguments) on every rank and returns the results by rank."""

    def __init__(self, size: int, settings: dict[str, Any] | None = None, cuda: bool = False) -> None:
        self.size, self._settings, self._cuda = size, settings or {}, cuda
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def call(self, function: Callable[..., Any], *arguments: Any, seconds: float = CALL_SECONDS) -> list[Any]:
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results: dict[int, Any] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting:
            ready = wait(list(waiting), timeout=seconds)
            if not ready:
                self.stop()
                raise RankFailed(f"ranks {sorted(waiting.values())} of {self.size} did not answer in {seconds} s")
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    fine, value = pipe.recv()
                except EOFError:
                    fine, value = False, "the process died"
                if not fine:
                    self.stop()
                    raise RankFailed(f"rank {rank} of {self.size}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(self.size)]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context, port = mp.get_context("spawn"), free_port()
        for rank in range(self.size):
            here, there = context.Pipe()
            arguments = (there, rank, self.size, port, self._settings, self._cuda)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)


def _serve(pipe: Connection, rank: int, size: int, port: int, settings: dict[str, Any], cuda: bool) -> None:
    facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in facts.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": str(not cuda).lower(), "OMP_NUM_THREADS": "1"}
    import torch.distributed as dist

    from tests.one_card import share_cards
    from tinygn_dist.backends import make_backend
    from tinygn_dist.config import DistributedConfig

    torch.set_num_threads(1)
    share_cards()
    asked = DistributedConfig(num_processes=size, timeout_seconds=COLLECTIVE_SECONDS, **settings)
    backend = make_backend(asked)
    connected = dist.get_world_size() if dist.is_initialized() else 1
    assert connected == backend.num_ranks == size and backend.rank == rank, "the test rig itself is not connected"
    assert backend.device.type == ("cuda" if cuda else "cpu")
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, _on_cpu(function(backend, *arguments))))
        except Exception:
            pipe.send((False, traceback.format_exc()))


def _on_cpu(value: Any) -> Any:
    """A result without device memory, which cannot travel to a process that has other devices."""
    match value:
        case torch.Tensor():
            return value.detach().cpu()
        case dict():
            return {key: _on_cpu(inner) for key, inner in value.items()}
        case list():
            return [_on_cpu(inner) for inner in value]
        case tuple() if type(value) is tuple:
            return tuple(_on_cpu(inner) for inner in value)
    return value


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
