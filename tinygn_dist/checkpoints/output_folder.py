"""The output folder: checked before any work, written by one job at a time, complete or not there.

Everything goes into a sibling folder that is renamed into place at the very end. A crash leaves either the old folder
or none.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tinygn_dist.backends.base import Backend
from tinygn_dist.config import OutputConfig
from tinygn_dist.errors import UserError

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
    """Inside, no other job writes this output: UserError on every rank when one does. Clears away what crashed runs
    left beside it. The system drops the lock of a killed process."""
    lock = destination.with_name(f"{_LEFTOVER}{destination.name}.lock")
    with contextlib.ExitStack() as locks:
        with backend.together("claiming the output folder"):
            if backend.is_main:
                locks.enter_context(_locked(lock, destination))
                for leftover in _leftovers(destination, r"[a-z0-9_]{8}|old-\d+"):
                    shutil.rmtree(leftover, ignore_errors=True)
        yield


@contextlib.contextmanager
def _locked(lock: Path, destination: Path) -> Iterator[None]:
    with contextlib.ExitStack() as opened:
        deleted = True
        while deleted:  # locked in vain when the run before has just deleted it
            file = opened.enter_context(open(lock, "w", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another run is writing output {destination}; wait for it or name another folder"
                ) from None
            except OSError as error:  # a file system without locks
                log.warning("output %s cannot be locked (%s): start no second run into it", destination, error.strerror)
            deleted = os.fstat(file.fileno()).st_nlink == 0
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
    otherwise. An older destination is removed only after the new one is complete."""
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
    _set_modes(made)
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


def _set_modes(made: Path) -> None:
    """As new files and folders have them here: mkdtemp makes private ones, and safetensors too. What the parent hands
    down (a set-group bit) stays."""
    masked = os.umask(0)
    os.umask(masked)
    for path in (made, *made.rglob("*")):
        handed_down = stat.S_IMODE(path.stat().st_mode) & ~0o777
        path.chmod(handed_down | (0o777 if path.is_dir() else 0o666) & ~masked)
