"""What lies beside the weights: carried byte by byte, or named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests import tiny
from tinygn_dist.checkpoints.companions import Companions, companions_of, merged_card, write_card
from tinygn_dist.errors import UserError

CARRIED = {
    "modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]),
    "sentence_bert_config.json": '{"max_seq_length": 32}',
    "config_sentence_transformers.json": '{"prompts": {"query": "query: "}}',
    "1_Pooling/config.json": '{"pooling_mode_cls_token": true}',
    "2_Dense/config.json": "{}",
    "2_Dense/model.safetensors": "dense",
    "3_Old/nothing.txt": "text",
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "custom_generate/generate.py": "def generate(): ...",
    "custom_generate/parts/more.py": "",
    "modeling_own.py": "",
    "LICENSE": "MIT",
    "README.md": "# card",
    "vocab.txt": "a",
    "spiece.model": "s",
}
LEFT = (
    "onnx/model.onnx", "pytorch_model.bin", "tf_model.h5", "checkpoint-5/model.safetensors", "original/a.pth",
    "consolidated.safetensors", "optimizer.pt", "rng_state_0.pth", "training_args.bin", "3_Unnamed/model.safetensors",
)  # fmt: skip
SILENT = (
    "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
    "generation_config.json", "tinygn_report.json", ".git/config", ".gitattributes", "__pycache__/a.pyc",
)  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    for name, text in {**CARRIED, **dict.fromkeys((*LEFT, *SILENT), "{}")}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_every_file_is_carried_written_anew_or_named(source: Path, tmp_path: Path):
    beside = companions_of(str(source))
    beside.copy(tmp_path / "out")
    found = {str(f.relative_to(tmp_path / "out")): f.read_text() for f in (tmp_path / "out").rglob("*") if f.is_file()}
    assert found == CARRIED
    (note,) = beside.notes
    for name in LEFT:
        assert (f"{name.split('/')[0]}/" if "/" in name else name) in note, name


def test_a_folder_of_its_own_code_only_has_no_note(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    assert companions_of(str(tmp_path)).notes == []


def test_a_file_that_cannot_be_read_is_named_before_the_work(source: Path):
    (source / "LICENSE").unlink()
    (source / "LICENSE").symlink_to(source / "nowhere")
    with pytest.raises(UserError, match="LICENSE cannot be read and belongs to the model"):
        companions_of(str(source))


@pytest.fixture
def with_tokenizer(tmp_path: Path) -> Path:
    """A tokenizer.json that truncates and pads, as sentence-transformers' models have them."""
    folder = tmp_path / "model"
    made = tiny.tokenizer(chat=True)
    made.save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    facts = json.loads((folder / "tokenizer.json").read_text())
    facts["truncation"] = {"direction": "Right", "max_length": 32, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(facts))
    (folder / "LICENSE").write_text("MIT")
    return folder


def test_calling_a_tokenizer_does_not_change_the_saved_one(with_tokenizer: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(with_tokenizer)
    tokenizer(["one text", "another longer text"], padding=False, truncation=True, max_length=8)
    Companions(*_two(with_tokenizer), processor=tokenizer).copy(tmp_path / "out")
    for file in with_tokenizer.iterdir():
        if file.name != "config.json":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("change", ["token", "template", "special"])
def test_a_tokenizer_that_the_caller_changed_is_the_one_that_is_saved(
    with_tokenizer: Path, tmp_path: Path, change: str
):
    tokenizer = AutoTokenizer.from_pretrained(with_tokenizer)
    (with_tokenizer / "added_tokens.json").write_text('{"stale": 7}')
    if change == "token":
        tokenizer.add_tokens(["<new>"])
    elif change == "template":
        tokenizer.chat_template = "{{ messages[0] }}"
    else:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    Companions(*_two(with_tokenizer), processor=tokenizer).copy(tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(again) == len(tokenizer) and again.chat_template == tokenizer.chat_template
    assert again.pad_token == tokenizer.pad_token
    assert (tmp_path / "out" / "LICENSE").is_file() and not (tmp_path / "out" / "added_tokens.json").exists()


def _two(folder: Path) -> tuple[Path, tuple[str, ...]]:
    found = companions_of(str(folder))
    return found.folder, found.carried


def test_without_a_source_the_tokenizer_is_saved(tmp_path: Path):
    Companions(processor=tiny.tokenizer()).copy(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == tiny.VOCAB


def test_cards_are_merged(tmp_path: Path):
    ours = "---\nbase_model: b\ntags:\n- pruned\n---\n\n# out\n"
    theirs = "---\nlicense: apache-2.0\nlanguage: [en, de]\ntags: [chat]\nbase_model: a\n---\n# Source\n---\nend\n"
    made = merged_card(ours, theirs)
    for part in ("license: apache-2.0", "- en", "- chat", "- pruned", "base_model: b", "# out", "# Source\n---\nend"):
        assert part in made, part
    assert made.count("base_model") == 1 and made.index("# out") < made.index("# Source")
    assert "# plain" in merged_card(ours, "# plain") and "broken: [" in merged_card(ours, "---\nbroken: [\n---\ntext")
    write_card(tmp_path, ours)
    assert (tmp_path / "README.md").read_text() == ours


def test_a_folder_that_is_a_link(source: Path, tmp_path: Path):
    """Hub snapshots are links to files; shared disks have links to folders."""
    shutil.move(source / "1_Pooling", tmp_path / "elsewhere")
    (source / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    assert "1_Pooling/config.json" in companions_of(str(source)).carried
