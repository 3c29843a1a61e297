"""The processes of a job, and what they tell each other. Work is dealt out here, and no rank fails alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator

from tinygn_dist.backends import collectives
from tinygn_dist.errors import UserError

Item = TypeVar("Item")


class Processes:
    """`accelerator` is private to backends: stages never touch it."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.rank: int = accelerator.process_index
        self.num_ranks: int = accelerator.num_processes
        self.is_main: bool = accelerator.is_main_process
        self.layout = {"backend": type(self).__name__, "num_ranks": self.num_ranks}
        """plain values: saved pieces of weights fit where they are equal"""

    def barrier(self) -> None:
        self._accelerator.wait_for_everyone()

    def everyone(self, value: Any) -> list[Any]:
        """Every rank's small picklable value, in rank order."""
        return collectives.gather_objects(value)

    def agree(self, value: Any, what: str) -> None:
        """UserError on every rank when `value` is not the same everywhere."""
        values = self.everyone(value)
        odd = [rank for rank, other in enumerate(values) if other != values[0]]
        if odd:
            raise UserError(
                f"ranks disagree about {what}: rank 0 has {values[0]}, rank {odd[0]} has {values[odd[0]]}; "
                "start every rank with the same command, files and code"
            )

    @contextlib.contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """A stretch without collectives in which any rank may fail: all ranks then raise the same one-line error. Never
        around another one: a rank that fails before the inner one would be answered by it."""
        failure: BaseException | None = None
        try:
            yield
        except Exception as error:
            failure = error
        told = self.everyone(None if failure is None else (isinstance(failure, UserError), str(failure)))
        failed = {rank: what for rank, what in enumerate(told) if what is not None}
        if not failed:
            return
        if failure is not None and (not isinstance(failure, UserError) or len(failed) == self.num_ranks):
            raise failure
        rank, (_, message) = next(iter(failed.items()))
        raise UserError(f"{doing} failed on rank {rank}: {message}")

    def main_first(self, work: Callable[[], Item]) -> Item:
        """`work()` on the main rank, then on the others (who find its caches warm), also when the main rank failed:
        Accelerate's own context would leave them waiting for it."""
        if not self.is_main:
            self.barrier()
        try:
            return work()
        finally:
            if self.is_main:
                self.barrier()

    def on_main(self, work: Callable[[], Item]) -> Item | None:
        """What `work` returned on the main rank; on the others None or the value of their own run."""
        self.barrier()
        result = work() if self.is_main else None
        self.barrier()
        return result

    def sum_over_data(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            collectives.sum_(tensor)

    def from_main(self, tensor: torch.Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        held = tensor.to(self.device) if self.is_main else torch.empty(shape, dtype=dtype, device=self.device)
        return collectives.broadcast_(held.contiguous(), 0)

    def dealt(self, items: Sequence[Item]) -> list[tuple[Item, bool]]:
        """(item, whether it counts); an item that does not count is run so that all ranks run equally many."""
        return [(item, True) for item in items[self.rank :: self.num_ranks]]

    def owners_of(self, costs: Sequence[float]) -> list[int]:
        """Owner rank of each piece of work: largest first to the least loaded rank. The same on every rank."""
        load, owner = [0.0] * self.num_ranks, [0] * len(costs)
        for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            owner[index] = min(range(self.num_ranks), key=lambda r: (load[r], r))
            load[owner[index]] += costs[index]
        return owner

    def start_trackers(self, config: dict[str, Any]) -> None:
        self._accelerator.init_trackers("tinygn", config=config)

    def track(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Send metrics to the configured trackers, from the main rank."""
        self._accelerator.log(metrics, step=step)

    def close(self) -> None:
        self.barrier()
        self._accelerator.end_training()
