"""The step that puts weights on a grid: `quantize`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from tinygn_dist.backends.base import Backend
from tinygn_dist.checkpoints.formats.compressed_tensors import Stored
from tinygn_dist.checkpoints.formats.form import Form
from tinygn_dist.checkpoints.run_checkpoint import SavedUnder, WriterUnder
from tinygn_dist.config.quantize import QuantizeConfig
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.estimator import resolve_estimator
from tinygn_dist.estimate.hessians import gram_gib, layer_groups
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths.grids import Scales
from tinygn_dist.maths.solve.quantise import Effort
from tinygn_dist.models.anatomy import Anatomy, Matrix
from tinygn_dist.quantize.quantiser import Quantiser
from tinygn_dist.quantize.quantize import CodeTask, quantize
from tinygn_dist.quantize.schemes import SCHEMES, bits_per_weight, check_groups, grid_of
from tinygn_dist.step import Live, Outcome, Request, Step, kept_weights


class OnGrid:
    """The constraint that the step leaves behind."""

    kept: Mapping[str, torch.Tensor] = MappingProxyType({})
    """zeros are those of the masks before"""

    def __init__(self, quantiser: Quantiser, backend: Backend, options: QuantizeConfig) -> None:
        self.quantiser, self._backend, self._options = quantiser, backend, options

    def attach(self, model: nn.Module, *optimizers: Any) -> Sequence[Any]:
        def hold() -> None:
            self.quantiser.apply_(model, self._backend)

        return [self._backend.after_step(model, optimizer, hold) for optimizer in optimizers]

    def violations(self, model: nn.Module, backend: Backend) -> int:
        return self.quantiser.violations(model, backend)

    def fingerprint(self, model: nn.Module, backend: Backend) -> str:
        return self.quantiser.fingerprint(model, backend)

    def write(self, writer: WriterUnder, model: nn.Module, optimizer: Any | None) -> dict[str, Any]:
        if self._backend.is_main:
            for name, scales in self.quantiser.scales.items():
                writer.add(f"scale|{name}", scales.scale)
                writer.add(f"zero point|{name}", scales.zero_point)
        return {}

    def resume_training(self, saved: SavedUnder, model: nn.Module, optimizer: Any) -> None:
        """Nothing: the scales do not train."""

    def form(self, form: Form, model: nn.Module) -> Form:
        """How the files of the model are written."""
        if self._options.files == "values":
            return form
        scheme = SCHEMES[self._options.scheme]
        codes = {
            name: (Stored(self.quantiser.grids[name], scheme.packed, scheme.activations), scales)
            for name, scales in self.quantiser.scales.items()
        }
        linear = [name for name, module in self._backend.unwrap(model).named_modules() if isinstance(module, nn.Linear)]
        return Form(form.dtypes, codes, tuple(name for name in linear if f"{name}.weight" not in codes))


@dataclass
class Quantize(Step):
    options: QuantizeConfig

    name = "quantize"

    def check(self, request: Request) -> None:
        options, matrices = self.options, self._matrices(request.anatomy)
        check_groups(matrices, grid_of(options))
        other = [matrix for matrix in matrices if matrix.input_dim != 1 or matrix.index is not None]
        if other and options.files == "codes":
            raise UserError(
                f"quantize.files codes: compressed-tensors stores Linear weights alone, and {other[0].name} is none; "
                "pass --quantize.files values, or leave such weights out with quantize.ignore"
            )
        if options.solver != "nearest":
            layer_groups(request.anatomy, matrices, options.gram_gib)

    def run(self, live: Live) -> Outcome:
        problem, options, notes = live.problem(), self.options, []
        matrices = self._matrices(problem.anatomy)
        grid = grid_of(options)
        check_groups(matrices, grid)
        backprop, effort = True, None
        if options.solver != "nearest":
            effort = Effort(options.damping, options.rounds)
            held = round(min(gram_gib(matrices), options.gram_gib) * 2**30)
            estimator, note = resolve_estimator(problem, options.estimator, held)
            backprop, notes = estimator == "backprop", [note] if note else []
        task = CodeTask(
            {matrix.name: grid for matrix in matrices},
            frozenset(kept_weights(live.constraints)),
            effort,
            backprop,
            options.gram_gib,
        )
        quantiser = quantize(problem, matrices, task)
        return Outcome(
            constraint=OnGrid(quantiser, problem.backend, options),
            facts=facts(quantiser, problem, options),
            notes=notes,
        )

    def restore(self, live: Live, saved: SavedUnder, state: Mapping[str, Any]) -> OnGrid:
        problem, grid = live.problem(), grid_of(self.options)
        matrices = self._matrices(problem.anatomy)
        names = [matrix.name for matrix in matrices]
        scales = {name: Scales(*(saved.tensor(f"{kind}|{name}") for kind in ("scale", "zero point"))) for name in names}
        return OnGrid(Quantiser(matrices, dict.fromkeys(names, grid), scales), problem.backend, self.options)

    def _matrices(self, anatomy: Anatomy) -> Sequence[Matrix]:
        return anatomy.choose_matrices(self.options.matrices, self.options.ignore)


def facts(quantiser: Quantiser, problem: Problem, options: QuantizeConfig) -> dict[str, Any]:
    """What the report says of the codes. A collective."""
    model, backend, matrices = problem.model, problem.backend, quantiser.matrices
    fingerprint = quantiser.fingerprint(model, backend)
    backend.agree(fingerprint, "the codes")
    scale_bits = backend.shard(model, matrices[0]).weight.dtype.itemsize * 8
    bits = sum(
        matrix.numel * bits_per_weight(quantiser.grids[matrix.name], matrix.shape[1], scale_bits) for matrix in matrices
    )
    weights = sum(matrix.numel for matrix in matrices)
    return {
        "quantization": {
            "scheme": options.scheme,
            "fingerprint": fingerprint,
            "weights": weights,
            "matrices": len(matrices),
            "bits_per_weight": round(bits / weights, 4),
        }
    }
