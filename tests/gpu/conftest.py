"""GPUs and NCCL in place of gloo on CPUs. One command: `bash launch/test.sh -m gpu tests/gpu`.

Without a GPU everything here is skipped; with one, what needs several is. A rank has a GPU of its own (NCCL wants that),
so the sizes follow from the machine: 1, 2 and 4 processes where there are as many GPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.ranks import Ranks

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0


def enough(wanted: int) -> int:
    if wanted > GPUS:
        pytest.skip(f"needs {wanted} GPUs, this machine has {GPUS}")
    return wanted


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    enough(1)


@pytest.fixture(scope="session")
def process_groups() -> Iterator[Callable[[int], Ranks]]:
    """process_groups(n): n processes on n GPUs, connected by NCCL."""

    @functools.cache
    def group(size: int) -> Ranks:
        made.append(Ranks(enough(size), cuda=True))
        return made[-1]

    made: list[Ranks] = []
    yield group
    for ranks in made:
        ranks.stop()


@pytest.fixture(params=[1, 2, 4])
def ranks(request: pytest.FixtureRequest, process_groups: Callable[[int], Ranks]) -> Ranks:
    return process_groups(request.param)


@pytest.fixture
def pair(process_groups: Callable[[int], Ranks]) -> Ranks:
    return process_groups(2)
