"""The backend contract on real processes: sums mean what they say, work is dealt once, errors reach every rank."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch

from tests import plain, tiny
from tests.ranks import RankFailed, Ranks
from tinygn_dist.backends.base import Backend
from tinygn_dist.backends.pieces import Edited, Job
from tinygn_dist.errors import UserError


def _data_sums(backend: Backend) -> list[list[float]]:
    tensors = [torch.full((3,), float(backend.rank + 1)), torch.tensor([10.0**backend.rank], dtype=torch.float64)]
    backend.sum_over_data(tensors)
    return [tensor.tolist() for tensor in tensors]


def test_sum_over_data_adds_every_rank_once(ranks: Ranks):
    n = ranks.size
    for sums in ranks.call(_data_sums):
        assert sums == [[n * (n + 1) / 2] * 3, [sum(10.0**rank for rank in range(n))]]


def _facts_about_weights(backend: Backend) -> dict[str, Any]:
    problem = tiny.problem("llama", backend)
    size, total = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    spans = []
    for matrix in problem.anatomy.matrices:
        shard = backend.shard(problem.model, matrix)
        size += shard.weight.numel()
        total += float(shard.weight.double().sum())
        spans.append((matrix.name, shard.offset, shard.offset + shard.weight.numel()))
    return {
        "size": int(backend.sum_over_shards(size)),
        "total": float(backend.sum_over_shards(total)),
        "spans": spans,
    }


def test_sum_over_shards_counts_every_weight_once(ranks: Ranks):
    """Under DDP every rank holds every weight: a bare all_reduce would multiply by the number of ranks."""
    model = tiny.build("llama")
    weights = [p for n, p in model.named_parameters() if "proj" in n]
    found = ranks.call(_facts_about_weights)
    for facts in found:
        assert facts["size"] == sum(w.numel() for w in weights)
        assert facts["total"] == pytest.approx(sum(float(w.detach().double().sum()) for w in weights), rel=1e-9)
    seen: dict[str, set[int]] = {}
    for name, start, stop in (span for facts in found for span in facts["spans"]):
        seen.setdefault(name, set()).update(range(start, stop))
    assert all(seen[n] == set(range(p.numel())) for n, p in model.named_parameters() if "proj" in n)


def _shares(backend: Backend) -> list[list[tuple[int, bool]]]:
    return [backend.dealt(range(count)) for count in (0, 1, 2, 3, 5, 8, 17)]


def test_share_gives_every_item_to_one_rank(ranks: Ranks):
    found = ranks.call(_shares)
    for index, count in enumerate((0, 1, 2, 3, 5, 8, 17)):
        real = [item for shares in found for item, counts in shares[index] if counts]
        assert sorted(real) == list(range(count))
        assert max(len(s[index]) for s in found) - min(len(s[index]) for s in found) <= 1


COSTS = [[5.0] * 7, [100.0, 1, 1, 1, 1, 1], [3.0, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [0.0, 0.0], []]


def _deals(backend: Backend) -> list[list[int]]:
    return [backend.owners_of(costs) for costs in COSTS]


def test_deal_is_balanced_and_the_same_on_every_rank(ranks: Ranks):
    found = ranks.call(_deals)
    assert all(deals == found[0] for deals in found)
    for costs, owners in zip(COSTS, found[0], strict=True):
        assert len(owners) == len(costs) and all(0 <= owner < ranks.size for owner in owners)
        loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in range(ranks.size)]
        best = max(sum(costs) / ranks.size, *costs, 0.0, 0.0)
        assert max(loads) <= best * 4 / 3 + 1e-9  # the guarantee of largest-first (Graham 1969)


def _solved(backend: Backend, family: str) -> dict[str, Any]:
    """Each job's solution depends on data of all ranks and on the whole weight."""
    problem = tiny.problem(family, backend)
    matrices = problem.anatomy.matrices
    jobs = [
        Job((matrix,), [torch.full((2, 2), float(backend.rank + 1), dtype=torch.float64)], float(matrix.numel))
        for matrix in matrices[:-2]
    ]
    jobs.append(Job(matrices[-2:], [torch.full((1,), 10.0**backend.rank, dtype=torch.float64)], 1.0))
    backend.sum_for_jobs(jobs)
    solved_here = []

    def solve(job: Job, weights: list[torch.Tensor]) -> list[Edited]:
        solved_here.append([matrix.name for matrix in job.matrices])
        assert [tuple(w.shape) for w in weights] == [t.shape for t in job.matrices], "not the whole matrix"
        keeps = [weight > 0 for weight in weights]
        return [
            Edited(
                (weight * float(job.moments[0].sum())).masked_fill(~keep, 0),
                {"mask": keep, "largest": weight.max(1).values, "codes": keep.to(torch.int8)},
            )
            for weight, keep in zip(weights, keeps, strict=True)
        ]

    extras = backend.map_matrices(problem.model, jobs, solve)
    return {
        "solved": solved_here,
        "state": plain.full_state(backend, problem.model),
        "masks": {name: each["mask"] for name, each in extras.items()},
        "codes": {name: each["codes"] for name, each in extras.items()},
        "largest": {name: each["largest"].cpu() for name, each in extras.items()},
        "offsets": {t.name: backend.shard(problem.model, t).offset for t in matrices},
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_map_targets_gives_every_rank_the_solution_of_one(ranks: Ranks, family: str):
    n, dense = ranks.size, tiny.problem(family)
    dense.model.cpu()
    found = ranks.call(_solved, family)
    factor = {t.name: n * (n + 1) / 2 * 4 for t in dense.anatomy.matrices[:-2]}
    factor |= {t.name: sum(10.0**rank for rank in range(n)) for t in dense.anatomy.matrices[-2:]}
    names = [name for facts in found for job in facts["solved"] for name in job]
    assert sorted(names) == sorted(factor)  # each solved by exactly one rank
    for facts in found:
        for matrix in dense.anatomy.matrices:
            weight = dense.model.get_parameter(matrix.name).detach()
            assert torch.equal(facts["masks"][matrix.name], weight > 0)
            assert torch.equal(facts["codes"][matrix.name], (weight > 0).to(torch.int8))
            assert torch.equal(facts["largest"][matrix.name], matrix.oriented(weight).max(1).values), "not whole"
            torch.testing.assert_close(facts["state"][matrix.name], (weight * factor[matrix.name]).clamp(min=0))
        untouched = [name for name in facts["state"] if name not in factor]
        assert all(
            torch.equal(facts["state"][n], dict(dense.model.named_parameters())[n])
            for n in untouched
            if n in dict(dense.model.named_parameters())
        )


def _full_state(backend: Backend) -> dict[str, torch.Tensor]:
    return plain.full_state(backend, tiny.problem("llama-tied", backend).model)


def test_full_tensors_are_the_whole_model_with_tied_weights_once(ranks: Ranks):
    wanted, found = dict(tiny.build("llama-tied").named_parameters()), ranks.call(_full_state)[0]
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())


