"""The generation config of a checkpoint, such that it can be saved again."""

from __future__ import annotations

import contextlib

from torch import nn
from transformers import GenerationConfig


def read_generation_config(model: nn.Module, path: str, revision: str | None) -> None:
    """As `from_pretrained` does: the checkpoint's own where it has one."""
    if getattr(model, "generation_config", None) is None:
        return
    with contextlib.suppress(OSError):
        options = {"revision": revision} if revision else {}
        model.generation_config = GenerationConfig.from_pretrained(path, **options)
    mend_generation_config(model)


def mend_generation_config(model: nn.Module) -> None:
    """A source with an invalid generation_config.json would make the final save fail after all the work."""
    try:
        model.generation_config.validate(strict=True)
    except (ValueError, TypeError):
        defaults = type(model.generation_config)()
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
            if hasattr(defaults, name):
                setattr(model.generation_config, name, getattr(defaults, name))
