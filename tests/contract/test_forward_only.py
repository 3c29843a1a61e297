"""Probes and forward-only training on connected ranks: the work is dealt, and the result is that of one process."""

from __future__ import annotations

import torch

from tests import tiny
from tinygn_dist.backends.base import Backend
from tinygn_dist.config import RecoverConfig
from tinygn_dist.estimate.elimination import Choice, successive_elimination
from tinygn_dist.estimate.probes import Probe, single_units
from tinygn_dist.train.forward_only.loop import ForwardOnly


def descend(backend: Backend) -> tuple[list[float], float, int]:
    """Losses of 4 steps, a digest of the weights, and the forwards this rank ran."""
    problem, forwards = tiny.problem("llama", backend, count=4, size=1), [0]
    problem.model.register_forward_pre_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
    options = RecoverConfig(optimizer="zo-adam", directions=4, batch_size=4, probe_step=2**-8, learning_rate=0.01)
    training = ForwardOnly(problem.model, problem.anatomy.matrices, {}, problem.objective, options, backend)
    losses = [training.step(problem.batches, number, 1.0)[0] for number in range(4)]
    digest = sum(float(p.detach().double().sin().sum()) for p in problem.model.parameters())
    return losses, digest, forwards[0]


def test_ranks_take_different_directions_and_end_with_the_same_weights(process_groups, backend):
    losses, digest, forwards = descend(backend)
    assert forwards == 4 * 4 * 2  # steps, directions, sides
    for other_losses, other_digest, other_forwards in process_groups(2).call(descend):
        assert other_losses == losses and other_digest == digest and other_forwards == forwards // 2
    assert torch.tensor(losses).isfinite().all()


def search(backend: Backend) -> tuple[str, float]:
    """The numbers of a training whose first steps measure its rate, and a digest of the weights."""
    problem = tiny.problem("llama", backend, count=4, size=1)
    options = RecoverConfig(optimizer="zo-sgd", directions=4, batch_size=4, probe_step=2**-8)
    training = ForwardOnly(problem.model, problem.anatomy.matrices, {}, problem.objective, options, backend)
    for number in range(14):
        training.step(problem.batches, number, 1.0)
    digest = sum(float(p.detach().double().sin().sum()) for p in problem.model.parameters())
    return repr(training.state_dict()), digest


def test_ranks_find_the_rate_of_one_process(process_groups, backend):
    """On the sequences it has seen, the sum of the directions goes down: a rate is found and the weights move."""
    told, digest = search(backend)
    assert "'rate': None" not in told and "'history': [(" in told
    assert process_groups(2).call(search) == [(told, digest)] * 2


def probe(backend: Backend) -> tuple[list[list[float]], list[int], int]:
    """Means of an elimination over 3 layers and 6 heads on three micro-batches, all in one round, and on five;
    sequences and places of the latter; the layers this rank ran for the former."""
    problem, layers = tiny.problem("llama", backend, count=3, size=1), [0]
    for layer in problem.model.model.layers:
        layer.register_forward_pre_hook(lambda *_: layers.__setitem__(0, layers[0] + 1))
    asked = [*map(Probe, range(3)), *single_units(problem.anatomy.of_kind("heads"))]
    found = successive_elimination(problem, asked, [Choice((0, 1, 2), 1), Choice(tuple(range(3, 9)), 2)])
    ran, longer = layers[0], tiny.problem("llama", backend, count=5, size=1)
    later = successive_elimination(longer, asked, [Choice((0, 1, 2), 1), Choice(tuple(range(3, 9)), 2)])
    return [found.mean.tolist(), later.mean.tolist()], [*later.sequences.tolist(), *later.place.tolist()], ran


def test_probes_are_dealt_where_batches_do_not_go_round(process_groups, backend):
    mean, sequences, layers = probe(backend)
    (one, other) = process_groups(2).call(probe)
    assert one[:2] == other[:2] == (mean, sequences)
    assert abs(one[2] - other[2]) <= 4 and one[2] + other[2] <= layers + 3, "a rank waited, or too much was done twice"
