"""The process groups every contract test runs on; a new backend is one more entry in LAYOUTS."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.ranks import Ranks

LAYOUTS = {
    # name: (processes, settings of the section `distributed`)
    "replicated-1": (1, {}),
    "replicated-2": (2, {}),
    "replicated-4": (4, {}),
    "offloaded": (1, {"offload": "disk", "device_gib": 5e-5}),
}


@pytest.fixture(params=LAYOUTS)
def ranks(request: pytest.FixtureRequest, process_groups: Callable[..., Ranks]) -> Ranks:
    """Connected processes of one layout."""
    size, settings = LAYOUTS[request.param]
    return process_groups(size, **settings)


@pytest.fixture
def pair(process_groups: Callable[..., Ranks]) -> Ranks:
    """Two connected processes."""
    return process_groups(2)
