"""What of a run goes into a checkpoint, and how a run goes on from one."""

from __future__ import annotations

import logging
from dataclasses import asdict

from tinygn_dist.checkpoints import load
from tinygn_dist.checkpoints.run_checkpoint import CONSTRAINT, Checkpoints
from tinygn_dist.errors import Stopped
from tinygn_dist.models.anatomy import read_anatomy
from tinygn_dist.run.state import RunState
from tinygn_dist.train.loop import Course, InTraining
from tinygn_dist.train.state_io import (
    read_forward_only,
    read_training,
    read_weights,
    saved_origin,
    write_forward_only,
    write_weights,
)

log = logging.getLogger(__name__)
KEPT = 2
"""checkpoints that stay until the run is done: the newest, and one more where that cannot be read"""

_KEPT_OF_REPORT = (
    "before",
    "compressed",
    "selection",
    "earlier_selections",
    "parameters",
    "reconstruction",
    "steps",
    "notes",
)


def find_checkpoint(state: RunState) -> bool:
    """Whether there is one to go on from. Raises UserError when it is of another run."""
    asked, folder = state.config.checkpoint, state.checkpoint_folder
    identity = state.identity()
    state.checkpoints = Checkpoints(folder, identity, state.backend, KEPT)
    state.best = Checkpoints(folder.with_name(f"{folder.name}.best"), identity, state.backend, keep=1)
    if asked.resume == "auto":
        state.saved = state.checkpoints.newest()
    else:
        _remove_statistics(state)
    if state.saved is None:
        state.checkpoints.remove()
        state.best.remove()
    else:
        log.info("going on from %s", state.saved.path)
    return state.saved is not None


def restore(state: RunState) -> None:
    """The model, its constraints and the report as they were; what only training knows follows when it begins."""
    saved, backend, facts = state.saved, state.backend, state.saved.facts
    state.next, state.course = facts["next"], Course(**facts["course"])
    state.layers = tuple(facts["layers"])
    for key, value in facts["report"].items():
        setattr(state.report, key, value)
    state.report.recovery["resumed_after_steps"] = [*facts["resumed"], state.course.step]
    if facts["model_config"] is None:
        read_weights(saved, state.model, backend)
    else:
        _place_smaller(state)
    for number, known in facts["constraints"].items():
        place = saved.under(f"{CONSTRAINT} {number}")
        state.left_by[int(number)] = state.steps[int(number)].restore(state, place, known)


def _place_smaller(state: RunState) -> None:
    """The model of the checkpoint, of which each rank reads the pieces that it holds."""
    bare = state.backend.unwrap(state.model)
    config = type(state.source.config).from_dict(state.saved.facts["model_config"])
    origin = saved_origin(state.saved, lambda: load.rebuild(state.source, config, bare.dtype), bare)
    state.model = state.backend.place(origin)
    state.anatomy = read_anatomy(load.skeleton(state.source, config), needs_units=True)


def save_or_stop(state: RunState, now: InTraining | None = None) -> None:
    """A checkpoint where one is due or the run is asked to stop, which raises Stopped then."""
    every, step = state.config.checkpoint.every, state.course.step
    stops = now.stopping if now else any(state.backend.everyone(state.stopping()))
    if stops or (every and step % every == 0):
        save(state, now)
    if stops:
        total = sum(training.steps for training in state.config.trainings)
        raise Stopped(f"stopped after {step} of {total} training steps; {state.checkpoints.folder} has it all")


def save(state: RunState, now: InTraining | None) -> None:
    backend, model = state.backend, now.model if now else state.model
    optimizer = now.optimizer if now else None
    with state.checkpoints.writing(f"{state.next:03d}-{step_name(state.course.step)}") as writer:
        write_weights(writer, state.model, now, backend)
        left = {
            number: constraint.write(writer.under(f"{CONSTRAINT} {number}"), model, optimizer)
            for number, constraint in state.left_by.items()
        }
        if now is not None and now.forward_only is not None:
            write_forward_only(writer, now.forward_only)
        smaller = state.anatomy is not state.request.anatomy
        writer.facts |= {
            "next": state.next,
            "course": asdict(state.course),
            "in_training": now is not None,
            "num_ranks": backend.num_ranks,
            "layers": list(state.layers),
            "constraints": left,
            "model_config": backend.unwrap(state.model).config.to_dict() if smaller else None,
            "report": {key: getattr(state.report, key) for key in _KEPT_OF_REPORT},
            "resumed": state.report.recovery.get("resumed_after_steps", []),
        }


def remove_checkpoints(state: RunState) -> None:
    """At the end of a run."""
    state.checkpoints.remove()
    state.best.remove()
    _remove_statistics(state)


def _remove_statistics(state: RunState) -> None:
    if state.config.checkpoint.statistics_every:
        Checkpoints(state.statistics_folder, {}, state.backend, keep=1).remove()


def resume_training(state: RunState, now: InTraining) -> bool:
    """Take up what was saved from training, if it was. A best model that is no longer there is forgotten: the
    evaluations that replaced it come again."""
    saved, state.saved = state.saved, None
    if saved is None:
        return False
    for number, constraint in state.left_by.items():
        constraint.resume_training(saved.under(f"{CONSTRAINT} {number}"), now.model, now.optimizer)
    if not saved.facts["in_training"]:
        return False
    if now.forward_only is not None:
        read_forward_only(saved, now.forward_only)
    else:
        read_training(saved, now, state.backend)
    if state.course.best is not None and not state.best.keep_only(step_name(state.course.best)):
        state.course.best = None
    return True


def save_best(state: RunState, now: InTraining) -> None:
    with state.best.writing(step_name(state.course.step)) as writer:
        write_weights(writer, state.model, now, state.backend, states=False)


def restore_best(state: RunState, now: InTraining) -> None:
    """Before a training ends: into the live weights and any masters behind them."""
    best = state.course.best
    if best is not None and best != state.course.step:
        log.info("the best evaluation was that of step %d, whose weights are taken", best)
        read_weights(state.best.named(step_name(best)), now.model, state.backend)


def step_name(step: int) -> str:
    return f"{step:08d}"
