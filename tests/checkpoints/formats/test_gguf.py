"""GGUF files: read back by the package `gguf`, by transformers, and run by llama.cpp where its wheel is installed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
import transformers as hf
from transformers import AutoConfig, AutoTokenizer

from tests import tiny
from tests.checkpoints.formats import gguf_cases
from tinygn_dist.checkpoints.formats import gguf as written_gguf
from tinygn_dist.checkpoints.formats.gguf import Described, write_gguf
from tinygn_dist.checkpoints.formats.stored_weights import StoredWeights
from tinygn_dist.errors import Refused, UserError

BITS = {"F32": 30, "F16": 10, "BF16": 7, "MXFP4": 3} | {
    name: int(name[1]) for name in written_gguf.TYPES if name.startswith("Q")
}
"""of the values: an error is at most the largest value times 2^(1 - bits)"""


def write(folder: Path, path: Path, type_name: str = "F32") -> dict[str, str]:
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    weights = StoredWeights(folder.glob("*.safetensors"), getattr(config, "quantization_config", None))
    return write_gguf(path, Described("tiny", config, tokenizer), weights, type_name)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(4, 24)[None]).logits


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_the_same_model(tmp_path: Path, kind: str, tied: bool):
    """An independent reader: it permutes rows and names back, and its logits are those of the checkpoint."""
    made = gguf_cases.model(kind, tie_word_embeddings=tied)
    gguf_cases.save(made, tmp_path / "hf")
    write(tmp_path / "hf", tmp_path / "m.gguf")
    options = dict(gguf_file="m.gguf", dtype=torch.float32)
    if kind == "qwen3":  # its reader there leaves out the size of a head
        options["config"] = type(made.config)(**made.config.to_dict())
    found = hf.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    torch.testing.assert_close(logits(found), logits(made), rtol=1e-4, atol=1e-4)


def test_every_type_holds_the_values_it_stands_for(tmp_path: Path):
    made = gguf_cases.model(hidden_size=256, intermediate_size=288)
    gguf_cases.save(made, tmp_path / "hf")
    weight = made.model.layers[1].mlp.gate_proj.weight.detach()
    for type_name in written_gguf.TYPES:
        path = tmp_path / f"{type_name}.gguf"
        chosen = write(tmp_path / "hf", path, type_name)
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        assert {name: tensor.tensor_type.name for name, tensor in tensors.items()} == chosen
        assert chosen["blk.1.ffn_gate.weight"] == type_name and chosen["blk.1.ffn_norm.weight"] == "F32"
        row_of_288 = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}.get(type_name, type_name)
        assert chosen["blk.1.ffn_down.weight"] == row_of_288
        tensor = tensors["blk.1.ffn_gate.weight"]
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        bits = BITS[type_name]
        assert (values - weight).abs().max() <= weight.abs().max() * 2.0 ** (1 - bits)


def test_layers_of_different_widths_are_lists_of_deci(tmp_path: Path):
    made = gguf_cases.model()
    gguf_cases.make_uneven(made, (96, 32, 64), (2, 1, 2))
    gguf_cases.save(made, tmp_path / "hf")
    write(tmp_path / "hf", tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["general.architecture"].contents() == "deci"
    assert fields["deci.feed_forward_length"].contents() == [96, 32, 64]
    assert fields["deci.attention.head_count"].contents() == [4, 2, 4]
    assert fields["deci.attention.head_count_kv"].contents() == [2, 1, 2]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_the_tokenizer_comes_along(tmp_path: Path, pre: str):
    gguf_cases.save(gguf_cases.model(), tmp_path / "hf", pre)
    write(tmp_path / "hf", tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    own = AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert fields["tokenizer.ggml.pre"].contents() == pre and len(tokens) == gguf_cases.VOCAB
    assert tokens[: len(own)] == own.convert_ids_to_tokens(range(len(own)))
    assert fields["tokenizer.ggml.token_type"].contents()[:4] == [3, 3, 3, 1]
    assert fields["tokenizer.chat_template"].contents() == own.chat_template
    assert fields["tokenizer.ggml.eos_token_id"].contents() == own.eos_token_id


def test_what_a_file_cannot_say_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = gguf_cases.save(gguf_cases.model(), tmp_path / "hf")
    path = tmp_path / "out" / "m.gguf"
    with pytest.raises(UserError, match="accepted: F32"):
        write(folder, path, "Q3_X")
    uneven = gguf_cases.model("qwen3")
    gguf_cases.make_uneven(uneven, (96, 32, 64), (2, 2, 2))
    with pytest.raises(Refused, match="norms of q and k"):
        write(gguf_cases.save(uneven, tmp_path / "qwen3"), path)
    gpt2 = tiny.build("gpt2")
    gpt2.config.vocab_size = gguf_cases.VOCAB
    with pytest.raises(Refused, match="gpt2"):
        write(gguf_cases.save(gpt2, tmp_path / "gpt2"), path)
    tiny.tokenizer().save_pretrained(tmp_path / "words")
    gguf_cases.model().save_pretrained(tmp_path / "words")
    with pytest.raises(Refused, match="WordLevel"):
        write(tmp_path / "words", path)
    with pytest.raises(UserError, match="exists"):
        write(folder, folder / "config.json")
    monkeypatch.setattr(written_gguf.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="make room"):
        write(folder, path)
    assert not path.parent.exists() or not list(path.parent.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = gguf_cases.save(gguf_cases.model(), tmp_path / "hf")
    (tmp_path / "out").mkdir()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(written_gguf, "_encoded", full)
    with pytest.raises(UserError, match="No space left"):
        write(folder, tmp_path / "out" / "m.gguf")
    assert not list((tmp_path / "out").iterdir())