def _masked(backend: Backend, family: str) -> tuple[dict[str, torch.Tensor], int]:
    problem = tiny.problem(family, backend)
    matrix = problem.anatomy.matrices[1]
    shard = backend.shard(problem.model, matrix)
    shard.weight.fill_(-1.0)
    indices = torch.arange(shard.weight.numel(), device=shard.weight.device).view(shard.weight.shape) + shard.offset
    backend.write_mask(problem.model, matrix, indices % 3 == 0)
    return plain.full_state(backend, problem.model)[matrix.name]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_write_mask_leaves_plain_zeros(ranks: Ranks, family: str):
    weight = ranks.call(_masked, family)[0].flatten()
    kept = torch.arange(weight.numel()) % 3 == 0
    assert (weight[kept] == -1).all() and (weight[~kept] == 0).all()
    assert not torch.signbit(weight[~kept]).any()


# -- agreement and errors ----------------------------------------------------------------------------------------------
def _everyone(backend: Backend) -> list[Any]:
    return backend.everyone({"rank": backend.rank, "big": "x" * backend.rank})


def test_everyone_is_in_rank_order(ranks: Ranks):
    assert ranks.call(_everyone) == [[{"rank": r, "big": "x" * r} for r in range(ranks.size)]] * ranks.size


def message_of(work, *arguments: Any) -> str | None:
    try:
        work(*arguments)
    except UserError as error:
        return str(error)
    return None


