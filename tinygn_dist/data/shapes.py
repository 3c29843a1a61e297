"""Which columns make a row, and what of a row is trained on: one table for text, chats, pairs and ready-made token
ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinygn_dist.errors import UserError

Cells = Mapping[str, Any]
"""one row as it is stored: a cell for each column"""


class Unreadable(Exception):
    """Why one row cannot be read; whoever knows its number and its dataset makes a UserError of it."""


@dataclass(frozen=True)
class Chat:
    """Messages with the keys role and content. reply_from: the message that training begins with; all of them without
    one. plain: the same row for a tokenizer without a chat template, where that is usual."""

    messages: list[dict[str, Any]]
    reply_from: int | None = None
    tools: list[Any] | None = None
    plain: Pair | None = None


@dataclass(frozen=True)
class Pair:
    """A prompt, and its completion, which is trained on."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class TextPair:
    """Two texts that a classifier compares."""

    first: str
    second: str


@dataclass(frozen=True)
class TokenIds:
    """A row that somebody has tokenised. labels: -100 where a token is not trained on."""

    tokens: list[int]
    labels: list[int] | None = None


RowValue = str | Chat | Pair | TextPair | TokenIds | None


@dataclass(frozen=True)
class Shape:
    """columns: all of them make the shape. optional: read too where they are there. weakness: a shape counts only where
    none of a smaller number fits, as what it holds is a piece of theirs."""

    columns: tuple[str, ...]
    read: Callable[[Cells], RowValue]
    optional: tuple[str, ...] = ()
    weakness: int = 0

    @property
    def option(self) -> str:
        return f"--data.column {','.join(self.columns)}"

    def all_of(self, columns: Sequence[str]) -> list[str]:
        return [*self.columns, *(name for name in self.optional if name in columns)]


_ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""what the `from` of ShareGPT rows is called in chat templates"""


def one_cell(name: str) -> Callable[[Cells], RowValue]:
    """Whatever one column holds: text, a chat, or token ids."""

    def read(cells: Cells) -> RowValue:
        value = cells[name]
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return Chat(messages_of(value))
        if isinstance(value, list) and value and isinstance(value[0], int):
            return TokenIds(value)
        if isinstance(value, list) and not value:
            return None
        raise Unreadable(
            f"column {name} holds {type(value).__name__}, accepted: text or a list of chat messages; name the column "
            "with --data.column"
        )

    return read


def messages_of(value: Any) -> list[dict[str, Any]]:
    """Messages with role and content, without keys that hold nothing: a parquet file gives every message the keys of
    all.

    Raises Unreadable, naming the keys that are not known.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Unreadable("got no list of messages, accepted: a list of mappings with role and content")
    return [_message(without_nulls(message)) for message in value]


