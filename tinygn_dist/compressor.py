"""Compression inside a user's own Accelerate script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from tinygn_dist import calibration, export
from tinygn_dist.anatomy import read_anatomy
from tinygn_dist.backends import make_backend
from tinygn_dist.config import Config
from tinygn_dist.errors import Refused, UserError
from tinygn_dist.estimate.setting import Setting
from tinygn_dist.load import task_of
from tinygn_dist.masking import Masks
from tinygn_dist.objective import add_reference, objective_of
from tinygn_dist.progress import Progress
from tinygn_dist.selection import check_nm
from tinygn_dist.shrink import fill_smaller, smaller_config
from tinygn_dist.units import plan_mixes, remove_units
from tinygn_dist.weights import sparsify


class Compressor:
    """Compress a model once, then keep its zeros through the caller's own training loop.

        compressor = Compressor(load_config(overrides={...}), accelerator)
        model = compressor.compress(model, tokenizer)              # before the optimizer is made
        optimizer = torch.optim.AdamW(model.parameters())
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        compressor.attach(model, optimizer)                        # masks hold after every step from here on
        ...                                                        # train as before
        compressor.save_pretrained(model, "out", tokenizer)

    For one process and DDP; under FSDP2 and DeepSpeed use `tinygn compress`, which shards the model itself. Of the config
    the sections data and prune are read, and output.overwrite.
    """

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        """Raises Refused when the Accelerator shards its models."""
        self.config = config
        self.backend = make_backend(config.distributed, accelerator)
        if self.backend.shards_weights:
            raise Refused(
                f"Compressor got an Accelerator that shards its models ({accelerator.distributed_type.value}), accepted: one "
                "process or DDP; use `tinygn compress` or launch/compress.py"
            )
        self.masks: Masks | None = None

    def compress(self, model: nn.Module, processor: Any) -> nn.Module:
        """The compressed model: the same one with masked weights, or a smaller one where units were removed.

        model: a whole transformers model, not yet prepared. processor: its tokenizer or image processor. Every rank
        calls this with the same model. Raises UserError as `tinygn compress` does.
        """
        prune, task = self.config.prune, task_of(self.config.model, model.config)
        self.backend.agree(self.config.fingerprint(), "the config")
        anatomy = read_anatomy(model, needs_units=bool(prune.unit_kinds))
        mixes = plan_mixes(anatomy, prune) if prune.unit_kinds else []
        targets = () if prune.unit_kinds else anatomy.choose_targets(prune.targets, prune.ignore)
        if prune.nm:
            check_nm(targets, prune.nm.m)
        if self.config.data.name == "self":
            raise UserError("data self is for `tinygn compress`; name a dataset")
        with self.backend.together("reading the data"):
            splits = self.backend.main_first(lambda: calibration.load_splits(self.config.data, task, processor, 0))
        self.backend.agree(splits.fingerprint(), "the data")
        training = model.training
        model = self.backend.prepare(model.eval())
        batches = add_reference(model, splits.calibration) if task == "feature-extraction" else splits.calibration
        progress = Progress(shown=self.backend.is_main)
        setting = Setting(model, anatomy, objective_of(task), batches, self.backend, progress)
        if mixes:
            kept, _, _ = remove_units(setting, mixes, prune)
            self.backend.agree(kept.fingerprint(), "the kept units")
            small = type(model)._from_config(smaller_config(model.config, anatomy, kept), dtype=model.dtype)
            model = self.backend.prepare(fill_smaller(small, model, anatomy, kept, self.backend))
        else:
            self.masks = sparsify(setting, targets, prune)
            self.backend.agree(self.masks.fingerprint(model, self.backend), "the mask")
        return model.train(training)

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Enforce the masks after every step of a prepared optimizer. Nothing to do where units were removed."""
        if self.masks is not None:
            self.masks.enforce(model, optimizer, self.backend)

    def save_pretrained(self, model: nn.Module, folder: str | Path, processor: Any) -> None:
        """Write the checkpoint whole or not at all; every rank calls this.

        Raises UserError when the folder is not empty (without output.overwrite) or the masks no longer hold.
        """
        if self.masks is not None and (wrong := self.masks.violations(model, self.backend)):
            raise UserError(f"{wrong} masked weights are not zero; call attach() after prepare() and before training")
        state, output = self.backend.full_state(model), self.config.output.model_copy(update={"dir": str(folder)})
        with self.backend.together("checking the output folder"):
            size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
            destination = export.claim(output, self.config.model.name, size)
        with export.draft(destination, self.backend) as draft, self.backend.together("writing the checkpoint"):
            if self.backend.is_main:
                bare = self.backend.unwrap(model)
                export.write_checkpoint(draft, bare, state, processor, output.max_shard_gib)
