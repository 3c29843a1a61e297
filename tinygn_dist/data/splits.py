"""Tokenised sequences for calibration, training and evaluation, which never overlap.

Evaluation rows are the last ones of the dataset, or a second dataset; calibration and training windows come from the
other rows, calibration drawn first by `data.seed`. Every rank builds the same sequences; who works on which micro-batch
is the backend's business.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tinygn_dist.config import DataConfig
from tinygn_dist.data.sources import Rows, read_rows
from tinygn_dist.errors import UserError
from tinygn_dist.models.objective import IGNORED, Batch, continuation

log = logging.getLogger(__name__)
MAX_TOKENS = 8_000_000
"""how much of a dataset is tokenised: enough for every window to be drawn from a wide stretch"""


@dataclass
class Splits:
    """calibration, evaluation: micro-batches on the CPU. training: single sequences. validation: those of them that are
    held out for evaluations on the way. used: what the report says."""

    calibration: list[Batch]
    evaluation: list[Batch]
    training: list[Batch]
    used: dict[str, Any] = field(default_factory=dict)
    validation: list[Batch] = field(default_factory=list)

    def hold_out(self, count: int) -> None:
        """Make the last `count` training sequences validation. UserError when too few would be left to train on."""
        if len(self.training) < 2 * count:
            raise UserError(
                f"recover.evaluate_samples {count} of {len(self.training)} training sequences, accepted: at most half of "
                "them; give more text, or a smaller recover.evaluate_samples or recover.seq_len"
            )
        self.training, self.validation = self.training[:-count], self.training[-count:]

    def fingerprint(self) -> str:
        """16 hex digits over every token, for ranks to compare."""
        digest = hashlib.sha256()
        for batch in (*self.calibration, *self.evaluation, *self.training, *self.validation):
            for name in sorted(batch):
                digest.update(batch[name].contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def num_tokens(self) -> int:
        """Real calibration tokens (or images)."""
        return sum(
            int(b["attention_mask"].sum())
            if "attention_mask" in b
            else next(iter(b.values())).shape[:2].numel()
            if "input_ids" in b
            else len(next(iter(b.values())))
            for b in self.calibration
        )


@dataclass(frozen=True)
class _Window:
    tokens: list[int]
    first_row: int
    last_row: int
    label: int | None = None


def load_splits(
    options: DataConfig,
    task: str,
    processor: Any,
    train_len: int,
    rows: Rows | None = None,
    start: int = 0,
) -> Splits:
    """Splits for a task. train_len: tokens per training sequence, 0 for no training. rows: used instead of reading
    `options.name` (self-generated text). start: the token that an encoder-decoder's matrices begin with."""
    if task == "seq2seq-lm":
        if not options.packing:
            raise UserError(
                "data.packing false with an encoder-decoder: text is cut into a source and its continuation; leave it on"
            )
        splits = load_text(options, processor, classes=False, train_len=train_len)
        for name in ("calibration", "evaluation", "training"):
            setattr(splits, name, [continuation(batch, start) for batch in getattr(splits, name)])
        return splits
    if task == "image-classification":
        return load_images(options, processor, training=bool(train_len))
    return load_text(options, processor, classes=task == "sequence-classification", train_len=train_len, rows=rows)


