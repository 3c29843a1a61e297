"""How the sparsity grows while the model trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from pydantic import Field, ValidationInfo, field_validator, model_validator

from tinygn_dist.config.experiments import Options, check_options
from tinygn_dist.config.section import Section, one_of
from tinygn_dist.maths.criteria import CRITERIA
from tinygn_dist.registry import experimental

CRITERIA_OF_UPDATES = tuple(name for name, row in CRITERIA.items() if row.in_schedule)
BUILT_IN = {
    "kind": ("one-shot", "linear", "cubic", "iterative"),
    "criterion": ("auto", *CRITERIA_OF_UPDATES),
    "regrow": ("none",),
}


class UpdateRow(Protocol):
    """What a schedule has to know of a row of MASK_UPDATES (prune/sparsity/mask_updates.py)."""

    option: str
    watches_training: bool
    check: Callable[[ScheduleConfig], None]


class ScheduleConfig(Section):
    kind: str = "one-shot"
    """one-shot: everything before training; linear, cubic (most of it early) and iterative (the same share of what is
    left each time, with a learning rate cycle of its own after each): in several updates during training; admm (of
    experiments/): the weights train densely, are drawn to a sparse copy of themselves that every update chooses
    anew, and are cut to it at the last one (for 70 % and more, with many steps)"""
    every: int = Field(100, ge=1)
    """optimizer steps from one update to the next"""
    first: float | None = Field(None, ge=0, lt=1)
    """sparsity before the first training step; by default half of prune.sparsity, a large first jump"""
    freeze: float = Field(0.25, ge=0, lt=1)
    """last share of the training in which nothing changes any more"""
    criterion: str = Field(
        "auto",
        description=f"""what scores the weights at an update: {", ".join(CRITERIA_OF_UPDATES)}; auto: as
        prune.criterion; movement:
        weights that training moved towards zero go, by the sum of weight times gradient over all steps so far""",
    )
    regrow: str = "none"
    """of experiments/: let zeroed weights come back at each update in place of the smallest kept ones: gradient, where
    the loss has the largest gradient (RigL), random (SET), or top-kast, those whose dense values, which train on
    beside the model, have become larger (one more fp32 number per weight)"""
    experiments: Options = {}
    """options of experiments by their names, such as {elsa: {penalty: 0.1}}"""

    @field_validator("kind", "criterion", "regrow")
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        built_in = BUILT_IN[info.field_name]
        if value in built_in:
            return value
        rows = experimental("MASK_UPDATES", UpdateRow)
        return one_of((*built_in, *(name for name, row in rows.items() if row.option == info.field_name)), value)

    @field_validator("experiments")
    @classmethod
    def _known_experiments(cls, value: Options) -> Options:
        return check_options(value)

    @model_validator(mode="after")
    def _fits(self) -> ScheduleConfig:
        for name in self._experiments_named():
            experimental("MASK_UPDATES", UpdateRow)[name].check(self)
        return self

    def _experiments_named(self) -> list[str]:
        named = {"kind": self.kind, "criterion": self.criterion, "regrow": self.regrow}
        return [name for option, name in named.items() if name not in BUILT_IN[option]]

    @property
    def growth(self) -> str:
        """The curve of the sparsity. Kinds of experiments/ leave all weights in place until their last update."""
        return self.kind if self.kind in BUILT_IN["kind"] else "late"

    @property
    def experiment(self) -> str | None:
        """The row of MASK_UPDATES that chooses the masks of updates; None where a criterion does."""
        return next(iter(self._experiments_named()), None)

    @property
    def watches_training(self) -> bool:
        """Whether every matrix has to train as a whole."""
        return any(experimental("MASK_UPDATES", UpdateRow)[name].watches_training for name in self._experiments_named())

    @property
    def changes(self) -> bool:
        """Whether anything happens during training."""
        return self.kind != "one-shot" or self.regrow != "none"
