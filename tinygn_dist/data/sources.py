"""Rows of a dataset: a hub id, a local copy of one, a file, a folder, or the reference that ships with Python.

What a user names is read as `datasets.load_dataset` reads it (splits, configurations, the YAML of a README), with one
exception: a path is taken literally, and the wildcard characters in it stand for themselves.
"""

from __future__ import annotations

import glob
import pydoc_data.topics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from tinygn_dist.config import DataConfig
from tinygn_dist.data.shapes import Shape, Unreadable, choose_shape
from tinygn_dist.errors import UserError

BUILTIN = "python-docs"
SELF = "self"
BETWEEN_TEXTS = "\n\n"
"""what joins two packed rows; rows of a text file are its lines, and a line break joins them"""
_BUILDERS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "score")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_NAMED_FILES = 8


@dataclass(frozen=True)
class Rows:
    """Row values (what a Shape reads, or images), where they came from, and what joins two of them when they are
    packed.

    labels: as they are stored. class_names: what the dataset calls its classes. files: those that were really read.
    """

    values: Iterable[Any]
    labels: Iterable[Any] | None
    origin: str
    separator: str
    class_names: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """For the report."""
        more = len(self.files) - _NAMED_FILES
        named = [*self.files[:_NAMED_FILES], *([f"and {more} more"] if more > 0 else [])]
        return {"source": self.origin} | ({"columns": list(self.columns), "files": named} if self.files else {})


@dataclass(frozen=True)
class _Table:
    """An opened dataset. in_lines: whether its rows are lines of text files."""

    dataset: Any
    files: tuple[str, ...]
    split: str | None
    in_lines: bool = False


def read_rows(options: DataConfig, name: str, task: str) -> Rows:
    """Rows of `name` for a task; classifiers get the labels too, where there are any.

    Raises UserError for a missing file, an unknown format, no column that is known, or more than one candidate.
    """
    if name == BUILTIN:
        topics = pydoc_data.topics.topics
        return Rows([topics[key] for key in sorted(topics)], None, "python-docs (pydoc_data.topics)", BETWEEN_TEXTS)
    table = _open(options, name)
    features = table.dataset.features or {}
    columns = list(features) or list(next(iter(table.dataset), {}))
    if not columns:
        raise UserError(f"data {name} has zero rows")
    classes = task.endswith("classification")
    label = _label_column(options, name, columns) if classes else None
    rest = [column for column in columns if column != label] if classes and not options.column else columns
    shape = choose_shape(options.column, name, rest, task)
    origin = name + (f" [{table.split}]" if table.split else "")
    names = _class_names(features.get(label)) if label else ()
    return Rows(
        _Values(table.dataset, shape, origin),
        _Cells(table.dataset, label) if label else None,
        origin,
        "\n" if table.in_lines else BETWEEN_TEXTS,
        names,
        tuple(shape.all_of(columns) + ([label] if label else [])),
        table.files,
    )


@dataclass(frozen=True)
class _Values:
    dataset: Any
    shape: Shape
    origin: str

    def __iter__(self) -> Iterator[Any]:
        for number, row in enumerate(self.dataset):
            try:
                yield self.shape.read(row)
            except Unreadable as error:
                raise UserError(f"row {number} of {self.origin}: {error}") from None


@dataclass(frozen=True)
class _Cells:
    dataset: Any
    column: str

    def __iter__(self) -> Iterator[Any]:
        for row in self.dataset:
            yield row[self.column]


def _class_names(feature: Any) -> tuple[str, ...]:
    inner = getattr(feature, "feature", feature)
    return tuple(getattr(inner, "names", None) or ())


def _label_column(options: DataConfig, name: str, columns: list[str]) -> str | None:
    if options.label_column is not None and options.label_column not in columns:
        raise UserError(f"data.label_column {options.label_column!r} is not in {name}, which has {', '.join(columns)}")
    return options.label_column or next((column for column in _LABEL_COLUMNS if column in columns), None)


