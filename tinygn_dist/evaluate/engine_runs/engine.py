"""The contract of an engine: log-probabilities after a prompt, and how long reading and writing tokens takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch


class Timing(NamedTuple):
    """tokens/s of reading a prompt and of writing after it, one token at a time."""

    prefill: float
    decode: float


class Engine(Protocol):
    """A file that one engine has loaded, on a stated number of threads."""

    def top_log_probs(self, prompt: Sequence[int], count: int) -> dict[int, float]:
        """Of the `count` likeliest tokens after the prompt, natural logarithms by token id."""

    def timed(self, prompt: Sequence[int], new_tokens: int) -> Timing:
        """Nothing of an earlier prompt is used again."""


Step = Callable[[torch.Tensor, Sequence[torch.Tensor] | None], tuple[torch.Tensor, Sequence[torch.Tensor]]]
"""ids (1, n) and a cache, None at the start -> logits of the last token (vocabulary), and the cache after them"""


def top_of(logits: torch.Tensor, count: int) -> dict[int, float]:
    """logits: (vocabulary)."""
    best = logits.float().log_softmax(-1).topk(count)
    return dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def timed_steps(step: Step, prompt: Sequence[int], new_tokens: int) -> Timing:
    """Greedy decoding, for engines that run one step at a time."""
    start = time.perf_counter()
    logits, cache = step(torch.tensor([list(prompt)]), None)
    read = time.perf_counter()
    for _ in range(new_tokens):
        logits, cache = step(logits.argmax().view(1, 1), cache)
    return Timing(len(prompt) / (read - start), new_tokens / (time.perf_counter() - read))
