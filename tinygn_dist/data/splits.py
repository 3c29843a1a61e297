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
from tinygn_dist.data.checks import check_ids, check_reader, refuse_text_without_words
from tinygn_dist.data.encoding import Encoded, Encoder, Reader
from tinygn_dist.data.images import image_batches
from tinygn_dist.data.labels import NUMBERS, LabelReader, label_reader
from tinygn_dist.data.shapes import Unreadable
from tinygn_dist.data.sources import Rows, read_rows
from tinygn_dist.data.windows import Collator, Layout, Window, packed, report_of, training_windows, unpacked
from tinygn_dist.errors import UserError
from tinygn_dist.models.objective import Batch, continuation, decoder_start

__all__ = ["MAX_TOKENS", "Reader", "Splits", "load_splits"]

log = logging.getLogger(__name__)
MAX_TOKENS = 8_000_000
"""how much of a dataset is tokenised: enough for every window to be drawn from a wide stretch"""
_AT_ONCE = 512
"""rows that are tokenised together"""


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
                f"recover.evaluate_samples {count} of {len(self.training)} training sequences, accepted: at most half "
                "of them; give more text, or a smaller recover.evaluate_samples or recover.seq_len"
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


def load_splits(options: DataConfig, reader: Reader, train_len: int = 0, rows: Rows | None = None) -> Splits:
    """Splits for a model, without any of its weights. train_len: tokens per training sequence, 0 for no training.
    rows: used instead of reading `options.name` (self-generated text).

    Raises UserError when a row cannot be read, when an id or a label is none of the model's, and when there is not one
    usable window for each split.
    """
    check_reader(options, reader)
    if reader.task == "image-classification":
        return Splits(*image_batches(options, reader, training=bool(train_len)))
    return _TextSplits(options, reader, train_len, rows).load()


