"""Which matrices does the calibration data reach? What no data passes through has no statistics, whatever the
criterion.

Some Linear modules are never called: Mamba multiplies `dt_proj.weight` itself, nn.MultiheadAttention its
`out_proj.weight`. Others are called for other inputs alone: the tower and projector of a vision-language model that
is given text, a head that the loss does not use.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from tinygn_dist.errors import UserError
from tinygn_dist.estimate.hooks import Observer
from tinygn_dist.estimate.overflow import refuse_overflow
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.models.anatomy import Matrix

log = logging.getLogger(__name__)
_LISTED = 6
"""kinds of names in a note"""


class Reached(NamedTuple):
    matrices: tuple[Matrix, ...]
    """those with data; experts to which no token is routed count, as their module runs"""
    notes: tuple[str, ...]


def reached_by_data(problem: Problem, matrices: Sequence[Matrix]) -> Reached:
    """The matrices that run in a forward of the calibration data, and a note that names the others. A collective.

    As many micro-batches as there are ranks are enough where they reach everything; else all are looked at. Raises
    UserError where the loss has no value, where no token counts in it, and where nothing is reached.
    """
    if not problem.batches:
        return Reached(tuple(matrices), ())
    at_once, modules = problem.backend.num_ranks, {matrix.module for matrix in matrices}
    called, counted = _look(replace(problem, batches=problem.batches[:at_once]), modules)
    if (called != modules or not counted) and len(problem.batches) > at_once:
        more, counts = _look(replace(problem, batches=problem.batches[at_once:]), modules - called)
        called, counted = called | more, counted + counts
    if not counted:
        raise UserError(
            "no calibration token or label counts in the loss (all labels are ignored, -100): scores of nothing; give "
            "rows with labels"
        )
    missed = [matrix for matrix in matrices if matrix.module not in called]
    if len(missed) == len(matrices):
        raise UserError(f"no calibration data reaches {_kinds(missed)}: nothing can be scored; give data that does")
    notes = (_note(missed),) if missed else ()
    for note in notes:
        log.warning("%s", note)
    return Reached(tuple(matrix for matrix in matrices if matrix.module in called), notes)


def _look(problem: Problem, modules: set[str]) -> tuple[set[str], int]:
    """Of these modules those that ran, and how many tokens or labels counted, over all ranks."""
    here: set[str] = set()
    called: set[str] = set()

    def observer(name: str) -> Observer:
        return Observer(lambda hidden, _: here.add(name) if hidden.numel() else None)

    hooks = [(problem.bare.get_submodule(name), observer(name)) for name in sorted(modules)]
    sums = torch.zeros(2, dtype=torch.float64)
    for micro_batch, losses in problem.forwards(problem.losses, hooks):
        if micro_batch.counts:
            called |= here
            sums += torch.stack([losses.total.sum(), losses.count.sum()]).double().cpu()
        here.clear()
    problem.backend.sum_over_data([sums])
    loss, counted = sums.tolist()
    refuse_overflow(problem, None if torch.isfinite(sums[0]) else f"the loss on calibration data is {loss}")
    return set().union(*problem.backend.everyone(sorted(called))), round(counted)


def _note(missed: Sequence[Matrix]) -> str:
    return (
        f"left dense: no calibration data passes through {_kinds(missed)} ({sum(t.numel for t in missed):,} weights), "
        "so nothing is known of what they do; data that reaches them would change that"
    )


def _kinds(matrices: Sequence[Matrix]) -> str:
    """Names with their layer numbers as stars."""
    kinds = list(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", matrix.parameter) for matrix in matrices))
    more = f" and {len(kinds) - _LISTED} more" if len(kinds) > _LISTED else ""
    return ", ".join(kinds[:_LISTED]) + more
