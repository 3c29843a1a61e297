"""Compression inside a user's own training: an Accelerate script, or (trainer.py) a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PretrainedConfig

from tinygn_dist.backends import make_backend
from tinygn_dist.backends.base import Backend
from tinygn_dist.checkpoints import export, output_folder
from tinygn_dist.checkpoints.companions import Companions, companions_of
from tinygn_dist.checkpoints.formats.form import Form
from tinygn_dist.checkpoints.load import task_of
from tinygn_dist.checkpoints.run_checkpoint import CONSTRAINT, Checkpoints
from tinygn_dist.checkpoints.unstored import keep_apart, kept_apart
from tinygn_dist.config import Config, PruneConfig, StepConfig
from tinygn_dist.data.splits import Reader, load_splits
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths.schedules import Plan
from tinygn_dist.models.anatomy import Anatomy, read_anatomy
from tinygn_dist.models.objective import Batch, add_reference, needs_reference, objective_of
from tinygn_dist.prune.sparsity.gradual_masks import GradualMasks, Update, plan_of
from tinygn_dist.prune.sparsity.step import SetToZero
from tinygn_dist.prune.structured.step import RemoveUnits
from tinygn_dist.runtime.progress import Progress
from tinygn_dist.step import Constraint, Request

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
        self._pruning: StepConfig | None = None
        """the step whose masks `attach` chooses; none where only units go"""
        self._anatomy: Anatomy | None = None
        """of the model to train; None before `compress`"""
        self._progress = Progress(shown=self.backend.is_main)
        self._saved_in: Path | None = None
        self._hooks: list[Any] = []
        self.backend.on_state(self.save_state, self.load_state)

    def compress(self, model: nn.Module, processor: Any) -> nn.Module:
        """The model to train: where units are removed a smaller one, else the same one, whose masks `attach` chooses.
        The smaller one is whole on every rank: accelerator.prepare has to see it before it shards.

        model: a whole transformers model, not yet prepared. processor: its tokenizer or image processor. Every rank
        calls this with the same model. Raises UserError as `tinygn compress` does.
        """
        bare = self.backend.unwrap(model)
        self.backend.refuse_spread(model)
        self._task = task_of(self.config.model, bare.config)
        self.backend.agree(self.config.fingerprint(), "the config")
        units, self._pruning = _without_training(self.config)
        if units and bare is not model:
            raise UserError(
                f"pattern {units[0].options.pattern} with a model in {type(model).__name__}; compress the plain model "
                "first, and wrap the smaller one"
            )
        request = self._request(bare, needs_units=bool(units))
        for step in [*units, *([self._mask_step(0)] if self._pruning else [])]:
            step.check(request)
        self._anatomy, self._saved_in = request.anatomy, None
        self._batches = self._calibration(bare, processor)
        layers: Sequence[int] = range(request.anatomy.num_layers)
        for step in units:
            model, layers = self._smaller(step, model, layers)
        return model

    def _request(self, bare: nn.Module, needs_units: bool) -> Request:
        skeleton = export.skeleton_of(bare)  # the model itself may be in pieces already (Trainer under ZeRO-3)
        export.refuse_misfits(bare, skeleton, self.backend)
        apart = kept_apart(skeleton)

        def build(config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
            return keep_apart(type(bare)._from_config(config, dtype=dtype), apart)

        anatomy = read_anatomy(skeleton, needs_units=needs_units)
        return Request(skeleton, anatomy, self._task, bare.dtype, build, self.backend)

    def _calibration(self, bare: nn.Module, processor: Any) -> list[Batch]:
        if self.config.data.name == "self":
            raise UserError("data self is for `tinygn compress`; name a dataset")
        with self.backend.together("reading the data"):
            splits = self.backend.main_first(
                lambda: load_splits(self.config.data, Reader(self._task, processor, bare.config))
            )
        self.backend.agree(splits.fingerprint(), "the data")
        return splits.calibration

    def _smaller(self, step: RemoveUnits, model: nn.Module, layers: Sequence[int]) -> tuple[nn.Module, Sequence[int]]:
        """The model without the units of one step, and which layers of the first model it has."""
        training = model.training
        model = self.backend.prepare(model.eval())
        outcome = step.run(_Live(self._problem(model, self._batches), self.backend, layers))
        if outcome.origin is None:
            return model.train(training), layers
        smaller = outcome.origin.take_whole()
        self._anatomy = self._request(smaller, needs_units=True).anatomy
        return smaller.train(training), tuple(layers[layer] for layer in outcome.layers)

    def _mask_step(self, num_steps: int) -> SetToZero:
        prune, schedule = self._pruning.prune, self._pruning.schedule
        plan = plan_of(schedule, prune, num_steps) if num_steps or not schedule.changes else Plan(0)
        return SetToZero(prune, schedule, plan)

    def attach(
        self,
        model: nn.Module,
        *optimizers: Any,
        num_steps: int | None = None,
        after_update: Callable[[Update], None] | None = None,
    ) -> None:
        """Choose the masks of a prepared model and hold them after every step of its prepared optimizers.

        num_steps: optimizer steps of the whole training, which a schedule divides; only steps of the first optimizer
        that really move weights count. after_update: called when masks changed. Nothing to do where only units were
        removed. Called again, for a loop that begins anew in one process, it begins anew too: hooks on the optimizers
        of the call before are taken off first.
        """
        self._need_compressed()
        if not self._pruning:
            return
        if not optimizers:
            raise UserError(
                "attach() got no optimizer; call attach(model, optimizer) with what accelerator.prepare returned"
            )
        schedule = self._pruning.schedule
        if schedule.changes and not num_steps:
            raise UserError(
                f"schedule.kind {schedule.kind} needs attach(..., num_steps=optimizer steps of the training)"
            )
        self.detach()
        self._model, self._optimizer = model, optimizers[0]
        self.backend.adopt(model, optimizers[0])
        saved = self._saved(self._saved_in) if self._saved_in else None
        step = self._mask_step(num_steps or 0)
        with self.backend.paused(model) as bare:
            live = _Live(self._problem(bare, self._batches), self.backend)
            if saved:
                self.masks = step.restore(live, saved.under(CONSTRAINT), saved.facts)
                self.backend.agree(self.masks.fingerprint(bare, self.backend), "the mask")
            else:
                self.masks = step.run(live).constraint
        self._hooks = self.masks.attach(model, *optimizers, after_update=after_update)
        if saved:
            self.masks.resume_training(saved.under(CONSTRAINT), model, optimizers[0])

    def detach(self) -> None:
        """Take the hooks off the optimizers that `attach` was given. The masks stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

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
        if self._pruning and self.masks is None:
            raise UserError("no masks were chosen; call attach() after prepare() and before training")
        if self.masks is not None and (wrong := self.masks.violations(model, self.backend)):
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
            export.write_checkpoint(draft, model, Form(), beside, output.max_shard_gib, self.backend)

    def _need_compressed(self) -> None:
        if self._anatomy is None:
            raise UserError(
                "nothing is compressed yet; call model = compressor.compress(model, tokenizer) before prepare()"
            )

    # -- checkpoints that somebody else writes -------------------------------------------------------------------------
    def save_state(self, folder: Path) -> None:
        """Masks and schedule, into a checkpoint folder; accelerator.save_state calls this on every rank."""
        if self.masks is not None:
            with self._store(folder).writing("masks") as writer:
                writer.facts |= self.masks.write(writer.under(CONSTRAINT), self._model, self._optimizer)

    def load_state(self, folder: Path) -> None:
        """What `save_state` wrote, before or after `attach`; accelerator.load_state calls this on every rank."""
        self._saved_in = folder
        if self.masks is not None:
            saved = self._saved(folder)
            self.masks.load_state(saved.facts)
            self.masks.read(saved.under(CONSTRAINT), self._model)
            self.masks.resume_training(saved.under(CONSTRAINT), self._model, self._optimizer)

    def _saved(self, folder: Path) -> Any:
        saved = self._store(folder).newest()
        if saved is None:
            raise UserError(
                f"checkpoint {folder} holds no masks of ours; it was not written while a Compressor was attached"
            )
        return saved

    def _store(self, folder: Path) -> Checkpoints:
        asked = self._pruning.model_dump(mode="json", include={"prune", "schedule"})
        return Checkpoints(folder / _STATE, asked, self.backend, keep=1)

    def _problem(self, model: nn.Module, batches: list[Batch]) -> Problem:
        if needs_reference(self._task, batches):
            batches = add_reference(model, batches, self.backend.device)
        objective = objective_of(self._task)
        return Problem(model, self._anatomy, objective, batches, self.backend, self._progress)


