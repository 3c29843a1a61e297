"""llama.cpp through the wheel `xllamacpp`: a .gguf file, or the one in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tinygn_dist.errors import UserError
from tinygn_dist.evaluate.engine_runs.engine import Timing

PACKAGES = ("xllamacpp",)
INSTALL = "pip install 'tinygn-dist[llama-cpp]'"
_CONTEXT = 4096
_QUIET = -1


def find_file(path: Path) -> Path:
    """Raises UserError where a folder has no .gguf file or several."""
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if len(files) != 1 or not files[0].is_file():
        found = ", ".join(file.name for file in files) if path.is_dir() and files else "none"
        raise UserError(
            f"{path}: llama.cpp runs one .gguf file, found {found}; name it, or make one with `tinygn export`"
        )
    return files[0]


class LlamaCpp:
    """On the CPU alone."""

    def __init__(self, path: Path, threads: int) -> None:
        import xllamacpp  # an extra: only here

        options = xllamacpp.CommonParams()
        options.model.path = str(path)
        options.n_ctx, options.n_parallel, options.n_gpu_layers = _CONTEXT, 1, 0
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
        options.warmup, options.verbosity, options.port = False, _QUIET, 0
        self._server = xllamacpp.Server(options)

    def top_log_probs(self, prompt: Sequence[int], count: int) -> dict[int, float]:
        answer = self._ask(prompt, n_predict=1, n_probs=count, ignore_eos=True, cache_prompt=True)
        told = answer["choices"][0]["logprobs"]
        if told is None:  # its server keeps back a likeliest token that is half a UTF-8 character
            raise UserError(
                f"llama.cpp tells no probabilities after the prompt of {len(prompt)} tokens; use other text"
            )
        best = told["content"][0]["top_logprobs"]
        return {one["id"]: one["logprob"] for one in best}

    def timed(self, prompt: Sequence[int], new_tokens: int) -> Timing:
        told = self._ask(prompt, n_predict=new_tokens + 1, ignore_eos=True, cache_prompt=False)["timings"]
        return Timing(told["prompt_per_second"], told["predicted_per_second"])

    def _ask(self, prompt: Sequence[int], **options: object) -> dict:
        answer = self._server.handle_completions({"prompt": list(prompt), "temperature": 0, **options})
        if "choices" not in answer:
            raise UserError(f"llama.cpp does not answer: {answer}")
        return answer
