"""Which masks and units every backend chooses on the same micro-batches: the Markdown table of docs/one-mask.md.

    python -m tests.contract.one_mask_table > docs/one-mask.md

Launches tests/contract/sharded_job.py once per layout and number of processes. A cell is "same" when the fingerprint is
that of one plain process, else the fingerprint found. With --keep FOLDER what a job found is kept there, and a run that
was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.contract.test_sharded import AT_FOUR, LAYOUTS, launched

COLUMNS = [(name, processes) for name, (_, processes, _) in LAYOUTS.items()]
COLUMNS = sorted([*COLUMNS, *((name, 4) for name in AT_FOUR)], key=lambda column: list(LAYOUTS).index(column[0]))
TITLES = {"cpu": "DDP", "fsdp2": "FSDP2", "hsdp": "HSDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
TITLES |= {"offload-cpu": "offloaded to CPU", "offload-disk": "to disk"}
HEAD = """# One mask

The same micro-batches on every backend and number of processes: the fingerprint of the mask (or of the kept units) that
one plain process chose, and whether the others chose it too. Models of tests/contract/sharded_models.py (sizes that no
number of ranks divides), sparsity 0.5 or N:M, gloo on CPU.
`python -m tests.contract.one_mask_table > docs/one-mask.md`; `tests/contract/test_sharded.py` asserts the same.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    keep = parser.parse_args().keep
    with tempfile.TemporaryDirectory() as fresh:
        folder = keep or Path(fresh)
        folder.mkdir(exist_ok=True)
        wanted, found = choices(facts("alone", 1, folder)), {}
        for layout, processes in COLUMNS:
            found[layout, processes] = choices(facts(layout, processes, folder))
            same = sum(found[layout, processes][name] == value for name, value in wanted.items())
            print(f"{layout} on {processes}: {same} of {len(wanted)} the same", file=sys.stderr, flush=True)
    print(HEAD)
    print("| what | one process | " + " | ".join(f"{TITLES[name]} x {n}" for name, n in COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for name, value in wanted.items():
        cells = ["same" if other[name] == value else other[name] for other in found.values()]
        print(f"| {name} | `{value}` | " + " | ".join(cells) + " |")


def facts(layout: str, processes: int, folder: Path) -> dict[str, Any]:
    kept = folder / f"{layout}-{processes}.json"
    if not kept.exists():
        kept.write_text(json.dumps(launched(layout, folder, processes, 1, "masks", "units")), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def choices(told: dict[str, Any]) -> dict[str, str]:
    masks = {name: case["mask"] for name, case in told["masks"].items()}
    return masks | {described(json.loads(name)): value.split()[0] for name, value in told["units"].items()}


def described(case: dict[str, Any]) -> str:
    measured = " by backpropagation" if case.get("estimator") == "backprop" else ""
    return f"units: {case['pattern']} {case.get('criterion', 'auto')}{measured}"


if __name__ == "__main__":
    main()
