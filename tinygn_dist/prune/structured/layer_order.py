"""Which layers go, each judged together with the feed-forward that absorbs it (`absorb.py`).

A plain removal probe says what a layer's absence costs, and most of that may be made up for: of SmolLM2-135M's layers
14 costs least then, 17 without, and of four layers those chosen here leave a perplexity of 32.68, those of plain probes
34.89 (docs/results.md). So the layers that plain probes rank first, and the neighbours of those that are gone, are
tried: moments of a few sequences, one fit each, the loss on as many others as tell them apart (`estimate.elimination`).
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from tinygn_dist.config import PruneConfig
from tinygn_dist.estimate.elimination import Choice, Elimination
from tinygn_dist.estimate.probes import Measured, Probe
from tinygn_dist.estimate.problem import Problem, batch_size
from tinygn_dist.evaluate.quality import sequence_losses
from tinygn_dist.maths.counts import Mix
from tinygn_dist.prune.structured.absorb import absorbers_of
from tinygn_dist.prune.structured.probing import (
    REPROBED,
    Prober,
    RemovalOrder,
    UnitScores,
    rank_layers,
    row_of,
)
from tinygn_dist.prune.structured.scores import UnitScorer, removable
from tinygn_dist.prune.structured.trials import RefitPlan, Trials
from tinygn_dist.runtime.progress import Progress

log = logging.getLogger(__name__)
JUDGED = 2 * REPROBED
"""layers that are tried before one is gone"""
_TOKENS_PER_INPUT = 4
"""of the widest feed-forward, that the fits of a trial see; not tuned"""


@dataclass(frozen=True)
class LayerOrder:
    """probed: sequences of plain probes, and of other criteria. fitted, held_out: those of the fits, and of the losses
    that the fits leave. protect: layers that stay."""

    probed: Problem
    fitted: Problem
    held_out: Problem
    options: PruneConfig
    protect: Sequence[int] = ()

    def score(self, removed: int) -> UnitScores:
        """The order in which `removed` layers go."""
        anatomy, options, scores = self.probed.anatomy, self.options, UnitScores()
        by_removal = removed and options.criterion in ("auto", "obs", "removal")
        if by_removal and options.compensate and any(group.added for group in anatomy.groups):
            layers = removable(anatomy, self.protect)
            scores.layer_order = self._judged(Prober(scores, self.probed, options.probes), layers, removed)
            return scores
        scorer = UnitScorer(self.probed, options, scores, protect=self.protect)
        return scorer.score(Mix(layers=removed))

    def _judged(self, prober: Prober, layers: Sequence[int], removed: int) -> list[int]:
        """Probe all once, then remove one after the other, the best of them judged with their fit before each."""
        ranking = rank_layers(prober, [Probe(layer) for layer in layers], [JUDGED])
        order = RemovalOrder([Choice(tuple(range(len(layers))), removed)], ranking)
        judge = LayerEvaluator(self.fitted, self.held_out, self.options, prober)
        while able := order.candidates():
            losses = judge.added_losses([layers[i] for i in able], [layers[i] for i in order.removed])
            by_index = {layers.index(layer): loss for layer, loss in losses.items()}
            order.update(by_index)
            order.remove_least(by_index)  # the losses of plain probes are not comparable
        return [layers[i] for i in order.removed]


class LayerEvaluator:
    """The loss that is added when a layer goes and a feed-forward absorbs it."""

    def __init__(self, fitted: Problem, held_out: Problem, options: PruneConfig, prober: Prober) -> None:
        self._problem, self._options = replace(held_out, progress=Progress(shown=False)), options
        self._prober = prober
        width = max(group.num_units for group in fitted.anatomy.of_kind("channels"))
        self._fitted = fitted.first(math.ceil(_TOKENS_PER_INPUT * width / _rows_per_sequence(fitted)))
        self._dense: torch.Tensor | None = None
        self._added: dict[tuple[int, ...], float] = {(): 0.0}  # to the dense loss, without these layers

    def added_losses(self, able: Sequence[int], removed: Sequence[int]) -> dict[int, float]:
        """By layer: the loss added to that without the `removed` layers. able: layers that may go, best first; only the
        most promising are tried, and fewer where the budget ends."""
        prober = self._prober
        if self._dense is None:
            self._dense, _ = sequence_losses(self._problem, "evaluating")
            prober.count(len(self._problem.batches))
        groups = list(self._in_room([[*removed, layer] for layer in worth_trying(able, removed)]))
        losses: dict[int, float] = {}
        doing = f"judging layer {len(removed) + 1} to go"
        with prober.problem.progress.bar(doing, sum(map(len, groups))) as advance:
            for orders in groups:
                if prober.exhausted:
                    break
                self._added |= self._compared(orders, adaptive=len(groups) == 1 and self._options.probes.adaptive)
                losses |= {order[-1]: self._added[tuple(order)] - self._added[tuple(removed)] for order in orders}
                for _ in orders:
                    advance()
        log.info("layers that may go, and what each adds to the loss: %s", _listed(losses))
        prober.scores.table += [
            row_of("layers", layer, "removal", value) | {"without": [*removed], "absorbed": True}
            for layer, value in losses.items()
        ]
        return losses

    def _compared(self, orders: Sequence[list[int]], *, adaptive: bool) -> dict[tuple[int, ...], float]:
        """The loss added to the dense one without each of these sets of layers, on as many sequences as it takes to
        know which adds least."""
        trials, problem, prober = self._fit(orders), self._problem, self._prober
        sizes = [batch_size(batch) for batch in problem.batches]
        choice = Choice(tuple(range(len(orders))), 1)
        elimination = Elimination(len(orders), sizes, [choice], adaptive=adaptive, limit=prober.limit)
        while elimination.wants_more(problem.backend):
            batches, active = elimination.batches, elimination.active
            some = replace(problem, batches=problem.batches[batches])
            removed = [UnitScores(layer_order=orders[index]) for index in active]
            found = [trials.losses_of(Mix(layers=len(one.layer_order)), one, some) for one in removed]
            totals, counts = torch.stack([losses for losses, _ in found]), found[0][1]
            first = sum(sizes[: batches.start])
            base = self._dense[first : first + len(counts)]
            elimination.add(Measured(totals - base, counts, base, len(active) * len(some.batches)))
        ranking = elimination.ranking()
        prober.count(ranking.forwards, ranking.exhaustive)
        in_order = sorted(choice.candidates, key=lambda index: int(ranking.place[index]))
        rising = itertools.accumulate((float(ranking.mean[index]) for index in in_order), max)  # decisions are final
        return {tuple(orders[index]): mean for index, mean in zip(in_order, rising, strict=True)}

    def _in_room(self, orders: Sequence[list[int]]) -> Iterator[list[list[int]]]:
        """Orders whose sums fit into prune.solver.gram_gib together, one at least."""
        room, some, used = self._options.solver.gram_gib * 2**30, [], 0
        for order in orders:
            absorbers, size = absorbers_of(self._problem.anatomy, [order]), 0
            for group, segments in absorbers.items():
                out, inputs = self._problem.anatomy.matrix_of(group.output).shape
                size += 8 * inputs * (inputs + len(segments) * out)
            if some and used + size > room:
                yield some
                some, used = [], 0
            some, used = [*some, order], used + size
        yield some

    def _fit(self, orders: Sequence[list[int]]) -> Trials:
        most, absorbers = Mix(layers=len(orders[-1])), absorbers_of(self._problem.anatomy, orders)
        plan = RefitPlan(self._problem, most, absorbers, self._options.compensate)
        jobs = plan.jobs(plan.moments(self._fitted))
        self._prober.count(len(self._fitted.batches))
        return Trials(self._problem, most, self._options, UnitScores(), jobs)


def worth_trying(able: Sequence[int], removed: Sequence[int]) -> list[int]:
    """The first few, and those next to a layer that is gone: one weight then absorbs the whole run."""
    best = list(able[: REPROBED if removed else JUDGED])
    return best + [layer for layer in able if layer not in best and {layer - 1, layer + 1} & set(removed)]


def _listed(losses: Mapping[int, float]) -> str:
    return ", ".join(f"{layer}: {losses[layer]:.3f}" for layer in sorted(losses, key=losses.get))


def _rows_per_sequence(problem: Problem) -> int:
    """Rows that a sequence gives to a fit; of images that is not known here, and one is too few."""
    return problem.batches[0]["input_ids"].shape[1] if "input_ids" in problem.batches[0] else 1
