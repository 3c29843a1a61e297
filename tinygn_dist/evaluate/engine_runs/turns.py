"""Files run in one engine, each in a process of its own, timed in turns.

A process of its own, so that resident memory is that of one file. Turns, because a machine is not equally fast all the
time: what is compared was measured side by side.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import psutil

from tinygn_dist.errors import Refused, UserError
from tinygn_dist.evaluate.engine_runs import llama_cpp, onnx_runtime, stock_transformers
from tinygn_dist.evaluate.engine_runs.engine import Engine, Timing

TURNS = 5
NEW_TOKENS = 24
TOP = 10
"""log-probabilities compared after each prompt"""
_MIB = 2**20


class EngineRow(NamedTuple):
    """How an engine is installed, which file it runs, and how it loads one on so many threads."""

    packages: Sequence[str]
    install: str
    find_file: Callable[[Path], Path]
    load: Callable[[Path, int], Engine]


ENGINES: Mapping[str, EngineRow] = {
    "transformers": EngineRow(
        stock_transformers.PACKAGES,
        stock_transformers.INSTALL,
        stock_transformers.find_file,
        stock_transformers.StockTransformers,
    ),
    "onnxruntime": EngineRow(
        onnx_runtime.PACKAGES, onnx_runtime.INSTALL, onnx_runtime.find_file, onnx_runtime.OnnxRuntime
    ),
    "llama.cpp": EngineRow(llama_cpp.PACKAGES, llama_cpp.INSTALL, llama_cpp.find_file, llama_cpp.LlamaCpp),
}


class Measured(NamedTuple):
    """Of one file. log_probs: after each prompt that was asked, by token. timings: medians by context length.
    resident_mib: of the process, libraries included, after the longest context."""

    num_bytes: int
    log_probs: Sequence[Mapping[int, float]]
    timings: Mapping[int, Timing]
    resident_mib: float


def row_of(engine: str) -> EngineRow:
    """Raises UserError for an unknown engine, or one whose package is missing (naming the pip command)."""
    if engine not in ENGINES:
        raise UserError(f"engine {engine}, accepted: {', '.join(ENGINES)}")
    row = ENGINES[engine]
    missing = [name for name in row.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"engine {engine} needs {', '.join(missing)}; run: {row.install}")
    return row


def measure(
    engine: str, files: Sequence[Path], ids: Sequence[int], contexts: Sequence[int], threads: int
) -> list[Measured]:
    """Every file once. ids: token ids of a text; after each of its first prefixes log-probabilities are asked, and its
    repetition fills the contexts (tokens). Raises UserError or Refused where a file cannot be run."""
    row = row_of(engine)
    workers = [_Worker(engine, row.find_file(path), threads) for path in files]
    try:
        found = [
            [worker.ask("top_log_probs", list(ids[:n]), TOP) for n in range(1, len(ids) + 1)] for worker in workers
        ]
        prompts = {n: (list(ids) * (n // len(ids) + 1))[:n] for n in contexts}
        timings = [{n: [] for n in contexts} for _ in workers]
        for turn in range(TURNS + 1):
            for context, prompt in prompts.items():
                for worker, own in zip(workers, timings, strict=True):
                    timing = worker.ask("timed", prompt, NEW_TOKENS)
                    if turn:  # the first turn warms up
                        own[context].append(Timing(*timing))
        residents = [worker.resident_mib() for worker in workers]
        medians = [{n: _median(timed) for n, timed in own.items()} for own in timings]
        sizes = [_bytes_of(worker.path) for worker in workers]
        return [Measured(*facts) for facts in zip(sizes, found, medians, residents, strict=True)]
    finally:
        for worker in workers:
            worker.end()


def largest_difference(found: Sequence[Mapping[int, float]], expected: Sequence[Mapping[int, float]]) -> float:
    """Of log-probabilities of the tokens that both have among their likeliest, over all prompts; inf where one has
    none."""
    apart = 0.0
    for one, other in zip(found, expected, strict=True):
        both = one.keys() & other.keys()
        apart = max([apart, *(abs(one[token] - other[token]) for token in both)]) if both else float("inf")
    return apart


def _median(timings: Sequence[Timing]) -> Timing:
    return Timing(*(statistics.median(each) for each in zip(*timings, strict=True)))


def _bytes_of(path: Path) -> int:
    """Of a folder its safetensors; of a graph the weights beside it too."""
    files = path.glob("*.safetensors") if path.is_dir() else path.parent.glob(f"{path.name}*")
    return sum(file.stat().st_size for file in files)


class _Worker:
    """A process that holds one loaded file and answers one call at a time."""

    def __init__(self, engine: str, path: Path, threads: int) -> None:
        self.path = path
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, engine, path, threads), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def ask(self, method: str, *arguments: object) -> object:
        self._ours.send((method, arguments))
        return self._answer()

    def resident_mib(self) -> float:
        return psutil.Process(self._process.pid).memory_info().rss / _MIB

    def end(self) -> None:
        self._process.terminate()
        self._process.join()

    def _answer(self) -> object:
        try:
            ok, answer = self._ours.recv()
        except EOFError:
            raise Refused(f"{self.path}: the engine's process ended; it cannot run this file") from None
        if not ok:
            raise Refused(f"{self.path}: {answer}")
        return answer


def _serve(pipe: Connection, engine: str, path: Path, threads: int) -> None:
    try:
        loaded = ENGINES[engine].load(path, threads)
        pipe.send((True, None))
        while True:
            method, arguments = pipe.recv()
            pipe.send((True, getattr(loaded, method)(*arguments)))
    except EOFError:
        return
    except Exception as error:  # whatever an engine raises is its answer
        pipe.send((False, f"{type(error).__name__}: {str(error).splitlines()[:1]}"))
