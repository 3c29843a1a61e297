"""What is known of units without looking at the loss: what they feed forward, and how large they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tinygn_dist import score
from tinygn_dist.anatomy import UnitGroup
from tinygn_dist.estimate.activations import InputMoments
from tinygn_dist.estimate.setting import Setting


def column_energies(setting: Setting, groups: Sequence[UnitGroup], moments: InputMoments | None) -> list[torch.Tensor]:
    """||W_:,j||^2 sum x_j^2 of every input feature of the groups' outputs, over the data of all ranks."""
    assert moments is not None
    targets = [setting.anatomy.target_of(group.output) for group in groups]
    diagonals = [moments.moments.sum(moments.of(target)).diagonal().clone() for target in targets]
    setting.backend.sum_over_data(diagonals)
    energies = []
    for target, diagonal in zip(targets, diagonals, strict=True):
        weight = setting.backend.shard(setting.model, target).weight
        weight = target.matrix(setting.backend.gather(setting.model, target, weight))
        energies.append(score.column_energy(weight, diagonal.float()))
    return energies


def unit_magnitude(setting: Setting, group: UnitGroup) -> torch.Tensor:
    """(units,) sums of squares of every parameter that goes with a unit."""
    total = torch.zeros(group.num_units, dtype=torch.float64)
    parameters = {name for name, _ in setting.bare.named_parameters()}
    for piece in group.slices:
        if piece.tensor not in parameters:  # a buffer
            continue
        squares = setting.backend.whole(setting.model, piece.tensor).double().square().movedim(piece.dim, 0)
        own = squares.reshape(len(squares), -1).sum(1)[piece.start : piece.start + group.num_units * piece.width]
        total += score.unit_sums(own, piece.width).cpu()
    return total
