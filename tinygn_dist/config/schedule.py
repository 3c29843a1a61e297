"""How the sparsity grows while the model trains."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from tinygn_dist.config.section import Section, one_of
from tinygn_dist.maths.criteria import CRITERIA

CRITERIA_OF_UPDATES = (*(name for name, row in CRITERIA.items() if row.in_schedule), "movement")


class ScheduleConfig(Section):
    kind: Literal["one-shot", "linear", "cubic", "iterative", "admm"] = "one-shot"
    """one-shot: everything before training; linear, cubic (most of it early) and iterative (the same share of what is
    left each time, with a learning rate cycle of its own after each): in several updates during training; admm: the weights
    train densely, are drawn to a sparse copy of themselves that every update chooses anew, and are cut to it at the last one
    (for 70 % and more, with many steps)"""
    every: int = Field(100, ge=1)
    """optimizer steps from one update to the next"""
    first: float | None = Field(None, ge=0, lt=1)
    """sparsity before the first training step; by default half of prune.sparsity, a large first jump"""
    freeze: float = Field(0.25, ge=0, lt=1)
    """last share of the training in which nothing changes any more"""
    criterion: str = Field(
        "auto",
        description=f"""what scores the weights at an update: {", ".join(CRITERIA_OF_UPDATES)}; auto: as prune.criterion; movement:
        weights that training moved towards zero go, by the sum of weight times gradient over all steps so far""",
    )
    penalty: float = Field(0.01, gt=0)
    """of kind admm: strength of the pull, added to the clipped gradient"""
    regrow: Literal["none", "gradient", "random", "top-kast"] = "none"
    """let zeroed weights come back at each update in place of the smallest kept ones: where the loss has the largest
    gradient (RigL), at random (SET), or those whose dense values, which train on beside the model, have become larger
    (top-kast; one more fp32 number per weight)"""
    swap: float = Field(0.3, gt=0, lt=1)
    """share of the kept weights that an update swaps when regrowing; gradient: decays to 0 at the last update"""
    explore: float = Field(0.1, gt=0, lt=1)
    """of regrow top-kast: share of all weights, the largest of the zeroed ones, that train on beside the model"""

    @field_validator("criterion")
    @classmethod
    def _known_criterion(cls, value: str) -> str:
        return one_of(("auto", *CRITERIA_OF_UPDATES), value)

    @model_validator(mode="after")
    def _fits(self) -> ScheduleConfig:
        if self.regrow != "none" and self.criterion not in ("auto", "magnitude"):
            raise ValueError(
                f"criterion {self.criterion!r} with regrow {self.regrow!r}: the smallest kept weights make room for the "
                "regrown ones; leave criterion at auto"
            )
        if self.kind == "admm" and (self.regrow != "none" or self.criterion != "auto"):
            raise ValueError(
                f"kind admm with criterion {self.criterion!r} and regrow {self.regrow!r}: it keeps the largest weights of its "
                "own sum and masks nothing before the last update; leave both at their defaults"
            )
        if self.criterion == "movement" and self.kind == "one-shot":
            raise ValueError(
                "criterion 'movement' is summed up in training, so kind cannot be one-shot; use cubic or linear"
            )
        return self

    @property
    def changes(self) -> bool:
        """Whether anything happens during training."""
        return self.kind != "one-shot" or self.regrow != "none"
