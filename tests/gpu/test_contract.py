"""The contract suite on GPUs: the tests of tests/contract, on the groups of conftest.py; and its launched jobs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.contract.test_backend import *  # noqa: F403  (collected here once more, with the fixtures beside this file)
from tests.contract.test_forward_only import *  # noqa: F403
from tests.contract.test_one_mask import *  # noqa: F403
from tests.contract.test_sharded import LAYOUTS, launched, write_inputs
from tests.gpu.conftest import enough

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
GPU_LAYOUTS = {"ddp": LAYOUTS["cpu"]} | {name: facts for name, facts in LAYOUTS.items() if name != "cpu"}

TRAINED = ("training", "training tied", "training bf16")
CHECKS = ("pieces", "loading", "restoring", "sums", "masks", "units", *TRAINED)
"""of the job: with all of it ten jobs beside each other took more than 150 s"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """run(layout): the facts of that layout's job on GPUs; `alone` is one process on one. run(layout, 1): of one
    process."""
    home = tmp_path_factory.mktemp("gpu")

    @functools.cache
    def facts(layout: str, processes: int | None = None) -> dict[str, Any]:
        folder: Path = home / f"{layout}-{processes}"
        write_inputs(folder)
        _, several, sharded = GPU_LAYOUTS.get(layout, ("", 1, 1))
        return launched(layout, folder, processes or several, processes or sharded, *CHECKS, device="cuda")

    return facts


@pytest.mark.parametrize("processes", [1, None], ids=["one process", "several"])
@pytest.mark.parametrize("layout", GPU_LAYOUTS)
def test_a_launched_job_is_that_of_one_gpu(run: Any, layout: str, processes: int | None):
    """Partition, zeros after every step and state that goes on are asserted inside the job, as on CPUs."""
    name, several, sharded = GPU_LAYOUTS[layout]
    if processes and (layout in ("ddp", "hsdp") or "offload" in layout):
        pytest.skip("one process of it is not another case")
    if not processes and layout.startswith("zero"):
        enough(several)
    wanted, found = run("alone"), run(layout, processes)
    assert found["device"] == "cuda" and (found["backend"], found["ranks"]) == (name, processes or several)
    differ = {case for case, facts in wanted["masks"].items() if found["masks"][case]["mask"] != facts["mask"]}
    assert not differ, "other masks than one GPU"
    assert found["units"] == wanted["units"]
    for kind in TRAINED:
        assert found[kind]["zeros"] == wanted[kind]["zeros"]
        assert found[kind] == pytest.approx(wanted[kind], rel=5e-3 if "bf16" in kind else 1e-4)


def test_one_gpu_chooses_as_the_processor_does_where_nothing_is_estimated(run: Any, tmp_path: Path):
    """Magnitudes are the same numbers on any device."""
    write_inputs(tmp_path)
    processor = launched("alone", tmp_path, None, 1, "masks")["masks"]
    for name, case in run("alone")["masks"].items():
        if "magnitude" in name or "random" in name:
            assert case["mask"] == processor[name]["mask"], name
