"""Classifiers, reward models and heads of several labels from the command line: a loss that says something, or one
line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from tests import tiny
from tests.data import tokenizers
from tests.pipeline.conftest import report_of
from tinygn_dist.checkpoints import load

LAYERS = ("--pattern=layers", "--sparsity=0.3")
MASKS = ("--pattern=unstructured", "--sparsity=0.5")


def model_with_head(folder: Path, family: str, post: str = "nothing", **config: Any) -> Path:
    asked = tiny.CONFIGS[family]()
    for key, value in {"vocab_size": tokenizers.VOCAB, "pad_token_id": 5, **config}.items():
        setattr(asked, key, value)
    torch.manual_seed(0)
    hf.AutoModelForSequenceClassification.from_config(asked).save_pretrained(folder)
    tokenizers.made(post).save_pretrained(folder)
    return folder


def rows_file(path: Path, label: Any, count: int = 24) -> Path:
    """label: of a row's number; None for rows without."""
    rows = [{"text": f"w{i} w{(3 * i) % 40} w7"} | ({"label": label(i)} if label else {}) for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize(
    "config, label, figures",
    [
        ({"num_labels": 1}, lambda i: 0, set()),
        ({"num_labels": 1}, lambda i: i / 10, {"spearman"}),
        ({"num_labels": 3}, lambda i: [i % 2, 1, 0], {"f1", "accuracy"}),
        ({"num_labels": 2}, lambda i: i % 2, {"accuracy"}),
    ],
    ids=["zeros", "numbers", "several", "one"],
)
def test_heads_have_a_loss_and_figures_of_their_kind(
    compress, tmp_path: Path, family: str, config: dict, label: Any, figures: set[str]
):
    model, data = model_with_head(tmp_path / "model", family, **config), rows_file(tmp_path / "rows.jsonl", label)
    for words, name in ((LAYERS, "layers"), (MASKS, "masks")):
        done = compress(model, tmp_path / name, *words, f"--data={data}", "--recover-steps=2", "--recover.batch_size=2")
        assert done.code == 0, done.err
        report = report_of(tmp_path / name)
        for when in ("before", "after"):
            assert report[when]["loss"] > 0 and math.isfinite(report[when]["loss"])
            assert figures <= report[when].keys()
        assert report["before"]["loss"] != report["after"]["loss"]
        assert report["data"]["calibration"]["files"] == [str(data)]


def test_a_reward_model_without_labels_is_held_to_its_own_scores(compress, tinygn, tmp_path: Path):
    model, data = model_with_head(tmp_path / "model", "llama", num_labels=1), rows_file(tmp_path / "rows.jsonl", None)
    done = compress(model, tmp_path / "out", *MASKS, f"--data={data}")
    assert done.code == 0, done.err
    report = report_of(tmp_path / "out")
    assert report["before"]["score_distance"] == 0 < report["after"]["score_distance"]
    assert "no labels" in tinygn("evaluate", tmp_path / "out", "--no-latency").told


def test_the_accuracy_before_is_the_models_own(compress, tmp_path: Path):
    """A classifier that reads [CLS] and [SEP]: without them its answers would be others."""
    folder = model_with_head(tmp_path / "model", "bert", "cls and sep", num_labels=3)
    tokenizer, model = hf.AutoTokenizer.from_pretrained(folder), load.load_model(_source(folder))
    texts = [f"w{i} w{(3 * i) % 40} w7" for i in range(24)]
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.mul_(30)
        for layer in model.bert.encoder.layer:
            layer.output.dense.weight.mul_(30)
        model.classifier.weight.mul_(30)
        answers = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
        bare = [
            int(model(**tokenizer(t, return_tensors="pt", add_special_tokens=False)).logits.argmax()) for t in texts
        ]
    assert answers != bare
    model.save_pretrained(folder)
    data = rows_file(tmp_path / "rows.jsonl", lambda i: answers[i])
    assert compress(folder, tmp_path / "out", *MASKS, f"--data={data}", "--data.eval_samples=12").code == 0
    assert report_of(tmp_path / "out")["before"]["accuracy"] == 1.0


def _source(folder: Path) -> load.Source:
    return load.find_model(load.ModelConfig(name=str(folder)))


@pytest.mark.parametrize(
    "config, label, words, part",
    [
        ({"num_labels": 2}, lambda i: 5, (), "knows 0 to 1"),
        ({"num_labels": 2}, lambda i: "pos", (), "row 0"),
        ({"num_labels": 2}, lambda i: -100, (), "labels that count"),
        ({"num_labels": 2}, None, (), "--data.label_column"),
        ({"num_labels": 2, "pad_token_id": None}, lambda i: 0, (), "no pad_token_id"),
        ({"num_labels": 2, "vocab_size": 20}, lambda i: 0, (), "has 20 rows"),
        ({"num_labels": 2}, lambda i: 0, ("--data.column=body",), "'body' is not in"),
    ],
)
def test_rows_that_do_not_fit_the_model_are_refused_before_weights_load(
    compress, monkeypatch, tmp_path: Path, config: dict, label: Any, words: tuple[str, ...], part: str
):
    def refuse(*_: Any) -> None:
        raise AssertionError("weights were loaded before the rows were refused")

    model, data = model_with_head(tmp_path / "model", "llama", **config), rows_file(tmp_path / "rows.jsonl", label)
    monkeypatch.setattr(load, "load_model", refuse)
    done = compress(model, tmp_path / "out", *MASKS, f"--data={data}", *words)
    assert done.code == 2 and part in done.told and not (tmp_path / "out").exists()
