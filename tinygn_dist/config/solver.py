"""How weights are chosen and updated at once: the layer solver of criterion obs."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from tinygn_dist.config.section import Section, one_of
from tinygn_dist.registry import experimental

DEFAULT_SHARE = 0.75


class SolverConfig(Section):
    method: str = "obs"
    """obs: the sweep of SparseGPT; or a solver of experiments/ by its name (admm)"""
    allocation: float | str = DEFAULT_SHARE
    """how far layers' budgets go from the same share everywhere (0) to one global threshold on the saliency in units of
    loss (1); auto: 0, 0.5, 0.75 and 1 are solved, and the best on held-out calibration sequences is taken; or an
    allocation of experiments/ by its name (search; owl, which serves any criterion)"""
    passes: int | None = Field(None, ge=1)
    """in how many passes the zeros are reached, each measured on the model that the last one left; by default as many
    as it takes that none removes more than half of what is there (one up to 50 %, two up to 75 %)"""
    gram_gib: float = Field(16, ge=0)
    """room on each rank for the Gram matrices of the inputs (8 bytes times the square of a weight's inputs). Where
    those of all layers do not fit, groups of layers that do are solved one after another, each measured on the
    outputs of the compressed layers before it (1.8 times the CPU time on SmolLM2-135M, for half the memory); 0: one
    layer at a time. Of pattern layers and units: room for what layers are judged by, together or one at a time"""
    refine: int = Field(8, ge=0)
    """conjugate gradient iterations on the kept weights of each layer after the sweep"""

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        return value if value == "obs" else one_of(("obs", *experimental("SOLVERS", object)), value)

    @field_validator("allocation", mode="before")
    @classmethod
    def _known_allocation(cls, value: Any) -> Any:
        try:
            if 0 <= float(value) <= 1:
                return float(value)
        except (TypeError, ValueError):
            names = ("auto", *experimental("ALLOCATIONS", object))
            if value in names:
                return value
            raise ValueError(_accepted(value, names)) from None
        raise ValueError(_accepted(value, ("auto", *experimental("ALLOCATIONS", object))))


def _accepted(value: Any, names: tuple[str, ...]) -> str:
    return (
        f"got {value!r}, accepted: 0 (equal shares) to 1 (one global threshold), {', '.join(names)}; "
        f"try {DEFAULT_SHARE}"
    )
