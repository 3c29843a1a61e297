"""What memory this process could still take, and the most that it has taken."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

_CGROUPS = (  # limit, usage and page cache that the system takes back, of cgroup v2 and v1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file "),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file ",
    ),
)


def free_bytes(device: torch.device) -> int | None:
    """What this process could still take on a device; None where nobody says. On a CPU the least of the machine's
    available memory, the control group's and the process's own limit of address space."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    rooms = [psutil.virtual_memory().available, *map(_group_room, _CGROUPS)]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        rooms.append(max(limit - psutil.Process().memory_info().vms, 0))
    return min(room for room in rooms if room is not None)


def peak_gib(device: torch.device) -> dict[str, float]:
    """The most that this process held so far, by the names in the report."""
    unit = 1 if sys.platform == "darwin" else 2**10  # of ru_maxrss, in bytes
    found = {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if device.type == "cuda":
        found["peak_device_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return found


def _group_room(files: Sequence[str]) -> int | None:
    """Of a control group, which psutil does not know of; None where it has no limit."""
    limit, usage, stat, cache = files
    try:
        most, used = Path(limit).read_text().strip(), int(Path(usage).read_text())
        counted = Path(stat).read_text().partition(cache)[2].split()
    except (OSError, ValueError):
        return None
    return max(int(most) - used + int(counted[0] if counted else 0), 0) if most.isdigit() else None
