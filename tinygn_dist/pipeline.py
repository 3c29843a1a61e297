"""In which order: check, load, data, every step of the recipe, export. No algorithm lives here."""

from __future__ import annotations

from collections.abc import Callable

from tinygn_dist.backends import Backend, make_backend
from tinygn_dist.checkpoints import load, output_folder
from tinygn_dist.config import Config
from tinygn_dist.data.sources import SELF
from tinygn_dist.models.anatomy import read_anatomy
from tinygn_dist.run import loading, resume
from tinygn_dist.run.figures import evaluate_before, quality
from tinygn_dist.run.report import Report
from tinygn_dist.run.request import check
from tinygn_dist.run.state import RunState
from tinygn_dist.run.training import Recover
from tinygn_dist.run.verified_export import write_result
from tinygn_dist.runtime.progress import Progress
from tinygn_dist.step import Outcome, Step


def compress(config: Config, backend: Backend | None = None, stopping: Callable[[], bool] = lambda: False) -> Report:
    """Compress one model as configured; every rank calls this and gets the same report.

    stopping: whether this rank was asked to stop, looked at after every training step. Raises UserError (and Refused)
    with one line for bad input, before the expensive part wherever it can be known, and Stopped with a checkpoint
    written.
    """
    backend = backend or make_backend(config.distributed)
    state = RunState(config, backend, stopping, Progress(shown=backend.is_main))
    backend.agree(config.fingerprint(), "the config")
    with backend.together("checking the request"):
        check(state)
    for step in state.steps:
        step.measure(state.request)
    with output_folder.only_writer(state.destination, backend):
        prepare(state)
        run_steps(state)
        with state.stage("export"):
            write_result(state)
    return state.report


def prepare(state: RunState) -> None:
    """The model, the data, and where the run begins: at its first step, or at the one that a checkpoint was written
    in."""
    written_by_model = state.config.data.name == SELF
    with state.stage("data"):
        loading.load_processor(state)
        if not written_by_model:  # rows that do not fit the model are refused before weights load
            loading.read_data(state)
    with state.stage("load"):
        loading.load_model(state)
        if written_by_model:
            loading.read_data(state)
        loading.begin_report(state)
    resumed = resume.find_checkpoint(state)
    if loading.caches_teacher(state):
        with state.stage("teacher"):
            loading.write_teacher(state)
    if resumed:
        with state.stage("restore"):
            resume.restore(state)
    else:
        with state.stage("evaluate before"):
            evaluate_before(state)


def run_steps(state: RunState) -> None:
    """Every step that is left, on the model that the one before it left."""
    while state.next < len(state.steps):
        step = state.steps[state.next]
        with state.stage(step.name):
            outcome = step.run(state)
            take(state, step, outcome)
        finish_step(state, step)


def take(state: RunState, step: Step, outcome: Outcome) -> None:
    """An outcome takes the place of the live model, its constraints and its figures."""
    state.report.add(step.name, outcome.facts)
    state.report.notes += outcome.notes
    state.report.steps.append({"step": step.name, "fingerprint": outcome.facts.get("selection", {}).get("fingerprint")})
    if outcome.constraint is not None:
        state.left_by[state.next] = outcome.constraint
    if outcome.origin is None:
        return
    state.model, state.dtypes = state.backend.place(outcome.origin), outcome.origin.dtypes
    config = state.backend.unwrap(state.model).config
    state.anatomy = read_anatomy(load.skeleton(state.source, config), needs_units=True)
    state.layers = tuple(state.layers[layer] for layer in outcome.layers)
    if outcome.settle:
        outcome.settle(state.problem())
    left = state.anatomy.total_params
    state.report.parameters |= {"removed": state.size["num_params"] - left, "kept": left}


def finish_step(state: RunState, step: Step) -> None:
    """The run may stop here and go on later. Before the first training the compressed model is measured."""
    state.next += 1
    if not any(isinstance(later, Recover) for later in state.steps[state.next :]):
        loading.let_teacher_go(state)
    follows = state.steps[state.next] if state.next < len(state.steps) else None
    if isinstance(follows, Recover) and not state.report.compressed:
        with state.stage("evaluate compressed"):
            state.report.compressed = quality(state, state.model)
    if not isinstance(step, Recover) and follows is not None:
        resume.save_or_stop(state)
