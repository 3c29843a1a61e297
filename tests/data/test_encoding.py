"""Rows reach the model as its own tokenizer writes them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers as hf

from tests.data import tokenizers
from tinygn_dist.config import DataConfig
from tinygn_dist.data.shapes import Chat, Pair, TextPair, TokenIds
from tinygn_dist.data.sources import Rows
from tinygn_dist.data.splits import Reader, Splits, load_splits
from tinygn_dist.errors import UserError
from tinygn_dist.models.objective import IGNORED

TEXTS = [" ".join(f"w{(7 * r + i) % 40}" for i in range(9)) for r in range(40)]


def load(values: list[Any], tokenizer: Any, task: str = "causal-lm", train_len: int = 0, **options: Any) -> Splits:
    asked = DataConfig(**{"num_samples": 64, "eval_samples": 2, "seq_len": 16, "packing": False, **options})
    labels = [0] * len(values) if task.endswith("classification") else None
    return load_splits(asked, Reader(task, tokenizer), train_len, Rows(values, labels, "rows", "\n"))


def sequences(splits: Splits) -> list[list[int]]:
    """Every sequence without its padding."""
    found = []
    for batch in splits.calibration + splits.evaluation:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        found += [ids[real.bool()].tolist() for ids, real in zip(batch["input_ids"], mask, strict=True)]
    return found


@pytest.mark.parametrize("post", tokenizers.POST)
@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification", "feature-extraction"])
def test_an_unpacked_row_is_what_the_tokenizer_makes_of_it(post: str, task: str):
    tokenizer = tokenizers.made(post)
    wanted = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert sorted(sequences(load(TEXTS, tokenizer, task))) == sorted(wanted)


@pytest.mark.parametrize("post", tokenizers.POST)
@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_a_row_that_is_too_long_keeps_its_end_token(post: str, task: str):
    tokenizer = tokenizers.made(post)
    wanted = [tokenizer(text, truncation=True, max_length=6)["input_ids"] for text in TEXTS]
    assert sorted(sequences(load(TEXTS, tokenizers.made(post), task, seq_len=6))) == sorted(wanted)


@pytest.mark.parametrize("post", tokenizers.POST)
@pytest.mark.parametrize("train_len", [0, 7, 16])
def test_every_packed_window_stands_between_the_tokens_that_the_model_was_trained_with(post: str, train_len: int):
    tokenizer = tokenizers.made(post)
    before, after = (tokenizer.convert_tokens_to_ids(words) for words in tokenizers.AROUND[post])
    splits = load(TEXTS, tokenizer, packing=True, train_len=train_len, num_samples=4)
    stream = [token for text in TEXTS for token in tokenizer(text + "\n", add_special_tokens=False)["input_ids"]]
    for batches, length in ((splits.calibration, 16), (splits.evaluation, 16), (splits.training, train_len)):
        for batch in batches:
            (ids,) = batch["input_ids"].tolist()
            assert len(ids) == length and "attention_mask" not in batch
            assert ids[: len(before)] == before and ids[len(ids) - len(after) :] == after
            body = ids[len(before) : len(ids) - len(after)]
            assert any(stream[i : i + len(body)] == body for i in range(len(stream)))
    assert bool(splits.training) == bool(train_len)


@pytest.mark.parametrize("post", ["start token", "start and end", "cls and sep"])
@pytest.mark.parametrize("packing", [False, True])
def test_a_text_that_begins_with_the_start_token_gets_no_second_one(post: str, packing: bool):
    """As text files of finished prompts do."""
    tokenizer = tokenizers.made(post)
    (start,) = tokenizers.AROUND[post][0]
    for ids in sequences(load([f"{start} {text}" for text in TEXTS], tokenizer, packing=packing)):
        assert ids[0] == tokenizer.convert_tokens_to_ids(start) != ids[1]


@pytest.mark.parametrize("post", ["end token", "start and end"])
def test_each_half_for_an_encoder_decoder_ends_as_its_texts_do(post: str):
    """T5 reads `... </s>` and writes `... </s>`."""
    tokenizer = tokenizers.made(post)
    start = len(tokenizers.AROUND[post][0])
    for seq_len in (16, 17):
        splits = load(TEXTS, tokenizer, "seq2seq-lm", packing=True, seq_len=seq_len)
        for batch in splits.calibration:
            source, target = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
            assert (len(source), len(target)) == (seq_len // 2, seq_len - seq_len // 2)
            assert source[-1] == target[-1] == tokenizer.eos_token_id
            assert [ids[0] == tokenizer.bos_token_id for ids in (source, target)] == [bool(start)] * 2
            assert batch["decoder_input_ids"][0].tolist() == [0, *target[:-1]]


def test_a_tokenizer_that_truncates_and_pads_stays_as_it_is():
    tokenizer = tokenizers.made("cls and sep")
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    before = tokenizer.backend_tokenizer.to_str()
    load(TEXTS, tokenizer, packing=True)
    assert tokenizer.backend_tokenizer.to_str() == before


# -- chats -------------------------------------------------------------------------------------------------------------
def chat(number: int, turns: int = 2) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": f"w{(number + i) % 40} w{i}"} for i in range(turns)]


CHATS = [chat(number) for number in range(40)]


@pytest.mark.parametrize("post", tokenizers.POST)
@pytest.mark.parametrize("template", tokenizers.TEMPLATES)
def test_chat_rows_are_what_the_template_writes(post: str, template: str):
    tokenizer = tokenizers.made(post, tokenizers.TEMPLATES[template])
    parts = template == "parts only"
    given = [[{**m, "content": [{"type": "text", "text": m["content"]}]} if parts else m for m in c] for c in CHATS]
    wanted = [tokenizer.apply_chat_template(messages, return_dict=False) for messages in given]
    found = sequences(load([Chat(messages) for messages in CHATS], tokenizer, seq_len=64))
    assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize("post", tokenizers.POST)
def test_no_window_of_packed_chats_begins_with_two_start_tokens(post: str):
    tokenizer = tokenizers.made(post, tokenizers.TEMPLATES["with a start token"])
    for ids in sequences(load([Chat(messages) for messages in CHATS], tokenizer, packing=True)):
        assert ids[:2].count(tokenizer.bos_token_id) <= 1 and len(ids) == 16


def test_contents_in_parts_are_read_by_a_template_for_texts():
    tokenizer = tokenizers.made(template=tokenizers.TEMPLATES["without one"])
    in_parts = [[{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages] for messages in CHATS]
    found, wanted = (sequences(load([Chat(m) for m in rows], tokenizer, seq_len=64)) for rows in (in_parts, CHATS))
    assert found == wanted


@pytest.mark.parametrize(
    "template, messages, part",
    [
        (tokenizers.NO_SYSTEM, [{"role": "system", "content": "w1"}, *chat(1)], "System role not supported"),
        (tokenizers.TOOLS, [{"role": "user", "content": "w1", "tool_calls": 5}], "refuses it"),
        (
            "{% for m in messages %}{{ m['content'] if loop.first else m['text'] }}{% endfor %}",
            chat(1),
            "leaves out the content",
        ),
        ("{{ messages[0]['content'] }}", chat(1), "role 'assistant' ('w2 w1')"),
        (tokenizers.BODY, [{"role": "user", "content": [{"type": "image", "url": "x"}]}], "'image'"),
        (tokenizers.BODY, [{"role": "user", "content": 5}], "a int"),
        (None, chat(1), "no chat template"),
    ],
)
def test_a_row_that_the_template_refuses_or_loses_is_named(template: str | None, messages: list, part: str):
    tokenizer = tokenizers.made(template=template)
    rows = [Chat(messages) if number == 3 or template is None else Chat(chat(number, 1)) for number in range(8)]
    with pytest.raises(UserError) as caught:
        load(rows, tokenizer)
    line = str(caught.value)
    assert part in line and f"row {3 if template else 0}" in line and "\n" not in line


def test_tool_calls_and_tools_reach_the_template():
    call = {"function": {"name": "w3", "arguments": {"a": "w5"}}}
    messages = [*chat(1, 1), {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "w7"}]
    tokenizer = tokenizers.made(template="{{ tools[0]['name'] }} </s>" + tokenizers.TOOLS)
    rows = [Chat(messages, tools=[{"name": "w9"}])] * 4
    wanted = tokenizer.apply_chat_template(messages, tools=[{"name": "w9"}], return_dict=False)
    assert sequences(load(rows, tokenizer, seq_len=64)) == [wanted] * 4


def test_thoughts_before_an_answer_may_be_left_out():
    template = "{% for m in messages %}{{ m['content'].split('</think>')[-1] }} </s>{% endfor %}"
    rows = [Chat([{"role": "assistant", "content": f"<think> w1 </think> w{i}"}]) for i in range(8)]
    assert len(sequences(load(rows, tokenizers.made(template=template)))) == 8


def test_a_template_that_escapes_what_a_tool_said():
    template = "{% for m in messages %}{{ m['content'] | tojson }} </s>{% endfor %}"
    rows = [Chat([{"role": "tool", "content": f' w{i} "w1"\nw2 '}]) for i in range(8)]
    assert len(sequences(load(rows, tokenizers.made(template=template)))) == 8


@pytest.mark.parametrize("values", [["q r s"] * 9, ["</s> <s>"] * 9, ["<unk> q"] * 9])
def test_rows_without_a_word_that_the_tokenizer_knows_are_refused(values: list[str]):
    with pytest.raises(UserError, match="special or unknown"):
        load(values, tokenizers.made())


# -- what is trained on ------------------------------------------------------------------------------------------------
def trained(splits: Splits) -> list[tuple[list[int], list[int]]]:
    """(ids that do not count, ids that do) of each sequence."""
    found = []
    for batch in splits.calibration + splits.evaluation:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            counts = labels != IGNORED
            assert torch.equal(labels[counts], ids[counts])
            found.append((ids[~counts].tolist(), ids[counts].tolist()))
    return found


@pytest.mark.parametrize("post", ["nothing", "start token", "end token", "start and end"])
def test_the_loss_of_a_pair_is_on_its_completion(post: str):
    tokenizer = tokenizers.made(post)
    before, after = (tokenizer.convert_tokens_to_ids(words) for words in tokenizers.AROUND[post])
    ids = tokenizer.convert_tokens_to_ids
    found = trained(load([Pair(f"w{i} w1 ", f"w2 w{i} ") for i in range(8)], tokenizer))
    end = after or [tokenizer.eos_token_id]
    assert sorted(found) == sorted((before + ids([f"w{i}", "w1"]), ids(["w2", f"w{i}"]) + end) for i in range(8))


def test_the_loss_of_an_answer_is_on_the_answer():
    tokenizer = tokenizers.made("start token", tokenizers.TEMPLATES["with a start token"])
    found = trained(load([Chat(messages, 1) for messages in CHATS], tokenizer, seq_len=64))
    for asked, answered in found:
        assert tokenizer.decode(asked).startswith("<s> user :") and tokenizer.decode(asked).endswith("assistant :")
        assert tokenizer.decode(answered).split()[-1] == "</s>" and "assistant" not in tokenizer.decode(answered)


def test_packed_pairs_count_their_completions_alone_and_no_window_without_one():
    tokenizer = tokenizers.made()
    rows = [Pair("w1 " * 30, "w2 w3 ") for _ in range(12)]
    found = trained(load(rows, tokenizer, packing=True, num_samples=64))
    ids = tokenizer.convert_tokens_to_ids
    assert {token for _, counted in found for token in counted} == {*ids(["w2", "w3"]), tokenizer.eos_token_id}
    assert {token for others, _ in found for token in others} == {ids("w1")}
    assert all(counted for _, counted in found)


def test_a_prompt_that_fills_the_window_leaves_nothing_to_train_on():
    rows = [Pair("w1 " * 20, "w2"), *(Pair("w1 ", "w2 w3") for _ in range(4))]
    assert len(trained(load(rows, tokenizers.made()))) == 4
    with pytest.raises(UserError, match="some of it trained on"):
        load([Pair("w1 " * 20, "w2")] * 6, tokenizers.made())


def test_token_ids_are_taken_as_they_are_and_labels_that_are_all_ignored_are_refused():
    rows = [TokenIds([7, 8, 9 + i], [IGNORED, 8, 9 + i]) for i in range(6)]
    assert sorted(trained(load(rows, tokenizers.made("start and end")))) == sorted(([7], [8, 9 + i]) for i in range(6))
    with pytest.raises(UserError, match="some of it trained on"):
        load([TokenIds([7, 8, 9], [IGNORED] * 3)] * 6, tokenizers.made())


# -- two texts ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("post", ["start and end", "cls and sep"])
@pytest.mark.parametrize("seq_len", [32, 9])
def test_two_texts_come_with_their_separators_and_token_types(post: str, seq_len: int):
    tokenizer = tokenizers.made(post)
    pairs = [(f"w{i} w1 w2 w3 w4", f"w5 w{i} w6") for i in range(8)]
    splits = load([TextPair(*pair) for pair in pairs], tokenizer, "sequence-classification", seq_len=seq_len)
    wanted = [tokenizer(*pair, truncation="longest_first", max_length=seq_len) for pair in pairs]
    assert sorted(sequences(splits)) == sorted(each["input_ids"] for each in wanted)
    batches = splits.calibration + splits.evaluation
    types = sorted(row for batch in batches for row in batch.get("token_type_ids", torch.zeros(0)).tolist())
    assert types == sorted(each["token_type_ids"] for each in wanted if "token_type_ids" in each)
    assert bool(types) == (post == "cls and sep")


# -- the model's sizes -------------------------------------------------------------------------------------------------
def test_more_tokens_than_rows_of_the_embedding():
    config = hf.LlamaConfig(vocab_size=30)
    options = DataConfig(seq_len=8, num_samples=4, eval_samples=2)
    with pytest.raises(UserError, match=f"of {tokenizers.VOCAB} tokens.*has 30 rows"):
        load_splits(options, Reader("causal-lm", tokenizers.made(), config), 0, Rows(TEXTS, None, "rows", "\n"))


def test_a_pad_token_that_was_added_and_has_no_embedding_is_not_used():
    tokenizer = tokenizers.made(pad_token="[PAD]")
    assert tokenizer.pad_token_id == tokenizers.VOCAB
    config = hf.LlamaConfig(vocab_size=tokenizers.VOCAB)
    options = DataConfig(seq_len=8, num_samples=4, eval_samples=2, packing=False, micro_batch=4)
    rows = Rows(["w1 w2", "w1 w2 w3", "w5 w6 w7 w8", "w1", "w4 w5 w6"], None, "rows", "\n")
    (batch, *_) = load_splits(options, Reader("causal-lm", tokenizer, config), 0, rows).calibration
    assert int(batch["input_ids"].max()) < tokenizers.VOCAB and (batch["attention_mask"] == 0).any()


def test_a_decoder_with_a_head_is_padded_by_the_token_it_looks_for():
    """LlamaForSequenceClassification takes the last token that is not config.pad_token_id."""
    tokenizer = tokenizers.made("start token")
    config = hf.LlamaConfig(vocab_size=tokenizers.VOCAB, pad_token_id=5, num_labels=2)
    options = DataConfig(seq_len=8, num_samples=4, eval_samples=1, micro_batch=4)
    rows = Rows(["w1 w2", "w1 w2 w3", "w5 w6 w7 w8", "w1"], [0, 1, 0, 1], "rows", "\n")
    for batch in load_splits(options, Reader("sequence-classification", tokenizer, config), 0, rows).calibration:
        assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) <= {5}
    bare = hf.LlamaConfig(vocab_size=tokenizers.VOCAB, pad_token_id=None, num_labels=2)
    with pytest.raises(UserError, match="no pad_token_id"):
        load_splits(options, Reader("sequence-classification", tokenizer, bare), 0, rows)


def test_json_of_messages_is_one_line(tmp_path):
    """null keys, which parquet and datasets give every message of a column, reach no template."""
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": [{**m, "tool_calls": None} for m in chat(i)]} for i in range(8)]
    rows.append(
        {
            "messages": [
                {
                    "role": "user",
                    "content": "w1",
                    "tool_calls": [{"function": {"name": "w2", "arguments": {"a": "w3"}}}],
                }
            ]
        }
    )
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tokenizer = tokenizers.made(template=tokenizers.TOOLS)
    plain = [[{k: v for k, v in m.items() if v is not None} for m in row["messages"]] for row in rows]
    wanted = [tokenizer.apply_chat_template(messages, return_dict=False) for messages in plain]
    options = DataConfig(name=str(path), seq_len=64, num_samples=64, eval_samples=2, packing=False)
    assert sorted(sequences(load_splits(options, Reader("causal-lm", tokenizer)))) == sorted(wanted)
