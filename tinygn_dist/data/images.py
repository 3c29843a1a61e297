"""Splits of an image classification dataset."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from tinygn_dist.config import DataConfig
from tinygn_dist.data.encoding import Reader
from tinygn_dist.data.labels import LabelReader, label_reader
from tinygn_dist.data.shapes import Unreadable
from tinygn_dist.data.sources import Rows, read_rows
from tinygn_dist.errors import UserError
from tinygn_dist.models.objective import Batch

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's name of an image with so many channels"""


def image_batches(
    options: DataConfig, reader: Reader, training: bool
) -> tuple[list[Batch], list[Batch], list[Batch], dict[str, Any]]:
    """Calibration, evaluation and training micro-batches, and what the report says. Evaluation rows are the last ones,
    or those of `data.evaluation`."""
    source = read_rows(options, options.name, reader.task)
    wanted = options.num_samples * (5 if training else 1) + options.eval_samples
    labels, pairs = _labelled(source, reader, None if options.evaluation else wanted)
    if options.evaluation:
        apart = read_rows(options, options.evaluation, reader.task)
        _, held_out = _labelled(apart, reader, options.eval_samples)
    else:
        boundary = len(pairs) - min(options.eval_samples, len(pairs) // 2)
        pairs, held_out = pairs[:boundary], pairs[boundary:]
    if not pairs or not held_out:
        raise UserError(
            f"{source.origin}: {len(pairs) + len(held_out)} images are too few for calibration and evaluation"
        )
    count = min(options.num_samples, len(pairs))
    facts = {
        "calibration": {**source.facts(), "sequences": count},
        "evaluation": {"sequences": len(held_out)},
    }
    return (
        _batches(pairs[:count], options.micro_batch, labels, reader),
        _batches(held_out, options.micro_batch, labels, reader),
        _batches(pairs[count:], 1, labels, reader) if training else [],
        facts,
    )


def _labelled(source: Rows, reader: Reader, limit: int | None) -> tuple[LabelReader, list[tuple[Any, Any]]]:
    if source.labels is None:
        raise UserError(
            f"data {source.origin} has no column that is known to hold labels; name it with --data.label_column"
        )
    stored = list(itertools.islice(source.labels, limit))
    labels, pairs = label_reader(reader.config, stored[:512], source.class_names), []
    for number, (image, label) in enumerate(zip(source.values, stored, strict=False)):
        try:
            read = labels.read(label)
        except Unreadable as error:
            raise UserError(f"row {number} of {source.origin}: {error}") from None
        if read is not None and image is not None:
            pairs.append((image, read))
    return labels, pairs


def _batches(pairs: Sequence[tuple[Any, Any]], size: int, labels: LabelReader, reader: Reader) -> list[Batch]:
    channels = getattr(reader.config, "num_channels", 3)
    if channels not in _MODES:
        raise UserError(f"the model reads images of {channels} channels, accepted: {', '.join(map(str, _MODES))}")
    made = []
    for start in range(0, len(pairs), size):
        some = pairs[start : start + size]
        images = [image.convert(_MODES[channels]) for image, _ in some]
        pixels = reader.processor(images, return_tensors="pt")["pixel_values"]
        if pixels.shape[1] != channels:
            raise UserError(
                f"the image processor gives {pixels.shape[1]} channels and the model reads {channels}; use the "
                "processor that belongs to the model"
            )
        made.append({"pixel_values": pixels, "labels": labels.tensor([label for _, label in some])})
    return made
