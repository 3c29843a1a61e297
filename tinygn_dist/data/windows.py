"""Rows to the sequences that a model reads: packed windows, or one row each; and micro-batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tinygn_dist.data.encoding import Encoded, Specials
from tinygn_dist.data.labels import LabelReader
from tinygn_dist.models.objective import IGNORED, Batch


@dataclass(frozen=True)
class Window:
    """body: tokens between the special ones. counted: which of them are trained on; None for all."""

    body: list[int]
    first_row: int
    last_row: int
    label: Any = None
    counted: list[bool] | None = None
    types: list[int] | None = None


@dataclass(frozen=True)
class Layout:
    """How special tokens stand in a sequence. halves: an encoder-decoder reads the first half and writes the second,
    and each has its own."""

    specials: Specials
    halves: bool = False

    def bodies(self, tokens: Sequence[int], start: int, length: int) -> list[int]:
        """Tokens in each piece of a sequence that begins at `start` and has `length` tokens with the special ones."""
        pieces = (length // 2, length - length // 2) if self.halves else (length,)
        sizes = []
        for piece in pieces:
            sizes.append(max(1, self.specials.room(tokens, start + sum(sizes), piece)))
        return sizes

    def whole(self, window: Window, length: int) -> tuple[list[int], list[bool]]:
        """A window's tokens with the special ones, and which are trained on. length: as it was made for."""
        body, counted = window.body, window.counted or [True] * len(window.body)
        tokens, trained, start = [], [], 0
        sizes = self.bodies(body, 0, length) if self.halves else [len(body)]
        for size in sizes:
            piece, after = body[start : start + size], counted[start : start + size]
            before, behind = self.specials.missing_before(piece), self.specials.missing_after(piece)
            tokens += [*before, *piece, *behind]
            trained += [after[0]] * len(before) + after + [after[-1]] * len(behind)
            start += size
        return tokens, trained


def packed(rows: Sequence[Encoded], layout: Layout, length: int) -> list[Window]:
    """Full windows of all rows one after another; those without a token to be trained on are left out."""
    tokens = [token for row in rows for token in row.tokens]
    origin = [row.number for row in rows for _ in row.tokens]
    counted = None
    if any(row.counted for row in rows):
        counted = [each for row in rows for each in row.counted or [True] * len(row.tokens)]
    windows = [
        Window(tokens[a:b], origin[a], origin[b - 1], counted=counted[a:b] if counted else None)
        for a, b in _spans(tokens, layout, length)
    ]
    return [window for window in windows if _trains(window)]


def unpacked(rows: Sequence[Encoded], layout: Layout, length: int, *, classes: bool) -> list[Window]:
    """One window for each row, its end left out where it is too long; rows that no loss comes of are left out."""
    windows = []
    for row in rows:
        size = sum(layout.bodies(row.tokens, 0, length))
        counted, types = (part[:size] if part else None for part in (row.counted, row.types))
        windows.append(Window(row.tokens[:size], row.number, row.number, row.label, counted, types))
    if classes:
        return [window for window in windows if window.body]
    return [window for window in windows if len(layout.whole(window, length)[0]) > 1 and _trains(window)]


def training_windows(windows: Sequence[Window], layout: Layout, length: int, *, classes: bool) -> list[Window]:
    """Windows as training sequences of at most `length` tokens; a shorter row stays whole."""
    short = []
    for window in windows:
        if classes:
            size = sum(layout.bodies(window.body, 0, length))
            types = window.types[:size] if window.types else None
            short.append(replace(window, body=window.body[:size], types=types))
            continue
        size = sum(layout.bodies(window.body, 0, length))
        spans = _spans(window.body, layout, length) if size <= len(window.body) else [(0, len(window.body))]
        short += [
            replace(window, body=window.body[a:b], counted=window.counted[a:b] if window.counted else None)
            for a, b in spans
        ]
    return [window for window in short if classes or _trains(window)]


def _spans(tokens: Sequence[int], layout: Layout, length: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start < len(tokens):
        stop = start + sum(layout.bodies(tokens, start, length))
        if stop > len(tokens):
            return
        yield start, stop
        start = stop


def _trains(window: Window) -> bool:
    """Whether any token is trained on: nothing predicts a window's first."""
    return window.counted is None or any(window.counted[1:])


@dataclass(frozen=True)
class Collator:
    """Windows to micro-batches. pad: the token that shorter rows are filled up with. labels: of a classifier."""

    layout: Layout
    length: int
    pad: int
    labels: LabelReader | None = None

    def batches(self, windows: Sequence[Window], size: int, length: int = 0) -> list[Batch]:
        """length: of these windows, where it is another one."""
        starts = range(0, len(windows), size)
        return [self._collate(windows[i : i + size], length or self.length) for i in starts]

    def _collate(self, windows: Sequence[Window], made_for: int) -> Batch:
        """Right-padded; the mask is left out when nothing is padded (attention is then faster, and equal)."""
        whole = [self.layout.whole(window, made_for) for window in windows]
        length = max(len(tokens) for tokens, _ in whole)
        ids = torch.tensor([tokens + [self.pad] * (length - len(tokens)) for tokens, _ in whole])
        mask = torch.tensor([[1] * len(tokens) + [0] * (length - len(tokens)) for tokens, _ in whole])
        batch = {"input_ids": ids}
        if any(window.types for window in windows):
            types = [window.types + [0] * (length - len(window.types)) for window in windows]
            batch["token_type_ids"] = torch.tensor(types)
        if self.labels is None:
            trained = torch.tensor([each + [False] * (length - len(each)) for _, each in whole])
            batch["labels"] = ids.masked_fill(~trained, IGNORED)
        elif windows[0].label is not None:
            batch["labels"] = self.labels.tensor([window.label for window in windows])
        return batch if bool(mask.all()) and self.labels is None else {**batch, "attention_mask": mask}


def report_of(windows: Sequence[Window], layout: Layout, length: int) -> dict[str, Any]:
    """Sequences, tokens, and the spans of rows that they come from."""
    return {
        "sequences": len(windows),
        "tokens": sum(len(layout.whole(window, length)[0]) for window in windows),
        "rows": _ranges(sorted({(window.first_row, window.last_row) for window in windows})),
    }


def _ranges(spans: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Sorted (first, last) row spans merged into as few as cover them."""
    merged: list[list[int]] = []
    for first, last in spans:
        if merged and first <= merged[-1][1] + 1:
            merged[-1][1] = max(merged[-1][1], last)
        else:
            merged.append([first, last])
    return merged
