"""DeepSpeed compiles parts of itself at first use, and waits without limit for the lock of a build that was killed."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import psutil
from torch.utils.cpp_extension import get_default_build_root

log = logging.getLogger(__name__)
_LONGEST_BUILD_SECONDS = 600


def clear_stale_builds() -> None:
    """Delete locks in torch's folder of compiled extensions that no process holds any more.

    torch keeps a lock's file open while it builds. A lock that no process of this machine has open is stale, unless
    the job has other machines that may share the folder: then it has to be older than any build lasts.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    locks = [path for pattern in ("*/lock", "*/*/lock") for path in root.glob(pattern)]
    if not locks:
        return
    opened, one_machine = _opened_files(), os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    for lock in locks:
        try:
            age = time.time() - lock.stat().st_mtime
            if str(lock.resolve()) not in opened and (one_machine or age > _LONGEST_BUILD_SECONDS):
                lock.unlink()
                log.warning("deleted %s, left by a build that was killed", lock)
        except OSError:  # another rank was faster, or it is somebody else's
            continue


def _opened_files() -> set[str]:
    opened: set[str] = set()
    for process in psutil.process_iter():
        try:
            opened.update(file.path for file in process.open_files())
        except psutil.Error:  # gone, or of another user, whose builds are in another folder
            continue
    return opened
