"""What can be refused without a weight is refused here."""

from __future__ import annotations

import functools

from tinygn_dist.checkpoints import load, output_folder
from tinygn_dist.checkpoints.inventory import beside
from tinygn_dist.checkpoints.run_checkpoint import refuse_unfinished
from tinygn_dist.data.sources import SELF
from tinygn_dist.errors import UserError
from tinygn_dist.evaluate.lm_tasks import check_tasks
from tinygn_dist.models.anatomy import read_anatomy
from tinygn_dist.models.objective import objective_of
from tinygn_dist.run.recipe import steps_of
from tinygn_dist.run.state import RunState
from tinygn_dist.step import Request


def check(state: RunState) -> None:
    """The request, the steps and the output folder of a run. Raises UserError and Refused."""
    config, backend = state.config, state.backend
    source = load.find_model(config.model)
    skeleton = load.skeleton(source)
    takes_units = any(step.prune and step.prune.unit_kinds for step in config.recipe)
    state.anatomy = read_anatomy(skeleton, needs_units=takes_units)
    state.source = source
    state.request = Request(
        skeleton,
        state.anatomy,
        source.task,
        load.dtype_of(source),
        functools.partial(load.rebuild, source),
        backend,
        config.evaluate,
    )
    state.beside = beside(source, skeleton, state.anatomy, takes_units)
    state.layers = range(state.anatomy.num_layers)
    state.steps = steps_of(config.recipe, state.request)
    for step in state.steps:
        step.check(state.request)
    check_tasks(config.evaluate, source.task)
    if config.data.name == SELF and source.task != "causal-lm":
        raise UserError(f"data self needs a model that writes text, got a {source.task} model; name a dataset")
    state.destination = output_folder.claim(config.output, source.path, load.stored_bytes(skeleton, source))
    if config.checkpoint.resume == "never" and not config.output.overwrite:
        refuse_unfinished(state.checkpoint_folder)
    state.objective = objective_of(source.task)
    backend.start_trackers({"fingerprint": config.fingerprint()})