def _open(options: DataConfig, name: str) -> _Table:
    path = Path(name).expanduser()
    if path.is_file():
        return _open_files(options, name, [path])
    if path.is_dir():
        return _open_folder(options, name, path)
    if path.suffix in _BUILDERS or name.startswith((".", "/", "~")):
        raise UserError(f"data {name}: no such file or folder")
    return _load(options, name, name, {"name": options.subset}, options.split)


def _open_files(options: DataConfig, name: str, files: list[Path]) -> _Table:
    suffixes = files[0].suffixes
    known = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in _COMPRESSED else files[0].suffix
    builder = _BUILDERS.get(known)
    if builder is None:
        raise UserError(
            f"data {name}: got {files[0].suffix or 'no suffix'}, accepted: {', '.join(_BUILDERS)}, a folder, or a hub "
            "id"
        )
    for file in files:
        _refuse_pointer(name, file)
    literal = [glob.escape(str(file)) for file in files]
    split = options.split if options.split.startswith("train[") else "train"
    table = _load(options, name, builder, {"data_files": literal}, split)
    return _Table(table.dataset, table.files, None, table.in_lines)


def _open_folder(options: DataConfig, name: str, folder: Path) -> _Table:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _open_saved(options, name, folder)
    inside = [file for file in folder.rglob("*") if file.is_file() and ".git" not in file.parts]
    inside = sorted(file for file in inside if file.name != "README.md")
    documents = [file for file in inside if file.suffix == ".md"]
    if not inside or not any(file.suffix not in (".md", "") for file in inside) and not documents:
        raise UserError(f"data folder {name} holds no file of a known kind: {', '.join(_BUILDERS)}")
    if len(documents) == len(inside):
        return _open_files(options, name, documents)
    if glob.has_magic(str(folder.resolve())):
        raise UserError(
            f"data folder {name} has one of the characters * ? [ in its path, which would be read as a pattern and "
            "could match another folder; rename it, or name one file"
        )
    for file in inside:
        _refuse_pointer(name, file)
    return _load(options, name, str(folder), {"name": options.subset}, options.split)


def _open_saved(options: DataConfig, name: str, folder: Path) -> _Table:
    """What `save_to_disk` wrote: a Dataset, or one for each split."""
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise _unreadable(name, error) from None
    split = None
    if isinstance(saved, datasets.DatasetDict):
        split = options.split
        if split not in saved:
            raise UserError(f"data {name} has no split {split!r}, accepted: {', '.join(saved)}; set --data.split")
        saved = saved[split]
    return _Table(saved, tuple(file["filename"] for file in saved.cache_files), split)


def _load(options: DataConfig, name: str, source: str, asked: dict[str, Any], split: str) -> _Table:
    try:
        builder = datasets.load_dataset_builder(source, **asked)
        if options.streaming:
            dataset = builder.as_streaming_dataset(split=split)
        else:
            builder.download_and_prepare()
            dataset = builder.as_dataset(split=split)
    except Exception as error:  # the library raises many kinds; all mean the same to the user
        raise _unreadable(name, error) from None
    wanted = {piece.split("[")[0].strip() for piece in split.split("+")}
    stored = (builder.config.data_files or {}).items()
    files = tuple(str(file) for key, found in stored if str(key) in wanted for file in found)
    in_lines = (builder.dataset_name if builder.name is None else builder.name) == "text"
    return _Table(dataset, files, split, in_lines)


def _refuse_pointer(name: str, file: Path) -> None:
    """A clone without git-lfs holds three lines in the place of each large file."""
    with file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(
                f"data {name}: {file.name} is a pointer of git-lfs and not the file itself; run: git lfs pull"
            )


def _unreadable(name: str, error: Exception) -> UserError:
    detail = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
    return UserError(f"data {name} cannot be read: {' '.join(detail)[:300]}")
