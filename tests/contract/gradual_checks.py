"""Sparsity that grows in training, on whatever backend runs tests/contract/sharded_job.py."""

from __future__ import annotations

import torch

from tests.contract.sharded_models import NO_DOWN, digest, llama, problem, rows
from tinygn_dist.backends import Backend
from tinygn_dist.config import PruneConfig, RecoverConfig, ScheduleConfig
from tinygn_dist.evaluate.quality import mean_loss
from tinygn_dist.models.anatomy import Matrix
from tinygn_dist.prune.sparsity.gradual_masks import GradualMasks, plan_of
from tinygn_dist.runtime.progress import Progress
from tinygn_dist.train.loop import Course, InTraining, Recovery

GRADUAL_CASES = {
    "cubic magnitude": ({"criterion": "magnitude"}, {"kind": "cubic"}),
    "iterative taylor": ({"criterion": "taylor", "scope": "global"}, {"kind": "iterative"}),
    "cubic obs": ({"criterion": "obs"}, {"kind": "cubic"}),
    "N:M fisher": ({"criterion": "fisher", "pattern": "2:4", **NO_DOWN}, {"kind": "linear", "criterion": "fisher"}),
    "movement": ({"criterion": "magnitude"}, {"kind": "linear", "criterion": "movement"}),
    "ADMM": ({"criterion": "magnitude"}, {"kind": "admm", "experiments": {"elsa": {"penalty": 1.0}}}),
    "RigL": ({"criterion": "magnitude"}, {"regrow": "gradient"}),
    "Top-KAST": ({"criterion": "magnitude"}, {"regrow": "top-kast"}),
}


def gradual(backend: Backend, dtype: torch.dtype) -> dict[str, dict[str, object]]:
    """Masks that change twice in six steps with momentum, weight decay and accumulation: exact zeros after every step,
    exact counts after every update, and no state left in the optimizer of a weight that changed."""
    cases = list(GRADUAL_CASES)[: None if dtype == torch.float32 else 1]
    return {name: _gradual(backend, dtype, *GRADUAL_CASES[name]) for name in cases}


def _gradual(backend: Backend, dtype: torch.dtype, prune: dict, schedule: dict) -> dict[str, object]:
    here = problem(backend, llama().to(dtype))
    prune = PruneConfig(**{"pattern": "unstructured", "sparsity": 0.6, **prune})
    schedule = ScheduleConfig(every=2, **schedule)
    plan = plan_of(schedule, prune, 6)
    assert plan.updates == (2, 4)
    masks = GradualMasks(here, here.anatomy.choose_matrices(prune.matrices, prune.ignore), prune, schedule, plan)
    asked = RecoverConfig(steps=6, learning_rate=5e-3, batch_size=8, weight_decay=0.1, clip_norm=0.5, distill=0)
    before = {matrix.name: masks.masks.by_name[matrix.name].clone() for matrix in masks.masks.matrices}

    def stepped(now: InTraining) -> None:
        assert masks.masks.violations(now.model, backend) == 0, f"live weights regrew in step {now.course.step}"
        assert masks.steps == now.course.step, "a step was counted twice or not at all"
        if now.course.step in plan.updates:
            total = sum(matrix.numel for matrix in masks.masks.matrices)
            kept = sum(masks.masks.kept(backend).values())
            if prune.nm is None and prune.scope == "global":
                assert kept == total - round(plan.level_after(masks.steps) * total)
            for matrix in masks.masks.matrices:
                changed = before[matrix.name] ^ masks.masks.by_name[matrix.name]
                if schedule.regrow != "top-kast":  # whose weights trained before they came
                    _assert_fresh(backend, now, matrix, changed)
                before[matrix.name] = masks.masks.by_name[matrix.name].clone()

    course = Course()
    recovery = Recovery(None, "causal-lm", rows(5), asked, plan, backend, Progress(), stepped=stepped)
    recovery.run(here.model, [masks], course)
    assert masks.masks.violations(here.model, backend) == 0
    told = {"losses": course.losses, "loss after": mean_loss(here, "evaluating")}
    return told | {
        "kept": sum(masks.masks.kept(backend).values()),
        "regrown": any(update.regrown for update in masks.history),
    }


def _assert_fresh(backend: Backend, now: InTraining, matrix: Matrix, changed: torch.Tensor) -> None:
    """Where the mask changed the optimizer knows nothing; elsewhere it knows something."""
    whole = backend.whole_training(now.model, now.optimizer, matrix.parameter)
    changed = backend.gather(now.model, matrix, changed).view(-1).cpu()
    states = [value for key, value in whole.items() if key != "weight" and value.dim() == 1]
    assert len(states) == 2, f"AdamW has two moments, found {list(whole)}"
    for state in states:
        state = matrix.within(state.view(-1, matrix.numel) if matrix.index is not None else state)
        assert not state[changed].any() and state[~changed].count_nonzero() > 0.5 * (~changed).sum()


def resumed(backend: Backend) -> None:
    """What `whole_training` saves is all there is to know: a new model goes on from it bit by bit."""
    prune, schedule = PruneConfig(pattern="unstructured", criterion="magnitude"), ScheduleConfig(kind="cubic", every=2)
    plan, asked = plan_of(schedule, prune, 6), RecoverConfig(steps=6, learning_rate=5e-3, batch_size=4, distill=0)
    saved: dict[str, object] = {}

    def save(now: InTraining) -> None:
        if now.course.step == 3:
            bare = backend.unwrap(now.model)
            names = [name for name, p in bare.named_parameters() if p.requires_grad]
            saved["whole"] = {name: backend.whole_training(now.model, now.optimizer, name) for name in names}
            saved["masks"], saved["state"] = dict(masks.masks.packed(now.model, backend)), masks.state()

    def begin(now: InTraining) -> None:
        if now.course.step == 3:
            for name, whole in saved["whole"].items():
                backend.write_training(now.model, now.optimizer, name, whole)
            for name, packed in saved["masks"].items():
                masks.masks.unpack(name, packed, now.model, backend)
            masks.load_state(saved["state"])

    digests = []
    for course in (Course(), Course(step=3)):
        here = problem(backend, llama())
        masks = GradualMasks(here, here.anatomy.matrices, prune, schedule, plan)
        recovery = Recovery(None, "causal-lm", rows(5), asked, plan, backend, Progress(), begin, save)
        recovery.run(here.model, [masks], course)
        digests.append(digest(backend, here.model))
    assert digests[0] == digests[1]