@dataclass
class _TextSplits:
    """How text becomes splits; one call of `load`."""

    options: DataConfig
    reader: Reader
    train_len: int
    rows: Rows | None = None
    skipped: int = 0
    labels: LabelReader | None = None

    @property
    def classes(self) -> bool:
        return self.reader.task == "sequence-classification"

    def load(self) -> Splits:
        options, task = self.options, self.reader.task
        source = self.rows or read_rows(options, options.name, task)
        longest = min(options.seq_len, self.train_len or options.seq_len)
        self.packs = options.packing and not self.classes
        self.encoder = Encoder(self.reader.processor, longest)
        encoded = self._encode(source)
        self.layout = Layout(self.encoder.specials_of(encoded), halves=task == "seq2seq-lm")
        rest, held_out, held_origin = self._hold_out(source, encoded)
        evaluation = self._windows(held_out)[: options.eval_samples]
        pool = self._windows(rest)
        for name, windows, size in (("evaluation", evaluation, held_out), ("calibration", pool, rest)):
            if not windows:
                raise UserError(
                    f"{source.origin}: {sum(len(row.tokens) for row in size)} tokens in {len(size)} rows are left for "
                    f"{name}, one window needs {options.seq_len}, some of it trained on; use more text, a smaller "
                    "--data.seq_len, or --data.packing false"
                )
        calibration, training = self._draw(pool, source.origin)
        self._warn(len(calibration), len(evaluation))
        return self._made(source, calibration, (evaluation, held_origin), training)

    def _encode(self, source: Rows) -> list[Encoded]:
        """Each usable row's tokens, up to MAX_TOKENS."""
        encoded: list[Encoded] = []
        total, labels = 0, itertools.repeat(None)
        if self.classes:
            self.labels = self._label_reader(source)
            labels = iter(source.labels) if source.labels is not None else labels
        numbered = enumerate(zip(source.values, labels, strict=False))
        while chunk := list(itertools.islice(numbered, _AT_ONCE)):
            try:
                some = [(number, value, self._label(number, label)) for number, (value, label) in chunk]
                if source.labels is not None and self.classes:
                    some = [row for row in some if row[2] is not None]
                done = self.encoder.encode(some, source.separator if self.packs else "")
            except Unreadable as error:
                raise UserError(f"{source.origin}, {error}") from None
            self.skipped += len(chunk) - len(done)
            encoded += done
            total += sum(len(row.tokens) for row in done)
            if total > MAX_TOKENS:
                break
        if not encoded:
            with_labels = " with labels that count" if self.classes else ""
            raise UserError(
                f"{source.origin} has no text{with_labels} in {self.skipped} rows; name the column with --data.column"
            )
        refuse_text_without_words(source.origin, encoded, self.encoder.tokenizer)
        return encoded

    def _label_reader(self, source: Rows) -> LabelReader:
        try:
            sample = list(itertools.islice(source.labels or (), _AT_ONCE))
            labels = label_reader(self.reader.config, sample, source.class_names)
        except Unreadable as error:
            raise UserError(str(error)) from None
        if source.labels is None and labels.kind != NUMBERS:
            raise UserError(
                f"data {source.origin} has no column that is known to hold labels; name it with --data.label_column"
            )
        return labels

    def _label(self, number: int, label: Any) -> Any:
        if self.labels is None:
            return None
        try:
            return self.labels.read(label)
        except Unreadable as error:
            raise Unreadable(f"row {number}: {error}") from None

    def _hold_out(self, source: Rows, encoded: list[Encoded]) -> tuple[list[Encoded], list[Encoded], str]:
        """Rows to choose from, evaluation rows, and where the latter come from."""
        options = self.options
        if options.evaluation:
            apart = read_rows(options, options.evaluation, self.reader.task)
            skipped, held_out = self.skipped, self._encode(apart)
            self.skipped = skipped
            return encoded, held_out, apart.origin
        return *_last_rows(encoded, options, self.packs), f"the last rows of {source.origin}"

    def _windows(self, rows: Sequence[Encoded]) -> list[Window]:
        if self.packs:
            return packed(rows, self.layout, self.options.seq_len)
        return unpacked(rows, self.layout, self.options.seq_len, classes=self.classes)

    def _draw(self, pool: Sequence[Window], origin: str) -> tuple[list[Window], list[Window]]:
        """Windows for calibration, and the others, where the model is to be trained."""
        options, trains = self.options, bool(self.train_len)
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(options.seed)).tolist()
        limit = min(options.num_samples, max(1, len(pool) * 3 // 4) if trains else len(pool))
        others = [pool[i] for i in order[limit:]] if trains else []
        if trains and not training_windows(others, self.layout, self.train_len, classes=self.classes):
            raise UserError(f"{origin}: no text is left for training after {limit} calibration windows; use more text")
        return [pool[i] for i in order[:limit]], others

    def _warn(self, calibration: int, evaluation: int) -> None:
        asked = self.options.num_samples, self.options.eval_samples
        for wanted, found, name in zip(asked, (calibration, evaluation), ("calibration", "evaluation"), strict=True):
            if found < wanted:
                log.warning("asked for %d %s sequences, the data has %d", wanted, name, found)

    def _made(
        self, source: Rows, calibration: list[Window], held_out: tuple[list[Window], str], training: list[Window]
    ) -> Splits:
        options, layout, length = self.options, self.layout, self.options.seq_len
        evaluation, held_origin = held_out
        short = training_windows(training, layout, self.train_len, classes=self.classes) if training else []
        collator = Collator(layout, length, self.reader.pad_token, self.labels)
        used = {
            "calibration": source.facts() | report_of(calibration, layout, length),
            "evaluation": {"source": held_origin} | report_of(evaluation, layout, length),
            "training": {"source": source.origin} | report_of(training, layout, length) if training else None,
            "rows_skipped": self.skipped,
            "seq_len": options.seq_len,
            "seed": options.seed,
        }
        splits = Splits(
            collator.batches(calibration, options.micro_batch),
            collator.batches(evaluation, options.micro_batch),
            collator.batches(short, 1, self.train_len),
            used,
        )
        check_ids([*splits.calibration, *splits.evaluation, *splits.training], self.reader)
        if self.reader.task == "seq2seq-lm":
            start = decoder_start(self.reader.config) if self.reader.config is not None else 0
            for name in ("calibration", "evaluation", "training"):
                setattr(splits, name, [continuation(batch, start) for batch in getattr(splits, name)])
        return splits


def _last_rows(encoded: list[Encoded], options: DataConfig, packs: bool) -> tuple[list[Encoded], list[Encoded]]:
    """Last rows apart: enough for the asked evaluation windows, at most half of the rows and of the tokens."""
    total, wanted = sum(len(row.tokens) for row in encoded), options.eval_samples * options.seq_len
    if not packs:
        boundary = len(encoded) - min(options.eval_samples, len(encoded) // 2)
        return encoded[:boundary], encoded[boundary:]
    taken, boundary = 0, len(encoded)
    while boundary > 1 and taken < min(wanted, total // 2):
        boundary -= 1
        taken += len(encoded[boundary].tokens)
    return encoded[:boundary], encoded[boundary:]
