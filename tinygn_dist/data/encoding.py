"""A row to token ids, in one place, as the model's own tokenizer does it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tinygn_dist.data.chats import render
from tinygn_dist.data.shapes import Chat, Pair, RowValue, TextPair, TokenIds, Unreadable, messages_of
from tinygn_dist.models.objective import IGNORED


@dataclass(frozen=True)
class Reader:
    """The model as rows meet it. processor: its tokenizer or image processor. config: its config.json; without one
    nothing is checked against the model's sizes."""

    task: str
    processor: Any
    config: PretrainedConfig | None = None

    @property
    def text_config(self) -> PretrainedConfig | None:
        return self.config.get_text_config() if self.config is not None else None

    @property
    def num_embeddings(self) -> int | None:
        """Rows of the embedding of tokens."""
        return getattr(self.text_config, "vocab_size", None)

    @property
    def pad_token(self) -> int:
        """What a row is filled up with, one of the model's own tokens: decoders with a class head find a row's end by
        the pad token of config.json."""
        candidates = (
            getattr(self.text_config, "pad_token_id", None) if self.task == "sequence-classification" else None,
            getattr(self.processor, "pad_token_id", None),
            getattr(self.processor, "eos_token_id", None),
        )
        size = self.num_embeddings or float("inf")
        return next((token for token in candidates if token is not None and 0 <= token < size), 0)


@dataclass(frozen=True)
class Encoded:
    """One row. tokens: without special tokens at its ends, unless complete. counted: which tokens are trained on; None
    for all. types: token types of a pair of texts."""

    tokens: list[int]
    number: int
    label: Any = None
    counted: list[bool] | None = None
    types: list[int] | None = None
    complete: bool = False


@dataclass(frozen=True)
class Specials:
    """Tokens that a tokenizer puts around a text: [CLS] and [SEP], a start token, an end token that pooling reads."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Specials:
        """Read off one text with and without them, which every kind of post-processor answers."""
        bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        places = range(len(whole) - len(bare) + 1)
        start = next((i for i in places if whole[i : i + len(bare)] == bare), None) if bare else len(whole)
        if start is None:  # other tokens altogether: nothing can be taken off or added
            return cls()
        return cls(tuple(whole[:start]), tuple(whole[start + len(bare) :]))

    def missing_before(self, tokens: Sequence[int]) -> list[int]:
        """What is to be put in front of tokens that may begin with it already."""
        return [] if tuple(tokens[: len(self.before)]) == self.before else list(self.before)

    def missing_after(self, tokens: Sequence[int]) -> list[int]:
        size = len(self.after)
        return [] if not size or tuple(tokens[-size:]) == self.after else list(self.after)

    def around(self, tokens: Sequence[int]) -> list[int]:
        return [*self.missing_before(tokens), *tokens, *self.missing_after(tokens)]

    def room(self, tokens: Sequence[int], start: int, length: int) -> int:
        """How many tokens from `start` on fill `length` places together with the special ones."""
        size = length - len(self.missing_before(tokens[start : start + len(self.before)]))
        return size - len(self.missing_after(tokens[start : start + size]))


@dataclass(frozen=True)
class _Written:
    """A row as text. prompt: its beginning that is not trained on. second: the other text of a pair. complete: special
    tokens are in it."""

    text: str
    prompt: str | None = None
    second: str | None = None
    complete: bool = False


class Encoder:
    """Rows to token ids. The tokenizer is copied: calling a fast one changes the truncation and padding that it holds
    and that a saved copy of it would carry."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, longest_pair: int) -> None:
        """longest_pair: tokens of a pair of texts at most."""
        self.tokenizer = copy.deepcopy(tokenizer)
        self.specials = Specials.of(self.tokenizer)
        self._longest_pair = longest_pair

    def encode(self, rows: Sequence[tuple[int, RowValue, Any]], joint: str) -> list[Encoded]:
        """Those rows of (number, value, label) that hold something. joint: what follows a text, where rows are packed.

        Raises Unreadable, with the row's number, when a row cannot be read.
        """
        ready: list[Encoded] = []
        written: list[tuple[Encoded, _Written]] = []
        for number, value, label in rows:
            if isinstance(value, TokenIds):
                counted = None if value.labels is None else [each != IGNORED for each in value.labels]
                ready.append(Encoded(list(value.tokens), number, label, counted, complete=True))
                continue
            try:
                text = self._write(value, joint)
            except Unreadable as error:
                raise Unreadable(f"row {number}: {error}") from None
            if text is not None and text.text.strip():
                written.append((Encoded([], number, label, complete=text.complete), text))
        return ready + self._with_tokens(written)

    def specials_of(self, rows: Sequence[Encoded]) -> Specials:
        """Of rows that have special tokens in them a start token alone, where each begins with it: it then stands at
        the start of every window too."""
        if not rows or not rows[0].complete:
            return self.specials
        begins = not self.specials.missing_before(rows[0].tokens)
        return Specials(self.specials.before if begins else ())

    def _write(self, value: RowValue, joint: str) -> _Written | None:
        template = getattr(self.tokenizer, "chat_template", None)
        if isinstance(value, list):
            value = Chat(messages_of(value))
        if isinstance(value, Chat) and not template:
            if value.plain is None:
                raise Unreadable(
                    "it is a list of chat messages and the tokenizer has no chat template; use text, or a chat model"
                )
            value = value.plain
        if isinstance(value, Chat):
            if not any(message.get("content") or message.get("tool_calls") for message in value.messages):
                return None
            text, prompt = render(value, self.tokenizer)
            return _Written(text, prompt, complete=True)
        if isinstance(value, Pair):
            end = getattr(self.tokenizer, "eos_token", None) or joint
            ended = value.completion if value.completion.endswith(end) else value.completion + end
            return _Written(value.prompt + ended, value.prompt)
        if isinstance(value, TextPair):
            return _Written(value.first, second=value.second, complete=True)
        return None if not value or not value.strip() else _Written(value + joint)

    def _with_tokens(self, written: Sequence[tuple[Encoded, _Written]]) -> list[Encoded]:
        if not written:
            return []
        if written[0][1].second is not None:
            return self._pairs(written)
        texts = self.tokenizer([text.text for _, text in written], add_special_tokens=False)["input_ids"]
        asked = [number for number, (_, text) in enumerate(written) if text.prompt is not None]
        prompts: dict[int, list[int]] = {}
        if asked:
            found = self.tokenizer([written[i][1].prompt for i in asked], add_special_tokens=False)["input_ids"]
            prompts = dict(zip(asked, found, strict=True))
        done = []
        for number, ((row, _), tokens) in enumerate(zip(written, texts, strict=True)):
            start = _common(prompts[number], tokens) if number in prompts else 0
            counted = [place >= start for place in range(len(tokens))] if start else None
            done.append(replace(row, tokens=tokens, counted=counted))
        return done

    def _pairs(self, written: Sequence[tuple[Encoded, _Written]]) -> list[Encoded]:
        found = self.tokenizer(
            [text.text for _, text in written],
            [text.second for _, text in written],
            truncation="longest_first",
            max_length=self._longest_pair,
        )
        types = found.get("token_type_ids") or [None] * len(written)
        return [
            replace(row, tokens=tokens, types=kinds)
            for (row, _), tokens, kinds in zip(written, found["input_ids"], types, strict=True)
        ]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with: a prompt's last token may be another one where a completion follows."""
    length = min(len(one), len(other))
    return next((place for place in range(length) if one[place] != other[place]), length)
