"""Stock transformers on the CPU: a folder that `from_pretrained` loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tinygn_dist.errors import UserError
from tinygn_dist.evaluate.engine_runs.engine import Timing, timed_steps, top_of

PACKAGES = ("transformers",)
INSTALL = "pip install transformers"


def find_file(path: Path) -> Path:
    """Raises UserError for anything but a folder with config.json."""
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: transformers runs a folder with config.json; name one")
    return path


class StockTransformers:
    def __init__(self, path: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()

    def top_log_probs(self, prompt: Sequence[int], count: int) -> dict[int, float]:
        return top_of(self._step(torch.tensor([list(prompt)]), None)[0], count)

    def timed(self, prompt: Sequence[int], new_tokens: int) -> Timing:
        return timed_steps(self._step, prompt, new_tokens)

    @torch.no_grad()
    def _step(self, ids: torch.Tensor, cache: object) -> tuple[torch.Tensor, object]:
        out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1], out.past_key_values
