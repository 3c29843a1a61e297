"""The result is written, read back, compared, measured on what was read, and only then put in its place."""

from __future__ import annotations

from tinygn_dist.checkpoints import export, load, output_folder, verification
from tinygn_dist.checkpoints.companions import write_card
from tinygn_dist.checkpoints.config_files import needed_versions
from tinygn_dist.checkpoints.formats.form import Form
from tinygn_dist.checkpoints.sharded_load import placed
from tinygn_dist.models.matrices import Matrix
from tinygn_dist.prune.sparsity.gradual_masks import GradualMasks
from tinygn_dist.quantize.step import OnGrid
from tinygn_dist.run.figures import all_figures
from tinygn_dist.run.report import REPORT_FILE
from tinygn_dist.run.resume import remove_checkpoints
from tinygn_dist.run.state import RunState
from tinygn_dist.runtime.memory import peak_gib
from tinygn_dist.runtime.stage_timer import give_back
from tinygn_dist.train.teacher_cache import TeacherCache


def write_result(state: RunState) -> None:
    """Write beside the destination, reload from there on every rank, measure, add the report, publish."""
    backend, output, config = state.backend, state.config.output, state.config
    with output_folder.draft(state.destination, backend) as draft:
        form = _form(state)
        with backend.together("writing the checkpoint"):
            written = export.write_checkpoint(draft, state.model, form, state.beside, output.max_shard_gib, backend)
        live = verification.digests(state.model, state.dtypes, backend)
        matrices = _matrices_with_zeros(state)
        _let_go(state)
        backend.barrier()
        with backend.together("reading the checkpoint back (every rank must see the output folder)"):
            disk = verification.read_back(draft, written)
            asked = {"name": str(draft), "task": state.source.task, "revision": None, "dequantize": True}
            source = load.find_model(config.model.model_copy(update=asked))
        disk = backend.everyone(disk)[0]  # of the rank that wrote it
        reloaded, _ = placed(source, backend)
        with backend.together("comparing what was reloaded"):
            verification.check_reloaded(reloaded, live, state.dtypes, backend)
        report = state.report
        report.notes += needed_versions(draft)
        report.sparsity = verification.sparsity_figures(disk, matrices, reloaded, backend)
        report.after = all_figures(state, reloaded) | {
            "num_params": state.anatomy.total_params if form.codes else disk.num_params,  # packed words hold several
            "bytes": disk.bytes,
        }
        for step in state.steps:
            report.add(step.name, step.figures("smaller", reloaded))
        _note_resources(state)
        if backend.is_main:
            (draft / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
            write_card(draft, report.to_markdown())
    remove_checkpoints(state)
    if isinstance(state.teacher, TeacherCache):
        state.teacher.remove(backend)
    backend.track({f"after/{k}": v for k, v in report.after.items() if isinstance(v, float)})


def _matrices_with_zeros(state: RunState) -> tuple[Matrix, ...]:
    """Those whose zeros are counted."""
    masked = [each.masks.matrices for each in state.constraints if isinstance(each, GradualMasks)]
    return tuple(masked[-1]) if masked else ()


def _form(state: RunState) -> Form:
    """How the tensors lie in the files: as codes where a step left them on a grid."""
    form = Form(state.dtypes)
    for constraint in state.constraints:
        if isinstance(constraint, OnGrid):
            form = constraint.form(form, state.model)
    return form


def _let_go(state: RunState) -> None:
    """Of the model: from here on there is what the files say, and the two would take twice the memory."""
    state.left_by = {}
    if not isinstance(state.teacher, TeacherCache):
        state.teacher = None
    state.model = None
    give_back()


def _note_resources(state: RunState) -> None:
    for name, used in peak_gib(state.backend.device).items():
        setattr(state.report, name, state.backend.everyone(round(used, 2)))
    cpu = state.backend.everyone(state.stage.cpu_seconds)
    state.report.cpu_seconds = {name: round(sum(rank[name] for rank in cpu), 1) for name in cpu[0]}
