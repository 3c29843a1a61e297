"""What units feed: second moments of the inputs of the weights that read them, for choosing and re-fitting.

What an output error does to the layers behind depends on how large the residual stream is there, because they norm it. So
every token weighs 1 / (mean square of its layer's output): a few tokens whose stream is far larger
than the others' would otherwise decide alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from tinygn_dist.estimate.activations import InputMoments, Read, complete, input_hooks
from tinygn_dist.estimate.hooks import Observer, attached, first
from tinygn_dist.estimate.setting import Setting
from tinygn_dist.moments import add_gram, fill_below
from tinygn_dist.objective import last_logits_only, model_inputs, real_tokens
from tinygn_dist.targets import Target

_FLOOR = 1e-6
"""of a mean square, as in norms"""


def unit_moments(setting: Setting, targets: Sequence[Target], with_constant: Collection[str]) -> InputMoments:
    """Weighted Gram matrices (in, in) over this rank's batches, not yet reduced, one per target.

    with_constant: names of targets that have a bias: a last input that is always 1 stands beside theirs, so that (in + 1,
    in + 1) also holds the weighted sums of every input and of the weights.
    """
    found, inputs = InputMoments(source_of={target.name: target.name for target in targets}), dict[str, Read]()
    sizes: dict[int, torch.Tensor] = {}
    layers = [
        (setting.bare.get_submodule(setting.anatomy.path_of(layer)), Observer(_mean_square(sizes, layer), output=True))
        for layer in sorted({target.layer for target in targets})
    ]
    hooks, mine = input_hooks(setting.bare, targets, inputs), setting.backend.share(setting.batches)
    with torch.no_grad(), attached([*hooks, *layers]), setting.progress.bar("input statistics", len(mine)) as advance:
        for batch, real in mine:
            batch = setting.on_device(batch)
            setting.model(**model_inputs(batch), **last_logits_only(setting.bare))
            mask = real_tokens(batch)
            for target in targets if real else ():
                rows, weights = inputs[target.name].hidden.flatten(0, -2).float(), 1 / sizes[target.layer]
                rows, weights = (rows, weights) if mask is None else (rows[mask], weights[mask])
                if target.name in with_constant:
                    found.moments.add(target.name, _beside_one(rows, weights))
                else:
                    found.moments.add_gram(target.name, rows, weights)
            advance()
    complete(found, setting)
    return found


def _mean_square(sizes: dict[int, torch.Tensor], layer: int) -> Callable[[torch.Tensor, Any], None]:
    def seen(_: torch.Tensor, output: Any) -> None:
        sizes[layer] = first(output).flatten(0, -2).float().square().mean(-1).clamp(min=_FLOOR)

    return seen


def _beside_one(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(in + 1, in + 1) fp64 weighted moment of (tokens, in) rows with a 1 at the end of each.

    Products are taken about the rows' mean and moved to zero in fp64: in fp32 the squares of a large constant would drown what
    varies beside it, and the matrix about the mean would not be one of squares.
    """
    total, about = weights.double().sum(), (weights @ rows) / weights.sum()
    apart = rows - about
    rest, about = (weights @ apart).double(), about.double()
    mixed, squares = torch.outer(about, rest), rows.new_zeros((rows.shape[1],) * 2, dtype=torch.float64)
    add_gram(squares, apart, weights)
    second = fill_below(squares) + mixed + mixed.t() + total * torch.outer(about, about)
    sums = rest + total * about
    return torch.cat([torch.cat([second, sums[None]]), torch.cat([sums, total[None]])[:, None]], 1)
