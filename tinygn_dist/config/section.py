"""What every section of a config is, and how one is made from plain values."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tinygn_dist.errors import UserError


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def one_of(known: Sequence[str], value: str) -> str:
    """The value. Raises ValueError where it is not one of these, with the nearest of them."""
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
        raise ValueError(
            f"got {value!r}, accepted: {', '.join(known)}" + (f"; did you mean {near[0]}?" if near else "")
        )
    return value


SectionType = TypeVar("SectionType", bound=Section)


def make(section: type[SectionType], values: dict[str, Any]) -> SectionType:
    """A checked section. Raises UserError with the first bad value."""
    try:
        return section(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise UserError(f"{where} is missing; give it in the recipe or as --{where}") from None
        told = first["msg"].removeprefix("Value error, ")
        got = "" if "got " in told or first["type"] == "value_error" else f" (got {first['input']!r})"
        raise UserError(f"{where}: {told}{got}" if where else told) from None
