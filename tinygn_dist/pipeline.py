"""The method, one call per stage. The only file that knows the order; no algorithm lives here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from tinygn_dist.backends import Backend, make_backend
from tinygn_dist.checkpoints import export, load, output_folder, verification
from tinygn_dist.checkpoints.companions import write_card
from tinygn_dist.checkpoints.inventory import beside
from tinygn_dist.checkpoints.run_checkpoint import refuse_unfinished, weights_digest
from tinygn_dist.checkpoints.sharded_load import placed
from tinygn_dist.config import Config
from tinygn_dist.data import splits as calibration
from tinygn_dist.data.self_generated import write_rows
from tinygn_dist.data.sources import SELF
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.gates import check_step
from tinygn_dist.estimate.problem import Problem, costs_of
from tinygn_dist.evaluate.lm_tasks import check_tasks
from tinygn_dist.maths.counts import share_left
from tinygn_dist.models.anatomy import Anatomy, Matrix, read_anatomy
from tinygn_dist.models.objective import Batch, add_reference, needs_reference, objective_of
from tinygn_dist.prune.sparsity import sparsify as weights
from tinygn_dist.prune.structured.latency import LatencyGoal
from tinygn_dist.prune.structured.methods import method_of
from tinygn_dist.prune.structured.removal import UnitGoal, UnitPlan
from tinygn_dist.prune.structured.shrink import smaller_config, smaller_origin
from tinygn_dist.prune.structured.size_goal import sparsity_of
from tinygn_dist.run.recovery import TrainingStage
from tinygn_dist.run.report import REPORT_FILE, Report, versions
from tinygn_dist.runtime.memory import peak_gib
from tinygn_dist.runtime.progress import Progress
from tinygn_dist.runtime.stage_timer import Stages, give_back
from tinygn_dist.train import reconstruct
from tinygn_dist.train.gradual_masks import GradualMasks, plan_of
from tinygn_dist.train.loop import Course, check_training
from tinygn_dist.train.teacher_cache import TeacherCache


def compress(config: Config, backend: Backend | None = None, stopping: Callable[[], bool] = lambda: False) -> Report:
    """Compress one model as configured; every rank calls this and gets the same report.

    stopping: whether this rank was asked to stop, looked at after every training step. Raises UserError (and Refused)
    with one line for bad input, before the expensive part wherever it can be known, and Stopped with a checkpoint
    written.
    """
    backend = backend or make_backend(config.distributed)
    run = _Run(config, backend, stopping)
    backend.agree(config.fingerprint(), "the config")
    with backend.together("checking the request"):
        run.check()
    run.measure_costs()
    with output_folder.only_writer(run.destination, backend):
        run.every_stage()
    return run.report


class _Run(TrainingStage):
    """What one run holds between its stages. Each method is one stage: it calls the method's parts and keeps the
    result."""

    model: nn.Module
    processor: Any
    splits: calibration.Splits
    report: Report

    def __init__(self, config: Config, backend: Backend, stopping: Callable[[], bool]) -> None:
        self.config, self.backend, self.stopping = config, backend, stopping
        self.progress = Progress(shown=backend.is_main)
        self.stage = Stages()
        self.masks: GradualMasks | None = None
        self.latency: LatencyGoal | None = None
        self.teacher: nn.Module | TeacherCache | None = None
        self.course, self.round = Course(), 0
        self.protected = config.prune.protect

    def every_stage(self) -> None:
        """The order of the method."""
        with self.stage("data"):
            self.load_processor()
            if self.config.data.name != SELF:  # rows that do not fit the model are refused before weights load
                self.read_data()
        with self.stage("load"):
            self.load()
            if self.config.data.name == SELF:
                self.read_data()
            self.begin_report()
        resumed = self.find_checkpoint()
        if self.caches_teacher:
            with self.stage("teacher"):
                self.write_teacher()
        if resumed:
            with self.stage("restore"):
                self.restore()
        else:
            self.compress()
        if self.config.recover.steps:
            with self.stage("recover"):
                self.recover()
        with self.stage("export"):
            self.export()

    def compress(self) -> None:
        with self.stage("evaluate before"):
            self.evaluate_before()
        with self.stage("compress"):
            if self.config.prune.unit_kinds:
                self.remove_units()
            else:
                self.sparsify()
        if self.config.prune.reconstruct:
            with self.stage("reconstruct"):
                self.reconstruct()
        if self.config.recover.steps:
            with self.stage("evaluate compressed"):
                self.report.compressed = self.quality(self.model)
            self.save_or_go_on()

    def check(self) -> None:
        """Everything that can be refused without reading a weight."""
        config = self.config
        self.source = load.find_model(config.model)
        skeleton = self.skeleton = load.skeleton(self.source)
        self.anatomy: Anatomy = read_anatomy(skeleton, needs_units=bool(config.prune.unit_kinds))
        self.beside = beside(self.source, skeleton, self.anatomy, bool(config.prune.unit_kinds))
        self.units, final = UnitPlan(), None
        self.matrices: tuple[Matrix, ...] = ()
        if config.prune.unit_kinds:
            self.method = method_of(self.anatomy, config.prune)
            self.dense_params = self.method.dense_params(self.anatomy)
            final = sparsity_of(config.prune, self.anatomy, skeleton, self.dense_params)
            self.goal = UnitGoal(final, config.prune.protect)
            if not config.prune.asks_latency:
                self.units = self.method.plan(self.anatomy, config.prune, self.goal)
        else:
            self.matrices = self.anatomy.choose_matrices(config.prune.matrices, config.prune.ignore)
            weights.check(self.anatomy, self.matrices, config.prune)
        reconstruct.check(self.anatomy, config.prune)
        if config.prune.probe_step is not None:
            check_step(config.prune.probe_step, load.dtype_of(self.source))
        check_tasks(config.evaluate, self.source.task)
        check_training(config.recover, self.matrices or self.anatomy.matrices, self.backend)
        rounds = bool(config.prune.unit_kinds)
        self.plan = plan_of(config.schedule, config.prune, config.recover.steps, rounds, final)
        if config.data.name == SELF and self.source.task != "causal-lm":
            raise UserError(f"data self needs a model that writes text, got a {self.source.task} model; name a dataset")
        self.destination = output_folder.claim(
            config.output, self.source.path, load.stored_bytes(skeleton, self.source)
        )
        if config.checkpoint.resume == "never" and not config.output.overwrite:
            refuse_unfinished(self.checkpoint_folder)
        self.objective = objective_of(self.source.task)
        self.backend.start_trackers({"fingerprint": config.fingerprint()})

    def measure_costs(self) -> None:
        """Where a latency is asked for: what layers cost on this device, and the mixes that meet the goal by that."""
        if self.config.prune.asks_latency:
            self.latency = LatencyGoal(self.source, self.config, self.anatomy, self.backend, self.goal)
            self.units = self.latency.plan

    def load(self) -> None:
        self.model, self.dtypes = placed(self.source, self.backend)
        self.digest = weights_digest(self.backend.full_tensors(self.model))
        sizes = {name: p.numel() for name, p in self.skeleton.named_parameters()}
        self.size = {
            "num_params": sum(sizes.values()),
            "bytes": sum(size * self.dtypes[name].itemsize for name, size in sizes.items()),
        }
        if self.config.recover.taught and self.source.task != "feature-extraction" and not self.caches_teacher:
            self.teacher, _ = placed(self.source, self.backend)

    def load_processor(self) -> None:
        with self.backend.together("loading the tokenizer or processor"):
            self.processor = load.load_processor(self.source)
        self.beside = replace(self.beside, processor=self.processor)

    def read_data(self) -> None:
        config, rows = self.config, None
        if config.data.name == SELF:
            rows = write_rows(self.model, self.processor, config.data, self.backend, self.progress)
        train_len = config.recover.seq_len if config.recover.steps else 0
        reader = calibration.Reader(self.source.task, self.processor, self.source.config)
        with self.backend.together("reading the data"):
            self.splits = self.backend.main_first(lambda: calibration.load_splits(config.data, reader, train_len, rows))
        if config.recover.steps and config.recover.evaluate_every:
            self.splits.hold_out(config.recover.evaluate_samples)
        self.backend.agree(self.splits.fingerprint(), "the data")

    def begin_report(self) -> None:
        config = self.config
        self.report = Report(
            model=config.model.name,
            task=self.source.task,
            output=str(self.destination),
            recipe=config.model_dump(mode="json"),
            fingerprint=config.fingerprint(),
            num_processes=self.backend.num_ranks,
            data={
                **self.splits.used,
                "calibration_tokens": self.splits.num_tokens(),
                "fingerprint": self.splits.fingerprint(),
            },
            seconds=self.stage.seconds,
            versions=versions(),
            notes=self.beside.notes,
        )
        if needs_reference(self.source.task, self.splits.calibration):
            for name in ("calibration", "evaluation", "training", "validation"):
                setattr(self.splits, name, add_reference(self.model, getattr(self.splits, name), self.backend.device))

    def evaluate_before(self) -> None:
        if self.latency:
            self.report.latency = self.latency.figures
            self.latency.time("dense", self.model)
        self.report.before = self.all_figures(self.model) | self.size

    def remove_units(self, number: int = 0) -> None:
        """Choose, re-fit and take out the units of one round; the model is a smaller one afterwards."""
        options, units = self.config.prune, self.units
        if self.plan.updates:
            here = self.method.dense_params(self.anatomy)
            left = share_left(self.plan.levels[number], self.dense_params, here)
            goal = UnitGoal(left, self.protected)
            units = self.method.plan(self.anatomy, options, goal) if left else UnitPlan()
        if not units.mixes:
            return
        found = self.method.remove(self.problem(self.model, self.splits.calibration), units, options)
        kept, scores = found.kept, found.scores
        self.report.notes += found.notes
        self.backend.agree(kept.fingerprint(), "the kept units")
        if self.report.selection:
            self.report.earlier_rounds.append(self.report.selection)
        self.report.selection = {
            "fingerprint": kept.fingerprint(),
            "kept": asdict(kept),
            "scores": scores.table,
            "pairs": scores.pairs,
            "tried": [asdict(trial) for trial in found.trials],
            "probe_forwards": scores.forwards,
            "probe_forwards_exhaustive": scores.exhaustive,
            "open_contests": scores.open,
            "probe_steps": scores.steps,
            "kinked_gates": scores.kinked,
        }
        config = smaller_config(self.backend.unwrap(self.model).config, self.anatomy, kept)
        build = functools.partial(load.rebuild, self.source, config, next(iter(self.dtypes.values())))
        smaller = smaller_origin(build, self.model, self.anatomy, kept, self.backend, found.shifts)
        self.model, self.dtypes = self.backend.place(smaller), smaller.dtypes
        self.anatomy = read_anatomy(load.skeleton(self.source, config), needs_units=True)
        if options.compensate:
            self.method.recalibrate_(self.problem(self.model, self.splits.calibration))
        self.kept_layers = kept.layers
        self.protected = tuple(kept.layers.index(layer) for layer in self.protected)
        self.report.parameters = {
            "dense": self.size["num_params"],
            "removed": self.size["num_params"] - self.anatomy.total_params,
            "kept": self.anatomy.total_params,
        }

    def sparsify(self) -> None:
        """Choose and apply masks; the weights that are kept may have been updated."""
        problem = replace(self.problem(self.model, self.splits.calibration), parts=self.parts)
        self.masks = GradualMasks(problem, self.matrices, self.config.prune, self.config.schedule, self.plan)
        self.tell_masks()
        self.report.notes += self.masks.masks.notes
        self.report.notes.append(
            "zeros are stored densely: the files do not shrink and stock engines run at the dense speed; sparsity serves "
            "storage with compression, research, and kernels made for it"
        )

    def tell_masks(self) -> None:
        masks = self.masks.masks
        fingerprint, kept = masks.fingerprint(self.model, self.backend), masks.kept(self.backend)
        self.backend.agree(fingerprint, "the mask")
        targeted, in_layers = (sum(t.numel for t in ts) for ts in (self.matrices, self.anatomy.matrices))
        self.report.selection = {"fingerprint": fingerprint, "kept": kept}
        self.report.parameters = {
            "dense": self.anatomy.total_params,
            "targeted": targeted,
            "set_to_zero": targeted - sum(kept.values()),
            "kept_by_pattern": in_layers - targeted,
            "kept_not_a_layer_matrix": self.anatomy.total_params - in_layers,
        }

    def export(self) -> None:
        """Write beside the destination, reload from there on every rank, measure, add the report, publish."""
        backend, output = self.backend, self.config.output
        with output_folder.draft(self.destination, backend) as draft:
            with backend.together("writing the checkpoint"):
                written = export.write_checkpoint(
                    draft, self.model, self.dtypes, self.beside, output.max_shard_gib, backend
                )
            held = verification.digests(self.model, self.dtypes, backend)
            self.let_go()
            backend.barrier()
            with backend.together("reading the checkpoint back (every rank must see the output folder)"):
                disk = verification.read_back(draft, written)
                asked = {"name": str(draft), "task": self.source.task, "revision": None}
                source = load.find_model(self.config.model.model_copy(update=asked))
            disk = backend.everyone(disk)[0]  # of the rank that wrote it
            reloaded, _ = placed(source, backend)
            with backend.together("comparing what was reloaded"):
                verification.check_reloaded(reloaded, held, self.dtypes, backend)
            self.report.sparsity = verification.sparsity_figures(disk, self.matrices, reloaded, backend)
            size = {"num_params": disk.num_params, "bytes": disk.bytes}
            self.report.after = self.all_figures(reloaded) | size
            if self.latency:
                self.latency.time("smaller", reloaded)
            for name, used in peak_gib(self.backend.device).items():
                setattr(self.report, name, self.backend.everyone(round(used, 2)))
            cpu = self.backend.everyone(self.stage.cpu_seconds)
            self.report.cpu_seconds = {name: round(sum(rank[name] for rank in cpu), 1) for name in cpu[0]}
            if self.backend.is_main:
                (draft / REPORT_FILE).write_text(self.report.to_json(), encoding="utf-8")
                write_card(draft, self.report.to_markdown())
        self.remove_checkpoints()
        if isinstance(self.teacher, TeacherCache):
            self.teacher.remove(self.backend)
        self.backend.track({f"after/{k}": v for k, v in self.report.after.items() if isinstance(v, float)})

    def let_go(self) -> None:
        """Of the model: from here on there is what the files say, and the two would take twice the memory."""
        self.masks = None
        if not isinstance(self.teacher, TeacherCache):
            self.teacher = None
        del self.model
        give_back()

    def problem(self, model: nn.Module, batches: Sequence[Batch]) -> Problem:
        costs = costs_of(self.config.prune)
        return Problem(
            model, self.anatomy, self.objective, batches, self.backend, self.progress, self.report.notes, costs=costs
        )
