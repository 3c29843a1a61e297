"""The dense model, its teacher and the data, in place before the first step."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch

from tinygn_dist.checkpoints import load
from tinygn_dist.checkpoints.run_checkpoint import weights_digest
from tinygn_dist.checkpoints.sharded_load import placed
from tinygn_dist.config import FLAT, Config
from tinygn_dist.data.self_generated import write_rows
from tinygn_dist.data.sources import SELF
from tinygn_dist.data.splits import Reader, load_splits
from tinygn_dist.models.objective import add_reference, needs_reference, num_counted
from tinygn_dist.run.report import Report, versions
from tinygn_dist.run.state import RunState
from tinygn_dist.train.distill import by_token
from tinygn_dist.train.loop import window_numbers
from tinygn_dist.train.teacher_cache import SEQUENCE, TeacherCache


def load_processor(state: RunState) -> None:
    """The tokenizer or image processor."""
    with state.backend.together("loading the tokenizer or processor"):
        state.beside = replace(state.beside, processor=load.load_processor(state.source))


def load_model(state: RunState) -> None:
    """The dense model on every rank as its backend spreads it, and once more as the teacher where training asks for
    it."""
    backend, source = state.backend, state.source
    state.model, state.dtypes = placed(source, backend)
    state.digest = weights_digest(backend.full_tensors(state.model))
    sizes = {name: p.numel() for name, p in state.request.skeleton.named_parameters()}
    stored = sum(size * state.dtypes[name].itemsize for name, size in sizes.items())
    state.size = {"num_params": sum(sizes.values()), "bytes": stored}
    learns = any(training.taught for training in state.config.trainings)
    if learns and source.task != "feature-extraction" and not caches_teacher(state):
        state.teacher, _ = placed(source, backend)


def read_data(state: RunState) -> None:
    """The splits, equal on every rank. Where the model writes its own rows, it has to be there."""
    config, backend, source, rows = state.config, state.backend, state.source, None
    if config.data.name == SELF:
        rows = write_rows(state.model, state.processor, config.data, backend, state.progress)
    train_len = config.trainings[0].seq_len if config.trainings else 0
    reader = Reader(source.task, state.processor, source.config)
    with backend.together("reading the data"):
        state.splits = backend.main_first(lambda: load_splits(config.data, reader, train_len, rows))
    held_out = [training.evaluate_samples for training in config.trainings if training.evaluate_every]
    if held_out:
        state.splits.hold_out(max(held_out))
    backend.agree(state.splits.fingerprint(), "the data")


def begin_report(state: RunState) -> None:
    """The report, and the dense model's outputs where a loss is the distance to them."""
    state.report = _report(state)
    if needs_reference(state.source.task, state.splits.calibration):
        for name in ("calibration", "evaluation", "training", "validation"):
            batches = getattr(state.splits, name)
            setattr(state.splits, name, add_reference(state.model, batches, state.backend.device))


def _report(state: RunState) -> Report:
    config, splits = state.config, state.splits
    return Report(
        model=config.model.name,
        task=state.source.task,
        output=str(state.destination),
        recipe=_recipe(config),
        fingerprint=config.fingerprint(),
        num_processes=state.backend.num_ranks,
        data={
            **splits.used,
            "calibration_tokens": splits.num_tokens(),
            "fingerprint": splits.fingerprint(),
        },
        seconds=state.stage.seconds,
        versions=versions(),
        notes=list(state.beside.notes),
    )


def _recipe(config: Config) -> dict[str, Any]:
    """As `load_config` reads it: the whole run's sections, and the list of steps."""
    steps = [step.model_dump(mode="json") for step in config.recipe]
    return config.model_dump(mode="json", exclude=set(FLAT)) | {"steps": steps}


def caches_teacher(state: RunState) -> bool:
    """Whether training reads the dense model's logits from disk."""
    cached = any(each.taught and each.teacher_cache_gib is not None for each in state.config.trainings)
    return cached and state.source.task != "feature-extraction"


def write_teacher(state: RunState) -> None:
    """The logits of the dense model, which is still the one that is placed, on every sequence that training will
    read."""
    (asked,) = (each for each in state.config.trainings if each.teacher_cache_gib is not None)
    backend, sequences = state.backend, state.splits.training
    wanted = sorted({n for step in window_numbers(len(sequences), asked, asked.steps) for n in step})
    identity = {"model": state.digest, "data": state.splits.fingerprint(), "sequences": wanted}
    folder = state.checkpoints.folder.with_name(f"{state.checkpoints.folder.name}.teacher")
    state.teacher = TeacherCache(folder, asked.teacher_top_k, asked.temperature, identity)
    state.teacher.check_size(sum(num_counted(sequences[n]) for n in wanted), asked.teacher_cache_gib)
    state.splits.training = [batch | {SEQUENCE: torch.tensor([n])} for n, batch in enumerate(sequences)]
    if not state.teacher.is_complete(backend):
        numbered = [(n, state.splits.training[n]) for n in wanted]
        positions = functools.partial(by_token, task=state.source.task)
        state.teacher.write(state.model, numbered, positions, backend, state.progress)


def let_teacher_go(state: RunState) -> None:
    """A teacher in memory takes as much room as the dense model."""
    if not isinstance(state.teacher, TeacherCache):
        state.teacher = None
