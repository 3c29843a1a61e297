"""Rows to windows: nothing overlaps, nothing is lost or doubled, and every odd file is answered."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pandas
import pytest
import torch

from tests import tiny
from tinygn_dist.config import DataConfig
from tinygn_dist.data.sources import Rows
from tinygn_dist.data.splits import Reader, Splits, load_splits
from tinygn_dist.errors import UserError
from tinygn_dist.models.objective import IGNORED

WORDS = [f"w{i}" for i in range(120)]


class Numbered:
    """A tokenizer that gives every distinct word its own number, so that a token says where it came from."""

    bos_token_id = eos_token_id = pad_token_id = None
    chat_template = None

    def __call__(self, text: str | list[str], add_special_tokens: bool = True) -> dict[str, list]:
        texts = [text] if isinstance(text, str) else text
        ids = [[int(word[1:]) for word in t.split() if word[1:].isdigit()] for t in texts]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}


def numbered_rows(count: int, length: int) -> Rows:
    rows = [" ".join(f"w{r * length + i}" for i in range(length)) for r in range(count)]
    return Rows(rows, None, "numbers", "\n")


def splits(rows: Rows | None = None, tokenizer: object = None, train_len: int = 0, **options: object) -> Splits:
    asked = DataConfig(**{"num_samples": 4, "eval_samples": 2, "seq_len": 16, **options})
    return load_splits(asked, Reader("causal-lm", tokenizer or Numbered()), train_len, rows)


def tokens(batches: list[dict[str, torch.Tensor]]) -> list[int]:
    return [t for b in batches for t in b["input_ids"][b["labels"] != IGNORED].tolist()]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("train_len", [0, 8])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_no_token_lies_in_two_splits_or_twice_in_one(packing: bool, train_len: int, micro_batch: int):
    found = splits(numbered_rows(40, 13), train_len=train_len, packing=packing, micro_batch=micro_batch)
    parts = [tokens(found.calibration), tokens(found.evaluation), tokens(found.training)]
    everything = [token for part in parts for token in part]
    assert len(everything) == len(set(everything))
    assert parts[0] and parts[1] and bool(parts[2]) == bool(train_len)
    assert min(parts[1]) > max(parts[0] + parts[2])  # evaluation rows are the last


def test_packed_windows_are_full_and_as_many_as_asked():
    found = splits(numbered_rows(40, 13))
    assert sum(len(b["input_ids"]) for b in found.calibration) == 4
    assert sum(len(b["input_ids"]) for b in found.evaluation) == 2
    assert all(b["input_ids"].shape[1] == 16 for b in found.calibration + found.evaluation)
    for batch in found.calibration:
        for row in batch["input_ids"].tolist():
            assert row == list(range(row[0], row[0] + 16))  # consecutive text


def test_five_rows_unpacked_are_five_sequences():
    found = splits(numbered_rows(5, 7), packing=False, num_samples=8, micro_batch=2)
    lengths = [len(b["input_ids"]) for b in found.calibration + found.evaluation]
    assert sum(lengths) == 5
    assert sorted(tokens(found.calibration) + tokens(found.evaluation)) == list(range(35))


def test_unpacked_padding_is_masked_and_not_a_label():
    rows = Rows(["w1 w2 w3 w4 w5", "w6 w7", "w8 w9 w10", "w11 w12"], None, "r", "\n")
    found = splits(rows, packing=False, micro_batch=4, eval_samples=1)
    (batch,) = found.calibration
    assert batch["attention_mask"].sum(1).tolist() == (batch["labels"] != IGNORED).sum(1).tolist()
    assert found.num_tokens() == int(batch["attention_mask"].sum()) == 10


def test_deterministic_and_seeded():
    one, again, other = (splits(numbered_rows(40, 13), seed=seed) for seed in (0, 0, 1))
    assert one.fingerprint() == again.fingerprint() != other.fingerprint()
    assert tokens(one.evaluation) == tokens(other.evaluation)  # the seed draws calibration windows only


def test_micro_batch_changes_the_grouping_not_the_windows():
    one, three = splits(numbered_rows(40, 13)), splits(numbered_rows(40, 13), micro_batch=3)
    assert tokens(one.calibration) == tokens(three.calibration)
    assert [len(b["input_ids"]) for b in three.calibration] == [3, 1]


def test_empty_and_blank_rows_are_skipped_and_counted():
    rows = Rows(["", "   ", None, *numbered_rows(20, 16).values, "\n\n"], None, "r", "\n")
    found = splits(rows)
    assert found.used["rows_skipped"] == 4 and len(tokens(found.calibration)) == 64


def test_a_very_long_row_is_cut_to_the_window():
    rows = Rows(
        [" ".join(f"w{i}" for i in range(10_000)), *[f"w{i} w{i + 1}" for i in range(20_000, 20_020, 2)]], None, "r", ""
    )
    found = splits(rows, packing=False, num_samples=64, eval_samples=5)
    lengths = [int((b["labels"] != IGNORED).sum()) for b in found.calibration]
    assert max(lengths) == 16 and all(b["input_ids"].shape[1] <= 16 for b in found.calibration)


@pytest.mark.parametrize("rows", [["w1 w2 w3"], ["w1 w2"] * 3])
def test_text_shorter_than_one_window_is_refused_with_a_way_out(rows: list[str]):
    with pytest.raises(UserError, match="--data.seq_len"):
        splits(Rows(rows, None, "short", ""))


@pytest.mark.parametrize("packing", [True, False])
def test_one_row_cannot_serve_two_splits(packing: bool):
    with pytest.raises(UserError, match="use more text"):
        splits(numbered_rows(1, 20), packing=packing)


def test_asking_for_more_than_there_is_warns(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("WARNING"):
        found = splits(numbered_rows(10, 16), num_samples=128, eval_samples=2)
    assert len(found.calibration) == 8 and "asked for 128 calibration sequences, the data has 8" in caplog.text


def test_nothing_left_to_train_on_is_refused():
    with pytest.raises(UserError, match="training"):
        splits(numbered_rows(2, 16), train_len=16, eval_samples=1, num_samples=1)


def test_the_beginning_of_sequence_token_goes_where_the_tokenizer_puts_it():
    tokenizer = tiny.tokenizer()
    plain = splits(tokenizer=tokenizer)
    assert all(b["input_ids"][0, 0] != tokenizer.bos_token_id for b in plain.calibration)

    class WithBos(Numbered):
        bos_token_id = 7777

        def __call__(self, text, add_special_tokens=True):
            found = super().__call__(text)["input_ids"]
            if add_special_tokens:
                found = [7777, *found]
            return {"input_ids": found}

    for batch in splits(numbered_rows(40, 13), WithBos()).calibration:
        assert batch["input_ids"][0, 0] == 7777 and batch["input_ids"].shape == (1, 16)


def test_python_docs_need_no_file():
    found = splits(tokenizer=tiny.tokenizer(), train_len=16)
    assert found.used["calibration"]["source"].startswith("python-docs") and len(found.training) > 10


TEXTS = [" ".join(WORDS[i : i + 20]) for i in range(0, 100, 5)]


def write(folder: Path, kind: str) -> Path:
    path = folder / f"rows.{kind}"
    match kind:
        case "txt" | "md":
            path.write_text("\n".join(TEXTS), encoding="utf-8")
        case "jsonl" | "json":
            path.write_text("\n".join(json.dumps({"id": i, "text": t}) for i, t in enumerate(TEXTS)), encoding="utf-8")
        case "csv":
            with path.open("w", newline="") as file:
                csv.writer(file).writerows([["id", "text"], *([i, t] for i, t in enumerate(TEXTS))])
        case "parquet":
            pandas.DataFrame({"id": range(len(TEXTS)), "text": TEXTS}).to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["txt", "md", "jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_file_gives_the_same_text(tmp_path: Path, kind: str, streaming: bool):
    path = write(tmp_path, kind)
    found = splits(name=str(path), streaming=streaming, packing=False, num_samples=64, eval_samples=4)
    wanted = [[int(w[1:]) for w in t.split()][:16] for t in TEXTS]
    seen = [b["input_ids"][0].tolist() for b in found.calibration + found.evaluation]
    assert sorted(seen) == sorted(wanted)


def test_a_folder_of_files(tmp_path: Path):
    for part in range(3):
        rows = "\n".join(json.dumps({"text": t}) for t in TEXTS[part::3])
        (tmp_path / f"part{part}.jsonl").write_text(rows, encoding="utf-8")
    found = splits(name=str(tmp_path), packing=False, num_samples=64, eval_samples=4)
    assert len(found.calibration) + len(found.evaluation) == len(TEXTS)


def test_a_second_dataset_for_evaluation(tmp_path: Path):
    path = write(tmp_path, "jsonl")
    found = splits(numbered_rows(20, 16), evaluation=str(path), packing=False, num_samples=64)
    assert len(found.calibration) == 20 and len(found.evaluation) == 2
    assert found.used["evaluation"]["source"] == str(path)


def messages(count: int) -> Rows:
    return Rows([[{"role": "user", "content": f"if x {i}"}] * 3 for i in range(count)], None, "chat", "")


def test_chat_messages_go_through_the_template():
    tokenizer = tiny.tokenizer(chat=True)
    found = splits(messages(8), tokenizer, packing=False)
    wanted = tokenizer("user: if x 0\n" * 3, add_special_tokens=False)["input_ids"][:16]
    seen = [b["input_ids"][0].tolist() for b in found.calibration + found.evaluation]
    assert wanted in seen


def test_chat_messages_without_a_template_are_refused():
    with pytest.raises(UserError, match="chat template"):
        splits(messages(8), tiny.tokenizer())


def test_no_pad_token_needs_no_new_one():
    tokenizer = tiny.tokenizer()
    assert tokenizer.pad_token_id is None
    (batch,) = splits(
        Rows(["if x", "if x else y", "while", "for x in y"], None, "r", ""),
        tokenizer,
        packing=False,
        micro_batch=4,
        eval_samples=1,
    ).calibration
    assert int(batch["input_ids"].max()) < tiny.VOCAB and (batch["attention_mask"] == 0).any()


@pytest.mark.parametrize(
    "name, content, part",
    [
        ("rows.jsonl", "", "rows.jsonl"),
        ("rows.jsonl", '{"a": "x", "b": "y"}\n', "--data.column"),
        ("rows.jsonl", "{not json", "rows.jsonl"),
        ("rows.csv", "a,b\n", "rows.csv"),
        ("rows.txt", "\n\n\n", "rows.txt"),
        ("rows.xyz", "text", ".xyz"),
        ("rows.jsonl", '{"text": 5}\n{"text": 6}\n', "--data.column"),
        ("rows.jsonl", '{"text": ["a", "b"]}\n', "--data.column"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name: str, content: str, part: str):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        splits(name=str(path))
    assert part in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/nowhere/rows.jsonl", "./nowhere", "rows-nowhere.txt"])
def test_a_missing_file(name: str):
    with pytest.raises(UserError, match="no such file"):
        splits(name=name)


def test_an_empty_folder(tmp_path: Path):
    with pytest.raises(UserError, match="holds no file"):
        splits(name=str(tmp_path))


def test_a_column_that_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match="'body' is not in"):
        splits(name=str(write(tmp_path, "jsonl")), column="body")


def test_labels_come_with_their_rows(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"w{i} w{i}", "label": i % 3} for i in range(12)] + [{"text": "", "label": 2}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options = DataConfig(name=str(path), num_samples=64, eval_samples=4, seq_len=16)
    found = load_splits(options, Reader("sequence-classification", Numbered()))
    pairs = [(int(b["input_ids"][0, 0]), int(b["labels"][0])) for b in found.calibration + found.evaluation]
    assert sorted(pairs) == [(i, i % 3) for i in range(12)]
