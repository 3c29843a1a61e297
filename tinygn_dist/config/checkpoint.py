"""How a run survives being stopped."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tinygn_dist.config.section import Section


class CheckpointConfig(Section):
    every: int = Field(0, ge=0)
    """optimizer steps from one checkpoint to the next, the first right after the compression; 0 writes one only when
    the run is asked to stop (SIGTERM)"""
    statistics_every: int = Field(0, ge=0)
    """micro-batches from one saving of the statistics that weights are scored by to the next; 0 for none. Not where
    layers are solved in groups (prune.solver.gram_gib)"""
    dir: str | None = None
    """folder, seen by every rank; by default the output folder's name with .checkpoints behind it"""
    resume: Literal["never", "auto"] = "never"
    """auto goes on from the newest complete checkpoint, where there is one"""
