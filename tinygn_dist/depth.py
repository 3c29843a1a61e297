"""Which layers go, each judged together with what its feed-forward takes over (`takeover`).

Plain removal says what a layer's absence costs, and most of that may be made up for: of SmolLM2-135M's layers 14 costs least
then, 17 without, and of four layers those chosen here leave a perplexity of 32.68, those of plain probes 34.89
(docs/results.md). So the layers that plain probes rank first, and the neighbours of those that are gone, are tried: moments of a
few sequences, one fit each, the loss on other sequences. Where heads and channels go too, the last layer is chosen once more.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from tinygn_dist.budget import Mix
from tinygn_dist.config import PruneConfig
from tinygn_dist.estimate.setting import Setting
from tinygn_dist.progress import Progress
from tinygn_dist.removal import JUDGED, REPROBED, Removals, UnitScores, order_layers, row_of
from tinygn_dist.takeover import takers_of
from tinygn_dist.trials import Fits, Trials
from tinygn_dist.unit_scores import removable, score_units

log = logging.getLogger(__name__)
_TOKENS_PER_INPUT = 4
"""of the widest feed-forward, that the fits of a trial see; not tuned"""
_JUDGED_TOKENS = 2048
"""on which a trial is measured, all on the same"""


def score_layers(probed: Setting, fitted: Setting, tried: Setting, removed: int, options: PruneConfig) -> UnitScores:
    """The order in which `removed` layers go. probed: sequences of plain probes, and of other criteria. fitted, tried: those of the
    fits, and of the losses that they leave."""
    scores, anatomy = UnitScores(), probed.anatomy
    by_removal = removed and options.criterion in ("auto", "obs", "removal")
    if by_removal and options.compensate and any(group.added for group in anatomy.groups):
        order_layers(scores, probed, removable(probed, options), removed, options, _Judge(fitted, tried, options).again)
    else:
        score_units(probed, Mix(layers=removed), options, scores=scores)
    return scores


def choose_last_again(scores: UnitScores, mix: Mix, fitted: Setting, tried: Setting, options: PruneConfig) -> None:
    """Changes layer_order where of the layers that were judged for the last place of a mix another one leaves less loss once heads
    and channels are gone too.

    One weight that takes over a long row of layers needs its channels more than others do: of seven of SmolLM2-135M's layers 13
    to 19 alone cost least, and with a quarter of the channels 12 % more perplexity than 13 to 18 and 7 (docs/results.md).
    """
    before = scores.layer_order[: mix.layers - 1]
    judged = [row for row in scores.table if row.get("taken_over") and row["without"] == before]
    rivals = [row["layer"] for row in sorted(judged, key=lambda row: row["score"])][:REPROBED]
    if len(rivals) < 2 or Removals(scores, tried, options).spent:
        return
    orders = {layer: [*before, layer] for layer in rivals}
    fits = Fits(tried, mix, takers_of(tried.anatomy, list(orders.values())), options)
    trials = Trials(tried, mix, options, scores, fits.jobs(fits.moments(fitted)))
    losses = {layer: trials.loss_of(mix, replace(scores, layer_order=order)) for layer, order in orders.items()}
    log.info("the last layer to go, and the loss without %s: %s", mix, _listed(losses))
    scores.table += [
        row_of("layers", layer, "removal", loss - losses[rivals[0]]) | {"without": before, "in_mix": str(mix)}
        for layer, loss in losses.items()
    ]
    best = min(rivals, key=losses.get)
    scores.layer_order = [*before, best, *(layer for layer in scores.layer_order[len(before) :] if layer != best)]


class _Judge:
    def __init__(self, fitted: Setting, tried: Setting, options: PruneConfig) -> None:
        self._setting, self._options = tried.first(math.ceil(_JUDGED_TOKENS / _losses_of_one(tried))), options
        width = max(group.num_units for group in fitted.anatomy.of_kind("channels"))
        self._fitted = fitted.first(math.ceil(_TOKENS_PER_INPUT * width / _rows_of_one(fitted)))
        self._losses: dict[tuple[int, ...], float] = {}

    def again(self, removals: Removals, able: Sequence[int], gone: Sequence[int]) -> dict[int, float]:
        """What each of some layers adds to the loss that is left without those gone; able: layers that may go, best first."""
        told: dict[int, float] = {}
        orders = [[*gone, layer] for layer in worth_trying(able, gone)]
        with self._setting.progress.bar(f"judging layer {len(gone) + 1} to go", len(orders)) as advance:
            for some in self._in_room(orders):
                if removals.spent:
                    break
                trials = self._fit(some if tuple(gone) in self._losses else [[*gone], *some], removals)
                for order in some:
                    told[order[-1]] = self._loss(order, trials, removals) - self._loss([*gone], trials, removals)
                    advance()
        log.info("layers that may go, and what each adds to the loss: %s", _listed(told))
        removals.scores.table += [
            row_of("layers", layer, "removal", value) | {"without": [*gone], "taken_over": True}
            for layer, value in told.items()
        ]
        return told

    def _in_room(self, orders: Sequence[list[int]]) -> Iterator[list[list[int]]]:
        """Orders whose sums fit into prune.gram_gib together, one at least."""
        room, some, taken = self._options.gram_gib * 2**30, [], 0
        for order in orders:
            takers, size = takers_of(self._setting.anatomy, [order]), 0
            for group, segments in takers.items():
                out, inputs = self._setting.anatomy.target_of(group.output).shape
                size += 8 * inputs * (inputs + len(segments) * out)
            if some and taken + size > room:
                yield some
                some, taken = [], 0
            some, taken = [*some, order], taken + size
        yield some

    def _fit(self, orders: Sequence[list[int]], removals: Removals) -> Trials:
        most = Mix(layers=len(orders[-1]))
        fits = Fits(self._setting, most, takers_of(self._setting.anatomy, orders), self._options)
        jobs = fits.jobs(fits.moments(self._fitted))
        removals.spend(len(self._fitted.batches))
        quiet = replace(self._setting, progress=Progress(shown=False))
        return Trials(quiet, most, self._options, UnitScores(), jobs)

    def _loss(self, order: list[int], trials: Trials, removals: Removals) -> float:
        if tuple(order) not in self._losses:
            self._losses[tuple(order)] = trials.loss_of(Mix(layers=len(order)), UnitScores(layer_order=order))
            removals.spend(len(self._setting.batches))
        return self._losses[tuple(order)]


def worth_trying(able: Sequence[int], gone: Sequence[int]) -> list[int]:
    """The first few, and those next to a layer that is gone: one weight then takes over the whole run."""
    best = list(able[: REPROBED if gone else JUDGED])
    return best + [layer for layer in able if layer not in best and {layer - 1, layer + 1} & set(gone)]


def _listed(losses: Mapping[int, float]) -> str:
    return ", ".join(f"{layer}: {losses[layer]:.3f}" for layer in sorted(losses, key=losses.get))


def _rows_of_one(setting: Setting) -> int:
    """Rows that a sequence gives to a fit; of images that is not known here, and one is too few."""
    return setting.batches[0]["input_ids"].shape[1] if "input_ids" in setting.batches[0] else 1


def _losses_of_one(setting: Setting) -> int:
    """Values of the loss in a sequence: a classifier has one."""
    labels = setting.batches[0].get("labels")
    return 1 if labels is not None and labels.dim() == 1 else _rows_of_one(setting)
