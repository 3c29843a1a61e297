"""What the stages of a run leave behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tinygn_dist.runtime.stage_timer import Stages, give_back


def resident_mib() -> float:
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_a_stage_freed_is_not_the_next_ones():
    torch.ones(7 << 20)  # a freed block of 28 MiB: from now on glibc keeps all that are smaller
    give_back()
    before, stage = resident_mib(), Stages()
    with stage("a"):
        held = [torch.ones(1 << 18) for _ in range(300)]  # of 1 MiB
        assert resident_mib() > before + 250
        last = held.pop()  # above all the others in the heap, which therefore cannot shrink by itself
        held.clear()
    assert resident_mib() < before + 50
    assert last.numel() and stage.seconds.keys() == stage.cpu_seconds.keys() == {"a"}
