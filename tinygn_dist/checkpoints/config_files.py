"""config.json, generation_config.json and the code of a custom class, as the plain class of a model writes them.

transformers 5 writes `rope_parameters` where transformers 4, and engines built on it, read `rope_theta` and
`rope_scaling`: without them they compute with a base of 10,000 and say nothing. Both are written.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig
from transformers.dynamic_module_utils import custom_object_save

from tinygn_dist.checkpoints.companions import Companions

_OLD_ROPE = ("rotary_pct", "rotary_emb_base", "partial_rotary_factor", "rope_local_base_freq")
"""further entries that transformers 5 moves into `rope_parameters`: kept where the source has them"""
_NOT_KEPT = ("auto_map", "architectures", "quantization_config", "transformers_version", "_name_or_path", "torch_dtype")


def write_config_files(folder: Path, bare: nn.Module, plain: nn.Module, dtype: torch.dtype, beside: Companions) -> None:
    """bare: the live model; plain: a skeleton of its own class and config, whatever a backend made of the live one."""
    config = copy.deepcopy(plain.config)
    config.architectures, config.dtype = [type(plain).__name__], dtype
    for name in beside.broken_promises:
        setattr(config.get_text_config(), name, 0)
    source = beside.source_json("config.json")
    brings_code = any(name.endswith(".py") and "/" not in name for name in beside.carried)
    if brings_code and source.get("auto_map"):
        config.auto_map = source["auto_map"]
        config._auto_class = None  # its file is carried
    elif plain.is_remote_code():
        custom_object_save(plain, folder, config=config)
    config.save_pretrained(folder)
    file = folder / "config.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(
        json.dumps(_with_old_words(facts, config, source), indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    if plain.can_generate() and getattr(bare, "generation_config", None) is not None:
        _write_generation_config(folder, bare.generation_config, beside)


def add_to_config(folder: Path, entries: Mapping[str, Any]) -> None:
    """Further entries of the config.json that was written there."""
    file = folder / "config.json"
    facts = json.loads(file.read_text(encoding="utf-8")) | dict(entries)
    file.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _with_old_words(facts: dict[str, Any], config: PretrainedConfig, source: dict[str, Any]) -> dict[str, Any]:
    """The entries of a config.json, and those that say the same to transformers 4. Sections of a config likewise."""
    made = dict(facts)
    rope = facts.get("rope_parameters")
    if isinstance(rope, dict):
        made |= {name: value for name, value in _old_rope(rope).items() if name not in facts}
        made |= {name: source[name] for name in _OLD_ROPE if name in source and name not in made}
    if source.get("tie_word_embeddings") is False:  # T5 reads from it whether outputs are scaled, and ties all the same
        made["tie_word_embeddings"] = False
    for name, value in source.items():
        if name in made or name in _NOT_KEPT or isinstance(value, dict):
            continue
        if getattr(config, name, _with_old_words) == value:  # left out as a default, which is another one elsewhere
            made[name] = value
    for name, value in facts.items():
        section = getattr(config, name, None)
        if isinstance(value, dict) and isinstance(section, PretrainedConfig):
            made[name] = _with_old_words(value, section, source.get(name) if isinstance(source.get(name), dict) else {})
    return made


def _old_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of `rope_parameters`; of layer types those of full attention, with the base of
    the others as `rope_local_base_freq` (Gemma 3)."""
    if any(isinstance(value, dict) for value in rope.values()):
        full, local = (rope.get(f"{kind}_attention") or {} for kind in ("full", "sliding"))
        made = _old_rope(full) if full else {}
        return made | ({"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {})
    made = {"rope_theta": rope["rope_theta"]} if rope.get("rope_theta") is not None else {}
    if rope.get("rope_type", "default") != "default":
        made["rope_scaling"] = {key: value for key, value in rope.items() if key not in ("rope_theta", *_OLD_ROPE)}
    return made


def _write_generation_config(folder: Path, config: GenerationConfig, beside: Companions) -> None:
    """The source's file where it says the same."""
    config.save_pretrained(folder)
    source = beside.source_json("generation_config.json")
    if source and _comparable(GenerationConfig.from_dict(source)) == _comparable(config):
        text = (beside.folder / "generation_config.json").read_bytes()
        (folder / "generation_config.json").write_bytes(text)


def _comparable(config: GenerationConfig) -> dict[str, Any]:
    return {
        key: value
        for key, value in config.to_dict().items()
        if key not in ("transformers_version", "_from_model_config")
    }


def readers(folder: Path) -> list[str]:
    """Which versions of transformers read a folder's config and tokenizer, where that is a question."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    said = []
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    rotary = [section for section in sections if isinstance(section.get("rope_parameters"), dict)]
    if any("rope_theta" not in section for section in rotary):
        said.append("needs transformers 5: config.json has rope_parameters and no rope_theta")
    elif rotary:
        said.append("config.json has rope_theta beside rope_parameters, for transformers 4")
    with contextlib.suppress(OSError, ValueError):
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        if tokenizer.get("tokenizer_class") == "TokenizersBackend" or isinstance(
            tokenizer.get("extra_special_tokens"), list
        ):
            said.append("its tokenizer needs transformers 5, as the source's does")
    return said


def needed_versions(folder: Path) -> list[str]:
    """What of `readers` keeps an older engine from reading a folder."""
    return [fact for fact in readers(folder) if "needs" in fact]
