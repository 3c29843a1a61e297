"""GPUs and NCCL in place of gloo on CPUs. One command: `bash launch/test.sh -m gpu tests/gpu`.

Without a GPU everything here is skipped. Ranks that have a GPU each are connected by NCCL; where there are fewer GPUs,
ranks share them over gloo (`one_card`), which DeepSpeed cannot do: what needs it with several ranks is skipped then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.contract.conftest import LAYOUTS
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
def process_groups() -> Iterator[Callable[..., Ranks]]:
    """process_groups(n): n processes on GPUs; with settings of the section `distributed`."""
    groups: dict[str, Ranks] = {}
    yield lambda size, **settings: groups.setdefault(f"{size} {settings}", Ranks(size, settings, cuda=True))
    for group in groups.values():
        group.stop()


@pytest.fixture(params=LAYOUTS)
def ranks(request: pytest.FixtureRequest, process_groups: Callable[..., Ranks]) -> Ranks:
    size, settings = LAYOUTS[request.param]
    return process_groups(size, **settings)


@pytest.fixture
def pair(process_groups: Callable[..., Ranks]) -> Ranks:
    return process_groups(2)
