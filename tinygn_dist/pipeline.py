"""The method, one call per stage. The only file that knows the order; no algorithm lives here."""

from __future__ import annotations

import contextlib
import copy
import logging
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinygn_dist import calibration, export, load
from tinygn_dist.anatomy import Anatomy, Target, read_anatomy
from tinygn_dist.backends import Backend, make_backend
from tinygn_dist.budget import Mix
from tinygn_dist.config import Config
from tinygn_dist.errors import UserError
from tinygn_dist.evaluate import quality, speed
from tinygn_dist.objective import Objective, add_reference, objective_of
from tinygn_dist.progress import Progress
from tinygn_dist.recover import check_batch, recover
from tinygn_dist.report import REPORT_FILE, Report, versions
from tinygn_dist.selection import check_nm
from tinygn_dist.selftext import write_rows
from tinygn_dist.shrink import smaller_config, smaller_state
from tinygn_dist.units import plan_mixes, remove_units
from tinygn_dist.weights import sparsify

log = logging.getLogger(__name__)


def compress(config: Config, backend: Backend | None = None) -> Report:
    """Compress one model as configured; every rank calls this and gets the same report.

    Raises UserError (and Refused) with one line for bad input, before the expensive part wherever it can be known.
    """
    backend = backend or make_backend(config.distributed)
    run = _Run(config, backend)
    backend.agree(config.fingerprint(), "the config")
    with backend.together("checking the request"):
        source = load.find_model(config.model)
        skeleton = load.skeleton(source)
        anatomy = read_anatomy(skeleton, needs_units=bool(config.prune.unit_kinds))
        plan = _plan(config, anatomy)
        check_batch(config.recover, backend.num_ranks)
        destination = export.claim(config.output, source.path, _bytes(skeleton, source))
    backend.start_trackers({"fingerprint": config.fingerprint()})

    with run.stage("load"), backend.together("loading the model"):
        model = backend.main_first(lambda: load.load_model(source))
        processor = load.load_processor(source)
    model = backend.prepare(model)
    objective = objective_of(source.task)
    with run.stage("data"):
        splits = _load_data(config, source.task, model, processor, backend, run.progress)
    report = run.report(source.task, destination, splits)

    with run.stage("evaluate before"):
        before = quality(model, source.task, objective, splits.evaluation, backend, run.progress, "evaluating")
        report.before = before | _size(model) | {"speed": run.speed(model, source.task, splits)}
    teacher = copy.deepcopy(model) if config.recover.steps and config.recover.distill else None

    with run.stage("compress"):
        model, masks, targets = _compress(model, source, anatomy, plan, config, objective, splits, backend, run, report)
    if config.recover.steps:
        with run.stage("evaluate compressed"):
            report.compressed = quality(
                model, source.task, objective, splits.evaluation, backend, run.progress, "evaluating"
            )
        with run.stage("recover"):
            done = recover(model, teacher, source.task, splits.training, masks, config.recover, backend, run.progress)
            report.recovery = asdict(done)
        del teacher

    with run.stage("export"):
        _export(model, processor, targets, masks, destination, config, source, objective, splits, backend, run, report)
    backend.track({f"after/{k}": v for k, v in report.after.items() if isinstance(v, float)})
    return report


class _Run:
    """Clock, progress and logging of one run."""

    def __init__(self, config: Config, backend: Backend) -> None:
        self.config, self.backend = config, backend
        self.progress = Progress(shown=backend.is_main)
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        log.info("stage: %s", name)
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 2)

    def speed(self, model: nn.Module, task: str, splits: calibration.Splits) -> dict[str, Any]:
        options = self.config.evaluate
        return speed(model, task, splits.evaluation[0], options, self.backend) if options.latency else {}

    def report(self, task: str, destination: Path, splits: calibration.Splits) -> Report:
        config = self.config
        return Report(
            model=config.model.name,
            task=task,
            output=str(destination),
            recipe=config.model_dump(mode="json"),
            fingerprint=config.fingerprint(),
            num_processes=self.backend.num_ranks,
            data={**splits.used, "calibration_tokens": splits.num_tokens(), "fingerprint": splits.fingerprint()},
            seconds=self.seconds,
            versions=versions(),
        )


def _plan(config: Config, anatomy: Anatomy) -> list[Mix] | tuple[Target, ...]:
    """What is to be cut, refused here when it cannot be."""
    if config.prune.unit_kinds:
        return plan_mixes(anatomy, config.prune)
    targets = anatomy.choose_targets(config.prune.targets, config.prune.ignore)
    if config.prune.nm:
        check_nm(targets, config.prune.nm.m)
    return targets


