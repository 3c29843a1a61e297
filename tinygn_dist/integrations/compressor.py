"""Compression inside a user's own training: an Accelerate script, or (trainer.py) a Trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from tinygn_dist.backends import make_backend
from tinygn_dist.checkpoints import export, output_folder
from tinygn_dist.checkpoints.companions import Companions, companions_of
from tinygn_dist.checkpoints.load import task_of
from tinygn_dist.checkpoints.run_checkpoint import Checkpoints
from tinygn_dist.checkpoints.unstored import keep_apart, kept_apart
from tinygn_dist.config import Config, PruneConfig
from tinygn_dist.data import splits as calibration
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.problem import Problem, costs_of
from tinygn_dist.models.anatomy import Anatomy, Matrix, read_anatomy
from tinygn_dist.models.objective import Batch, add_reference, needs_reference, objective_of
from tinygn_dist.prune.sparsity import sparsify
from tinygn_dist.prune.structured.methods import method_of
from tinygn_dist.prune.structured.removal import UnitGoal, UnitPlan
from tinygn_dist.prune.structured.shrink import smaller_config, smaller_origin
from tinygn_dist.prune.structured.size_goal import sparsity_of
from tinygn_dist.runtime.progress import Progress
from tinygn_dist.train.gradual_masks import GradualMasks, Update, plan_of
from tinygn_dist.train.state_io import read_masks, read_step_statistics, write_masks, write_step_statistics

_STATE = "tinygn"
"""folder of ours inside a checkpoint that somebody else writes"""


class Compressor:
    """Compress a model, then keep its zeros (and let them grow, by config.schedule) through the caller's own training.

        compressor = Compressor(load_config(overrides={...}), accelerator)
        model = compressor.compress(model, tokenizer)              # units go here, before the optimizer is made
        optimizer = torch.optim.AdamW(model.parameters())
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        compressor.attach(model, optimizer, num_steps=1000)        # masks are chosen here, and hold after every step
        ...                                                        # train as before
        compressor.save_pretrained(model, "out", tokenizer)

    On one process, DDP, FSDP2 and DeepSpeed ZeRO-1/2/3. accelerator.save_state and load_state carry masks and schedule.
    Make it right after the Accelerator. Of the config the sections data, prune and schedule are read, and
    output.overwrite.
    """

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        """Raises Refused when the Accelerator spreads models in a way that no backend knows."""
        self.config = config
        self.backend = make_backend(config.distributed, accelerator)
        self.masks: GradualMasks | None = None
        self._matrices: tuple[Matrix, ...] | None = None
        """what gets masks; None before `compress`, and none where units go"""
        self._progress = Progress(shown=self.backend.is_main)
        self._saved_in: Path | None = None
        self.backend.on_state(self.save_state, self.load_state)

    def compress(self, model: nn.Module, processor: Any) -> nn.Module:
        """The model to train: where units are removed a smaller one, else the same one, whose masks `attach` chooses.
        The smaller one is whole on every rank: accelerator.prepare has to see it before it shards.

        model: a whole transformers model, not yet prepared. processor: its tokenizer or image processor. Every rank
        calls this with the same model. Raises UserError as `tinygn compress` does.
        """
        prune, bare = self.config.prune, self.backend.unwrap(model)
        self.backend.refuse_spread(model)
        self._task = task_of(self.config.model, bare.config)
        self.backend.agree(self.config.fingerprint(), "the config")
        skeleton = export.skeleton_of(bare)  # the model itself may be in pieces already (Trainer under ZeRO-3)
        export.refuse_misfits(bare, skeleton, self.backend)
        apart = kept_apart(skeleton)
        self._anatomy: Anatomy = read_anatomy(skeleton, needs_units=bool(prune.unit_kinds))
        if prune.unit_kinds and self.config.schedule.changes:
            raise UserError(
                f"schedule.kind {self.config.schedule.kind} with pattern {prune.pattern}: units can only go before your "
                "optimizer is made; use kind one-shot here, or `tinygn compress`, which trains between the rounds"
            )
        if prune.unit_kinds and bare is not model:
            raise UserError(
                f"pattern {prune.pattern} with a model in {type(model).__name__}; compress the plain model first, and wrap the "
                "smaller one"
            )
        _refuse_what_takes_a_run(prune)
        units = UnitPlan()
        if prune.unit_kinds:
            method = method_of(self._anatomy, prune)
            sparsity = sparsity_of(prune, self._anatomy, skeleton, method.dense_params(self._anatomy))
            units = method.plan(self._anatomy, prune, UnitGoal(sparsity, prune.protect))
        self._matrices = ()
        if not units.mixes:
            self._matrices = self._anatomy.choose_matrices(prune.matrices, prune.ignore)
            sparsify.check(self._anatomy, self._matrices, prune)
        if self.config.data.name == "self":
            raise UserError("data self is for `tinygn compress`; name a dataset")
        with self.backend.together("reading the data"):
            splits = self.backend.main_first(
                lambda: calibration.load_splits(
                    self.config.data, calibration.Reader(self._task, processor, bare.config)
                )
            )
        self.backend.agree(splits.fingerprint(), "the data")
        self._batches = splits.calibration
        if not units.mixes:
            return model
        training = model.training
        model = self.backend.prepare(model.eval())
        problem = self._problem(model, self._batches)
        found = method.remove(problem, units, prune)
        kept = found.kept
        self.backend.agree(kept.fingerprint(), "the kept units")
        config = smaller_config(skeleton.config, self._anatomy, kept)

        def build() -> nn.Module:
            return keep_apart(type(model)._from_config(config, dtype=model.dtype), apart)

        smaller = smaller_origin(build, model, self._anatomy, kept, self.backend, found.shifts)
        return smaller.take_whole().train(training)

    def attach(
        self,
        model: nn.Module,
        *optimizers: Any,
        num_steps: int | None = None,
        after_update: Callable[[Update], None] | None = None,
    ) -> None:
        """Choose the masks of a prepared model and hold them after every step of its prepared optimizers.

        num_steps: optimizer steps of the whole training, which a schedule divides; only steps of the first optimizer
        that really move weights count. after_update: called when masks changed. Nothing to do where units were removed.
        """
        self._need_compressed()
        if not self._matrices:
            return
        if not optimizers:
            raise UserError(
                "attach() got no optimizer; call attach(model, optimizer) with what accelerator.prepare returned"
            )
        schedule = self.config.schedule
        if schedule.changes and not num_steps:
            raise UserError(
                f"schedule.kind {schedule.kind} needs attach(..., num_steps=optimizer steps of the training)"
            )
        plan = plan_of(schedule, self.config.prune, num_steps or 0)
        self._model, self._optimizer = model, optimizers[0]
        self.backend.adopt(model, optimizers[0])
        saved = self._saved(self._saved_in) if self._saved_in else None
        with self.backend.paused(model) as bare:
            problem = self._problem(bare, self._batches)
            going_on = saved.facts if saved else None
            self.masks = GradualMasks(problem, self._matrices, self.config.prune, schedule, plan, going_on)
            if saved:
                read_masks(saved, self.masks.masks, bare, self.backend)
            self.backend.agree(self.masks.masks.fingerprint(bare, self.backend), "the mask")
        self.masks.attach(model, *optimizers, after_update=after_update)
        if saved:
            read_step_statistics(saved, self.masks, model, optimizers[0])

    def mask_copy(self, copy: nn.Module) -> None:
        """Zero in a whole copy of the model, such as an average of its weights, what is zero in the model: an average
        also remembers what weights were before they went. Every rank calls this."""
        if self.masks is not None:
            self.masks.masks.apply_to_copy(copy, self._model, self.backend)

    def save_pretrained(self, model: nn.Module, folder: str | Path, processor: Any) -> None:
        """Write the checkpoint whole or not at all; every rank calls this.

        Raises UserError when the folder is not empty (without output.overwrite) or the masks no longer hold.
        """
        self._need_compressed()
        if self._matrices and self.masks is None:
            raise UserError("no masks were chosen; call attach() after prepare() and before training")
        if self.masks is not None and (wrong := self.masks.masks.violations(model, self.backend)):
            raise UserError(f"{wrong} masked weights are not zero; train with the optimizer that attach() was given")
        output = self.config.output.model_copy(update={"dir": str(folder)})
        held = sum(piece.numel() * piece.element_size() for piece in self.backend.pieces(model).values())
        size = int(self.backend.sum_over_shards(torch.tensor([held])))
        source = getattr(self.backend.unwrap(model).config, "_name_or_path", "")
        with self.backend.together("checking the output folder"):
            beside = replace(companions_of(source) if source else Companions(), processor=processor)
            destination = output_folder.claim(output, self.config.model.name, size)
        with (
            output_folder.only_writer(destination, self.backend),
            output_folder.draft(destination, self.backend) as draft,
            self.backend.together("writing the checkpoint"),
        ):
            export.write_checkpoint(draft, model, {}, beside, output.max_shard_gib, self.backend)

    def _need_compressed(self) -> None:
        if self._matrices is None:
            raise UserError(
                "nothing is compressed yet; call model = compressor.compress(model, tokenizer) before prepare()"
            )

    # -- checkpoints that somebody else writes -------------------------------------------------------------------------
    def save_state(self, folder: Path) -> None:
        """Masks and schedule, into a checkpoint folder; accelerator.save_state calls this on every rank."""
        if self.masks is not None:
            with self._store(folder).writing("masks") as writer:
                write_masks(writer, self.masks.masks, self._model, self.backend)
                write_step_statistics(writer, self.masks, self._model, self._optimizer, self.backend)
                writer.facts |= self.masks.state()

    def load_state(self, folder: Path) -> None:
        """What `save_state` wrote, before or after `attach`; accelerator.load_state calls this on every rank."""
        self._saved_in = folder
        if self.masks is not None:
            saved = self._saved(folder)
            self.masks.load_state(saved.facts)
            read_masks(saved, self.masks.masks, self._model, self.backend)
            read_step_statistics(saved, self.masks, self._model, self._optimizer)

    def _saved(self, folder: Path) -> Any:
        saved = self._store(folder).newest()
        if saved is None:
            raise UserError(
                f"checkpoint {folder} holds no masks of ours; it was not written while a Compressor was attached"
            )
        return saved

    def _store(self, folder: Path) -> Checkpoints:
        identity = self.config.model_dump(mode="json", include={"prune", "schedule"})
        return Checkpoints(folder / _STATE, identity, self.backend, keep=1)

    def _problem(self, model: nn.Module, batches: list[Batch]) -> Problem:
        if needs_reference(self._task, batches):
            batches = add_reference(model, batches, self.backend.device)
        costs, objective = costs_of(self.config.prune), objective_of(self._task)
        return Problem(model, self._anatomy, objective, batches, self.backend, self._progress, costs=costs)


def _refuse_what_takes_a_run(prune: PruneConfig) -> None:
    if prune.pattern in ("hidden", "filters"):
        raise UserError(
            f"pattern {prune.pattern} is for `tinygn compress`; use layers, heads, channels or experts here"
        )
    if prune.reconstruct:
        raise UserError(
            f"prune.reconstruct {prune.reconstruct} is for `tinygn compress`, which has the dense model beside the compressed "
            "one; leave it at 0 here"
        )
    if prune.asks_latency:
        raise UserError(f"prune.goal {prune.goal} is for `tinygn compress`; use params=, bytes= or flops= here")
