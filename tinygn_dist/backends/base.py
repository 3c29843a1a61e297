"""The contract between the method and the way a model is spread over processes.

Stages call these operations and never ask which backend they have. Two kinds of sum are kept apart because mixing
them up is the typical bug: under DDP every rank holds every weight, so adding a fact about weights over ranks counts
it `num_ranks` times, while a fact about a batch must be added exactly once.

| operation                           | meaning                                                                   |
|-------------------------------------|---------------------------------------------------------------------------|
| place(origin)                       | a placed model; where weights are sharded no rank ever holds it whole       |
| prepare(model, optimizer)           | place a model once; with an optimizer, wrap the placed model for training   |
| release(model, *prepared)           | end training: the model is placed as before, with the trained weights       |
| unwrap(model)                       | the model under the wrappers, to read names and attach hooks                |
| in_fp32(model)                      | context: a placed model's weights and buffers in fp32, for training         |
| share(items)                        | the items this rank works on; padded where a forward is a collective        |
| share_over_replicas / ..within..    | the same in two steps: copies of the model, then the ranks that hold one    |
| on_main(work)                       | work that runs forwards, for the main rank (all take part where they must)  |
| shard(model, matrix)                | this rank's piece of a weight and where it starts                           |
| gather / cut                        | whole tensor from the pieces of every rank (a collective) / piece of a whole|
| whole(model, name)                  | a whole parameter or buffer on every rank, to read, one at a time           |
| full_tensors(model)                 | all of them by name, tied ones once, one after the other (collectives)      |
| pieces(model)                       | the same as what this rank holds of each, flat                              |
| from_main(tensor, shape, dtype)     | the main rank's tensor on every rank                                        |
| by_rows(model, matrix, piece, f)    | f on whole rows of something shaped like the shards, as pieces again        |
| gradient_sums(model, matrices, f)    | sums over micro-batches of f(gradient), as pieces                           |
| sum_over_shards / max_over_shards   | combine facts about disjoint pieces of weights                              |
| sum_over_data(tensors)              | combine facts about different batches                                       |
| sum_for_jobs(jobs)                  | the moments of each job, summed over data, on the rank that will solve it    |
| map_matrices(model, jobs, solve)     | whole-row work: each job solved by one rank; weights written, extras returned|
| look_at_targets(model, jobs, look)  | the same without a result: the rank that will solve a job reads its weights |
| write(model, matrix, piece)         | new values of this rank's piece, in the live weight and any master copy     |
| write_mask(model, matrix, keep)     | zeros in the live weight and in any master copy behind it                   |

What concerns a model in training (steps, the optimizer's state) is in training.py.

The operations of base.py that are not abstract are right where every rank holds every weight whole; backends that
shard the weights override them.
"""

from __future__ import annotations

import contextlib
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from tinygn_dist.backends import collectives
from tinygn_dist.backends.gradients import GradientSums, hooked
from tinygn_dist.backends.optimizer_state import Training
from tinygn_dist.backends.pieces import Edited, Extras, Job, Look, Origin, Shard, Solve, tensor_named, tensors_of
from tinygn_dist.errors import UserError
from tinygn_dist.models.anatomy import Matrix

log = logging.getLogger(__name__)
Item = TypeVar("Item")
_Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def _layout_of(result: Edited) -> _Layout:
    """Shape and dtype of each extra, which other ranks need before it can be sent."""
    return {name: (tuple(value.shape), value.dtype) for name, value in result.extras.items()}


