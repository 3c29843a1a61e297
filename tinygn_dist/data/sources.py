"""Rows of a dataset, from a hub id, a local file or folder, or the reference that ships with Python."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from tinygn_dist.config import DataConfig
from tinygn_dist.errors import UserError

BUILTIN = "python-docs"
SELF = "self"
_BUILDERS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_TEXT_NAMES = ("text", "content", "document", "article", "sentence", "messages", "conversations", "prompt")


@dataclass(frozen=True)
class Rows:
    """An iterable of row values (text, chat messages, or images), where they came from, and what joins two of them."""

    values: Iterable[Any]
    labels: Iterable[int] | None
    origin: str
    separator: str


def read_rows(options: DataConfig, name: str, *, classes: bool = False, images: bool = False) -> Rows:
    """Rows of `name`. With `classes` each comes with its label.

    Raises UserError for a missing file, an unknown format, no text column, or more than one candidate.
    """
    if name == BUILTIN:
        topics = pydoc_data.topics.topics
        return Rows([topics[key] for key in sorted(topics)], None, "python-docs (pydoc_data.topics)", options.separator)
    dataset, separator = _open(options, name)
    features = dataset.features or {}
    column = options.column or _find_column(name, list(features) or list(next(iter(dataset), {})), images)
    known = list(features) or [column]
    if column not in known:
        raise UserError(f"data.column {column!r} is not in {name}, which has {', '.join(known)}")
    label = _label_column(options, name, known) if classes else None
    origin = f"{name}" + ("" if Path(name).exists() else f" [{options.split}]")
    return Rows(_Column(dataset, column), _Column(dataset, label) if label else None, origin, separator)


@dataclass(frozen=True)
class _Column:
    dataset: Any
    name: str

    def __iter__(self) -> Iterator[Any]:
        for row in self.dataset:
            yield row[self.name]


def _open(options: DataConfig, name: str) -> tuple[Any, str]:
    path = Path(name).expanduser()
    separator = options.separator
    asked: dict[str, Any] = {"streaming": options.streaming}
    if path.is_file():
        builder = _BUILDERS.get(path.suffix)
        if builder is None:
            raise UserError(
                f"data {name}: got {path.suffix or 'no suffix'}, accepted: {', '.join(_BUILDERS)}, a folder, or a hub id"
            )
        source, asked = builder, {**asked, "data_files": [str(path)], "split": "train"}
        separator = "\n" if builder == "text" else separator  # rows of a text file are its lines
    elif path.is_dir():
        files = sorted(
            file for file in path.rglob("*") if file.suffix in _BUILDERS and file.name != "dataset_info.json"
        )
        if not files:
            raise UserError(f"data folder {name} holds no file of a known kind: {', '.join(_BUILDERS)}")
        suffix = files[0].suffix
        source = _BUILDERS[suffix]
        asked |= {"data_files": [str(file) for file in files if file.suffix == suffix], "split": "train"}
        separator = "\n" if source == "text" else separator
    elif path.suffix in _BUILDERS or name.startswith((".", "/", "~")):
        raise UserError(f"data {name}: no such file or folder")
    else:
        source, asked = name, {**asked, "name": options.subset, "split": options.split}
    try:
        return datasets.load_dataset(source, **asked), separator
    except Exception as error:  # the library raises many kinds; all mean the same to the user
        detail = str(error.__cause__ or error).splitlines() or [type(error).__name__]
        raise UserError(f"data {name} cannot be read: {detail[0][:300]}") from None


def _find_column(name: str, columns: list[str], images: bool) -> str:
    if not columns:
        raise UserError(f"data {name} has zero rows")
    wanted = ("image", "img", "pixel_values") if images else _TEXT_NAMES
    found = [column for column in wanted if column in columns] or (columns if len(columns) == 1 else [])
    if not found:
        raise UserError(
            f"data {name} has columns {', '.join(columns)} and none is known to hold "
            f"{'images' if images else 'text'}; name it with --data.column"
        )
    return found[0]


def _label_column(options: DataConfig, name: str, columns: list[str]) -> str:
    column = options.label_column or next((c for c in ("label", "labels", "fine_label", "class") if c in columns), None)
    if column not in columns:
        raise UserError(
            f"data {name} has columns {', '.join(columns)} and none is known to hold labels; name it with "
            "--data.label_column"
        )
    return column
