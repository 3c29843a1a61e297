"""What the layer solver knows of every weight: the Gram matrix of its inputs and the energy of its rows, for all layers
at once or for as many at a time as there is room for.

At once, one pass over the data is enough. A few layers at a time, each group reads what the layers before it give as
they are by then, solved or not, and its Gram matrices go before the next group's come. The loss is then listened to
first, at the model as it was: a backward pass leaves a number for each token and weight, and no sum larger than a
row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from tinygn_dist.backends.pieces import Job
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.gradient_energy import LossMoments, TokenWeights, loss_moments
from tinygn_dist.estimate.input_moments import InputMoments, add_inputs, complete, input_hooks, input_moments
from tinygn_dist.estimate.output_probes import output_energies
from tinygn_dist.estimate.overflow import refuse_overflow
from tinygn_dist.estimate.partial_forward import PrefixCache, run_layers
from tinygn_dist.estimate.problem import Problem, batch_size
from tinygn_dist.estimate.saved_moments import in_parts
from tinygn_dist.maths.sums import fill_below
from tinygn_dist.models.anatomy import Anatomy, Matrix
from tinygn_dist.models.objective import real_tokens

PLAIN, PLAIN_NM = 0.0, 4.0
"""What every token weighs in a loss-aware Hessian beside its energy (mean 1). Where weights of a row compete with each
other alone, little of the energy is best. Measured on SmolLM2-135M (docs/results.md)."""

BUDGET_SEQUENCES = 16
"""from which budgets are taken, at least, where Gram matrices are measured for them alone"""


OUTPUT_SEQUENCES = 2
"""on which each layer's output is moved where no gradient is taken"""


@dataclass(frozen=True)
class HessianOptions:
    """What is measured. room_gib: for Gram matrices on each rank. backprop: tokens and rows are weighed by gradient
    energy. plain: what every token weighs beside it. competing: rows' energies are wanted, by output probes where
    there is no backprop. name: of this measurement among those of a run, under which it is saved on the way."""

    room_gib: float = 16
    backprop: bool = True
    plain: float = PLAIN
    competing: bool = False
    name: str = ""


class Hessians(Protocol):
    """jobs: of one group of layers after the other, from the first to the last, with complete moments on the rank that
    will solve each: a Gram matrix in fp32, then the energies (out,) of each matrix's rows. They are to be used up
    before the next group is asked for. solving: whether the caller changes the weights of a group before it asks for
    the next; else fewer sequences may do, as for budgets. notes: for the report."""

    notes: tuple[str, ...]

    def jobs(self, *, solving: bool) -> Iterator[list[Job]]: ...


class Group(NamedTuple):
    """Consecutive layers, and what of them is pruned."""

    layers: range
    matrices: tuple[Matrix, ...]


def hessians(problem: Problem, matrices: Sequence[Matrix], options: HessianOptions) -> Hessians:
    """Every statistic is of the model as it is now, but for the inputs of later groups (see `Hessians.jobs`)."""
    groups = layer_groups(problem.anatomy, matrices, options.room_gib)
    if len(groups) == 1:
        return _AtOnce(problem, matrices, options)
    return _InGroups(problem, groups, options)


def layer_groups(anatomy: Anatomy, matrices: Sequence[Matrix], room_gib: float) -> list[Group]:
    """As many consecutive layers in each group as have room for their Gram matrices, at least one.

    Raises UserError where all have to be there at once and do not fit.
    """
    needed = gram_gib(matrices)
    if needed <= room_gib:
        return [Group(range(max(anatomy.num_layers, 1)), tuple(matrices))]
    if not anatomy.layers_path:
        raise UserError(
            f"prune.solver.gram_gib {room_gib:g} and {needed:.3g} GiB of Gram matrices, which this kind of model "
            "needs at once: it has no one list of layers that can run by themselves; raise prune.solver.gram_gib to "
            f"{needed:.3g}, or use criterion wanda"
        )
    groups: list[list[int]] = []
    used = 0.0
    for layer in range(anatomy.num_layers):
        more = gram_gib([matrix for matrix in matrices if matrix.layer == layer])
        if groups and (more == 0 or used + more <= room_gib):
            groups[-1].append(layer)
            used += more
        else:
            groups.append([layer])
            used = more
    return [Group(range(g[0], g[-1] + 1), tuple(t for t in matrices if t.layer in g)) for g in groups]


def gram_gib(matrices: Sequence[Matrix]) -> float:
    """fp64, one for each matrix; those that share an input may share one."""
    return sum(8 * matrix.shape[1] ** 2 for matrix in matrices) / 2**30


