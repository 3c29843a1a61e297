"""Sparsity and learning rate as functions of the step, against closed forms."""

from __future__ import annotations

import math

import pytest

from tinygn_dist.errors import UserError
from tinygn_dist.maths.schedules import Growth, Plan, make_plan, sparsity_between, swapped_share, warmup_linear


def plan(kind: str = "cubic", total: int = 100, every: int = 10, **changes: object) -> Plan:
    asked = dict(first=0.2, final=0.8, freeze=0.25) | changes
    final = asked.pop("final")
    return make_plan(Growth(kind, every, **asked), total, final)


def test_every_kind_starts_at_the_first_and_ends_at_the_final_sparsity():
    for kind in ("linear", "cubic", "iterative"):
        made = plan(kind)
        assert made.levels[0] == pytest.approx(0.2) and made.levels[-1] == 0.8
        assert list(made.levels) == sorted(made.levels)
        assert len(made.levels) == len(made.updates) + 1


def test_the_curves():
    assert sparsity_between("linear", 0.2, 0.8, 0.5) == pytest.approx(0.5)
    assert sparsity_between("cubic", 0.2, 0.8, 0.5) == pytest.approx(0.8 - 0.6 / 8)
    # the same share of what is left each time: densities 0.8, sqrt(0.8 * 0.2), 0.2
    assert sparsity_between("iterative", 0.2, 0.8, 0.5) == pytest.approx(1 - math.sqrt(0.16))


def test_nothing_changes_in_the_last_part():
    made = plan(total=100, every=10, freeze=0.25)
    assert made.updates == (10, 20, 30, 40, 50, 60, 70)
    assert made.level_after(9) == pytest.approx(0.2) and made.level_after(10) == made.levels[1]
    assert made.level_after(70) == made.level_after(100) == 0.8


def test_the_first_jump_is_half_of_the_target_by_default_and_never_beyond_it():
    assert plan(first=None).levels[0] == pytest.approx(0.4)
    assert plan(first=0.9).levels == (0.8,) * 8


def test_one_shot_has_no_update_unless_weights_are_swapped():
    assert plan("one-shot") == Plan(100, (), (0.8,))
    assert plan("one-shot", swaps=True).levels == (0.8,) * 8


def test_too_few_steps_for_an_update_are_refused():
    with pytest.raises(UserError, match="every 30 leaves no update in the first 50% of 50 optimizer steps"):
        plan(total=50, every=30, freeze=0.5)


def test_iterative_warms_up_anew_after_every_update():
    made = plan("iterative", total=40, every=10, freeze=0.5)
    assert made.updates == (10, 20) and [len(r) for r in made.rounds()] == [10, 10, 20]
    assert [made.learning_rate(step) for step in (0, 10, 20)] == [1.0, 1.0, 0.5]
    assert made.learning_rate(19) == warmup_linear(9, 10) and made.learning_rate(39) == warmup_linear(19, 20)
    assert plan("cubic", total=40).learning_rate(20) == warmup_linear(20, 40)


def test_the_swapped_share_decays_by_a_cosine_or_not_at_all():
    assert swapped_share(0.3, 0, 100, decays=True) == pytest.approx(0.3)
    assert swapped_share(0.3, 50, 100, decays=True) == pytest.approx(0.15)
    assert swapped_share(0.3, 100, 100, decays=True) == pytest.approx(0)
    assert swapped_share(0.3, 100, 100, decays=False) == 0.3
