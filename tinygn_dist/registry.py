"""Rows that leaf files add to a table when a name is looked up, so that nothing has to import them.

A module of `experiments/` says at its top level which row it is, such as `METHODS = {"hidden": HiddenWidth()}`. Whoever
owns the table asks for its rows by that name. Built-in rows come first, so an experiment cannot replace one.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import TypeVar

EXPERIMENTS = "tinygn_dist.experiments"
Row = TypeVar("Row")


def experimental(table: str, of: type[Row]) -> dict[str, Row]:
    """All rows that the modules of `experiments/` have under the attribute `table`, by their names.

    of: what a row is (for the type checker alone). AssertionError where two modules claim one name.
    """
    rows: dict[str, Row] = {}
    for module in _modules():
        own: Mapping[str, Row] = getattr(module, table, {})
        taken = rows.keys() & own.keys()
        assert not taken, f"{module.__name__} registers {sorted(taken)} in {table} again"
        rows |= own
    return rows


@functools.cache
def _modules() -> tuple[ModuleType, ...]:
    package = importlib.import_module(EXPERIMENTS)
    found = pkgutil.iter_modules(package.__path__, f"{EXPERIMENTS}.")
    return tuple(importlib.import_module(one.name) for one in sorted(found, key=lambda one: one.name))