class _AtOnce:
    notes: tuple[str, ...] = ()

    def __init__(self, problem: Problem, matrices: Sequence[Matrix], options: HessianOptions) -> None:
        if options.backprop:
            found = in_parts(
                problem,
                f"loss {options.name}",
                lambda some: loss_moments(some, matrices, options.plain),
                LossMoments(),
            )
            self._jobs = [Job((t,), [found.grams.pop(t.name), found.rows.pop(t.name)], _cost([t])) for t in matrices]
            problem.backend.sum_for_jobs(self._jobs)
            _round(problem, self._jobs)
            return
        name = f"inputs {options.name}"
        found = in_parts(problem, name, lambda some: input_moments(some, matrices, full=True), InputMoments())
        self._jobs = _by_source(matrices, found)
        problem.backend.sum_for_jobs(self._jobs)
        _round(problem, self._jobs)
        _add_energies(self._jobs, _probed(problem, matrices, options))

    def jobs(self, *, solving: bool) -> Iterator[list[Job]]:
        yield self._jobs


class _InGroups:
    def __init__(self, problem: Problem, groups: Sequence[Group], options: HessianOptions) -> None:
        self._problem, self._groups = problem, groups
        matrices = [matrix for group in groups for matrix in group.matrices]
        self.notes = (
            f"the Gram matrices of all layers take {gram_gib(matrices):.3g} GiB: {len(groups)} groups of layers were "
            f"solved one after another, to stay within prune.solver.gram_gib {options.room_gib:g}",
        )
        self._weights = TokenWeights(problem, matrices, options.plain) if options.backprop else None
        self._energies = {} if self._weights else _probed(problem, matrices, options)

    def jobs(self, *, solving: bool) -> Iterator[list[Job]]:
        starts: list[PrefixCache] = []
        problem = self._problem if solving else self._problem.first(_for_budgets(self._problem))
        for group in self._groups:
            jobs, ends = self._measured(problem, group, starts)
            yield jobs
            for job in jobs:
                job.moments.clear()
            if solving and group is not self._groups[-1]:
                ends = run_layers(problem, group.layers, starts)
            starts = ends

    def _measured(
        self, problem: Problem, group: Group, starts: list[PrefixCache]
    ) -> tuple[list[Job], list[PrefixCache]]:
        found, inputs = InputMoments(), {}
        if self._weights:
            for matrix in group.matrices:
                found.moments.reserve(matrix.name, (matrix.shape[1],) * 2, problem.backend.device)

        def seen(number: int, batch: dict) -> None:
            weigh = self._weights and (lambda name, tokens, call: self._weights.of(name, number, tokens, call))
            add_inputs(found, inputs, real_tokens(batch), True, weigh)
            inputs.clear()

        hooks = input_hooks(problem.bare, group.matrices, inputs)
        ends = run_layers(problem, group.layers, starts, hooks, seen)
        complete(found, problem)
        jobs = _by_source(group.matrices, found)
        if self._weights:
            for job in jobs:
                job.moments.append(self._weights.rows.sum(job.matrices[0].name).clone())
        problem.backend.sum_for_jobs(jobs)
        _round(problem, jobs)
        _add_energies(jobs, self._energies)
        return jobs, ends


def _for_budgets(problem: Problem) -> int:
    """Sequences that say enough of how large the saliencies of one layer are beside another's."""
    return max(BUDGET_SEQUENCES, sum(map(batch_size, problem.batches)) // 4)


def _round(problem: Problem, jobs: Sequence[Job]) -> None:
    """Whole fp32 Gram matrices on the ranks that have them, one after the other: there is never room for all in fp64.

    A collective. UserError on every rank where one has no value: the loss is looked at, gradients are not.
    """
    bad: str | None = None
    with problem.backend.together("summing what weights read"):
        for job in jobs:
            if job.moments[0].numel():
                job.moments[0] = fill_below(job.moments[0]).float()
                if bad is None and not all(bool(moment.isfinite().all()) for moment in job.moments):
                    bad = f"what {job.matrices[0].name} reads or its gradients hold NaN or inf, though no loss does"
    refuse_overflow(problem, bad, "use --estimator finite-difference, which takes no gradient, or another model.dtype")


def _probed(problem: Problem, matrices: Sequence[Matrix], options: HessianOptions) -> dict[str, float]:
    """Energy of each matrix by forward passes alone, where budgets ask for it."""
    if not options.competing:
        return {}
    energies = output_energies(problem.first(OUTPUT_SEQUENCES), matrices)
    return {matrix.name: float(energy) for matrix, energy in zip(matrices, energies, strict=True)}


def _add_energies(jobs: Sequence[Job], energies: dict[str, float]) -> None:
    """By forward passes alone a layer's energy is known as a whole, and its rows are alike."""
    for job in jobs if energies else ():
        job.moments += [job.moments[0].new_full((t.shape[0],), energies[t.name] / t.shape[0]) for t in job.matrices]


def _by_source(matrices: Sequence[Matrix], inputs: InputMoments) -> list[Job]:
    """Targets grouped by the input whose Gram matrix they share, and the cost of factorising and sweeping it."""
    by_source: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        by_source.setdefault(inputs.of(matrix), []).append(matrix)
    return [Job(tuple(group), [inputs.moments.pop(source)], _cost(group)) for source, group in by_source.items()]


def _cost(matrices: Sequence[Matrix]) -> float:
    num_inputs = matrices[0].shape[1]
    return sum(t.shape[0] for t in matrices) * num_inputs**2 + 2.0 * num_inputs**3
