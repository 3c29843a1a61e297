"""The tokenizer of a checkpoint as keys of a GGUF file: vocabulary, merges, pre-tokenizer, special ids, chat template.

llama.cpp knows pre-tokenizers by name. Which one a checkpoint has is found by what it does: its pieces of a text full
of hard cases are those of exactly one row here, or it is refused. Source: src/llama-vocab.cpp of llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gguf import GGUFWriter, TokenType
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from tinygn_dist.errors import Refused

_HARD = (
    "Hello  world\n\n\t x=12345,67.8!! don't WE'LL I'M\r\n  naïve Ελλάδα 数字123 русский 😀😀 foo_bar(baz);  \n   end  "
)
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    first = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _digits_first() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


PRE_TOKENIZERS: Mapping[str, pre_tokenizers.PreTokenizer] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": _digits_first(),
    "llama-bpe": _split(_LLAMA_3),
    "qwen2": _split(_LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")),
}


class Vocabulary(NamedTuple):
    """model: gpt2 (byte-level BPE, with a pre-tokenizer and merges) or llama (sentencepiece BPE, with scores)."""

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    scores: Sequence[float]
    adds_space: bool


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Vocabulary:
    """vocab_size: rows of the embedding; ids without a token get names of their own.

    Raises Refused for a tokenizer that is no BPE, has an unknown pre-tokenizer or more tokens than the embedding.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise Refused(f"{type(tokenizer).__name__} has no tokenizer.json; GGUF needs one, save the fast tokenizer")
    written = json.loads(backend.to_str())
    model = written["model"]
    if model["type"] != "BPE":
        raise Refused(f"GGUF files carry BPE tokenizers here, this one is {model['type']}; use --format onnx")
    if len(tokenizer) > vocab_size:
        raise Refused(f"the tokenizer has {len(tokenizer):,} tokens, the embedding {vocab_size:,} rows")
    merges = [tuple(each.split(" ")) if isinstance(each, str) else tuple(each) for each in model["merges"]]
    is_spm = bool(model.get("byte_fallback"))
    tokens, types = _tokens(written, vocab_size, is_spm)
    if is_spm:
        return Vocabulary("llama", "default", tokens, types, (), _scores(tokens, merges), _adds_space(written))
    if written.get("normalizer") and written["normalizer"]["type"] not in ("NFC",):
        raise Refused(f"GGUF files have no normalizer {written['normalizer']['type']}; use --format onnx")
    return Vocabulary("gpt2", _pre_tokenizer(backend), tokens, types, [" ".join(pair) for pair in merges], (), False)


def add_tokenizer(writer: GGUFWriter, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every key that llama.cpp reads of a tokenizer."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None:
            add(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    writer.add_add_space_prefix(vocabulary.adds_space)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(written: dict, vocab_size: int, is_spm: bool) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    for token, number in written["model"]["vocab"].items():
        byte = is_spm and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        tokens[number], types[number] = token, int(TokenType.BYTE if byte else TokenType.NORMAL)
    for added in written["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    if is_spm and (unknown := written["model"].get("unk_token")) in tokens:
        types[tokens.index(unknown)] = int(TokenType.UNKNOWN)
    return tokens, types


def _scores(tokens: Sequence[str], merges: Sequence[tuple[str, ...]]) -> list[float]:
    """A sentencepiece BPE merges the pair whose result scores most: minus the rank of the merge that makes it first."""
    first: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        first.setdefault("".join(pair), rank)
    return [-float(first[token]) if token in first else -1e4 - len(merges) for token in tokens]


def _adds_space(written: dict) -> bool:
    pre, normalizer = written.get("pre_tokenizer") or {}, written.get("normalizer") or {}
    steps = [pre, normalizer, *normalizer.get("normalizers", ())]
    return any(s.get("type") == "Prepend" or s.get("prepend_scheme") in ("first", "always") for s in steps)


def _pre_tokenizer(backend: Tokenizer) -> str:
    if backend.pre_tokenizer is not None:
        found = backend.pre_tokenizer.pre_tokenize_str(_HARD)
        for name, known in PRE_TOKENIZERS.items():
            if known.pre_tokenize_str(_HARD) == found:
                return name
    raise Refused(
        f"the tokenizer splits text as none of llama.cpp's pre-tokenizers known here ({', '.join(PRE_TOKENIZERS)}); "
        "use --format onnx"
    )
