"""Chats as their tokenizer's template writes them, and what shows that nothing was lost on the way."""

from __future__ import annotations

import json
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from tinygn_dist.data.shapes import Chat, Unreadable

Message = dict[str, Any]


def render(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None]:
    """The chat as text with all its special tokens, and the beginning of it that is not trained on.

    Contents are given to the template as texts, and where it then leaves something out or refuses, as lists of parts,
    which templates of vision-language models ask for. Raises Unreadable when the template refuses the chat, or when a
    message's content is not in the text.
    """
    problems = []
    for write in (_as_text, _as_parts):
        messages = [write(message) for message in chat.messages]
        try:
            text = _apply(messages, chat, tokenizer)
            if lost := _lost(chat.messages, text):
                problems.append(f"the chat template leaves out {lost}")
                continue
            if chat.reply_from is None:
                return text, None
            return text, _apply(messages[: chat.reply_from], chat, tokenizer, add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            detail = str(error).strip().splitlines() or [type(error).__name__]
            problems.append(f"the chat template refuses it: {detail[0][:200]}")
    raise Unreadable(f"{problems[0]}; take such rows out, or name a column of text with --data.column")


def _apply(messages: list[Message], chat: Chat, tokenizer: PreTrainedTokenizerBase, **options: bool) -> str:
    return tokenizer.apply_chat_template(messages, tools=chat.tools, tokenize=False, **options)


def _parts(message: Message) -> list[str]:
    """The texts of a message's content."""
    content = message.get("content", "")
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise Unreadable(
            f"the content of a message is a {type(content).__name__}, accepted: text, or a list of its parts"
        )
    other = next((p for p in content if not isinstance(p, str) and not isinstance(p.get("text"), str)), None)
    if other is not None:
        raise Unreadable(f"a message holds a part of type {other.get('type')!r}, accepted in text rows: text")
    return [part if isinstance(part, str) else part["text"] for part in content]


def _as_text(message: Message) -> Message:
    return message if "content" not in message else {**message, "content": "".join(_parts(message))}


def _as_parts(message: Message) -> Message:
    if "content" not in message:
        return message
    return {**message, "content": [{"type": "text", "text": text} for text in _parts(message)]}


def _lost(messages: list[Message], text: str) -> str | None:
    """Which content is not in the text. Left out on purpose: thoughts before an answer, and what is said beside a call
    of a tool, which templates may drop."""
    squeezed = None
    for message in messages:
        if message.get("tool_calls"):
            continue
        for content in _parts(message):
            answer = content.rsplit("</think>", 1)[-1].strip()
            written = (json.dumps(answer, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False))
            if answer in text or any(form in text for form in written):
                continue
            squeezed = squeezed or " ".join(text.split())
            if " ".join(answer.split()) not in squeezed:
                return f"the content of a message of role {message.get('role')!r} ({answer[:40]!r})"
    return None
