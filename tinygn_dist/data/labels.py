"""Labels as the model's head counts them: one class, several, or numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from tinygn_dist.data.shapes import Unreadable
from tinygn_dist.models.objective import IGNORED

ONE, SEVERAL, NUMBERS = "single_label_classification", "multi_label_classification", "regression"
"""values of `problem_type` in config.json"""
Label = int | list[bool] | float | list[float]


@dataclass(frozen=True)
class LabelReader:
    """kind: a value of `problem_type`. size: outputs of the head. names: number of each class by its name in small
    letters; none where config.json only counts them. stored: what the dataset calls its classes 0, 1, ..."""

    kind: str
    size: int
    names: dict[str, int]
    stored: tuple[str, ...] = ()
    indices: bool = False
    """whether a list of several labels holds numbers of classes, and not a 0 or 1 for each"""

    def read(self, value: Any) -> Label | None:
        """None for a row without a label. Raises Unreadable for one that the head cannot mean."""
        if value is None or (_is_number(value) and value == IGNORED):
            return None
        return _KINDS[self.kind].read(self, value)

    def tensor(self, labels: Sequence[Label]) -> torch.Tensor:
        return torch.tensor(labels, dtype=_KINDS[self.kind].dtype)

    def number_of(self, value: Any) -> int:
        """The model's number of one class."""
        if isinstance(value, str):
            known = self.names.get(value.strip().lower())
            if known is None and not value.strip().lstrip("-").isdigit():
                named = ", ".join(self.names) if self.names else "numbers only (config.json has no names in label2id)"
                raise Unreadable(f"its label is {value!r}, and the model's classes are: {named}")
            value = known if known is not None else int(value)
        if not _is_number(value) or value != int(value):
            raise Unreadable(
                f"its label is {value!r} and the head answers one of {self.size} classes; a head for numbers or "
                "several labels has num_labels and problem_type in config.json"
            )
        number = int(value)
        if self.stored and self.names and 0 <= number < len(self.stored):
            number = self.names.get(self.stored[number].lower(), number)
        if not 0 <= number < self.size:
            hint = "; -1 stands for a label that is kept secret, use another split" if number == -1 else ""
            raise Unreadable(f"its label is {number}, and the model's head knows 0 to {self.size - 1}{hint}")
        return number


def label_reader(config: PretrainedConfig | None, sample: Sequence[Any], stored: Sequence[str] = ()) -> LabelReader:
    """How to read labels for a model. sample: the first labels, which decide where config.json says nothing.

    Raises Unreadable when config.json names a problem_type that is not known.
    """
    given = [value for value in sample if value is not None]
    lists = bool(given) and all(isinstance(value, list | tuple) for value in given)
    size = getattr(config, "num_labels", None) or 1 << 62
    kind = getattr(config, "problem_type", None) or (NUMBERS if size == 1 else SEVERAL if lists else ONE)
    if kind not in _KINDS:
        raise Unreadable(f"problem_type of config.json is {kind!r}, accepted: {', '.join(_KINDS)}")
    named = getattr(config, "label2id", None) or {}
    names = {str(name).strip().lower(): int(number) for name, number in named.items()}
    if all(re.fullmatch(r"label_\d+", name) for name in names):
        names = {}
    whole = lists and all(len(v) == size and all(_is_number(x) and x in (0, 1) for x in v) for v in given)
    return LabelReader(kind, size, names, tuple(stored), indices=lists and (bool(stored) or not whole))


@dataclass(frozen=True)
class _Kind:
    read: Callable[[LabelReader, Any], Label]
    dtype: torch.dtype


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _several(reader: LabelReader, value: Any) -> list[bool]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    if reader.indices or not isinstance(value, list | tuple):
        chosen = {reader.number_of(each) for each in values}
        return [number in chosen for number in range(reader.size)]
    if len(values) != reader.size or not all(_is_number(each) and each in (0, 1) for each in values):
        raise Unreadable(f"its labels are {values}, accepted: {reader.size} of 0 or 1, one for each class")
    return [bool(each) for each in values]


def _numbers(reader: LabelReader, value: Any) -> float | list[float]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    if len(values) != reader.size or not all(_is_number(each) for each in values):
        wanted = "a number" if reader.size == 1 else f"{reader.size} numbers"
        raise Unreadable(f"its label is {value!r}, accepted: {wanted}, as the head's problem_type is regression")
    return float(values[0]) if reader.size == 1 else [float(each) for each in values]


_KINDS = {
    ONE: _Kind(LabelReader.number_of, torch.int64),
    SEVERAL: _Kind(_several, torch.bool),
    NUMBERS: _Kind(_numbers, torch.float32),
}
