"""lm-evaluation-harness on the dense and on the exported model, with a task of our own that needs no network."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.pipeline.conftest import report_of

WORDS = ["the", "of", "and", "to", "in", "is"]
CHOOSE = """task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def task_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": f"{WORDS[i % 6]} {WORDS[(i + 1) % 6]}", "choices": WORDS[:3], "answer": i % 3} for i in range(7)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "choose.yaml").write_text(CHOOSE.format(file=folder / "rows.jsonl"), encoding="utf-8")
    return folder


def accuracy(folder: Path, rows: Path, count: int) -> float:
    """The same by hand: the choice with the largest log-probability after the question."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = 0
    for line in rows.read_text(encoding="utf-8").splitlines()[:count]:
        row = json.loads(line)
        logs = []
        for choice in row["choices"]:
            asked = tokenizer(row["question"], add_special_tokens=False)["input_ids"]
            both = tokenizer(f"{row['question']} {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([both])).logits.log_softmax(-1)[0]
            logs.append(sum(float(logits[i - 1, both[i]]) for i in range(len(asked), len(both))))
        right += logs.index(max(logs)) == row["answer"]
    return right / count


def test_scores_of_both_models_are_in_the_report(compress, saved_model, text_file, task_dir: Path, tmp_path: Path):
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    out, model = tmp_path / "out", saved_model("llama")
    asked = ["--pattern=unstructured", "--sparsity=0.5", "--criterion=magnitude", "--evaluate.tasks=[choose]"]
    asked += [f"--evaluate.task_dir={task_dir}", "--evaluate.task_limit=6"]
    done = compress(model, out, "--data", text_file, *asked)
    assert done.code == 0, done.err
    report = report_of(out)
    for folder, part in ((model, "before"), (out, "after")):
        found = report[part]["tasks"]["choose"]
        assert found["acc"] == pytest.approx(accuracy(folder, task_dir / "rows.jsonl", 6)), part
    assert "choose acc" in (out / "README.md").read_text(encoding="utf-8")


def test_what_cannot_be_run_is_told_before_work(compress, saved_model, text_file, task_dir: Path, tmp_path: Path):
    words = ["--pattern=2:4", "--evaluate.tasks=[no-such-task]"]
    with mock.patch.dict(sys.modules, {"lm_eval.tasks": None, "lm_eval": None}):
        done = compress(saved_model("llama"), tmp_path / "out", "--data", text_file, *words)
    assert done.code == 2 and "pip install 'tinygn-dist[lm-eval]'" in done.told
    done = compress(saved_model("llama"), tmp_path / "out", *words, f"--evaluate.task_dir={tmp_path / 'nowhere'}")
    assert done.code == 2 and "is not a folder" in done.told
    done = compress(saved_model("vit"), tmp_path / "out", *words)
    assert done.code == 2 and "models that write text" in done.told
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    done = compress(saved_model("llama"), tmp_path / "out", *words, f"--evaluate.task_dir={task_dir}")
    assert done.code == 2 and "'no-such-task' is no task of lm_eval" in done.told