class Backend(Training):
    """See the module's table. `accelerator` is private to backends: stages never touch it."""

    shards_weights = False
    """whether a rank may hold only a piece of a weight, or a master copy beside it"""
    splits_weights = False
    """whether a rank holds only a piece of a weight"""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.rank: int = accelerator.process_index
        self.num_ranks: int = accelerator.num_processes
        self.is_main: bool = accelerator.is_main_process
        self.layout = {"backend": type(self).__name__, "num_ranks": self.num_ranks}
        """plain values: saved pieces of weights fit where they are equal"""

    # -- where the model is ------------------------------------------------------------------------------------------
    @abstractmethod
    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any: ...

    @abstractmethod
    def release(self, model: nn.Module, *prepared: Any) -> None: ...

    def place(self, origin: Origin) -> nn.Module:
        with self.together("loading the model"):
            model = origin.take_whole()
        return self.prepare(model)

    def spread_buffers(self, model: nn.Module) -> None:
        """The main rank's buffers everywhere: running statistics of norms differ, because each rank saw its own
        data."""
        for buffer in self.unwrap(model).buffers():
            collectives.broadcast_(buffer.data, 0)

    @contextlib.contextmanager
    def in_fp32(self, model: nn.Module) -> Iterator[None]:
        """Afterwards every tensor has its own dtype again: buffers are often fp32 in a bf16 model, and must stay so."""
        before = {name: tensor.dtype for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        self._cast(model, {n: torch.float32 if dtype.is_floating_point else dtype for n, dtype in before.items()})
        yield
        self._cast(model, before)

    def _cast(self, model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.data = tensor.data.to(dtypes[name])

    def share(self, items: Sequence[Item]) -> list[tuple[Item, bool]]:
        """(item, whether it counts); an item that does not count is run so that all ranks run equally many."""
        return [(item, True) for item in items[self.rank :: self.num_ranks]]

    def share_over_replicas(self, items: Sequence[Item]) -> list[Item]:
        """What the model copy that this rank belongs to works on; ranks that share one copy get the same."""
        return list(items) if self.shards_weights else [item for item, _ in self.share(items)]

    def share_within_replica(self, items: Sequence[Item]) -> list[tuple[Item, bool]]:
        """What of its copy's work this rank does, as `share` says it."""
        return self.share(items) if self.shards_weights else [(item, True) for item in items]

    def on_main(self, work: Callable[[], Item]) -> Item | None:
        """What `work` returned on the main rank; on the others None or the value of their own run."""
        self.barrier()
        result = work() if self.is_main else None
        self.barrier()
        return result

    # -- pieces of weights -------------------------------------------------------------------------------------------
    def shard(self, model: nn.Module, matrix: Matrix) -> Shard:
        return Shard(matrix.within(self.unwrap(model).get_parameter(matrix.parameter).data), 0)

    def gather(self, model: nn.Module, matrix: Matrix, piece: torch.Tensor) -> torch.Tensor:
        return piece

    def cut(self, model: nn.Module, matrix: Matrix, whole: torch.Tensor) -> torch.Tensor:
        return whole

    def whole(self, model: nn.Module, name: str) -> torch.Tensor:
        """To be read only, and dropped before the next: it may be a copy."""
        return tensor_named(self.unwrap(model), name).data

    def full_tensors(self, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        for name in tensors_of(self.unwrap(model)):
            yield name, self.whole(model, name)

    def pieces(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().reshape(-1) for name, tensor in tensors_of(self.unwrap(model)).items()}

    def by_rows(
        self, model: nn.Module, matrix: Matrix, piece: torch.Tensor, work: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """`work` maps (rows, in) to the same shape, row by row. Moves nothing where the pieces are made of whole
        rows."""
        if piece.dim() == 2 and matrix.input_dim == 1:
            return work(piece)
        whole = matrix.oriented(work(matrix.oriented(self.gather(model, matrix, piece))))
        return self.cut(model, matrix, whole.contiguous())

    @contextlib.contextmanager
    def gradient_sums(
        self, model: nn.Module, matrices: Sequence[Matrix], function: Callable[[torch.Tensor], torch.Tensor]
    ) -> Iterator[GradientSums]:
        """Inside, every backward of a micro-batch adds function(fp32 gradient); afterwards `.moments` are complete over
        the data of all ranks. The matrices must require gradients."""
        sums = self._empty_sums(model, matrices, function)
        with hooked(sums, [(self.unwrap(model).get_parameter(t.parameter), t, lambda whole: whole) for t in matrices]):
            yield sums
        self.sum_over_data(sums.moments.tensors())

    def _empty_sums(self, model: nn.Module, matrices: Sequence[Matrix], function: Callable) -> GradientSums:
        sums = GradientSums(function)
        for matrix in matrices:
            weight = self.shard(model, matrix).weight
            sums.moments.reserve(matrix.name, tuple(weight.shape), weight.device)
        return sums

    # -- combining facts ---------------------------------------------------------------------------------------------
    def sum_over_shards(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def max_over_shards(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def sum_over_data(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            collectives.sum_(tensor)

    def from_main(self, tensor: torch.Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        held = tensor.to(self.device) if self.is_main else torch.empty(shape, dtype=dtype, device=self.device)
        return collectives.broadcast_(held.contiguous(), 0)

    def sum_for_jobs(self, jobs: Sequence[Job]) -> None:
        for job, owner in zip(jobs, self.deal([job.cost for job in jobs]), strict=True):
            for index, moment in enumerate(job.moments):
                collectives.sum_(moment, owner=owner)
                if owner != self.rank:
                    job.moments[index] = moment.new_empty(0)

    # -- writing -----------------------------------------------------------------------------------------------------
    @abstractmethod
    def write(self, model: nn.Module, matrix: Matrix, piece: torch.Tensor) -> None: ...

    @abstractmethod
    def write_mask(self, model: nn.Module, matrix: Matrix, keep: torch.Tensor) -> None: ...

    def map_matrices(self, model: nn.Module, jobs: Sequence[Job], solve: Solve) -> dict[str, Extras]:
        """Writes the new weights; returns the extras of each matrix by its name (see `Edited`).

        Every weight is gathered in turn and kept by its owner alone; the owners solve at the same time; then every
        result is sent once and each rank keeps its piece.
        """
        owners = self.deal([job.cost for job in jobs])
        mine, edited = self._owned_weights(model, jobs, owners), {}
        with self.together("solving the layers"):
            for index in list(mine):
                edited[index] = solve(jobs[index], mine.pop(index))
        layouts: dict[int, list[_Layout]] = {}
        for of_rank in self.everyone({index: list(map(_layout_of, results)) for index, results in edited.items()}):
            layouts |= of_rank
        extras = {}
        for index, (job, owner) in enumerate(zip(jobs, owners, strict=True)):
            for position, matrix in enumerate(job.matrices):
                result = edited[index][position] if owner == self.rank else None
                extras[matrix.name] = self._spread_result(model, matrix, result, layouts[index][position], owner)
        return extras

    def look_at_targets(self, model: nn.Module, jobs: Sequence[Job], look: Look) -> None:
        mine = self._owned_weights(model, jobs, self.deal([job.cost for job in jobs]))
        with self.together("looking at the layers"):
            for index in list(mine):
                look(jobs[index], mine.pop(index))

    def _owned_weights(
        self, model: nn.Module, jobs: Sequence[Job], owners: Sequence[int]
    ) -> dict[int, list[torch.Tensor]]:
        """The whole (out, in) weights of the jobs this rank owns, by index of the job."""
        mine: dict[int, list[torch.Tensor]] = {}
        for index, (job, owner) in enumerate(zip(jobs, owners, strict=True)):
            for matrix in job.matrices:
                weight = matrix.oriented(self.gather(model, matrix, self.shard(model, matrix).weight))
                if owner == self.rank:
                    mine.setdefault(index, []).append(weight)
        return mine

    def _spread_result(
        self, model: nn.Module, matrix: Matrix, result: Edited | None, layout: _Layout, owner: int
    ) -> Extras:
        """Write the owner's new (out, in) weight everywhere; returns the extras, in pieces where they are shaped like
        it."""

        def stored(whole: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
            sent = torch.empty(matrix.stored_shape, dtype=dtype, device=self.device)
            if whole is not None:
                sent.copy_(matrix.oriented(whole))
            return self.cut(model, matrix, collectives.broadcast_(sent, owner))

        dtype = self.shard(model, matrix).weight.dtype
        self.write(model, matrix, stored(result and result.weight, dtype))
        extras: Extras = {}
        for name, (shape, dtype) in layout.items():
            value = result and result.extras[name]
            if shape == matrix.shape:
                extras[name] = stored(value, dtype)
            else:
                sent = torch.empty(shape, dtype=dtype, device=self.device)
                if value is not None:
                    sent.copy_(value)
                extras[name] = collectives.broadcast_(sent, owner)
        return extras

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
