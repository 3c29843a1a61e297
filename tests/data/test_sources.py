"""Local copies of datasets as `load_dataset` reads them, paths as they are written, and rows by the names of their
columns."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.data import tokenizers
from tinygn_dist.config import DataConfig
from tinygn_dist.data.shapes import Chat, Pair, TextPair, TokenIds
from tinygn_dist.data.sources import Rows, read_rows
from tinygn_dist.data.splits import Reader, load_splits
from tinygn_dist.errors import UserError


def texts(name: str, count: int) -> list[dict[str, str]]:
    return [{"text": f"{name} {i}"} for i in range(count)]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(list(rows)).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(name: Path, task: str = "causal-lm", **options: Any) -> Rows:
    return read_rows(DataConfig(name=str(name), **options), str(name), task)


def values(name: Path, **options: Any) -> list[Any]:
    return list(read(name, **options).values)


def copy_of_a_hub_dataset(folder: Path, layout: str) -> Path:
    """60 rows to train on and 30 to test on, in one of the layouts that the hub knows."""
    train, test = texts("train", 60), texts("test", 30)
    match layout:
        case "data/split-*.parquet":
            write(folder / "data/train-00000-of-00002.parquet", train[:40])
            write(folder / "data/train-00001-of-00002.parquet", train[40:])
            write(folder / "data/test-00000-of-00001.parquet", test)
        case "split.jsonl":
            write(folder / "train.jsonl", train)
            write(folder / "test.jsonl", test)
        case "split/file.jsonl":
            write(folder / "train/rows.jsonl", train)
            write(folder / "test/rows.jsonl", test)
        case "readme":
            write(folder / "a.jsonl", train)
            write(folder / "b.jsonl", test)
            front = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a.jsonl\n"
            front += "  - split: test\n    path: b.jsonl\n"
            (folder / "README.md").write_text(f"---\n{front}---\n# Rows\n", encoding="utf-8")
        case "save_to_disk":
            splits = {"train": datasets.Dataset.from_list(train), "test": datasets.Dataset.from_list(test)}
            datasets.DatasetDict(splits).save_to_disk(folder)
    return folder


LAYOUTS = ["data/split-*.parquet", "split.jsonl", "split/file.jsonl", "readme", "save_to_disk"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_local_copy_keeps_its_splits(tmp_path: Path, layout: str):
    folder = copy_of_a_hub_dataset(tmp_path / "rows", layout)
    for split, count in (("train", 60), ("test", 30)):
        rows = read(folder, split=split)
        assert list(rows.values) == [f"{split} {i}" for i in range(count)]
        assert rows.origin == f"{folder} [{split}]" and rows.facts()["columns"] == ["text"]
        assert rows.files and all(str(folder.resolve()) in file for file in rows.files)
        if layout != "readme":
            assert all(split in file.removeprefix(str(folder.resolve())) for file in rows.files)
    with pytest.raises(UserError, match="train") as caught:
        read(folder, split="validation")
    assert "validation" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_a_piece_of_a_split_and_streams(tmp_path: Path, layout: str):
    folder = copy_of_a_hub_dataset(tmp_path / "rows", layout)
    assert values(folder, split="train[:5]") == [f"train {i}" for i in range(5)]
    assert values(folder, split="test", streaming=True) == [f"test {i}" for i in range(30)]


def test_a_saved_dataset_without_splits(tmp_path: Path):
    datasets.Dataset.from_list(texts("row", 7)).save_to_disk(tmp_path / "rows")
    assert values(tmp_path / "rows") == [f"row {i}" for i in range(7)]


def test_configurations_of_a_local_copy(tmp_path: Path):
    write(tmp_path / "en.jsonl", texts("en", 3))
    write(tmp_path / "de.jsonl", texts("de", 2))
    front = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("en", "de"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{front}---\n", encoding="utf-8")
    assert values(tmp_path, subset="de") == ["de 0", "de 1"]
    with pytest.raises(UserError, match="en.*de"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["r[1].jsonl", "q?.jsonl", "s*.jsonl", "u**v.jsonl", "{a,b}.jsonl", "t[x.jsonl"])
@pytest.mark.parametrize("namesake", [True, False])
def test_a_file_with_wildcards_in_its_name_is_that_file(tmp_path: Path, name: str, namesake: bool):
    for other in ("r1.jsonl", "qq.jsonl", "sss.jsonl", "uxv.jsonl", "a.jsonl") if namesake else ():
        write(tmp_path / other, texts("another", 2))
    path = write(tmp_path / name, texts("mine", 3))
    rows = read(path)
    assert list(rows.values) == ["mine 0", "mine 1", "mine 2"] and rows.files == (str(path),)


@pytest.mark.parametrize("name", ["a[1]", "b*", "c?"])
def test_below_a_folder_with_wildcards_in_its_name(tmp_path: Path, name: str):
    """`datasets` reads a1/ where a[1]/ is asked for."""
    for other in ("a1", "bxx", "cc"):
        write(tmp_path / other / "rows.jsonl", texts("another", 2))
    path = write(tmp_path / name / "rows.jsonl", texts("mine", 3))
    assert values(path) == ["mine 0", "mine 1", "mine 2"]
    with pytest.raises(UserError, match="pattern"):
        read(tmp_path / name)


def test_pointers_of_git_lfs_are_not_rows(tmp_path: Path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    for suffix in (".txt", ".parquet", ".jsonl"):
        path = tmp_path / suffix[1:] / f"train{suffix}"
        path.parent.mkdir()
        path.write_text(pointer, encoding="utf-8")
        for name in (path, path.parent):
            with pytest.raises(UserError, match="git lfs pull"):
                read(name)


def test_compressed_files(tmp_path: Path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in texts("row", 3)).encode()))
    assert values(path) == ["row 0", "row 1", "row 2"]


def test_lines_of_a_folder_of_text_files_are_rows(tmp_path: Path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"{name} 0\n{name} 1\n", encoding="utf-8")
    rows = read(tmp_path)
    assert list(rows.values) == ["a.txt 0", "a.txt 1", "b.txt 0", "b.txt 1"] and rows.separator == "\n"


# -- columns -----------------------------------------------------------------------------------------------------------
USER, ASSISTANT = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}
SHAREGPT = [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]
SHAPES = [
    ({"text": "w1", "id": 5}, "w1"),
    ({"messages": [USER, ASSISTANT]}, Chat([USER, ASSISTANT])),
    ({"messages": [USER, ASSISTANT], "prompt": "w1"}, Chat([USER, ASSISTANT])),
    ({"messages": [USER, ASSISTANT], "chosen": [USER], "rejected": [USER]}, Chat([USER, ASSISTANT])),
    ({"messages": [USER], "tools": '[{"name": "w9"}]'}, Chat([USER], tools=[{"name": "w9"}])),
    ({"conversations": SHAREGPT, "source": "x"}, Chat([USER, ASSISTANT])),
    (
        {"system": "w8", "conversations": SHAREGPT},
        Chat([{"role": "system", "content": "w8"}, USER, ASSISTANT]),
    ),
    (
        {"system": "w8", "instruction": "w1", "input": "", "output": "w2"},
        Chat([{"role": "system", "content": "w8"}, USER, ASSISTANT], 2, plain=Pair("w8\n\nw1\n\n", "w2")),
    ),
    ({"conversation": [{**USER, "language": "en"}]}, Chat([{**USER, "language": "en"}])),
    ({"prompt": "w1 ", "completion": "w2"}, Pair("w1 ", "w2")),
    ({"prompt": [USER], "completion": [ASSISTANT]}, Chat([USER, ASSISTANT], 1)),
    ({"instruction": "w1", "input": "", "output": "w2"}, Chat([USER, ASSISTANT], 1, plain=Pair("w1\n\n", "w2"))),
    (
        {"instruction": "w1", "context": "w3", "response": "w2", "category": "x"},
        Chat([{"role": "user", "content": "w1\n\nw3"}, ASSISTANT], 1, plain=Pair("w1\n\nw3\n\n", "w2")),
    ),
    ({"question": "w1", "answer": "w2"}, Chat([USER, ASSISTANT], 1, plain=Pair("w1\n\n", "w2"))),
    ({"chosen": "w1 w2", "rejected": "w3"}, Pair("", "w1 w2")),
    ({"prompt": "w1", "chosen": [USER, ASSISTANT], "rejected": [USER]}, Chat([USER, ASSISTANT])),
    ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [USER]}, Chat([USER, ASSISTANT], 1)),
    ({"prompt": "w1", "id": 1}, "w1"),
    ({"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0], "labels": [-100, 6, -100]}, TokenIds([5, 6], [-100, 6])),
    ({"anything": "w1"}, "w1"),
]


@pytest.mark.parametrize("row, wanted", SHAPES)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_are_known_by_the_names_of_their_columns(tmp_path: Path, row: dict[str, Any], wanted: Any, suffix: str):
    assert values(write(tmp_path / f"rows{suffix}", [row, row])) == [wanted, wanted]


@pytest.mark.parametrize(
    "row, parts",
    [
        ({"text": "w1", "content": "w2"}, ["--data.column text", "--data.column content"]),
        ({"text": "w1", "messages": [USER]}, ["--data.column text", "--data.column messages"]),
        ({"instruction": "w1", "output": "w2", "text": "w3"}, ["--data.column instruction,output"]),
        ({"messages": [USER], "conversations": SHAREGPT}, ["--data.column conversations"]),
        ({"title": "w1", "body": "w2"}, ["title, body", "--data.column"]),
    ],
)
def test_several_candidates_are_named_and_one_can_be_chosen(tmp_path: Path, row: dict[str, Any], parts: list[str]):
    path = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError) as caught:
        read(path)
    assert all(part in str(caught.value) for part in parts)
    chosen = parts[-1].split("--data.column ")[-1] if "," in parts[-1] or " " in parts[-1] else "body"
    assert values(path, column=chosen)[0] is not None


@pytest.mark.parametrize(
    "row, part",
    [
        ({"messages": [{"speaker": "a", "utterance": "w1"}]}, "keys speaker, utterance"),
        ({"conversations": [{"from": "narrator", "value": "w1"}]}, "'narrator'"),
        ({"conversations": [{"user": "w1", "assistant": "w2"}]}, "keys user, assistant"),
        ({"conversations": ["w1", "w2"]}, "no list of messages"),
        ({"question": "w1", "answer": {"text": "w2"}}, "accepted: texts"),
        ({"text": {"a": 1}}, "dict"),
        ({"input_ids": [5, 6], "labels": [5]}, "one label per token"),
    ],
)
def test_rows_of_another_shape_are_refused_by_their_keys(tmp_path: Path, row: dict[str, Any], part: str):
    path = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError) as caught:
        values(path)
    assert part in str(caught.value) and "row 0" in str(caught.value) and "\n" not in str(caught.value)


def test_sharegpt_rows_have_their_words_in_the_windows(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", [{"conversations": SHAREGPT}] * 40)
    tokenizer = tokenizers.made(template=tokenizers.TEMPLATES["without one"])
    options = DataConfig(name=str(path), seq_len=16, num_samples=4, eval_samples=2)
    ids = load_splits(options, Reader("causal-lm", tokenizer)).calibration[0]["input_ids"][0].tolist()
    assert {"w1", "w2"} <= set(tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize(
    "row, wanted",
    [
        ({"sentence1": "w1", "sentence2": "w2", "idx": 1, "label": 0}, TextPair("w1", "w2")),
        ({"premise": "w1", "hypothesis": "w2", "label": 0}, TextPair("w1", "w2")),
        ({"question": "w1", "sentence": "w2", "label": 0}, TextPair("w1", "w2")),
        ({"sentence": "w1", "idx": 0, "label": 0}, "w1"),
        ({"anything": "w1", "label": 0}, "w1"),
    ],
)
def test_rows_for_a_classifier(tmp_path: Path, row: dict[str, Any], wanted: Any):
    rows = read(write(tmp_path / "rows.jsonl", [row]), "sequence-classification")
    assert list(rows.values) == [wanted] and list(rows.labels) == [0]


def test_a_label_column_can_be_named(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", [{"text": "w1", "stars": 3, "label": 0}])
    assert list(read(path, "sequence-classification", label_column="stars").labels) == [3]
    with pytest.raises(UserError, match="'starts' is not in"):
        read(path, "sequence-classification", label_column="starts")