@dataclass(frozen=True)
class _Live:
    """A model in the caller's own loop, as a step may know it (`step.Live`)."""

    on_calibration: Problem
    backend: Backend
    layers: Sequence[int] = ()
    constraints: Sequence[Constraint] = ()

    def problem(self) -> Problem:
        return self.on_calibration

    def dense(self) -> Problem:
        raise AssertionError("no step that asks for the dense model is let into a user's own loop")


def _without_training(config: Config) -> tuple[list[RemoveUnits], StepConfig | None]:
    """The steps that remove units, and the one that sets weights to zero. UserError for what needs a run of its own:
    the caller trains."""
    entries = [entry for entry in config.recipe if entry.prune]
    for entry in config.recipe:
        if entry.reconstruct or entry.quantize or (entry.recover and config.steps):
            raise UserError(
                f"a step {entry.name} is for `tinygn compress`, which has the dense model and the training data; "
                "leave it out here, and train as you do"
            )
    for entry in entries:
        _refuse_what_takes_a_run(entry.prune)
        if entry.prune.unit_kinds and entry.schedule.changes:
            raise UserError(
                f"schedule.kind {entry.schedule.kind} with pattern {entry.prune.pattern}: units can only go before "
                "your optimizer is made; use kind one-shot here, or `tinygn compress`, which trains between the rounds"
            )
    masked = [entry for entry in entries if not entry.prune.unit_kinds]
    if len(masked) > 1:
        raise UserError(
            f"got {len(masked)} steps that set weights to zero, accepted: one; `tinygn compress` takes several"
        )
    return [RemoveUnits(entry.prune) for entry in entries if entry.prune.unit_kinds], (masked or [None])[0]


def _refuse_what_takes_a_run(prune: PruneConfig) -> None:
    if prune.pattern in ("hidden", "filters"):
        raise UserError(
            f"pattern {prune.pattern} is for `tinygn compress`; use layers, heads, channels or experts here"
        )
    if prune.asks_latency:
        raise UserError(f"prune.goal {prune.goal} is for `tinygn compress`; use params=, bytes= or flops= here")
