"""The contract between the method and the way a model is spread over processes: three parts, on the processes
themselves.

- processes.py: the processes themselves (dealt, owners_of, together, agree, everyone, on_main, sum_over_data);
- placement.py: where a model is, and how it is gathered (place, prepare, unwrap, in_fp32, whole, full_tensors, pieces);
- row_work.py: pieces of weights and work on rows (shard, gather, shard_of, write, sum_over_shards, map_matrices);
- optimizer_state.py: what training holds (backward, after_step, paused, held, whole_training, write_training).

Stages call these operations and never ask which backend they have. A backend is one class that says how it differs from
one process, where every rank holds every weight whole: replicated.py, fsdp2.py, zero.py, offload.py.
"""

from __future__ import annotations

from tinygn_dist.backends.optimizer_state import Training
from tinygn_dist.backends.processes import Item

__all__ = ["Backend", "Item"]


class Backend(Training):
    """All parts together."""
