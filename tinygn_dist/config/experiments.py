"""Options of what lives in experiments/: each leaf file carries a section of its own, and registers it under
OPTIONS."""

from __future__ import annotations

from typing import Any, TypeVar

from tinygn_dist.config.section import Section, one_of
from tinygn_dist.registry import experimental

Options = dict[str, dict[str, Any]]
"""experiment -> key -> value, as in `experiments: {owl: {spread: 0.1}}`"""
SectionType = TypeVar("SectionType", bound=Section)


def check_options(asked: Options) -> Options:
    """The same. Raises ValueError for an unknown experiment, an unknown key or a bad value."""
    known = experimental("OPTIONS", type[Section]) if asked else {}
    for name, values in asked.items():
        known[one_of(sorted(known), name)](**values)
    return asked


def options_of(asked: Options, name: str, section: type[SectionType]) -> SectionType:
    """One experiment's section, with what was asked for."""
    return section(**asked.get(name, {}))
