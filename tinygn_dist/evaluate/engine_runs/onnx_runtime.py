"""ONNX Runtime on the CPU: an .onnx file of a causal language model with keys and values, or the one in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tinygn_dist.errors import UserError
from tinygn_dist.evaluate.engine_runs.engine import Timing, timed_steps, top_of

PACKAGES = ("onnxruntime",)
INSTALL = "pip install 'tinygn-dist[onnx]'"


def find_file(path: Path) -> Path:
    """Raises UserError where a folder has no .onnx file or several."""
    files = sorted(path.glob("*.onnx")) if path.is_dir() else [path]
    if len(files) != 1 or not files[0].is_file():
        found = ", ".join(file.name for file in files) if path.is_dir() and files else "none"
        raise UserError(
            f"{path}: ONNX Runtime runs one .onnx file, found {found}; name it, or make one with `tinygn export`"
        )
    return files[0]


class OnnxRuntime:
    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime  # an extra: only here

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._inputs = self._session.get_inputs()

    def top_log_probs(self, prompt: Sequence[int], count: int) -> dict[int, float]:
        return top_of(self._step(torch.tensor([list(prompt)]), None)[0], count)

    def timed(self, prompt: Sequence[int], new_tokens: int) -> Timing:
        return timed_steps(self._step, prompt, new_tokens)

    def _step(
        self, ids: torch.Tensor, cache: Sequence[torch.Tensor] | None
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        first, *others = self._inputs
        if cache is None:
            shapes = [(1, one.shape[1], 0, one.shape[3]) for one in others]
            past = [np.zeros(shape, dtype=np.float32) for shape in shapes]
        else:
            past = [tensor.numpy() for tensor in cache]
        fed = {first.name: ids.numpy()} | {one.name: each for one, each in zip(others, past, strict=True)}
        logits, *present = self._session.run(None, fed)
        return torch.from_numpy(logits[0, -1]), [torch.from_numpy(each) for each in present]
