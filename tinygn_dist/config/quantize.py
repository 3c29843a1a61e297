"""Which grid the weights go onto, and how their codes are found."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from tinygn_dist.config.section import Section

SchemeName = Literal["int8", "int8-dynamic", "int4", "int3", "int2", "fp8", "fp8-dynamic"]
SCHEMES: tuple[SchemeName, ...] = get_args(SchemeName)
"""rows of the table in quantize/schemes.py"""
PER_ROW = ("int8-dynamic", "fp8", "fp8-dynamic")
"""schemes that no format stores in groups"""
CENTRED = ("int8", *PER_ROW)
"""schemes without zero points: codes of 8 bits around another centre are not told apart by a weight in bf16"""


class QuantizeConfig(Section):
    scheme: SchemeName | None = None
    """int8, int4, int3, int2 or fp8 weights; int8-dynamic and fp8-dynamic: engines also round what a layer reads, token
    by token; by default nothing is quantised"""
    group_size: Literal[0, 32, 64, 128] | None = None
    """consecutive inputs of a row that share a scale, 0: the whole row; by default 64 for int4, int3 and int2, the
    whole row for the others"""
    symmetric: bool | None = None
    """whether codes are centred on zero, instead of each group with a zero point; int8 and fp8 are, others by default
    not"""
    matrices: tuple[str, ...] = (".*",)
    """regular expressions: weights of the layers to quantise"""
    ignore: tuple[str, ...] = ()
    """regular expressions: weights to leave as they are"""
    estimator: Literal["auto", "finite-difference", "backprop"] = "auto"
    """what codes are solved with: a Hessian weighted by gradient energy where backpropagation fits in memory, else one
    of the inputs alone"""
    solver: Literal["sweep", "nearest"] = "sweep"
    """nearest: rounding without data, to compare with"""
    rounds: int = Field(2, ge=0)
    """times that scales are fitted to the codes, and the codes to the scales, after the sweep"""
    files: Literal["codes", "values"] = "codes"
    """codes: files of compressed-tensors, as small as the scheme; values: plain weights that lie on the grid"""
    damping: float = Field(0.01, gt=0)
    """added to the Hessian's diagonal, as a fraction of its mean"""
    gram_gib: float = Field(16, ge=0)
    """room on each rank for the Gram matrices of the inputs; where those of all layers do not fit, groups of layers
    that do are solved one after another, each measured on what the quantised layers before it give"""

    @model_validator(mode="after")
    def _fits(self) -> QuantizeConfig:
        if self.scheme in PER_ROW and self.group_size:
            raise ValueError(
                f"group_size {self.group_size} with scheme {self.scheme}, whose formats store one scale for each "
                "row; set it to 0, or use int8, int4, int3 or int2"
            )
        if self.scheme in CENTRED and self.symmetric is False:
            raise ValueError(
                f"symmetric false with scheme {self.scheme}, whose codes of 8 bits are stored without zero points; "
                "leave it out, or use int4, int3 or int2"
            )
        return self
