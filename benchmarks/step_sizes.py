"""How good measured steps are: finite differences of closed forms against their exact derivatives.

    python benchmarks/step_sizes.py

For each function, dtype and scheme: the median step over 20 random directions, the RMS error of the derivative at the
measured steps, and the least RMS error any one step (a power of two) reaches.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch

from tinygn_dist.maths import finite_difference

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
Function = Callable[[torch.Tensor], torch.Tensor]


def quadratic(size: int = 400) -> tuple[Function, torch.Tensor]:
    """1 + w.A w / 2 with eigenvalues from 0.01 to 10, around a point; computed in the dtype of w, summed in float64."""
    scale = torch.logspace(-2, 1, size, dtype=torch.float64)
    point = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value(w: torch.Tensor) -> torch.Tensor:
        return 1 + ((scale.to(w.dtype) * w) * w).sum(dtype=torch.float64) / (2 * size)

    return value, point


def mlp(inputs: int = 16, hidden: int = 32, rows: int = 64) -> tuple[Function, torch.Tensor]:
    """Mean squared error of a two-layer tanh network on random data, by its flattened weights."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(rows, inputs, generator=draw, dtype=torch.float64)
    y = torch.randn(rows, generator=draw, dtype=torch.float64)
    point = torch.randn(hidden * (inputs + 1), generator=draw, dtype=torch.float64) / 4

    def value(w: torch.Tensor) -> torch.Tensor:
        first, second = w[: hidden * inputs].view(hidden, inputs), w[hidden * inputs :]
        out = torch.tanh(x.to(w.dtype) @ first.t()) @ second
        return (out.double() - y).square().mean()

    return value, point


FUNCTIONS = {"quadratic": quadratic, "tanh network": mlp}


def along(function: Function, point: torch.Tensor, signs: torch.Tensor, dtype: torch.dtype) -> Callable:
    """phi(t) = f(point + t * rms * signs), evaluated in `dtype`; relative steps as the search wants them."""
    rms = point.square().mean().sqrt()
    return lambda steps: [float(function((point + t * rms * signs).to(dtype))) for t in steps]


def exact_slope(function: Function, point: torch.Tensor, signs: torch.Tensor) -> float:
    point = point.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(point), point)
    return float(grad @ signs) * float(point.detach().square().mean().sqrt())


def difference(phi: Callable, scheme: str, step: float) -> float:
    ends = phi([step, 0.0 if scheme == "forward" else -step])
    return (ends[0] - ends[1]) / (step if scheme == "forward" else 2 * step)


def row(name: str, dtype: torch.dtype, scheme: str, directions: int) -> tuple[float, float, float, float]:
    """(median step, RMS error at the measured steps, least RMS error of one step for all, the step that has it)."""
    function, point = FUNCTIONS[name]()
    point = point.to(dtype).double()
    resolution = 2 * torch.finfo(dtype).eps
    grid = [2.0**-k for k in range(2, 45) if 2.0**-k >= resolution]
    steps, errors, on_grid = [], [], {step: 0.0 for step in grid}
    for seed in range(directions):
        draw = torch.Generator().manual_seed(100 + seed)
        signs = torch.randint(0, 2, point.shape, generator=draw).double() * 2 - 1
        phi, slope = along(function, point, signs, dtype), exact_slope(function, point, signs)
        step = finite_difference.run(finite_difference.search(scheme, resolution), phi)
        steps.append(step.value)
        errors.append((difference(phi, scheme, step.value) - slope) ** 2)
        for candidate in grid:
            on_grid[candidate] += (difference(phi, scheme, candidate) - slope) ** 2 / directions
    best = min(on_grid, key=on_grid.get)
    return sorted(steps)[directions // 2], math.sqrt(sum(errors) / directions), math.sqrt(on_grid[best]), best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directions", type=int, default=20)
    asked = parser.parse_args()
    print("| function | dtype | scheme | step measured | its RMS error | best step | least RMS error | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for name in FUNCTIONS:
        for dtype_name, dtype in DTYPES.items():
            for scheme in ("forward", "central"):
                step, error, least, best = row(name, dtype, scheme, asked.directions)
                print(
                    f"| {name} | {dtype_name} | {scheme} | {step:.2g} | {error:.2g} | {best:.2g} | {least:.2g} | "
                    f"{error / least:.1f} |"
                )


if __name__ == "__main__":
    main()
