"""Labels as the model's head counts them, and one line for those that it cannot mean."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
import transformers as hf

from tests.data import tokenizers
from tinygn_dist.config import DataConfig
from tinygn_dist.data.sources import Rows, read_rows
from tinygn_dist.data.splits import Reader, Splits, load_splits
from tinygn_dist.errors import UserError


def load(labels: list[Any] | None, stored: tuple[str, ...] = (), **config: Any) -> Splits:
    """One row for each label, in order."""
    options = DataConfig(seq_len=8, num_samples=64, eval_samples=2)
    rows = Rows([f"w{i} w1" for i in range(len(labels or range(8)))], labels, "rows", "\n", stored)
    reader = Reader("sequence-classification", tokenizers.made(), hf.BertConfig(vocab_size=99, **config))
    return load_splits(options, reader, 0, rows)


def found(splits: Splits) -> torch.Tensor:
    """Labels in the order of the rows."""
    batches = splits.calibration + splits.evaluation
    order = sorted(range(len(batches)), key=lambda i: int(batches[i]["input_ids"][0, 0]))
    return torch.cat([batches[i]["labels"] for i in order])


NAMES = {"label2id": {"NEGATIVE": 0, "POSITIVE": 1}, "id2label": {0: "NEGATIVE", 1: "POSITIVE"}}


@pytest.mark.parametrize(
    "labels, config, wanted",
    [
        ([0, 1, 0, 1], {"num_labels": 2}, [0, 1, 0, 1]),
        ([False, True, False, True], {"num_labels": 2}, [0, 1, 0, 1]),
        ([0.0, 1.0, 0.0, 1.0], {"num_labels": 2}, [0, 1, 0, 1]),
        (["0", "1", "0", "1"], {"num_labels": 2}, [0, 1, 0, 1]),
        (["positive", "NEGATIVE", "Positive ", "negative"], NAMES, [1, 0, 1, 0]),
        ([0.5, 2, -1.5, 3], {"num_labels": 1}, [0.5, 2, -1.5, 3]),
        ([0, 0, 0, 0], {"num_labels": 1}, [0.0, 0.0, 0.0, 0.0]),
        ([1, 2, 3, 4], {"num_labels": 1, "problem_type": "regression"}, [1.0, 2.0, 3.0, 4.0]),
        (
            [[0.5, 1], [1, 2], [3, 4], [5, 6]],
            {"num_labels": 2, "problem_type": "regression"},
            [[0.5, 1], [1, 2], [3, 4], [5, 6]],
        ),
        ([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]], {"num_labels": 3}, [[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]]),
        (
            [[0.0, 1.0], [1.0, 0.0]] * 2,
            {"num_labels": 2, "problem_type": "multi_label_classification"},
            [[0, 1], [1, 0]] * 2,
        ),
        ([[2], [0, 1], [], [1, 2]], {"num_labels": 3}, [[0, 0, 1], [1, 1, 0], [0, 0, 0], [0, 1, 1]]),
        ([["positive"], [], ["negative", "positive"], ["negative"]], NAMES, [[0, 1], [0, 0], [1, 1], [1, 0]]),
    ],
)
def test_labels_are_read_as_the_head_counts_them(labels: list[Any], config: dict[str, Any], wanted: list[Any]):
    result = found(load(labels, **config))
    assert result.to(torch.float64).tolist() == torch.tensor(wanted, dtype=torch.float64).tolist()
    number = config.get("problem_type") == "regression" or config.get("num_labels") == 1
    several = isinstance(wanted[0], list) and not number
    assert result.dtype == (torch.float32 if number else torch.bool if several else torch.int64)


def test_class_names_of_the_dataset_are_the_models_by_name():
    """huggingface/optimum#197: the two count their classes in another order."""
    config = {"label2id": {"CONTRADICTION": 0, "NEUTRAL": 1, "ENTAILMENT": 2}}
    config["id2label"] = {number: name for name, number in config["label2id"].items()}
    names = ("entailment", "neutral", "contradiction")
    assert found(load([0, 1, 2, 0], names, **config)).tolist() == [2, 1, 0, 2]
    assert found(load([0, 1, 2, 0], names, num_labels=3)).tolist() == [0, 1, 2, 0]  # the model has no names


def test_class_names_are_read_from_the_files(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])})
    datasets.Dataset.from_dict({"text": ["w1"], "label": [1]}, features).save_to_disk(tmp_path / "rows")
    name = str(tmp_path / "rows")
    assert read_rows(DataConfig(name=name), name, "sequence-classification").class_names == ("pos", "neg")


@pytest.mark.parametrize(
    "labels, config, part",
    [
        ([0, 1, 5, 0], {"num_labels": 2}, "its label is 5, and the model's head knows 0 to 1"),
        ([0, 1, -1, 0], {"num_labels": 2}, "kept secret"),
        ([0, 1, 0.7, 0], {"num_labels": 2}, "0.7"),
        ([0, 1, "pos", 0], {"num_labels": 2}, "numbers only"),
        (["positive", "negative", "mixed", "positive"], NAMES, "negative, positive"),
        ([0.5, 1.0, "high", 2.0], {"num_labels": 1}, "'high'"),
        ([0.5, 1.0, float("nan"), 2.0], {"num_labels": 1}, "nan"),
        ([[0, 1], [1, 0], [1, -100], [1, 1]], {"num_labels": 2, "problem_type": "multi_label_classification"}, "-100"),
        ([[1, 2, 3], [1], [7], [0]], {"num_labels": 4}, "its label is 7"),
        ([0, 1, [0, 1], 0], {"num_labels": 2}, "[0, 1]"),
    ],
)
def test_a_label_that_the_head_cannot_mean_is_named_with_its_row(labels: list[Any], config: dict[str, Any], part: str):
    with pytest.raises(UserError) as caught:
        load(labels, **config)
    line = str(caught.value)
    assert part in line and "row 2" in line and "\n" not in line


@pytest.mark.parametrize("nothing", [None, -100])
def test_rows_without_a_label_are_left_out_and_all_of_them_are_refused(nothing: Any):
    splits = load([0, nothing, 1, 0, nothing, 1], num_labels=2)
    assert found(splits).tolist() == [0, 1, 0, 1] and splits.used["rows_skipped"] == 2
    with pytest.raises(UserError, match="no text with labels that count"):
        load([nothing] * 6, num_labels=2)


def test_a_reward_model_needs_no_labels_and_a_classifier_does():
    splits = load(None, num_labels=1)
    assert all("labels" not in batch for batch in splits.calibration + splits.evaluation)
    with pytest.raises(UserError, match="--data.label_column"):
        load(None, num_labels=2)


def test_an_unknown_problem_type():
    config = hf.BertConfig(vocab_size=99, num_labels=2)
    config.problem_type = "ranking"
    rows = Rows(["w1"] * 8, [0] * 8, "rows", "\n")
    with pytest.raises(UserError, match="'ranking'"):
        load_splits(DataConfig(seq_len=8), Reader("sequence-classification", tokenizers.made(), config), 0, rows)
