"""The process groups every contract test runs on; a new backend is one more entry in LAYOUTS."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.ranks import Ranks

LAYOUTS = {"replicated-1": 1, "replicated-2": 2, "replicated-4": 4}


@pytest.fixture(params=LAYOUTS)
def ranks(request: pytest.FixtureRequest, process_groups: Callable[[int], Ranks]) -> Ranks:
    """Connected processes of one layout."""
    return process_groups(LAYOUTS[request.param])


@pytest.fixture
def pair(process_groups: Callable[[int], Ranks]) -> Ranks:
    """Two connected processes."""
    return process_groups(2)
