"""The contract between the method and the way a model is spread over processes.

Stages call these operations and never ask which backend they have. Two kinds of sum are kept apart because mixing
them up is the typical bug: under DDP every rank holds every weight, so adding a fact about weights over ranks counts
it `num_ranks` times, while a fact about a batch must be added exactly once.

| operation                           | meaning                                                                   |
|-------------------------------------|---------------------------------------------------------------------------|
| prepare(model, optimizer)           | place (and, with an optimizer, wrap) the model; once per model              |
| unwrap(model)                       | the model under the wrappers, to read names and attach hooks                |
| share(items)                        | the items this rank works on; padded where a forward is a collective        |
| shard(model, target)                | this rank's piece of a weight, where it starts, and its gradient            |
| sum_over_shards / max_over_shards   | combine facts about disjoint pieces of weights                              |
| sum_over_data(tensors)              | combine facts about different batches                                       |
| sum_for_jobs(jobs)                  | the moments of each job, summed over data, on the rank that will solve it    |
| map_targets(model, jobs, solve)     | whole-row work: each job solved by one rank, the result on every rank       |
| look_at_targets(model, jobs, look)  | the same without a result: the rank that will solve a job reads its weights |
| write_mask(model, target, keep)     | zeros in the live weight and in any master copy behind it                   |
| no_sync / backward / clip_grad_norm | one optimizer step made of micro-batches                                    |
| inner_optimizer(optimizer)          | the torch optimizer whose step really moves the weights                     |
| full_state(model)                   | full weights by name, on the main rank's CPU                                |
"""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from tinygn_dist.anatomy import Target
from tinygn_dist.backends import collectives
from tinygn_dist.errors import UserError

log = logging.getLogger(__name__)
Item = TypeVar("Item")


@dataclass(frozen=True)
class Shard:
    """This rank's piece of a target.

    weight: the live storage, any shape, possibly empty. offset: index of its first element in the flattened target *as
    stored* (which `target.start` places in a parameter that holds several). grad: same shape, or None. Masks of a
    target have this shape on each rank.
    """

    weight: torch.Tensor
    offset: int
    grad: torch.Tensor | None = None


@dataclass
class Job:
    """Row work on targets that share one input. moments: this rank's partial sums over its data, until
    `sum_for_jobs` completes them on the rank that solves the job and empties them elsewhere."""

    targets: tuple[Target, ...]
    moments: list[torch.Tensor]
    cost: float
    extra: dict[str, Any] = field(default_factory=dict)


# solve(job, whole (out, in) weights) -> for each target (new weight, keep mask), both (out, in)
Solve = Callable[[Job, list[torch.Tensor]], list[tuple[torch.Tensor, torch.Tensor]]]

Look = Callable[[Job, list[torch.Tensor]], None]


class Backend(ABC):
    """See the module's table. `accelerator` is private to backends: stages never touch it."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.rank: int = accelerator.process_index
        self.num_ranks: int = accelerator.num_processes
        self.is_main: bool = accelerator.is_main_process

    # -- where the model is ------------------------------------------------------------------------------------------
    @abstractmethod
    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any: ...

    @abstractmethod
    def unwrap(self, model: nn.Module) -> nn.Module: ...

    @abstractmethod
    def release(self, *prepared: Any) -> None: ...

    @abstractmethod
    def share(self, items: Sequence[Item]) -> list[tuple[Item, bool]]: ...

    @abstractmethod
    def shard(self, model: nn.Module, target: Target) -> Shard: ...

    @abstractmethod
    def full_state(self, model: nn.Module) -> dict[str, torch.Tensor]: ...

    # -- combining facts ---------------------------------------------------------------------------------------------
    @abstractmethod
    def sum_over_shards(self, tensor: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def max_over_shards(self, tensor: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def sum_over_data(self, tensors: Iterable[torch.Tensor]) -> None: ...

    @abstractmethod
    def sum_for_jobs(self, jobs: Sequence[Job]) -> None: ...

    # -- writing -----------------------------------------------------------------------------------------------------
    @abstractmethod
    def map_targets(self, model: nn.Module, jobs: Sequence[Job], solve: Solve) -> dict[str, torch.Tensor]: ...

    @abstractmethod
    def look_at_targets(self, model: nn.Module, jobs: Sequence[Job], look: Look) -> None: ...

    @abstractmethod
    def write_mask(self, model: nn.Module, target: Target, keep: torch.Tensor) -> None: ...

    # -- training ----------------------------------------------------------------------------------------------------
    @abstractmethod
    def no_sync(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager: ...

    @abstractmethod
    def inner_optimizer(self, optimizer: Any) -> torch.optim.Optimizer: ...

    def backward(self, loss: torch.Tensor) -> None:
        self._accelerator.backward(loss)

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> float:
        return float(self._accelerator.clip_grad_norm_(parameters, max_norm))

    # -- the same on every backend -----------------------------------------------------------------------------------
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
        """A stretch without collectives in which any rank may fail: all ranks then raise the same one-line error."""
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

    def deal(self, costs: Sequence[float]) -> list[int]:
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
