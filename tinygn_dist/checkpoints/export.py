"""Write the checkpoint whole or not at all, then read it back.

Everything goes into a sibling folder which is renamed into place at the very end; a crash leaves either the old folder
or none. What the report says about the result is read from the files, not from memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from tinygn_dist.backends.base import Backend
from tinygn_dist.backends.pieces import tensors_of
from tinygn_dist.checkpoints.safetensors_io import Kind, ShardWriter, StoredTensors, Written, written
from tinygn_dist.config import OutputConfig
from tinygn_dist.errors import UserError
from tinygn_dist.models.anatomy import Matrix

log = logging.getLogger(__name__)
_SPARE = 1.05
_LEFTOVER = ".partial-"


def claim(options: OutputConfig, source_path: str, needed_bytes: int) -> Path:
    """The output folder, checked before any work.

    Raises UserError when it is not empty (without overwrite), is the model's own folder, cannot be written, or its disk
    has less room than `needed_bytes`.
    """
    path, source = Path(options.dir).expanduser().resolve(), Path(source_path).expanduser().resolve()
    if path.exists() and not path.is_dir():
        raise UserError(f"output {path} is a file; name a folder")
    if path == source or path in source.parents and path.is_dir():
        what = "is" if path == source else "holds"
        raise UserError(f"output {path} {what} the model's own folder; name another one")
    _restore(path)
    if path.exists() and any(path.iterdir()) and not options.overwrite:
        raise UserError(f"output folder {path} is not empty; name another one or pass --overwrite")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"output {path} cannot be written: {error.strerror}") from None
    free, needed = shutil.disk_usage(path.parent).free, int(needed_bytes * _SPARE)
    if free < needed:
        raise UserError(
            f"output {path} needs {needed:,} bytes, its disk has {free:,} free; make room or name another disk"
        )
    return path


@contextlib.contextmanager
def only_writer(destination: Path, backend: Backend) -> Iterator[None]:
    """Inside, no other job writes this output: UserError on every rank when one does. Clears away what crashed runs left
    beside it. The system drops the lock of a killed process."""
    lock = destination.with_name(f"{_LEFTOVER}{destination.name}.lock")
    with contextlib.ExitStack() as held:
        with backend.together("claiming the output folder"):
            if backend.is_main:
                held.enter_context(_locked(lock, destination))
                for leftover in _leftovers(destination, r"[a-z0-9_]{8}|old-\d+"):
                    shutil.rmtree(leftover, ignore_errors=True)
        yield


@contextlib.contextmanager
def _locked(lock: Path, destination: Path) -> Iterator[None]:
    with contextlib.ExitStack() as opened:
        gone = True
        while gone:  # locked in vain when the run before has just deleted it
            file = opened.enter_context(open(lock, "w", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another run is writing output {destination}; wait for it or name another folder"
                ) from None
            except OSError as error:  # a file system without locks
                log.warning("output %s cannot be locked (%s): start no second run into it", destination, error.strerror)
            gone = os.fstat(file.fileno()).st_nlink == 0
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _leftovers(path: Path, ending: str) -> list[Path]:
    """What crashed runs left beside this output (not what a run for `NAME-2` is writing beside output `NAME`)."""
    pattern = re.compile(rf"{re.escape(_LEFTOVER + path.name)}-(?:{ending})")
    return [other for other in path.parent.glob(f"{_LEFTOVER}*") if pattern.fullmatch(other.name)]


def _restore(path: Path) -> None:
    """A run killed between the two renames of `_publish` left the older output under a temporary name."""
    for old in _leftovers(path, r"old-\d+") if not path.exists() else []:
        with contextlib.suppress(OSError):  # another rank was faster
            os.rename(old, path)


@contextlib.contextmanager
def draft(destination: Path, backend: Backend) -> Iterator[Path]:
    """A folder beside the destination, the same on every rank; moved into place when the context ends well, removed
    otherwise. An older destination is gone only after the new one is complete."""
    made = None
    try:
        with backend.together("making the output folder"):
            if backend.is_main:
                made = Path(tempfile.mkdtemp(prefix=f"{_LEFTOVER}{destination.name}-", dir=destination.parent))
        yield Path(backend.everyone(str(made))[0])
        with backend.together("publishing the checkpoint"):
            if made:
                _publish(made, destination)
    except BaseException:
        if made:
            shutil.rmtree(made, ignore_errors=True)
        raise


def _publish(made: Path, destination: Path) -> None:
    made.chmod(0o755)  # made private by mkdtemp, and by safetensors for its files
    for file in made.iterdir():
        file.chmod(0o644)
    old = None
    if destination.exists():
        old = destination.with_name(f"{_LEFTOVER}{destination.name}-old-{os.getpid()}")
        os.rename(destination, old)
    try:
        os.rename(made, destination)
    except OSError:
        if old:
            os.rename(old, destination)
        raise
    if old:
        shutil.rmtree(old, ignore_errors=True)


def write_checkpoint(
    folder: Path,
    model: nn.Module,
    dtypes: Mapping[str, torch.dtype],
    processor: Any,
    max_shard_gib: float,
    backend: Backend,
) -> dict[str, Written]:
    """safetensors shards, config, generation config, tokenizer and custom code, as plain `from_pretrained` reads them.

    A collective; the main rank writes, and holds one whole tensor at a time. model: as the backend prepared it. dtypes:
    of the tensors to write, by name; others keep theirs. Returns what was written, by name on disk, on the main rank.
    Raises UserError when the disk fills up while writing.
    """
    failure: Exception | None = None
    checkpoint: _Checkpoint | None = None
    for name, tensor in backend.full_tensors(model):  # to the end on every rank, whatever happens on the main one
        if not backend.is_main or failure is not None:
            continue
        try:
            checkpoint = checkpoint or _Checkpoint(folder, model, backend, dtypes, processor, max_shard_gib)
            checkpoint.add(name, tensor)
        except Exception as error:
            failure = error
    if isinstance(failure, OSError | SafetensorError):
        reason = getattr(failure, "strerror", None) or failure
        free = shutil.disk_usage(folder).free
        raise UserError(f"writing {folder} failed: {reason}; {free:,} bytes are free")
    if failure is not None:
        raise failure
    return checkpoint.finish() if checkpoint else {}


class _Checkpoint:
    """A checkpoint that is being written. transformers stores some weights in other shapes than it runs (fused experts
    one by one): each tensor is converted alone, and those that can only be converted together wait for each other."""

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        backend: Backend,
        dtypes: Mapping[str, torch.dtype],
        processor: Any,
        max_shard_gib: float,
    ) -> None:
        bare = backend.unwrap(model)
        self._bare, self._dtypes, self._waiting = bare, dtypes, {}
        state = {
            name: torch.empty(backend.shape(tensor), dtype=dtypes.get(name, tensor.dtype), device="meta")
            for name, tensor in tensors_of(bare).items()
        }
        stored = revert_weight_conversion(bare, dict(state))
        layout = {name: _kind(tensor) for name, tensor in stored.items()}
        alone = {name: self._converted({name: tensor}) for name, tensor in state.items()}
        self._together = {
            name for name, made in alone.items() if any(layout.get(n) != _kind(t) for n, t in made.items())
        }
        bare.save_pretrained(folder, state_dict={})  # all but the weights
        bare.config.dtype = next((k.dtype for k in layout.values() if k.dtype.is_floating_point), bare.dtype)
        bare.config.save_pretrained(folder)  # again: the running model may be in another dtype
        processor.save_pretrained(folder)
        self._writer = ShardWriter(folder, layout, max_shard_gib * 1e9)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        assert tensor.numel() > 0, f"{name} would be written empty"
        tensor = tensor.cpu().to(self._dtypes.get(name, tensor.dtype))
        if name in self._together:
            self._waiting[name] = tensor
        else:
            self._write({name: tensor})

    def finish(self) -> dict[str, Written]:
        if self._waiting:
            self._write(self._waiting)
        return self._writer.finish()

    def _write(self, state: dict[str, torch.Tensor]) -> None:
        for name, tensor in self._converted(state).items():
            self._writer.add(name, tensor)

    def _converted(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return revert_weight_conversion(self._bare, state)


def _kind(tensor: torch.Tensor) -> Kind:
    return Kind(tuple(tensor.shape), tensor.dtype)


@dataclass(frozen=True)
class Disk:
    """What the safetensors files hold. num_params: distinct stored values. zeros, sizes: per tensor. matrices: the
    names of those that are matrices or stacks of them."""

    bytes: int
    num_params: int
    zeros: dict[str, int]
    sizes: dict[str, int]
    matrices: tuple[str, ...]


def read_back(folder: Path, expected: Mapping[str, Written]) -> Disk:
    """Read every stored tensor and compare its bits with what was written. expected: as `write_checkpoint` returned it;
    empty on ranks that did not write, which only look at what is there. Raises RuntimeError when a tensor differs."""
    files = sorted(folder.glob("*.safetensors"))
    stored, found = StoredTensors(files), {}
    for name in stored.names:
        found[name] = written(name, stored.whole(name)) if expected else None
    if expected and found != dict(expected):
        name = next(n for n in {**expected, **found} if found.get(n) != expected.get(n))
        raise RuntimeError(f"{folder} holds another {name} than was written; the disk or library is at fault")
    told = [(name, fact) for name, fact in found.items() if fact]
    return Disk(
        sum(file.stat().st_size for file in files),
        sum(fact.size for _, fact in told),
        {name: fact.zeros for name, fact in told},
        {name: fact.size for name, fact in told},
        tuple(name for name, fact in told if fact.is_matrix),
    )


def digests(model: nn.Module, dtypes: Mapping[str, torch.dtype], backend: Backend) -> dict[str, bytes]:
    """SHA-256 of this rank's piece of every tensor, in the dtype it is written in: what it takes to compare two models that are
    not in memory together."""
    return {
        name: hashlib.sha256(_bytes_of(piece.to(dtypes.get(name, piece.dtype)))).digest()
        for name, piece in backend.pieces(model).items()
    }


def _bytes_of(piece: torch.Tensor) -> memoryview:
    return memoryview(piece.contiguous().cpu().view(torch.uint8).numpy())


def check_reloaded(
    reloaded: nn.Module, written: Mapping[str, bytes], dtypes: Mapping[str, torch.dtype], backend: Backend
) -> None:
    """Compare the model that was loaded from the files with the `digests` of the one that was written, each rank its pieces.
    Raises RuntimeError on the ranks where they differ."""
    for name, digest in digests(reloaded, dtypes, backend).items():
        if digest != written[name]:
            raise RuntimeError(f"{name} was reloaded with other values than were written; the library is at fault")


def sparsity_figures(
    disk: Disk, matrices: tuple[Matrix, ...], reloaded: nn.Module, backend: Backend
) -> dict[str, float | int]:
    """Zeros among the masked weights (in the model that was loaded from disk), all matrices and everything stored. A
    collective."""
    nonzero = torch.zeros(1, dtype=torch.int64)
    for matrix in matrices:
        nonzero += int(torch.count_nonzero(backend.shard(reloaded, matrix).weight))
    left, targeted = int(backend.sum_over_shards(nonzero)), sum(matrix.numel for matrix in matrices)

    def share(chosen: list[str]) -> float:
        total = sum(disk.sizes[name] for name in chosen)
        return sum(disk.zeros[name] for name in chosen) / total if total else 0.0

    return {
        "targeted_weights": 1 - left / targeted if targeted else 0.0,
        "all_weight_matrices": share(list(disk.matrices)),
        "whole_checkpoint": share(list(disk.sizes)),
        "zeros": sum(disk.zeros.values()),
    }