def load_text(
    options: DataConfig, tokenizer: Any, *, classes: bool, train_len: int, rows: Rows | None = None
) -> Splits:
    """Splits of a text dataset.

    classes: each row carries a class. train_len: tokens per training sequence, 0 for no training. rows: used instead
    of reading `options.name` (self-generated text). Raises UserError when there is not one usable window per split.
    """
    source = rows or read_rows(options, options.name, classes=classes)
    packed = options.packing and not classes
    encoded, skipped = _encode(source, tokenizer, options)
    if options.evaluation:
        apart = read_rows(options, options.evaluation, classes=classes)
        held_out, _ = _encode(apart, tokenizer, options)
        rest, held_origin = encoded, apart.origin
    else:
        rest, held_out = _hold_out(encoded, options, packed)
        held_origin = f"the last rows of {source.origin}"
    evaluation = _windows(held_out, tokenizer, options.seq_len, packed)[: options.eval_samples]
    pool = _windows(rest, tokenizer, options.seq_len, packed)
    for what, windows, size in (("evaluation", evaluation, held_out), ("calibration", pool, rest)):
        if not windows:
            raise UserError(
                f"{source.origin}: {sum(len(w.tokens) for w in size)} tokens in {len(size)} rows are left for {what}, one window "
                f"needs {options.seq_len}; use more text, a smaller --data.seq_len, or --data.packing false"
            )
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(options.seed)).tolist()
    limit = min(options.num_samples, max(1, len(pool) * 3 // 4) if train_len else len(pool))
    chosen, others = order[:limit], order[limit:]
    for asked, have, what in (
        (options.num_samples, len(chosen), "calibration"),
        (options.eval_samples, len(evaluation), "evaluation"),
    ):
        if have < asked:
            log.warning("asked for %d %s sequences, the data has %d", asked, what, have)
    training = _retrim([pool[i] for i in others], train_len) if train_len else []
    if train_len and not training:
        raise UserError(
            f"{source.origin}: no text is left for training after {limit} calibration windows; use more text"
        )
    return Splits(
        _batches([pool[i] for i in chosen], tokenizer, options.micro_batch, classes),
        _batches(evaluation, tokenizer, options.micro_batch, classes),
        _batches(training, tokenizer, 1, classes),
        {
            "calibration": _told(source.origin, [pool[i] for i in chosen]),
            "evaluation": _told(held_origin, evaluation),
            "training": _told(source.origin, [pool[i] for i in others]) if train_len else None,
            "rows_skipped": skipped,
            "seq_len": options.seq_len,
            "seed": options.seed,
        },
    )


def load_images(options: DataConfig, processor: Any, *, training: bool) -> Splits:
    """Splits of an image classification dataset: evaluation rows last, or from `data.evaluation`."""
    source = read_rows(options, options.name, classes=True, images=True)
    wanted = options.num_samples * (5 if training else 1) + options.eval_samples
    pairs = list(
        itertools.islice(zip(source.values, source.labels, strict=True), None if options.evaluation else wanted)
    )
    if options.evaluation:
        apart = read_rows(options, options.evaluation, classes=True, images=True)
        held_out = list(itertools.islice(zip(apart.values, apart.labels, strict=True), options.eval_samples))
    else:
        cut = max(1, len(pairs) - options.eval_samples)
        pairs, held_out = pairs[:cut], pairs[cut:]
    if not pairs or not held_out:
        raise UserError(
            f"{source.origin}: {len(pairs) + len(held_out)} images are too few for calibration and evaluation"
        )

    def batches(chosen: list[tuple[Any, int]], size: int) -> list[Batch]:
        return [
            {
                "pixel_values": processor([image.convert("RGB") for image, _ in part], return_tensors="pt")[
                    "pixel_values"
                ],
                "labels": torch.tensor([label for _, label in part]),
            }
            for part in (chosen[i : i + size] for i in range(0, len(chosen), size))
        ]

    count = min(options.num_samples, len(pairs))
    return Splits(
        batches(pairs[:count], options.micro_batch),
        batches(held_out, options.micro_batch),
        batches(pairs[count:], 1) if training else [],
        {"calibration": {"source": source.origin, "sequences": count}, "evaluation": {"sequences": len(held_out)}},
    )


def _encode(source: Rows, tokenizer: Any, options: DataConfig) -> tuple[list[_Window], int]:
    """Each usable row's tokens (without special tokens), up to MAX_TOKENS, and how many rows were skipped."""
    encoded, skipped, total = [], 0, 0
    labels = iter(source.labels) if source.labels is not None else itertools.repeat(None)
    numbered = enumerate(zip(source.values, labels, strict=False))
    while chunk := list(itertools.islice(numbered, 512)):
        usable = [
            (number, text, label) for number, (value, label) in chunk if (text := _text(value, tokenizer)).strip()
        ]
        skipped += len(chunk) - len(usable)
        if not usable:
            continue
        texts = [text + (source.separator if options.packing and label is None else "") for _, text, label in usable]
        for (number, _, label), tokens in zip(
            usable, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True
        ):
            encoded.append(_Window(tokens, number, number, label))
            total += len(tokens)
        if total > MAX_TOKENS:
            break
    if not encoded:
        raise UserError(f"{source.origin} has no text in {skipped} rows; name the column with --data.column")
    return encoded, skipped


def _text(value: Any, tokenizer: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and isinstance(value[0], dict):
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "the rows are chat messages and the tokenizer has no chat template; use text, or a chat model"
            )
        return tokenizer.apply_chat_template(value, tokenize=False)
    raise UserError(
        f"a row holds {type(value).__name__}, accepted: text or a list of chat messages; name the column with "
        "--data.column"
    )


def _hold_out(encoded: list[_Window], options: DataConfig, packed: bool) -> tuple[list[_Window], list[_Window]]:
    """Last rows apart: enough for the asked evaluation windows, at most half of the rows and of the tokens."""
    total, wanted = sum(len(w.tokens) for w in encoded), options.eval_samples * options.seq_len
    if not packed:
        cut = len(encoded) - min(options.eval_samples, len(encoded) // 2)
        return encoded[:cut], encoded[cut:]
    taken, cut = 0, len(encoded)
    while cut > 1 and taken < min(wanted, total // 2):
        cut -= 1
        taken += len(encoded[cut].tokens)
    return encoded[:cut], encoded[cut:]


def _windows(rows: Sequence[_Window], tokenizer: Any, seq_len: int, packed: bool) -> list[_Window]:
    prefix = _prefix(tokenizer)
    if not packed:
        cut = [_Window((prefix + row.tokens)[:seq_len], row.first_row, row.last_row, row.label) for row in rows]
        return [window for window in cut if len(window.tokens) > 1]
    tokens = [token for row in rows for token in row.tokens]
    origin = [row.first_row for row in rows for _ in row.tokens]
    body = seq_len - len(prefix)
    return [
        _Window(prefix + tokens[i : i + body], origin[i], origin[i + body - 1])
        for i in range(0, len(tokens) - body + 1, body)
    ]


def _prefix(tokenizer: Any) -> list[int]:
    """[bos] when the tokenizer itself would put it in front of a text."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _retrim(windows: Sequence[_Window], train_len: int) -> list[_Window]:
    """Windows cut into training sequences of train_len (a shorter row stays whole)."""
    cut = []
    for window in windows:
        step = min(train_len, len(window.tokens))
        starts = range(0, len(window.tokens) - step + 1, step) if window.label is None else (0,)
        cut += [_Window(window.tokens[s : s + step], window.first_row, window.last_row, window.label) for s in starts]
    return cut


def _batches(windows: Sequence[_Window], tokenizer: Any, size: int, classes: bool) -> list[Batch]:
    pad = next(
        (
            t
            for t in (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None))
            if t is not None
        ),
        0,
    )
    return [_collate(windows[i : i + size], pad, classes) for i in range(0, len(windows), size)]


def _collate(windows: Sequence[_Window], pad: int, classes: bool) -> Batch:
    """Right-padded batch; the mask is left out when nothing is padded (attention is then faster, and equal)."""
    length = max(len(window.tokens) for window in windows)
    ids = torch.tensor([w.tokens + [pad] * (length - len(w.tokens)) for w in windows])
    mask = torch.tensor([[1] * len(w.tokens) + [0] * (length - len(w.tokens)) for w in windows])
    labels = torch.tensor([w.label for w in windows]) if classes else ids.masked_fill(mask == 0, IGNORED)
    batch = {"input_ids": ids, "labels": labels}
    return batch if bool(mask.all()) and not classes else {**batch, "attention_mask": mask}


def _told(origin: str, windows: Sequence[_Window]) -> dict[str, Any]:
    rows = sorted({(w.first_row, w.last_row) for w in windows})
    return {
        "source": origin,
        "sequences": len(windows),
        "tokens": sum(len(w.tokens) for w in windows),
        "rows": _ranges(rows),
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
