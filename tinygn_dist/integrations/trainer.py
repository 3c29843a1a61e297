"""Compression inside transformers.Trainer and what derives from it (such as TRL's SFTTrainer)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from tinygn_dist.config import Config
from tinygn_dist.errors import UserError
from tinygn_dist.integrations.compressor import Compressor
from tinygn_dist.prune.sparsity.gradual_masks import Update


class TinyGNCallback(TrainerCallback):
    """Masks chosen when training begins, held after every step, changed by config.schedule.

        trainer = Trainer(model, args, train_dataset=..., processing_class=tokenizer)
        trainer.add_callback(TinyGNCallback(config, trainer))
        trainer.train()

    Masks and schedule lie in the Trainer's checkpoints and go on with resume_from_checkpoint. The best model that
    load_best_model_at_end looks for is sought among those of the final sparsity only. Weights only: units have to go
    before a Trainer makes its optimizer (`tinygn compress`, or Compressor.compress).
    """

    def __init__(self, config: Config, trainer: Trainer, resume_from: str | Path | None = None) -> None:
        """resume_from: the checkpoint folder that train(resume_from_checkpoint=...) is given, where it lies outside of
        args.output_dir. Raises UserError for a unit pattern."""
        patterns = [step.prune.pattern for step in config.recipe if step.prune and step.prune.unit_kinds]
        if patterns:
            raise UserError(
                f"pattern {patterns[0]} removes units, which have to go before the Trainer makes its optimizer; use "
                "`tinygn compress` first, or Compressor.compress, and train the smaller model"
            )
        self._accelerator = trainer.accelerator
        self._config, self._resume_from = config, resume_from
        self.compressor: Compressor | None = None
        self._log = trainer.log
        self._update: Update | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **facts: Any) -> None:
        model, optimizer = facts["model"], facts["optimizer"]
        self.compressor = self.compressor or Compressor(self._config, self._accelerator)
        self.compressor.compress(model, facts["processing_class"])
        if state.global_step:
            self.compressor.load_state(self._checkpoint(args, state))
        wrapped = self.compressor.backend.wrapped(model)
        self.compressor.attach(wrapped, optimizer, num_steps=state.max_steps, after_update=self._after_update)

    def _after_update(self, update: Update) -> None:
        self._update = update

    def on_step_end(self, args: Any, state: Any, control: Any, **facts: Any) -> None:
        """A model with fewer zeros must not win over those that come."""
        update, self._update = self._update, None
        if update is not None:
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None
            self._log({"sparsity": update.sparsity, "mask_churn": update.removed + update.regrown})

    def on_save(self, args: Any, state: Any, control: Any, **facts: Any) -> None:
        self.compressor.save_state(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **facts: Any) -> None:
        """The best model, which is loaded by now, has the zeros of the last masks."""
        masks = self.compressor.masks.masks
        masks.apply_(self.compressor.backend.wrapped(facts["model"]), self.compressor.backend)

    def _checkpoint(self, args: Any, state: Any) -> Path:
        usual = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for folder in (self._resume_from, args.resume_from_checkpoint, usual):
            if isinstance(folder, str | Path) and (Path(folder) / "tinygn").is_dir():
                return Path(folder)
        raise UserError(
            f"training goes on from step {state.global_step} and {usual} holds no masks of ours; pass the "
            "checkpoint's folder as TinyGNCallback(..., resume_from=...)"
        )
