"""Block reconstruction on whatever backend runs tests/contract/sharded_job.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tests import plain
from tests.contract.sharded_models import llama, mixtral, problem
from tinygn_dist.backends import Backend
from tinygn_dist.config import PruneConfig, ReconstructConfig
from tinygn_dist.prune.sparsity.sparsify import sparsify
from tinygn_dist.train.reconstruct import Movable, blocks_of, reconstruct

CASES: dict[str, tuple[Callable[[], nn.Module], torch.dtype]] = {
    "llama": (llama, torch.float32),
    "experts": (mixtral, torch.float32),
    "llama bf16": (llama, torch.bfloat16),
}

TUNED = ReconstructConfig(epochs=2, rate=0.02, batch_size=3)


def reconstructed(backend: Backend) -> dict[str, dict[str, float]]:
    """Four micro-batches in steps of three and of one, the fifth held out; that zeros stay is asserted here."""
    return {name: _reconstructed(backend, build, dtype) for name, (build, dtype) in CASES.items()}


def _reconstructed(backend: Backend, build: Callable[[], nn.Module], dtype: torch.dtype) -> dict[str, float]:
    sparse, dense = (problem(backend, build().to(dtype)) for _ in range(2))
    options = PruneConfig(pattern="unstructured", sparsity=0.5, criterion="magnitude")
    masks = sparsify(sparse, sparse.anatomy.matrices, options)
    before = masks.fingerprint(sparse.model, backend)
    layers = range(sparse.anatomy.num_layers)
    blocks = blocks_of(layers, len(layers))
    told = reconstruct(sparse, dense, blocks, Movable(sparse.anatomy.matrices, masks.by_name), TUNED)
    assert masks.violations(sparse.model, backend) == 0 and masks.fingerprint(sparse.model, backend) == before
    backend.agree(told, "what reconstruction reached")
    state = plain.full_state(backend, sparse.model)
    facts = {"norm": float(sum(t.double().square().sum() for t in state.values()) ** 0.5)}
    facts["zeros"] = float(sum(int((state[t.parameter] == 0).sum()) for t in sparse.anatomy.matrices))
    for layer in told["layers"]:
        assert layer["after"] <= layer["before"]
        facts |= {f"{key} {layer['layer']}": float(layer[key]) for key in ("before", "after")}
    assert told["layers"][0]["after"] < told["layers"][0]["before"]
    return facts
