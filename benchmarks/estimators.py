"""How well each estimator of a unit's importance ranks what really happens when it goes, and whether adaptive probing
chooses as exhaustive probing does. Two commands, the first once per kind (it may take minutes):

    python benchmarks/estimators.py measure layers --data text.txt --windows 16 --seq-len 128 --out losses
    python benchmarks/estimators.py table losses

What really happens is the removal probe of each unit on `--windows` held-out sequences. Every estimator sees other
sequences, and takes as many forwards as removal probes on `--few` sequences would: differences of one side take
`--few`, of both sides half of them, random directions over all gates at once half as many as there are units, and a
backward counts as two forwards (on at most 32 sequences). Rank correlations are Spearman's; their standard errors are a
jackknife over the held-out sequences. "Held-out, halves" correlates two halves of the held-out sequences: no estimator
can be expected beyond that. The race is run on losses that were measured before, which it cannot tell from new ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from prepared import add_arguments, problem_of

from tinygn_dist.estimate.backprop import gate_gradients
from tinygn_dist.estimate.elimination import Contest, successive_elimination
from tinygn_dist.estimate.gates import gate_derivatives
from tinygn_dist.estimate.hooks import LayerGate, attached, unit_gates
from tinygn_dist.estimate.input_moments import block_influence, input_moments
from tinygn_dist.estimate.probes import Measured, Probe, measure, single_units
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.maths import confidence, criteria
from tinygn_dist.maths.counter_rng import key_of, signs
from tinygn_dist.runtime.cpu_matmul import fast_matmul

KINDS = {"layers": None, "attention": "heads", "ffn": "channels", "heads": "heads"}
STEPS = {"forward": 2.0**-9, "central": 2.0**-5}
MOST_BACKWARDS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("kind", choices=KINDS)
    add_arguments(measuring, windows=16, seq_len=128)
    measuring.add_argument("--few", type=int, default=4, help="sequences of the estimators; an even number")
    measuring.add_argument("--every", type=int, default=1, help="units of each so-many-th layer")
    measuring.add_argument("--out", required=True, help="folder that collects the kinds")
    commands.add_parser("table").add_argument("folder")
    asked = parser.parse_args()
    if asked.command == "table":
        return table(Path(asked.folder))
    Path(asked.out).mkdir(exist_ok=True)
    with fast_matmul(torch.device("cpu")):
        found = measured(asked)
    torch.save(found, Path(asked.out) / f"{asked.kind}.pt")


# -- measuring ---------------------------------------------------------------------------------------------------------
def probes_of(problem: Problem, kind: str, every: int) -> list[Probe]:
    """Removal of whole layers; of all heads or all channels of a layer; of single heads (KV groups)."""
    if kind == "layers":
        return [Probe(layer) for layer in range(0, problem.anatomy.num_layers, every)]
    groups = problem.anatomy.of_kind(KINDS[kind])[::every]
    if kind == "heads":
        return list(single_units(groups))
    return [Probe(group.layer, group, tuple(range(group.num_units))) for group in groups]


def measured(asked: argparse.Namespace) -> dict:
    held_out = asked.windows
    asked.windows += MOST_BACKWARDS
    whole = problem_of(asked)
    probes = probes_of(whole, asked.kind, asked.every)

    def on(start: int, count: int) -> Problem:
        return replace(whole, batches=whole.batches[start : start + count])

    few = on(held_out, asked.few)
    truth, early = measure(on(0, held_out), probes), measure(few, probes)
    backwards = on(held_out, min(MOST_BACKWARDS, max(1, len(probes) * asked.few // 3)))
    return {
        "truth": truth.differences,
        "counts": truth.counts,
        "removed": contests_of(probes, asked.kind),
        "estimates": {
            "removal": (confidence.ratio_mean(early.differences, early.counts)[0], early.forwards),
            **by_gates(few, on(held_out, asked.few // 2), probes),
            **by_random_directions(few, probes),
            **by_backprop(backwards, probes),
            **without_the_loss(few, probes),
        },
    }


def contests_of(probes: list[Probe], kind: str) -> list[Contest]:
    """A fifth of the layers or blocks goes; one head of each layer."""
    if kind != "heads":
        return [Contest(tuple(range(len(probes))), len(probes) // 5)]
    places = dict.fromkeys(probe.layer for probe in probes)
    return [Contest(tuple(i for i, p in enumerate(probes) if p.layer == layer), 1) for layer in places]


def by_gates(few: Problem, half: Problem, probes: list[Probe]) -> dict:
    one = gate_derivatives(few, probes, scheme="forward", step=STEPS["forward"])
    two = gate_derivatives(half, probes, scheme="central", step=STEPS["central"])
    slope = two.slopes.sum(1) / two.counts.sum()
    return {
        "gate derivative, forward difference": (-one.slopes.sum(1) / one.counts.sum(), one.forwards),
        "gate derivative, central difference": (-slope, two.forwards),
        "... with the second difference": (-slope + two.bends.sum(1) / two.counts.sum() / 2, two.forwards),
    }


def by_random_directions(few: Problem, probes: list[Probe]) -> dict:
    """All gates moved at once: the mean over directions of slope times sign."""
    step, count = STEPS["central"], max(1, len(probes) // 2)
    estimate = torch.zeros(len(probes), dtype=torch.float64)
    for number in range(count):
        direction = signs(0, len(probes), key_of(0, f"gates/{number}")).double()
        up, down = (_loss_at(few, probes, 1 + side * step * direction) for side in (1, -1))
        estimate += (up - down) / (2 * step) * direction / count
    return {"random directions over all gates": (-estimate, 2 * count * len(few.batches))}


def _loss_at(problem: Problem, probes: list[Probe], factors: torch.Tensor) -> float:
    hooks, by_group = [], {}
    for probe, factor in zip(probes, factors.tolist(), strict=True):
        if probe.group is None:
            layer = problem.bare.get_submodule(problem.anatomy.path_of(probe.layer))
            hooks.append((layer, LayerGate(torch.tensor(factor, dtype=torch.float64))))
        else:
            gates = by_group.setdefault(probe.group, torch.ones(probe.group.num_units, dtype=torch.float64))
            gates[list(probe.units)] = factor
    for group, gates in by_group.items():
        hooks += unit_gates(problem.bare, group, gates)
    with attached(hooks):
        seen = measure(problem, [])
    return float(seen.base.sum() / seen.counts.sum())


def by_backprop(problem: Problem, probes: list[Probe]) -> dict:
    groups = list(dict.fromkeys(probe.group for probe in probes if probe.group is not None))
    by_group, by_layer, counts = gate_gradients(problem, groups, [p.layer for p in probes if p.group is None])
    grads = (
        by_layer if not groups else torch.stack([by_group[groups.index(p.group)][list(p.units)].sum(0) for p in probes])
    )
    mass, cost = grads.square().sum(1) / 2 / counts.sum(), 3 * len(problem.batches)
    return {
        "backprop, gate gradient (Taylor)": (-grads.sum(1) / counts.sum(), cost),
        "backprop, Fisher mass of the gate": (mass, cost),
        "backprop, both": (criteria.second_order(grads, counts), cost),
    }


def without_the_loss(problem: Problem, probes: list[Probe]) -> dict:
    """Sums of squared weights, and of what reaches the residual stream (layers: block influence)."""
    anatomy, cost = problem.anatomy, len(problem.batches)
    if probes[0].group is None:
        sizes = torch.zeros(anatomy.num_layers, dtype=torch.float64)
        for matrix in anatomy.matrices:
            sizes[matrix.layer] += problem.bare.get_parameter(matrix.parameter).detach().double().square().sum()
        active = criteria.block_influence(*block_influence(problem))
        layers = [probe.layer for probe in probes]
        return {"magnitude": (sizes[layers], 0), "activation": (active[layers], cost)}
    groups = list(dict.fromkeys(probe.group for probe in probes))
    matrices = [anatomy.matrix_of(group.output) for group in groups]
    moments = input_moments(problem, matrices, full=False)
    sizes, active = {}, {}
    for group, matrix in zip(groups, matrices, strict=True):
        weight = matrix.oriented(problem.bare.get_parameter(matrix.parameter).detach())
        energy = criteria.column_energy(weight, moments.moments.sum(moments.of(matrix)).float())
        sizes[group] = criteria.unit_sums(weight.double().square().sum(0), group.output_width)
        active[group] = criteria.unit_sums(energy, group.output_width)

    def of_each(values: dict) -> torch.Tensor:
        return torch.stack([values[probe.group][list(probe.units)].sum().double() for probe in probes])

    return {"magnitude": (of_each(sizes), 0), "activation": (of_each(active), cost)}


# -- tables ------------------------------------------------------------------------------------------------------------
def table(folder: Path) -> None:
    kinds = {
        kind: torch.load(folder / f"{kind}.pt", weights_only=False)
        for kind in KINDS
        if (folder / f"{kind}.pt").exists()
    }
    print("| estimator | " + " | ".join(f"{kind} ({len(seen['truth'])})" for kind, seen in kinds.items()) + " |")
    print("|---" * (len(kinds) + 1) + "|")
    names = list(dict.fromkeys(name for seen in kinds.values() for name in seen["estimates"]))
    print(f"| held-out, halves | {' | '.join(f'{halves(seen):.2f}' for seen in kinds.values())} |")
    for name in names:
        cells = []
        for seen in kinds.values():
            values, forwards = seen["estimates"][name]
            rho, error = jackknifed(lambda t, v=values: spearman(v, t), seen["truth"], seen["counts"])
            cells.append(f"{rho:.2f} ± {error:.2f} ({forwards})")
        print(f"| {name} | {' | '.join(cells)} |")
    print(
        "\n| adaptive probing | units alike | forwards, of exhaustive | loss given away per contest | open, of "
        "contests |"
    )
    print("|---" * 5 + "|")
    for kind, seen in kinds.items():
        first, *_ = runs = [raced(seen, order) for order in orders_of(len(seen["counts"]))]
        for name, some in (("as measured", [first]), (f"mean of {len(runs)} orders", runs)):
            alike, share, lost, still = (sum(values) / len(some) for values in zip(*some, strict=True))
            told = f"{alike:.1%} | {share:.1%} | {lost:.5f} | {still:.1f} of {len(seen['removed'])}"
            print(f"| {kind}, {name} | {told} |")


def spearman(one: torch.Tensor, other: torch.Tensor) -> float:
    """Correlation of ranks (ties by position)."""
    ranks = torch.stack([values.argsort(stable=True).argsort().double() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


def jackknifed(of: Callable[[torch.Tensor], float], truth: torch.Tensor, counts: torch.Tensor) -> tuple[float, float]:
    """A figure of the mean losses, and its standard error from leaving each sequence out in turn."""
    total, each = truth.sum(1), []
    for column, count in zip(truth.t(), counts, strict=True):
        each.append(of((total - column) / (counts.sum() - count)))
    left_out, number = torch.tensor(each, dtype=torch.float64), len(counts)
    return of(total / counts.sum()), float((left_out.var(correction=0) * (number - 1)).sqrt())


def halves(seen: dict) -> float:
    return spearman(seen["truth"][:, 0::2].sum(1), seen["truth"][:, 1::2].sum(1))


ORDERS = 100


def orders_of(number: int) -> list[torch.Tensor]:
    """As measured, and at random: which sequences come first is chance."""
    draw = torch.Generator().manual_seed(0)
    return [torch.arange(number), *(torch.randperm(number, generator=draw) for _ in range(ORDERS - 1))]


def raced(seen: dict, order: torch.Tensor) -> tuple[float, float, float, float]:
    """Of a race on the sequences in this order: the share of units on which it and all sequences agree, of the forwards
    that all take; by how much what it removes costs more on all sequences, per contest; open contests."""
    truth, counts, contests = seen["truth"][:, order], seen["counts"][order], seen["removed"]

    def look(problem: Problem, asked: list[Probe], *, without: object = ()) -> Measured:
        columns = [int(batch["number"]) for batch in problem.batches]
        rows = [probe.layer for probe in asked]
        return Measured(truth[rows][:, columns], counts[columns], counts[columns], len(rows) * len(columns))

    batches = [{"number": torch.tensor([number])} for number in range(len(counts))]
    problem = Problem(None, None, None, batches, None, None)
    found = successive_elimination(problem, [Probe(row) for row in range(len(truth))], contests, look=look)
    exact, wrong, lost = confidence.ratio_mean(truth, counts)[0], 0, 0.0
    for contest in contests:
        members = torch.tensor(contest.probes)
        best = members[exact[members].argsort(stable=True)[: contest.removed]]
        gone = members[found.place[members] < contest.removed]
        wrong += len(set(best.tolist()) ^ set(gone.tolist()))
        lost += float(exact[gone].sum() - exact[best].sum())
    return 1 - wrong / len(truth), found.forwards / found.exhaustive, lost / len(contests), found.open


if __name__ == "__main__":
    main()
