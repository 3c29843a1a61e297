"""Movement (Sanh et al. 2020, `schedule.criterion movement`) and ADMM on the loss of the whole model (ELSA, arXiv
2510.01650, `schedule.kind admm`).

Both keep numbers laid out as this rank's torch optimizer holds a parameter (whole, rows, or a run of a flat fp32
master), so they cost one or two more fp32 numbers per weight of that and no communication in a step. Neither has a
figure on a real model: a perplexity below that of `cubic` with `obs` at the same tokens, at 70 % or more, would
bring it in.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import nn

from tinygn_dist.backends.base import Backend
from tinygn_dist.config import ScheduleConfig, Section
from tinygn_dist.config.experiments import options_of
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.models.anatomy import Matrix
from tinygn_dist.prune.sparsity.mask_updates import Best, MaskUpdate, StepStatistics, UpdatePoint

_ABOVE_ALL = torch.finfo(torch.float32).max


class BesideGradients(StepStatistics):
    """values: kind of number -> parameter -> flat fp32 piece."""

    kinds: tuple[str, ...] = ()

    def __init__(self, matrices: Sequence[Matrix], backend: Backend) -> None:
        super().__init__(matrices, backend)
        self.values: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in self.kinds}
        self.finished = False

    def attach(self, model: nn.Module, optimizers: Sequence[Any]) -> list[Any]:
        bare = self.backend.unwrap(model)
        names = [n for n in dict.fromkeys(t.parameter for t in self.matrices) if bare.get_parameter(n).requires_grad]
        return [self.backend.on_gradients(model, each, names, self.seen) for each in optimizers]

    @abstractmethod
    def seen(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        """A parameter is about to be stepped along this gradient, as the optimizer will see it (clipped)."""

    def finish(self) -> None:
        self.values, self.finished = {kind: {} for kind in self.kinds}, True

    def whole(self, model: nn.Module, optimizer: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for kind, pieces in self.values.items():
            for name, piece in self._everywhere(model, optimizer, pieces).items():
                yield f"{kind}|{name}", self.backend.join_held(model, optimizer, name, piece).cpu()

    def take(self, model: nn.Module, optimizer: Any, whole: Mapping[str, torch.Tensor]) -> None:
        self.values = {kind: {} for kind in self.kinds}
        for key, tensor in whole.items():
            kind, _, name = key.partition("|")
            piece = self.backend.cut_held(model, optimizer, name, tensor.to(self.backend.device))
            self.values[kind][name] = piece.clone()

    def _everywhere(
        self, model: nn.Module, optimizer: Any, pieces: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The same names in the same order on every rank: one whose part of a flat master has nothing of a parameter
        (ZeRO) never sees a gradient of it, and holds an empty piece."""
        seen = dict.fromkeys(name for names in self.backend.everyone(list(pieces)) for name in names)
        return {
            name: pieces[name]
            if name in pieces
            else torch.zeros_like(self.backend.held_weight(model, optimizer, name), dtype=torch.float32)
            for name in seen
        }

    def as_shards(
        self, model: nn.Module, optimizer: Any, pieces: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """By matrix, shaped like this rank's shards; zero where there is no piece. Collectives, one parameter at a
        time."""
        shards: dict[str, torch.Tensor] = {}
        pieces = self._everywhere(model, optimizer, pieces)
        for matrix in self.matrices:
            held = self.backend.shard(model, matrix).weight
            if matrix.parameter not in pieces:
                shards[matrix.name] = torch.zeros_like(held, dtype=torch.float32)
                continue
            whole = self.backend.join_held(model, optimizer, matrix.parameter, pieces[matrix.parameter])
            stored = whole[matrix.start : matrix.start + matrix.numel].view(matrix.stored_shape)
            shards[matrix.name] = self.backend.shard_of(model, matrix, stored).reshape(held.shape)
        return shards


class Movement(BesideGradients):
    """Weights on their way to zero go (Sanh et al. 2020): S = - sum over steps of w * g, the larger the better. It is
    the Taylor term of each step's batch, summed over all that training has seen."""

    kinds = ("movement",)

    def seen(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        sums = self.values["movement"]
        if self.finished:
            return
        if name not in sums:
            sums[name] = torch.zeros_like(weight, dtype=torch.float32)
        sums[name].addcmul_(weight.float(), gradient.float(), value=-1)

    def choose(self, here: UpdatePoint, keep: Mapping[str, torch.Tensor], best: Best) -> dict[str, torch.Tensor]:
        if not here.sparsity:
            return dict(keep)
        scores = self.as_shards(here.problem.model, here.optimizer, self.values["movement"])
        for name, kept in keep.items():  # a weight that is zero has stopped moving
            scores[name].masked_fill_(~kept, -_ABOVE_ALL)
        return best(scores, here.sparsity)


class Consensus(BesideGradients):
    """ADMM on the loss of the whole model (ELSA, arXiv 2510.01650): the weights x train densely and are drawn to a
    sparse copy z by penalty * (x - z + u), added to the gradient; at an update z = the largest of x + u, and u += x
    - z."""

    kinds = ("sparse", "dual")

    def __init__(self, matrices: Sequence[Matrix], backend: Backend, penalty: float, final: float) -> None:
        """final: sparsity of the copy, at every update."""
        super().__init__(matrices, backend)
        self.penalty, self.final = penalty, final

    def before_steps(self, model: nn.Module, optimizer: Any, best: Best) -> None:
        self._project(model, optimizer, best)

    def choose(self, here: UpdatePoint, keep: Mapping[str, torch.Tensor], best: Best) -> dict[str, torch.Tensor]:
        projected = self._project(here.problem.model, here.optimizer, best)
        return projected if here.sparsity else dict(keep)

    def seen(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        if name in self.values["sparse"]:
            away = weight - self.values["sparse"][name] + self.values["dual"][name]
            gradient.add_(away.to(gradient.dtype), alpha=self.penalty)

    def _project(self, model: nn.Module, optimizer: Any, best: Best) -> dict[str, torch.Tensor]:
        """The masks of z. The first call starts at u = 0 and leaves it there."""
        names = list(dict.fromkeys(matrix.parameter for matrix in self.matrices))
        weights = {name: self.backend.held_weight(model, optimizer, name).float() for name in names}
        first = not self.values["dual"]
        dual = {name: torch.zeros_like(w) for name, w in weights.items()} if first else self.values["dual"]
        sums = {name: weights[name] + dual[name] for name in names}
        keep = best({name: s.abs() for name, s in self.as_shards(model, optimizer, sums).items()}, self.final)
        for name in names:
            kept = self._held_mask(model, optimizer, name, keep)
            sparse = sums[name] * kept
            if not first:
                dual[name] += weights[name] - sparse
            self.values["sparse"][name], self.values["dual"][name] = sparse, dual[name]
        return keep

    def _held_mask(self, model: nn.Module, optimizer: Any, name: str, keep: Mapping[str, torch.Tensor]) -> torch.Tensor:
        whole = torch.ones(self.backend.num_elements(model, name), dtype=torch.bool, device=self.backend.device)
        for matrix in self.matrices:
            if matrix.parameter == name:
                gathered = self.backend.gather(model, matrix, keep[matrix.name])
                whole[matrix.start : matrix.start + matrix.numel] = gathered.reshape(-1)
        return self.backend.cut_held(model, optimizer, name, whole)


class ElsaOptions(Section):
    penalty: float = Field(0.01, gt=0)
    """strength of the pull, added to the clipped gradient"""


def make_movement(
    problem: Problem, matrices: Sequence[Matrix], schedule: ScheduleConfig, final: float
) -> StepStatistics:
    return Movement(matrices, problem.backend)


def make_consensus(
    problem: Problem, matrices: Sequence[Matrix], schedule: ScheduleConfig, final: float
) -> StepStatistics:
    asked = options_of(schedule.experiments, "elsa", ElsaOptions)
    return Consensus(matrices, problem.backend, asked.penalty, final)


def check_movement(schedule: ScheduleConfig) -> None:
    if schedule.kind == "one-shot":
        raise ValueError(
            "criterion 'movement' is summed up in training, so kind cannot be one-shot; use cubic or linear"
        )


def check_consensus(schedule: ScheduleConfig) -> None:
    if schedule.regrow != "none" or schedule.criterion != "auto":
        raise ValueError(
            f"kind admm with criterion {schedule.criterion!r} and regrow {schedule.regrow!r}: it keeps the largest "
            "weights of its own sum and masks nothing before the last update; leave both at their defaults"
        )


OPTIONS = {"elsa": ElsaOptions}
MASK_UPDATES = {
    "movement": MaskUpdate("criterion", make_movement, check_movement),
    "admm": MaskUpdate("kind", make_consensus, check_consensus),
}