def without_nulls(value: Any) -> Any:
    """The same without keys whose value is None, at every depth."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _message(message: dict[str, Any]) -> dict[str, Any]:
    if "role" in message:
        if not message.keys() & {"content", "tool_calls", "thinking", "reasoning_content"}:
            message = {**message, "content": ""} if len(message) == 1 else message
        if "content" in message or "tool_calls" in message or "thinking" in message or "reasoning_content" in message:
            return message
    elif "from" in message and "value" in message:
        role = _ROLES.get(str(message["from"]))
        if role is None:
            raise Unreadable(f"a message is from {message['from']!r}, accepted: {', '.join(_ROLES)}")
        return {"role": role, "content": message["value"]}
    raise Unreadable(
        f"its messages have the keys {', '.join(map(str, message)) or '(none)'}, accepted: role and content, or from "
        "and value; rename them, or name a column of text with --data.column"
    )


def _chat(name: str) -> Callable[[Cells], RowValue]:
    def read(cells: Cells) -> RowValue:
        return Chat(_system(cells) + messages_of(cells[name]), tools=_tools(cells)) if cells[name] else None

    return read


def _system(cells: Cells) -> list[dict[str, Any]]:
    """What a column of its own says to the model before the chat."""
    text = cells.get("system")
    return [{"role": "system", "content": text}] if isinstance(text, str) and text else []


def _tools(cells: Cells) -> list[Any] | None:
    tools = cells.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise Unreadable("its tools are no JSON, accepted: a list of JSON schemas") from None
    return without_nulls(list(tools)) if tools else None


def _prompt_and(name: str) -> Callable[[Cells], RowValue]:
    """A prompt and what follows: texts are joined as they are, messages through the chat template."""

    def read(cells: Cells) -> RowValue:
        prompt, completion = cells.get("prompt"), cells[name]
        if isinstance(completion, str) and isinstance(prompt, str | None):
            return Pair(prompt or "", completion) if completion else None
        if not completion:
            return None
        reply = _turns(completion, "assistant")
        if prompt is None or reply[0]["role"] != "assistant":
            return Chat(reply, tools=_tools(cells))  # the whole chat, as preference data often has it
        before = _turns(prompt, "user")
        return Chat(before + reply, len(before), _tools(cells))

    return read


def _turns(value: Any, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": value}] if isinstance(value, str) else messages_of(value)


def _asked_and_answered(question: str, answer: str, *context: str) -> Callable[[Cells], RowValue]:
    """Somebody asks and the model answers: a chat where the tokenizer has a template."""

    def read(cells: Cells) -> RowValue:
        texts = [cells.get(name) for name in (question, *context)]
        if any(not isinstance(text, str | None) for text in (*texts, cells[answer])):
            kinds = {name: type(cells.get(name)).__name__ for name in (question, *context, answer)}
            raise Unreadable(f"its cells are {kinds}, accepted: texts; name the column with --data.column")
        asked, reply = "\n\n".join(text for text in texts if text), cells[answer]
        if not asked or not reply:
            return None
        system = _system(cells)
        chat = [*system, {"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
        before = "\n\n".join([message["content"] for message in system] + [asked])
        return Chat(chat, len(system) + 1, plain=Pair(f"{before}\n\n", reply))

    return read


def _two_texts(first: str, second: str) -> Shape:
    def read(cells: Cells) -> RowValue:
        one, other = cells[first], cells[second]
        if not isinstance(one, str | None) or not isinstance(other, str | None):
            raise Unreadable(
                f"{first} and {second} hold {type(one).__name__} and {type(other).__name__}, accepted: texts"
            )
        return TextPair(one, other) if one and other else None

    return Shape((first, second), read)


def _token_ids(cells: Cells) -> RowValue:
    tokens, labels = cells["input_ids"], cells.get("labels")
    if not tokens:
        return None
    mask = cells.get("attention_mask") or [1] * len(tokens)
    real = [place for place, counts in enumerate(mask) if counts]
    if labels is not None and (not isinstance(labels, list) or len(labels) != len(tokens)):
        raise Unreadable(f"it has {len(tokens)} input_ids and labels of another length, accepted: one label per token")
    return TokenIds([tokens[i] for i in real], [labels[i] for i in real] if labels is not None else None)


_TEXTS = ("text", "content", "document", "article", "sentence")
_CHATS = ("messages", "conversations", "conversation")
_TEXT_SHAPES = (
    *(Shape((name,), one_cell(name)) for name in _TEXTS),
    *(Shape((name,), _chat(name), ("tools", "system")) for name in _CHATS),
    Shape(("prompt", "completion"), _prompt_and("completion"), ("tools",)),
    Shape(("prompt", "response"), _prompt_and("response")),
    Shape(("instruction", "output"), _asked_and_answered("instruction", "output", "input"), ("input", "system")),
    Shape(("instruction", "response"), _asked_and_answered("instruction", "response", "context"), ("context",)),
    Shape(("question", "answer"), _asked_and_answered("question", "answer")),
    Shape(("question", "response"), _asked_and_answered("question", "response")),
    Shape(("query", "response"), _asked_and_answered("query", "response")),
    Shape(("input", "output"), _asked_and_answered("input", "output")),
    Shape(("input_ids",), _token_ids, ("labels", "attention_mask")),
    Shape(("chosen",), _prompt_and("chosen"), ("prompt",), weakness=1),
    Shape(("prompt",), one_cell("prompt"), weakness=2),
)
_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text", "text_pair"),
    ("query", "passage"),
)
_CLASS_SHAPES = (*_TEXT_SHAPES, *(_two_texts(*names) for names in _PAIRS))
_IMAGE_SHAPES = tuple(Shape((name,), lambda cells, name=name: cells[name]) for name in ("image", "img", "pixel_values"))
_SHAPES = {"sequence-classification": _CLASS_SHAPES, "image-classification": _IMAGE_SHAPES}


def choose_shape(asked: str | None, name: str, columns: Sequence[str], task: str) -> Shape:
    """The shape of a dataset's rows. asked: data.column, one name, or all names of a shape with commas between them.

    Raises UserError for a column that is not there, no shape that fits, and more than one.
    """
    shapes = _SHAPES.get(task, _TEXT_SHAPES)
    if asked is not None:
        return _asked_shape(asked, name, columns, task)
    fitting = [shape for shape in shapes if set(shape.columns) <= set(columns)]
    least = min((shape.weakness for shape in fitting), default=0)
    fitting = [shape for shape in fitting if shape.weakness == least]
    whole = [
        shape
        for shape in fitting
        if not any(set(shape.columns) < set(other.all_of(columns)) for other in fitting if other is not shape)
    ]
    if len(whole) > 1:
        raise UserError(
            f"data {name} has several columns that could be its rows, accepted: "
            + ", or ".join(shape.option for shape in whole)
        )
    if whole:
        return whole[0]
    if len(columns) == 1:
        return _asked_shape(columns[0], name, columns, task)
    raise UserError(
        f"data {name} has columns {', '.join(columns)} and none is known to hold "
        f"{'images' if task == 'image-classification' else 'text'}; name it with --data.column"
    )


def _asked_shape(asked: str, name: str, columns: Sequence[str], task: str) -> Shape:
    names = (asked,) if asked in columns else tuple(part.strip() for part in asked.split(","))
    missing = [part for part in names if part not in columns]
    if missing:
        raise UserError(f"data.column {missing[0]!r} is not in {name}, which has {', '.join(columns)}")
    for shape in _SHAPES.get(task, _TEXT_SHAPES):
        if set(shape.columns) <= set(names) <= {*shape.columns, *shape.optional}:
            return shape
    if len(names) > 1:
        raise UserError(
            f"data.column {asked!r} are no columns that make a row together, accepted: one column, or "
            + ", ".join(",".join(shape.columns) for shape in _SHAPES.get(task, _TEXT_SHAPES) if len(shape.columns) > 1)
        )
    if task == "image-classification":
        return Shape(names, lambda cells: cells[names[0]])
    return Shape(names, one_cell(names[0]))
