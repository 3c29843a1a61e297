"""Options of pruning with the keys of its sections beside the others, as tests like to write them."""

from __future__ import annotations

from typing import Any

from tinygn_dist.config import PruneConfig, SolverConfig


def pruning(**keys: Any) -> PruneConfig:
    """`PruneConfig` with checks; keys of `SolverConfig` go into its section."""
    solver = {key: keys.pop(key) for key in list(keys) if key in SolverConfig.model_fields}
    return PruneConfig(**keys, solver=SolverConfig(**solver))


def changed(options: PruneConfig, **keys: Any) -> PruneConfig:
    """The same with other values."""
    plain = options.model_dump()
    plain["solver"] |= {key: keys.pop(key) for key in list(keys) if key in SolverConfig.model_fields}
    return PruneConfig(**(plain | keys))
