"""Which layers go, each judged together with what its feed-forward takes over (`takeover`).

Plain removal says what a layer's absence costs, and most of that may be made up for: of SmolLM2-135M's layers 14 costs least
then, 17 without, and of four layers a run of neighbours leaves a perplexity of 32.2, the plain greedy choice 34.9
(docs/results.md). So the layers that plain probes rank first, and the neighbours of those that are gone, are tried: moments of a
few sequences, one fit each, the loss on other sequences.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tinygn_dist.budget import Mix
from tinygn_dist.config import PruneConfig
from tinygn_dist.estimate.setting import Setting
from tinygn_dist.progress import Progress
from tinygn_dist.removal import JUDGED, REPROBED, Removals, UnitScores, order_layers, row_of
from tinygn_dist.takeover import Takers, takers_of
from tinygn_dist.trials import Fits, Trials
from tinygn_dist.unit_scores import removable, score_units

log = logging.getLogger(__name__)
_TOKENS_PER_INPUT = 4
"""of the widest feed-forward, that the fits of a trial see: twice as many change no choice (docs/results.md)"""
_JUDGED_TOKENS = 2048
"""on which a trial is measured; all trials on the same"""


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


class _Judge:
    def __init__(self, fitted: Setting, tried: Setting, options: PruneConfig) -> None:
        self._setting, self._options = _of_tokens(tried, _JUDGED_TOKENS), options
        width = max(group.num_units for group in fitted.anatomy.of_kind("channels"))
        self._fitted = _of_tokens(fitted, _TOKENS_PER_INPUT * width)
        self._losses: dict[tuple[int, ...], float] = {}

    def again(self, removals: Removals, able: Sequence[int], gone: Sequence[int]) -> dict[int, float]:
        """What each of some layers adds to the loss that is left without those gone; able: layers that may go, best first."""
        if removals.spent:
            return {}
        anatomy, options, most = self._setting.anatomy, self._options, Mix(layers=len(gone) + 1)
        orders = {layer: [*gone, layer] for layer in worth_trying(able, gone)}
        takers = together([takers_of(anatomy, order) for order in ([*gone], *orders.values())])
        fits = Fits(self._setting, most, takers, options)
        quiet = replace(self._setting, progress=Progress(shown=False))
        trials = Trials(quiet, most, options, UnitScores(), fits.jobs(fits.moments(self._fitted)))

        def loss(order: list[int]) -> float:
            if tuple(order) not in self._losses:
                scores = UnitScores(layer_order=order)
                self._losses[tuple(order)] = trials.loss_of(Mix(layers=len(order)), scores)
                removals.spend(len(self._setting.batches))
            return self._losses[tuple(order)]

        with self._setting.progress.bar(f"judging layer {len(gone) + 1} to go", 1 + len(orders)) as advance:
            before, told = loss([*gone]), {}
            advance()
            for layer, order in orders.items():
                told[layer] = loss(order) - before
                advance()
        log.info("layers that may go, and what each adds to the loss: %s", _listed(told))
        removals.scores.table += [
            row_of("layers", layer, "removal", value) | {"without": [*gone], "taken_over": True}
            for layer, value in told.items()
        ]
        return told


def worth_trying(able: Sequence[int], gone: Sequence[int]) -> list[int]:
    """The first few, and those next to a layer that is gone: one weight then takes over the whole run."""
    best = list(able[: REPROBED if gone else JUDGED])
    return best + [layer for layer in able if layer not in best and {layer - 1, layer + 1} & set(gone)]


def together(several: Sequence[Takers]) -> Takers:
    """Takers of any of several orders; what one has to take over in one of them is the beginning of it in another."""
    found: Takers = {}
    for takers in several:
        for group, behind in takers.items():
            found[group] = max(found.get(group, ()), behind, key=len)
    return found


def _listed(losses: Mapping[int, float]) -> str:
    return ", ".join(f"{layer}: {losses[layer]:.3f}" for layer in sorted(losses, key=losses.get))


def _of_tokens(setting: Setting, tokens: int) -> Setting:
    """The first micro-batches with so many tokens."""
    batch = setting.batches[0]
    size = batch["input_ids"].shape[1] if "input_ids" in batch else 1
    return setting.first(math.ceil(tokens / size))
