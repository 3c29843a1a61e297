"""Rows against the model's sizes, as config.json has them: nothing of this needs a weight."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from transformers import PreTrainedTokenizerBase

from tinygn_dist.config import DataConfig
from tinygn_dist.data.encoding import Encoded, Reader
from tinygn_dist.errors import UserError
from tinygn_dist.models.objective import Batch

_ROWS_LOOKED_AT = 4096


def check_reader(options: DataConfig, reader: Reader) -> None:
    """Raises UserError where the model cannot read what the options ask for."""
    if reader.task == "seq2seq-lm" and not options.packing:
        raise UserError(
            "data.packing false with an encoder-decoder: text is cut into a source and its continuation; leave it on"
        )
    without_pad = reader.config is not None and getattr(reader.text_config, "pad_token_id", None) is None
    if reader.task == "sequence-classification" and options.micro_batch > 1 and without_pad:
        raise UserError(
            f"data.micro_batch {options.micro_batch} with a classifier whose config.json has no pad_token_id, by "
            "which it finds the end of a row, accepted: 1; or set pad_token_id there"
        )


def check_ids(batches: Sequence[Batch], reader: Reader) -> None:
    """Raises UserError for a token that the embedding has no row for."""
    size = reader.num_embeddings
    if size is None or not batches:
        return
    largest = max(int(batch["input_ids"].max()) for batch in batches)
    if largest >= size:
        word = reader.processor.convert_ids_to_tokens(largest)
        raise UserError(
            f"the rows hold token {largest} ({word!r}) of a tokenizer of {len(reader.processor)} tokens, and the "
            f"model's embedding has {size} rows; use the tokenizer that belongs to the model"
        )


def refuse_text_without_words(origin: str, rows: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError when no token of the first rows is text: all are special ones, or ones for unknown words."""
    special = set(getattr(tokenizer, "all_special_ids", None) or ())
    if not any(token not in special for row in islice(rows, _ROWS_LOOKED_AT) for token in row.tokens):
        raise UserError(
            f"{origin}: every token of the rows is a special or unknown one; name the column of the text with "
            "--data.column, or use the tokenizer that belongs to the model"
        )
