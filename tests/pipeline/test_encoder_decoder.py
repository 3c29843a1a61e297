"""Encoder-decoders from the command line to a folder that stock classes load: source, continuation, both stacks
smaller."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as hf

from tests import tiny
from tests.conftest import save
from tests.family_cases import build
from tests.pipeline.conftest import report_of
from tinygn_dist.config import load_config
from tinygn_dist.data import splits


@pytest.mark.parametrize(
    ("model_type", "words", "small"),
    [
        ("t5", ("--pattern=channels", "--sparsity=0.08", "--recover-steps=2"), {"d_ff": 24}),
        ("bart", ("--pattern=layers", "--prune.counts={layers: 2}"), {"encoder_layers": 1, "decoder_layers": 1}),
    ],
)
def test_smaller_and_measured(compress, tmp_path, model_type, words, small):
    model = build(model_type, vocab_size=tiny.VOCAB)
    folder, out = save(model, tmp_path / "model"), tmp_path / "out"
    done = compress(folder, out, *words, "--recover.seq_len=16", "--recover.batch_size=2")
    assert done.code == 0, done.err
    report, loaded = report_of(out), hf.AutoModelForSeq2SeqLM.from_pretrained(out).eval()
    assert {key: getattr(loaded.config, key) for key in small} == small
    stored = [*loaded.parameters(), *(b for name, b in loaded.named_buffers() if name == "final_logits_bias")]
    assert report["task"] == "seq2seq-lm"
    assert report["after"]["num_params"] == sum(tensor.numel() for tensor in stored)

    options = load_config(None, {"model.name": "m"}).data.model_copy(update=report["recipe"]["data"])
    reader = splits.Reader("seq2seq-lm", tiny.tokenizer(), loaded.config)
    rows = splits.load_splits(options, reader, 16 * ("d_ff" in small)).evaluation
    loss, count = 0.0, 0
    for row in rows:
        source, matrix = row["input_ids"].contiguous(), row["labels"].contiguous()
        with torch.no_grad():  # the model's own loss of labels that it shifts itself
            loss += float(loaded(input_ids=source, labels=matrix).loss) * matrix.numel()
        count += matrix.numel()
    assert report["after"]["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-4)


@pytest.mark.parametrize("words", [(), ("--model.task=feature-extraction",)])
def test_half_of_one_is_refused(compress, tmp_path, words):
    config = build("t5").config
    config.architectures = ["T5EncoderModel"]
    config.save_pretrained(tmp_path / "half")
    done = compress(tmp_path / "half", tmp_path / "out", "--pattern=channels", *words)
    assert done.code == 3 and "of a checkpoint with both halves" in done.told


def test_rows_of_their_own_are_refused(compress, tmp_path):
    folder = save(build("t5", vocab_size=tiny.VOCAB), tmp_path / "model")
    done = compress(folder, tmp_path / "out", "--pattern=layers", "--prune.counts={layers: 1}", "--data.packing=false")
    assert done.code == 2 and "cut into a source and its continuation" in done.told
