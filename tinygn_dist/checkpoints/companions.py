"""What lies beside the weights of a checkpoint and comes along as it is: tokenizers, processors, chat templates,
pooling, prompts, licences, code. The files are those of the source, byte by byte: nothing that a run does changes them.

Weights in other formats would be those of the dense model, so they stay behind, and so does the state of a training.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import snapshot_download
from transformers.utils import cached_file

from tinygn_dist.errors import UserError

CARD = "README.md"
_SHOWN = 3
_WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.ot",
    "*.tflite", "*.mlmodel", "*.npz", "*.pkl", "*.index.json",
)  # fmt: skip
_TRAINING = ("optimizer.*", "scheduler.*", "scaler.pt", "rng_state*", "trainer_state.json", "training_args.bin")
_WRITTEN_ANEW = (
    "config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors",
    "model.safetensors.index.json", "tinygn_report.json",
)  # fmt: skip
_HIDDEN = (".*", "__pycache__")
_OF_A_PROCESSOR = (
    "tokenizer*", "*.tiktoken", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model",
    "sentencepiece*", "chat_template*", "additional_chat_templates/*", "*preprocessor_config.json",
    "processor_config.json", "normalizer.json",
)  # fmt: skip


@dataclass(frozen=True)
class Companions:
    """The files of a source folder. carried: relative paths. left_behind: names of files and folders, each with the
    reason."""

    folder: Path | None = None
    carried: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    """stored tensors of the source that its model has no place for and that come along"""
    tensor_files: tuple[Path, ...] = ()
    """the safetensors files in which they lie"""
    dropped: tuple[str, ...] = ()
    """stored tensors that do not fit the result"""
    broken_promises: tuple[str, ...] = ()
    """entries of the config that count modules which are dropped; the result has none of them"""
    processor: Any = None
    """the tokenizer or image processor that belongs to the model; the source's files stand for it unless it is another
    one by now"""

    @property
    def notes(self) -> list[str]:
        notes = []
        if self.left_behind:
            notes.append(f"not carried over from the source: {', '.join(self.left_behind)}")
        if self.tensors:
            notes.append(f"carried over as they are, the model has no place for them: {_shown(self.tensors)}")
        if self.dropped:
            entries = f"; config.json counts none of them ({', '.join(self.broken_promises)})"
            ending = entries if self.broken_promises else ""
            notes.append(f"stored in the source and not in the result: {_shown(self.dropped)}{ending}")
        return notes

    def copy(self, destination: Path) -> None:
        """Into a folder."""
        theirs = [name for name in self.carried if _matches(name, _OF_A_PROCESSOR)]
        saved = self.processor is not None and not (theirs and self._holds_processor())
        for name in self.carried:
            if not (saved and name in theirs):
                (destination / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / name, destination / name)
        if saved:
            self.processor.save_pretrained(destination)

    def source_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the source; empty where it has none that is readable."""
        try:
            found = json.loads((self.folder / name).read_text(encoding="utf-8")) if self.folder else {}
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _holds_processor(self) -> bool:
        """Whether the source's files say what the processor would save. Truncation and padding do not count: calling a
        fast tokenizer resets them."""
        if not hasattr(type(self.processor), "from_pretrained"):
            return False
        try:
            return _saved(type(self.processor).from_pretrained(self.folder)) == _saved(self.processor)
        except Exception:  # the folder does not describe such a processor
            return False


def companions_of(path: str, revision: str | None = None) -> Companions:
    """Of a model folder, or of a hub id, whose small files are downloaded where a connection allows.

    Raises UserError for a file that cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        folder = _downloaded(path, revision)
    if folder is None or not (folder / "config.json").is_file():
        return Companions()
    carried: list[str] = []
    left_behind: list[str] = []
    modules = _modules(folder)
    for entry in sorted(folder.iterdir()):
        if _matches(entry.name, _HIDDEN) or _matches(entry.name, _WRITTEN_ANEW):
            continue
        if entry.is_dir():
            files = sorted(_files(entry))
            weights = [file for file in files if _matches(file.name, _WEIGHTS)]
            if weights and entry.name not in modules:
                left_behind.append(f"{entry.name}/ (weights of its own)")
            else:
                carried += [str(file.relative_to(folder)) for file in files]
        elif _matches(entry.name, _TRAINING):
            left_behind.append(f"{entry.name} (state of a training)")
        elif _matches(entry.name, _WEIGHTS):
            left_behind.append(f"{entry.name} (weights of the source)")
        else:
            carried.append(entry.name)
    for name in carried:
        if not os.access(folder / name, os.R_OK):
            raise UserError(f"{folder / name} cannot be read and belongs to the model; make it readable, or remove it")
    return Companions(folder, tuple(carried), tuple(left_behind))


def merged_card(ours: str, theirs: str) -> str:
    """Our model card with the source's below; what the source's front matter says stays (licence, languages), with our
    base model and tags."""
    (our_facts, our_text), (their_facts, their_text) = _split_card(ours), _split_card(theirs)
    tags = [*_listed(their_facts.get("tags")), *_listed(our_facts.get("tags"))]
    facts = their_facts | our_facts | {"tags": list(dict.fromkeys(tags))}
    front = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n{our_text.rstrip()}\n\n# The card of the source\n\n{their_text.strip()}\n"


def write_card(folder: Path, ours: str) -> None:
    """Our model card, merged with the source's that was carried over."""
    card = folder / CARD
    card.write_text(merged_card(ours, card.read_text(encoding="utf-8")) if card.exists() else ours, encoding="utf-8")


def _split_card(text: str) -> tuple[dict[str, Any], str]:
    """(front matter, what follows)."""
    words = text.split("---\n", 2)
    if len(words) == 3 and not words[0].strip():
        try:
            facts = yaml.safe_load(words[1])
        except yaml.YAMLError:
            facts = None
        if isinstance(facts, dict):
            return facts, words[2]
    return {}, text


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _shown(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def _saved(processor: Any) -> dict[str, bytes]:
    """The files that it saves, by name."""
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        return {str(file.relative_to(folder)): _comparable(file) for file in _files(Path(folder))}


def _comparable(file: Path) -> bytes:
    if file.name not in ("tokenizer.json", "tokenizer_config.json"):
        return file.read_bytes()
    facts = json.loads(file.read_text(encoding="utf-8"))
    for name in ("truncation", "padding", "name_or_path", "is_local", "local_files_only", "processor_class"):
        facts.pop(name, None)
    return json.dumps(facts, sort_keys=True).encode()


def _downloaded(name: str, revision: str | None) -> Path | None:
    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=list(_WEIGHTS)))
    except Exception:  # no connection: what the cache holds
        pass
    try:
        found = cached_file(name, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return None
    return Path(found).parent if found else None


def _modules(folder: Path) -> set[str]:
    """Subfolders that modules.json names (sentence-transformers): their weights do not depend on what is removed."""
    try:
        entries = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        return {Path(entry["path"]).parts[0] for entry in entries if entry.get("path")}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return set()


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not _matches(name, _HIDDEN)]
        yield from (Path(place) / name for name in names if not _matches(name, _HIDDEN))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
