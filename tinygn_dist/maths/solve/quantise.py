"""The codes of one linear layer: a sweep over its columns, then exact coordinate descent and the best scales for the
codes.

Minimise tr((W - V) H (W - V)^T) over V on a grid, with zeros where a mask has them. Columns are visited in order of the
Hessian's diagonal; what rounding (or the mask) does wrong in one is pushed onto those still to come (GPTQ, Frantar et
al. 2023; with a mask SparseGPT, section 3.5). Coordinate descent then takes for every code in turn the best there is
while the others stay, and for fixed codes the best scales of a row are a small least-squares problem: both only lower
the error (as LNQ of GuidedQuant, Kim et al. 2025, for tables of values).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tinygn_dist.maths.grids import Grid, Quantised, Scales, find_scales, quantised, stored_scale, to_nearest
from tinygn_dist.maths.solve.least_squares import refit_masked
from tinygn_dist.maths.solve.obs import damped, inverse_factor

PANEL = 32
"""columns whose errors are pushed onto the rest together"""


@dataclass(frozen=True)
class Effort:
    """How codes are sought. damping: added to the Hessian's diagonal, as a fraction of its mean. rounds: times that
    scales are fitted to codes and codes to scales after the sweep. descents: passes of coordinate descent over all
    codes each time. refine: conjugate gradient iterations on the weights that a mask leaves, before the sweep."""

    damping: float = 0.01
    rounds: int = 2
    descents: int = 2
    refine: int = 8


def round_to_nearest(weight: torch.Tensor, grid: Grid, dtype: torch.dtype) -> Quantised:
    """Without a Hessian: ranges that clip nothing, nearest codes. weight (out, in). dtype: that scales are stored
    in."""
    scales = find_scales(weight, None, grid, dtype, search=False)
    return quantised(to_nearest(weight, scales, grid), scales, grid)


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    dtype: torch.dtype,
    *,
    keep: torch.Tensor | None = None,
    effort: Effort = Effort(),
) -> Quantised:
    """The codes of a weight (out, in) whose Hessian (in, in) is the sum over tokens of x x^T, weighted or not.

    dtype: that scales are stored in. keep: (out, in) bool, False where the value has to be exactly 0. Raises ValueError
    for NaN or inf in either, and where groups do not fill the rows.
    """
    weight, hessian = weight.float(), hessian.float()
    if not hessian.isfinite().all():
        raise ValueError("the Hessian holds NaN or inf")
    start = weight
    if keep is not None:
        start = refit_masked(weight, weight.masked_fill(~keep, 0), keep, hessian, effort.refine, effort.damping)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    scales = find_scales(start, damped(hessian, effort.damping).diagonal(), grid, dtype)
    rows = _Columns(order, scales, grid, keep)
    ordered = hessian[order][:, order]
    factor, used = inverse_factor(ordered, effort.damping)
    solid = damped(ordered, used)
    codes = rows.sweep(start, factor)
    dense = weight[:, order].t().contiguous()
    for _ in range(effort.rounds):
        codes = rows.descend(dense, codes, solid, effort.descents)
        rows = rows.rescaled(dense, codes, solid, dtype)
    codes = rows.descend(dense, codes, solid, effort.descents)
    return quantised(rows.in_place(codes), rows.scales, grid)


class _Columns:
    """The columns of a matrix in the order they are visited: everything here is (in, out), a column a run of memory."""

    def __init__(self, order: torch.Tensor, scales: Scales, grid: Grid, keep: torch.Tensor | None) -> None:
        self.order, self.scales, self.grid, self._kept = order, scales, grid, keep
        width = len(order) // scales.scale.shape[1]
        self._group = order // width
        self._groups = self._group.tolist()
        self._scale, self._zero_point = (each.t().contiguous() for each in scales)
        self._keep = None if keep is None else keep[:, order].t().contiguous().float()

    def nearest(self, at: int, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes, values) of the grid nearest to the wanted values of one column; where it is masked, zero."""
        scale, zero_point = self._scale[self._groups[at]], self._zero_point[self._groups[at]]
        if self._keep is not None:
            column = column * self._keep[at]
        codes = self.grid.nearest((column / scale).add_(zero_point))
        return codes, (codes - zero_point).mul_(scale)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        return (codes - self._zero_point[self._group]).mul_(self._scale[self._group])

    def in_place(self, codes: torch.Tensor) -> torch.Tensor:
        """(out, in) again, columns where they were."""
        result = torch.empty_like(codes)
        result[self.order] = codes
        return result.t().contiguous()

    def sweep(self, weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Codes of a weight (out, in). factor: upper, H^-1 = U^T U, of the Hessian in this order."""
        work = weight[:, self.order].t().contiguous()
        codes, errors, diagonal = torch.empty_like(work), torch.empty_like(work), factor.diagonal().tolist()
        for first in range(0, len(work), PANEL):
            last = min(first + PANEL, len(work))
            for at in range(first, last):
                codes[at], values = self.nearest(at, work[at])
                torch.sub(work[at], values, out=errors[at]).div_(diagonal[at])
                work[at + 1 : last].addr_(factor[at, at + 1 : last], errors[at], alpha=-1)
            work[last:].addmm_(factor[first:last, last:].t(), errors[first:last], alpha=-1)
        return codes

    def descend(self, dense: torch.Tensor, codes: torch.Tensor, hessian: torch.Tensor, passes: int) -> torch.Tensor:
        """Codes of less error: each in turn the best there is while the others stay. dense, codes: (in, out)."""
        codes, values = codes.clone(), self.values(codes)
        slope, diagonal = hessian @ (values - dense), hessian.diagonal().tolist()
        for _ in range(passes):
            moved = False
            for first in range(0, len(codes), PANEL):
                panel = slice(first, first + PANEL)
                inside, here = hessian[panel, panel], slope[panel].clone()
                steps = torch.empty_like(here)
                for row in range(len(here)):
                    at = first + row
                    codes[at], new = self.nearest(at, values[at] - here[row] / diagonal[at])
                    torch.sub(new, values[at], out=steps[row])
                    values[at] = new
                    here[row + 1 :].addr_(inside[row + 1 :, row], steps[row])
                if steps.any():
                    slope.addmm_(hessian[:, panel], steps)
                    moved = True
            if not moved:
                break
        return codes

    def rescaled(self, dense: torch.Tensor, codes: torch.Tensor, hessian: torch.Tensor, dtype: torch.dtype) -> _Columns:
        """With the best scales of each row for its codes (in, out), where they lower its error: the group's values are
        s_g q_g, so sum_h s_h q_g^T H q_h = q_g^T H w for every g."""
        whole = codes - self._zero_point[self._group]
        groups, out = self._scale.shape
        normal, wanted = whole.new_empty(out, groups, groups), whole.new_empty(out, groups)
        image = hessian @ dense
        for group in range(groups):
            inside = self._group == group
            part = whole[inside]
            wanted[:, group] = (part * image[inside]).sum(0)
            product = (hessian[:, inside] @ part).mul_(whole)
            normal[:, group] = product.new_zeros(groups, out).index_add_(0, self._group, product).t()
        diagonal = normal.diagonal(dim1=1, dim2=2)
        empty = diagonal <= 0
        diagonal.add_(empty + 1e-6 * diagonal.mean(1, keepdim=True))
        lower, failed = torch.linalg.cholesky_ex(normal)
        found = torch.cholesky_solve(wanted[..., None], lower)[..., 0]
        fine = found.isfinite() & (found > 0) & ~empty & (failed == 0)[:, None]
        scale = torch.where(fine, stored_scale(found, dtype), self.scales.scale)
        changed = _Columns(self.order, Scales(scale, self.scales.zero_point), self.grid, self._kept)
        errors = [
            ((each.values(codes) - dense) * (hessian @ (each.values(codes) - dense))).sum(0) for each in (self, changed)
        ]
        scale = torch.where((errors[1] < errors[0])[:, None], scale, self.scales.scale)
        return _Columns(self.order, Scales(scale, self.scales.zero_point), self.grid, self._kept)
