"""Which code a rank runs: nodes of a cluster are installed one by one, and one that was left behind gives other masks."""

from __future__ import annotations

import functools
import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed")


@functools.cache
def code_in_use() -> dict[str, str]:
    """Of this package a digest of its sources, which a version number does not tell apart while it is worked on; of the
    libraries that compute, their versions."""
    digest, home = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(home.rglob("*.py")):
        digest.update(f"{path.relative_to(home)}\0".encode() + path.read_bytes() + b"\0")
    return {"the sources of tinygn_dist": digest.hexdigest()[:16]} | {
        f"the version of {name}": _version(name) for name in _LIBRARIES
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