def _agreements(backend: Backend) -> list[str | None]:
    odd = "b" if backend.rank == backend.num_ranks - 1 else "a"
    return [message_of(backend.agree, "same", "the weather"), message_of(backend.agree, odd, "the weather")]


def test_agree_raises_the_same_line_everywhere(ranks: Ranks):
    for fine, told in ranks.call(_agreements):
        assert fine is None
        if ranks.size == 1:
            assert told is None
        else:
            assert f"ranks disagree about the weather: rank 0 has a, rank {ranks.size - 1} has b" in told


def _together(backend: Backend, failing: list[int], kind: type[Exception]) -> tuple[str, str]:
    try:
        with backend.together("reading tea leaves"):
            if backend.rank in failing:
                raise kind("the cup is empty")
    except Exception as error:
        backend.barrier()  # nobody hangs: everyone gets here
        return type(error).__name__, str(error)
    backend.barrier()
    return "", ""


def test_together_without_a_failure(ranks: Ranks):
    assert ranks.call(_together, [], UserError) == [("", "")] * ranks.size


def test_together_tells_every_rank_of_one_failure(pair: Ranks):
    for failing in ([0], [1]):
        for name, told in pair.call(_together, failing, UserError):
            assert name == "UserError"
            assert told == f"reading tea leaves failed on rank {failing[0]}: the cup is empty"


def test_together_keeps_the_plain_message_when_all_fail(ranks: Ranks):
    assert ranks.call(_together, list(range(ranks.size)), UserError) == [("UserError", "the cup is empty")] * ranks.size


def test_together_shows_a_bug_where_it_happened_and_a_line_elsewhere(pair: Ranks):
    here, there = reversed(pair.call(_together, [1], ZeroDivisionError))
    assert here == ("ZeroDivisionError", "the cup is empty")
    assert there[0] == "UserError" and "rank 1" in there[1]


def _main_first(backend: Backend, failing: bool) -> tuple[str | None, float, float]:
    start = time.monotonic()

    def work() -> float:
        time.sleep(0.3 if backend.is_main else 0)
        if failing and backend.is_main:
            raise UserError("the file is missing")
        return time.monotonic()

    def all_of_it() -> None:
        nonlocal done
        with backend.together("reading the file"):
            done = backend.main_first(work)

    done = math.inf
    told = message_of(all_of_it)
    return told, done, time.monotonic() - start


def test_the_main_rank_goes_first(ranks: Ranks):
    found = ranks.call(_main_first, False)
    assert all(told is None for told, _, _ in found)
    assert all(found[0][1] <= done for _, done, _ in found)


def test_a_failure_while_the_others_wait_their_turn_does_not_hang(pair: Ranks):
    """The main rank raises before the others started: they must hear of it now, not at the collective timeout."""
    for told, _, seconds in pair.call(_main_first, True, seconds=90):
        assert told is not None and "the file is missing" in told
        assert seconds < 20


def _one_raises(backend: Backend) -> None:
    if backend.rank == 1:
        raise RuntimeError("the disk of this rank is gone")
    backend.barrier()


def test_the_rig_itself_reports_a_rank_that_raises(pair: Ranks):
    with pytest.raises(RankFailed, match="the disk of this rank is gone"):
        pair.call(_one_raises)
    assert pair.call(_everyone)[0][1]["rank"] == 1  # a fresh group works again
