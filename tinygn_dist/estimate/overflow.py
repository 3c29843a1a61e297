"""Where does a value stop being finite? An overflow is met where something reads it, and is named where it arises."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import ModelHook
from torch import nn

from tinygn_dist.errors import UserError
from tinygn_dist.estimate.hooks import first, first_input
from tinygn_dist.estimate.problem import Problem


def refuse_overflow(problem: Problem, what: str | None, instead: str = "") -> None:
    """UserError on every rank when any rank says `what` is not finite; it names the first module whose output is not.
    instead: what to do where all outputs are finite. A collective."""
    said = [one for one in problem.backend.everyone(what) if one is not None]
    if said:
        where = first_overflow(problem)
        cause = f"{where}; use another model.dtype, such as bfloat16" if where else instead
        raise UserError(f"{said[0]}; {cause or 'check the model and the data'}")


def first_overflow(problem: Problem) -> str | None:
    """The first module, in the order they run, whose output holds NaN or inf while its input does not, on the first
    micro-batch of calibration data where one does; None where all are finite. A collective."""
    found: list[str] = []
    leaves = [(name, module) for name, module in problem.bare.named_modules() if not list(module.children())]
    hooks = [(module, _Finite(name, found)) for name, module in leaves]
    mine: list[tuple[int, str]] = []
    for micro_batch, _ in problem.forwards(problem.layers_alone, hooks):
        mine += [(micro_batch.number, name) for name in found[:1]]
        found.clear()
    everywhere = [one for ranks in problem.backend.everyone(mine) for one in ranks]
    return min(everywhere)[1] if everywhere else None


class _Finite(ModelHook):
    def __init__(self, name: str, found: list[str]) -> None:
        self.name, self.found = name, found

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        hidden = first_input(args, kwargs)
        self._began_finite = hidden is None or not hidden.is_floating_point() or bool(hidden.isfinite().all())
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        hidden = first(output)
        looks = isinstance(hidden, torch.Tensor) and hidden.is_floating_point() and not self.found
        if looks and not bool(hidden.isfinite().all()):
            kind = str(hidden.dtype).removeprefix("torch.")
            where = f"{self.name} gives NaN or inf in {kind}"
            self.found.append(f"{where} from finite inputs" if self._began_finite else f"{self.name} reads NaN or inf")
        return output
