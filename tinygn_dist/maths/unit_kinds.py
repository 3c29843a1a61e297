"""The kinds of unit that can be removed whole: one row each. Config choices, help, checks and messages read this
table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UnitKind:
    """label: for people, in the plural. per_layer: whether counts are of each layer that stays (or of each group of
    filters). mixed: whether a mix may remove some beside other kinds (pattern units, `prune.counts`). solved: whether
    the weight that reads these units can rank them by its own least-squares saliency. criterion: the meaning of `auto`.
    uneven_cost: why no share of multiplications or seconds can be counted for them; empty where it can."""

    label: str
    per_layer: bool = True
    mixed: bool = True
    solved: bool = True
    criterion: str = "removal"
    uneven_cost: str = ""


UNIT_KINDS: dict[str, UnitKind] = {
    "layers": UnitKind("layers", per_layer=False, solved=False),
    "heads": UnitKind("KV groups"),
    "channels": UnitKind("channels", criterion="obs"),
    "experts": UnitKind(
        "experts", solved=False, uneven_cost="tokens visit as many experts as before however many there are"
    ),
    "filters": UnitKind(
        "parts", mixed=False, solved=False, uneven_cost="a filter costs more the larger its feature map"
    ),
    "hidden": UnitKind(
        "hidden dimensions",
        per_layer=False,
        mixed=False,
        solved=False,
        uneven_cost="the width of the stream is cut by parameters",
    ),
}
"""in the order in which a mix counts them"""
INNER_KINDS = tuple(kind for kind in UNIT_KINDS if kind != "layers")
MIXED_KINDS = tuple(kind for kind, row in UNIT_KINDS.items() if row.mixed)
"""of which a mix may remove several, and that can be counted"""
