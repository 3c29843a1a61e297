"""Which layers go, each judged together with what its feed-forward takes over (`takeover`).

Plain removal says what a layer's absence costs, and most of that may be made up for: of SmolLM2-135M's layers 14 costs least
then, 17 without, and of four layers those chosen here leave a perplexity of 32.68, those of plain probes 34.89
(docs/results.md). So the layers that plain probes rank first, and the neighbours of those that are gone, are tried: moments of a
few sequences, one fit each, the loss on as many others as tell them apart (`estimate.adaptive`).
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from tinygn_dist.config import PruneConfig
from tinygn_dist.estimate.elimination import Contest, successive_elimination
from tinygn_dist.estimate.probes import Measured
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.evaluate.quality import sequence_losses
from tinygn_dist.maths.counts import Mix
from tinygn_dist.prune.structured.absorb import takers_of
from tinygn_dist.prune.structured.probing import JUDGED, REPROBED, Removals, UnitScores, order_layers, row_of
from tinygn_dist.prune.structured.scores import removable, score_units
from tinygn_dist.prune.structured.trials import Fits, Trials
from tinygn_dist.runtime.progress import Progress

log = logging.getLogger(__name__)
_TOKENS_PER_INPUT = 4
"""of the widest feed-forward, that the fits of a trial see; not tuned"""


def score_layers(
    probed: Problem,
    fitted: Problem,
    tried: Problem,
    removed: int,
    options: PruneConfig,
    protect: Sequence[int] = (),
) -> UnitScores:
    """The order in which `removed` layers go. probed: sequences of plain probes, and of other criteria. fitted, tried: those of the
    fits, and of the losses that they leave."""
    scores, anatomy = UnitScores(), probed.anatomy
    by_removal = removed and options.criterion in ("auto", "obs", "removal")
    if by_removal and options.compensate and any(group.added for group in anatomy.groups):
        layers = removable(anatomy, protect)
        order_layers(scores, probed, layers, removed, options, _Judge(fitted, tried, options).again)
    else:
        score_units(probed, Mix(layers=removed), options, scores=scores, protect=protect)
    return scores


class _Judge:
    def __init__(self, fitted: Problem, tried: Problem, options: PruneConfig) -> None:
        self._problem, self._options = replace(tried, progress=Progress(shown=False)), options
        width = max(group.num_units for group in fitted.anatomy.of_kind("channels"))
        self._fitted = fitted.first(math.ceil(_TOKENS_PER_INPUT * width / _rows_of_one(fitted)))
        self._dense: torch.Tensor | None = None
        self._left: dict[tuple[int, ...], float] = {(): 0.0}  # what is added to the dense loss without layers

    def again(self, removals: Removals, able: Sequence[int], gone: Sequence[int]) -> dict[int, float]:
        """What each of some layers adds to the loss that is left without those gone; able: layers that may go, best first."""
        if self._dense is None:
            self._dense, _ = sequence_losses(self._problem, "evaluating")
            removals.spend(len(self._problem.batches))
        groups = list(self._in_room([[*gone, layer] for layer in worth_trying(able, gone)]))
        told: dict[int, float] = {}
        with removals.problem.progress.bar(f"judging layer {len(gone) + 1} to go", sum(map(len, groups))) as advance:
            for orders in groups:
                if removals.spent:
                    break
                self._left |= self._race(orders, removals, adaptive=len(groups) == 1 and self._options.probe_adaptive)
                told |= {order[-1]: self._left[tuple(order)] - self._left[tuple(gone)] for order in orders}
                for _ in orders:
                    advance()
        log.info("layers that may go, and what each adds to the loss: %s", _listed(told))
        removals.scores.table += [
            row_of("layers", layer, "removal", value) | {"without": [*gone], "taken_over": True}
            for layer, value in told.items()
        ]
        return told

    def _race(self, orders: Sequence[list[int]], removals: Removals, *, adaptive: bool) -> dict[tuple[int, ...], float]:
        """What is added to the dense loss without each of these sets of layers, on as many sequences as it takes to tell which
        adds least."""
        trials, seen = self._fit(orders, removals), 0

        def look(some: Problem, asked: Sequence[list[int]], without: Sequence[object]) -> Measured:
            nonlocal seen
            found = [trials.losses_of(Mix(layers=len(o)), UnitScores(layer_order=o), some) for o in asked]
            totals, counts = torch.stack([losses for losses, _ in found]), found[0][1]
            base = self._dense[seen : seen + len(counts)]
            seen += len(counts)
            return Measured(totals - base, counts, base, len(asked) * len(some.batches))

        contest = Contest(tuple(range(len(orders))), 1)
        found = successive_elimination(
            self._problem, orders, [contest], adaptive=adaptive, limit=removals.limit, look=look
        )
        removals.spend(found.forwards, found.exhaustive)
        in_order = sorted(contest.probes, key=lambda index: int(found.place[index]))
        means = itertools.accumulate((float(found.mean[index]) for index in in_order), max)  # what was decided stands
        return {tuple(orders[index]): mean for index, mean in zip(in_order, means, strict=True)}

    def _in_room(self, orders: Sequence[list[int]]) -> Iterator[list[list[int]]]:
        """Orders whose sums fit into prune.solver.gram_gib together, one at least."""
        room, some, taken = self._options.solver.gram_gib * 2**30, [], 0
        for order in orders:
            takers, size = takers_of(self._problem.anatomy, [order]), 0
            for group, segments in takers.items():
                out, inputs = self._problem.anatomy.matrix_of(group.output).shape
                size += 8 * inputs * (inputs + len(segments) * out)
            if some and taken + size > room:
                yield some
                some, taken = [], 0
            some, taken = [*some, order], taken + size
        yield some

    def _fit(self, orders: Sequence[list[int]], removals: Removals) -> Trials:
        most = Mix(layers=len(orders[-1]))
        fits = Fits(self._problem, most, takers_of(self._problem.anatomy, orders), self._options)
        jobs = fits.jobs(fits.moments(self._fitted))
        removals.spend(len(self._fitted.batches))
        return Trials(self._problem, most, self._options, UnitScores(), jobs)


def worth_trying(able: Sequence[int], gone: Sequence[int]) -> list[int]:
    """The first few, and those next to a layer that is gone: one weight then takes over the whole run."""
    best = list(able[: REPROBED if gone else JUDGED])
    return best + [layer for layer in able if layer not in best and {layer - 1, layer + 1} & set(gone)]


def _listed(losses: Mapping[int, float]) -> str:
    return ", ".join(f"{layer}: {losses[layer]:.3f}" for layer in sorted(losses, key=losses.get))


def _rows_of_one(problem: Problem) -> int:
    """Rows that a sequence gives to a fit; of images that is not known here, and one is too few."""
    return problem.batches[0]["input_ids"].shape[1] if "input_ids" in problem.batches[0] else 1