def _load_data(config: Config, task: str, model, processor, backend: Backend, progress: Progress) -> calibration.Splits:
    train_len = config.recover.seq_len if config.recover.steps else 0
    rows = None
    if config.data.name == "self":
        if task != "causal-lm":
            raise UserError(f"data self needs a model that writes text, got a {task} model; name a dataset")
        rows = write_rows(model, processor, config.data, backend, progress)
    with backend.together("reading the data"):
        if task == "image-classification":
            load_splits = lambda: calibration.load_images(config.data, processor, training=bool(train_len))  # noqa: E731
        else:
            classes = task == "sequence-classification"
            load_splits = lambda: calibration.load_text(  # noqa: E731
                config.data, processor, classes=classes, train_len=train_len, rows=rows
            )
        splits = backend.main_first(load_splits)
    backend.agree(splits.fingerprint(), "the data")
    if task == "feature-extraction":
        splits.calibration = add_reference(model, splits.calibration)
        splits.evaluation = add_reference(model, splits.evaluation)
        splits.training = add_reference(model, splits.training)
    return splits


def _compress(
    model, source, anatomy: Anatomy, plan, config: Config, objective: Objective, splits, backend, run, report
):
    """The compressed model, its masks (None when units were removed) and the weights a sparsity is asked of."""
    if config.prune.unit_kinds:
        kept, scores, trials = remove_units(
            model, anatomy, plan, config.prune, objective, splits.calibration, backend, run.progress
        )
        backend.agree(kept.fingerprint(), "the kept units")
        report.selection = {
            "fingerprint": kept.fingerprint(),
            "kept": asdict(kept),
            "scores": scores.table,
            "tried": [asdict(trial) for trial in trials],
            "probe_forwards": scores.forwards,
        }
        dense_params = anatomy.total_params
        is_conv1d = {target.module: target.input_dim == 0 for target in anatomy.targets}
        state = smaller_state(backend.unwrap(model).state_dict(), anatomy, kept, is_conv1d)
        small = load.rebuild(source, smaller_config(backend.unwrap(model).config, anatomy, kept), model.dtype)
        small.load_state_dict(state, strict=True)
        small.tie_weights()
        small.generation_config = getattr(model, "generation_config", None)
        left = sum(p.numel() for p in small.parameters())
        report.parameters = {"dense": dense_params, "removed": dense_params - left, "kept": left}
        return backend.prepare(small.eval()), None, ()
    masks = sparsify(model, plan, config.prune, objective, splits.calibration, backend, run.progress)
    fingerprint = masks.fingerprint(model, backend)
    backend.agree(fingerprint, "the mask")
    kept = masks.kept(backend)
    targeted = sum(target.numel for target in plan)
    report.selection = {"fingerprint": fingerprint, "kept": kept}
    report.parameters = {
        "dense": anatomy.total_params,
        "targeted": targeted,
        "set_to_zero": targeted - sum(kept.values()),
        "kept_by_pattern": sum(t.numel for t in anatomy.targets) - targeted,
        "kept_not_a_layer_matrix": anatomy.total_params - sum(t.numel for t in anatomy.targets),
    }
    report.notes.append(
        "zeros are stored densely: the files do not shrink and stock engines run at the dense speed; "
        "sparsity serves storage with compression, research, and kernels made for it"
    )
    return model, masks, plan


def _export(
    model, processor, targets, masks, destination, config, source, objective, splits, backend, run, report
) -> None:
    """Write beside the destination, reload from there on every rank, measure, add the report, publish."""
    state = backend.full_state(model)
    draft: export.Draft | None = None
    try:
        with backend.together("writing the checkpoint"):
            if backend.is_main:
                draft = export.Draft(destination)
                export.write_checkpoint(
                    draft.path, backend.unwrap(model), state, processor, config.output.max_shard_gib
                )
        folder = next(path for path in backend.everyone(str(draft.path) if draft else None) if path)
        with backend.together("reading the checkpoint back (the output folder must be visible to every rank)"):
            disk = export.read_back(Path(folder), state)
            reloaded = load.load_model(
                load.find_model(config.model.model_copy(update={"name": folder, "task": source.task}))
            )
        reloaded = backend.prepare(reloaded)
        report.after = quality(reloaded, source.task, objective, splits.evaluation, backend, run.progress, "evaluating")
        report.after |= {
            "num_params": disk.num_params,
            "bytes": disk.bytes,
            "speed": run.speed(reloaded, source.task, splits),
        }
        report.sparsity = export.sparsity_figures(disk, tuple(targets))
        report.peak_memory_gib = backend.everyone(round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2))
        with backend.together("publishing the checkpoint"):
            if draft:
                (draft.path / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
                (draft.path / "README.md").write_text(report.to_markdown(), encoding="utf-8")
                draft.publish()
    except BaseException:
        if draft:
            draft.discard()
        raise


def _size(model: nn.Module) -> dict[str, int]:
    """Parameters, and the bytes they take at their dtype (tied ones once)."""
    parameters = list(model.parameters())
    return {
        "num_params": sum(p.numel() for p in parameters),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
    }


def _bytes(skeleton: nn.Module, source: load.Source) -> int:
    asked = source.options.dtype
    width = torch.finfo(getattr(torch, asked)).bits // 8 if asked != "auto" else 4
    return sum(p.numel() for p in skeleton.parameters()) * width
