"""Checkpoints of a run that is under way: complete or not there, and refused when they are of another run.

A checkpoint is a folder of safetensors files, each rank its own, of whole tensors: it fits any number of ranks and any
backend. Everything is written into a folder with another name, flushed to the disk and listed in a manifest before
the folder is renamed; what a killed run leaves behind is never taken for a checkpoint. The folder must be one that all
ranks see.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tinygn_dist.backends.base import Backend
from tinygn_dist.checkpoints.safetensors_io import StoredTensors
from tinygn_dist.errors import UserError

MANIFEST = "manifest.json"
CONSTRAINT = "constraint"
"""under it and its step's number lies what a constraint writes"""
_DRAFT = ".partial-"
_FILE_BYTES = 1 << 30


class Checkpoints:
    """The checkpoints of one run, in one folder. identity: nested plain values that must be the same for a checkpoint
    to be of this run."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], backend: Backend, keep: int) -> None:
        self.folder, self.identity, self._backend, self._keep = folder, identity, backend, keep

    def newest(self) -> Saved | None:
        """The last complete one, the same on every rank. UserError when it is of another run."""
        found: Path | None = None
        with self._backend.together("looking for checkpoints"):
            if self._backend.is_main:
                found = max((path for path in _folders(self.folder) if _complete(path)), default=None)
                if found:
                    self._refuse_another_run(found)
        path = self._backend.everyone(found)[0]
        return None if path is None else Saved(path)

    def named(self, name: str) -> Saved:
        """One that is known to be complete."""
        return Saved(self.folder / name)

    def keep_only(self, name: str) -> bool:
        """Remove all others, and say whether this one is there and complete."""
        found = self._backend.everyone(_complete(self.folder / name))[0]
        with self._backend.together("tidying the checkpoints"):
            if self._backend.is_main:
                for other in _folders(self.folder):
                    if other.name != name or not found:
                        shutil.rmtree(other, ignore_errors=True)
        return found

    def _refuse_another_run(self, path: Path) -> None:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        before, now = _flat(manifest["identity"]), _flat(json.loads(json.dumps(self.identity)))
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if changed:
            told = ", ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in changed[:3])
            raise UserError(
                f"checkpoint {path} is of another run: {told}; ask for the same again, or start anew with another "
                "--checkpoint.dir or without --resume"
            )

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Writer]:
        """A checkpoint that exists once the context ended well on every rank; older ones than the `keep` newest are
        removed afterwards. Names sort by age."""
        draft = self.folder / f"{_DRAFT}{name}"
        with self._backend.together("making the checkpoint"):
            if self._backend.is_main:
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir(parents=True)
        self._backend.barrier()
        writer = Writer(draft, self._backend.rank)
        yield writer
        with self._backend.together("writing the checkpoint"):
            files = writer.close()
        told = self._backend.everyone(files)
        with self._backend.together("publishing the checkpoint"):
            if self._backend.is_main:
                self._publish(draft, name, {k: v for files in told for k, v in files.items()}, writer.facts)
        self._backend.barrier()

    def _publish(self, draft: Path, name: str, files: dict[str, int], facts: Mapping[str, Any]) -> None:
        manifest = {"identity": self.identity, "files": files, "facts": facts}
        (draft / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        _flush(draft / MANIFEST)
        _flush(draft)
        final = self.folder / name
        shutil.rmtree(final, ignore_errors=True)
        os.rename(draft, final)
        _flush(self.folder)
        for old in _folders(self.folder)[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)

    def remove(self) -> None:
        """All of them, at the end of a run."""
        self._backend.barrier()
        if self._backend.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)


def refuse_unfinished(folder: Path) -> None:
    """UserError where a run that is not done left checkpoints, which a new one would mix with its own."""
    if any(_complete(path) for path in _folders(folder)):
        raise UserError(
            f"{folder} holds checkpoints of a run that is not done; go on with --resume auto, or start anew with "
            "--output.overwrite true or after removing it"
        )


class Writer:
    """One rank's part of a checkpoint. facts: plain values; those of the main rank are kept."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.facts: dict[str, Any] = {}
        self._folder, self._rank = folder, rank
        self._files: dict[str, int] = {}
        self._waiting: dict[str, torch.Tensor] = {}
        self._bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor that no other rank adds. Held in memory until a file is full."""
        self._waiting[name] = tensor.detach().cpu().contiguous()
        self._bytes += tensor.numel() * tensor.element_size()
        if self._bytes >= _FILE_BYTES:
            self._write()

    def under(self, place: str) -> WriterUnder:
        return WriterUnder(self, place)

    def close(self) -> dict[str, int]:
        """Bytes of each file this rank wrote, which are on the disk."""
        if self._waiting:
            self._write()
        return self._files

    def _write(self) -> None:
        path = self._folder / f"rank{self._rank:05d}-{len(self._files):05d}.safetensors"
        try:
            save_file(self._waiting, path)
        except (OSError, SafetensorError) as error:
            free = shutil.disk_usage(self._folder).free
            raise UserError(f"writing {path} failed: {error}; {free:,} bytes are free") from None
        _flush(path)
        self._files[path.name] = path.stat().st_size
        self._waiting, self._bytes = {}, 0


@dataclass(frozen=True)
class WriterUnder:
    """A place of its own in a checkpoint that is being written."""

    whole: Writer
    place: str

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.whole.add(f"{self.place}|{name}", tensor)


class Saved:
    """A complete checkpoint, read tensor by tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["facts"]
        self._where: dict[str, Path] = {}
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as content:
                self._where |= dict.fromkeys(content.keys(), file)

    def names(self, prefix: str) -> list[str]:
        return [name for name in self._where if name.startswith(prefix)]

    def tensor(self, name: str) -> torch.Tensor:
        with safe_open(self._where[name], framework="pt") as content:
            return content.get_tensor(name)

    def under(self, place: str) -> SavedUnder:
        return SavedUnder(self, place)

    def run(self, name: str, low: int, high: int) -> torch.Tensor:
        """Flat elements [low, high) of a tensor, and no more of the file than holds them."""
        return StoredTensors([self._where[name]]).run(name, low, high)


@dataclass(frozen=True)
class SavedUnder:
    """What `WriterUnder` wrote at one place."""

    whole: Saved
    place: str

    def names(self, prefix: str) -> list[str]:
        found = self.whole.names(f"{self.place}|{prefix}")
        return [name.removeprefix(f"{self.place}|") for name in found]

    def tensor(self, name: str) -> torch.Tensor:
        return self.whole.tensor(f"{self.place}|{name}")


def weights_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """16 hex digits over up to 4096 evenly spaced elements of every whole tensor, looked at one after the other."""
    digest = hashlib.sha256()
    for name, parameter in tensors:
        flat = parameter.detach().flatten()
        chosen = flat[:: max(1, len(flat) // 4096)].float()
        digest.update(name.encode() + str(tuple(parameter.shape)).encode() + chosen.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _folders(folder: Path) -> list[Path]:
    return (
        sorted(p for p in folder.glob("*") if p.is_dir() and not p.name.startswith(_DRAFT)) if folder.is_dir() else []
    )


def _complete(path: Path) -> bool:
    """Whether the manifest can be read and every file has the size it lists."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
