"""Memory that is free, and that was taken: within what the machine has, and the least of all limits."""

from __future__ import annotations

import resource

import psutil
import pytest
import torch

from tinygn_dist.runtime import memory


def test_free_memory_of_a_cpu_is_below_what_the_machine_has():
    free = memory.free_bytes(torch.device("cpu"))
    assert 0 < free < psutil.virtual_memory().total
    assert memory.free_bytes(torch.device("meta")) is None


@pytest.mark.parametrize("most,room", [("1000", 700), ("max", None), (None, None)])
def test_the_room_of_a_control_group(tmp_path, most: str | None, room: int | None):
    """Limit 1000, used 400, of which 100 are cache that the system takes back."""
    files = [tmp_path / name for name in ("max", "current", "stat")]
    for file, text in zip(files, (most, "400", "anon 5\ninactive_file 100\n"), strict=True):
        if text is not None:
            file.write_text(text)
    assert memory._group_room((*map(str, files), "inactive_file ")) == room


def test_the_peak_is_not_below_what_is_held():
    held = torch.ones(1 << 25)  # 128 MiB
    found = memory.peak_gib(torch.device("cpu"))
    assert found.keys() == {"peak_memory_gib"}
    assert found["peak_memory_gib"] >= 0.98 * psutil.Process().memory_info().rss / 2**30 > 0.12
    del held


def test_the_limit_of_address_space_counts():
    """Lowered to 1 GiB above what is mapped, no more than that is free."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**30, before[1]))
    try:
        assert memory.free_bytes(torch.device("cpu")) <= 2**30
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
