"""The stages of a run: what each took, and the memory it freed handed back to the system before the next."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

log = logging.getLogger(__name__)


@dataclass
class Stages:
    """seconds: of the clock, by stage; stages of one name add up. cpu_seconds: of this process."""

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        log.info("stage: %s", name)
        start, used = time.monotonic(), time.process_time()
        yield
        give_back()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - start, 2)
        self.cpu_seconds[name] = self.cpu_seconds.get(name, 0.0) + time.process_time() - used


def give_back() -> None:
    """glibc keeps freed blocks of up to 32 MiB for later, and what a stage leaves that way stands below everything that
    the next one takes: 0.4 GiB after a checkpoint of 0.5 GiB was read from GGUF. Does nothing where the C library
    cannot be asked. Python's own garbage is left to Python: to look for it takes a quarter of a second, and found
    nothing there."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # musl has none
        trim(0)
