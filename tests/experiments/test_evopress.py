"""Budgets by search: counts that never change, a loss that torch gives, a choice that other sequences must confirm."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from tests import tiny
from tinygn_dist.config import PruneConfig
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.hessians import measure
from tinygn_dist.evaluate.quality import mean_loss
from tinygn_dist.experiments import evopress
from tinygn_dist.experiments.evopress import REACH, _step, from_dense, hold_out, search
from tinygn_dist.prune.sparsity import sparsify
from tinygn_dist.prune.sparsity.masks import Masks

HALF = PruneConfig(pattern="unstructured", sparsity=0.5)


def quiet_setting():
    """What layer 1's MLP writes is small, so its weights should lose more than their share."""
    setting = tiny.setting("llama", count=12, size=2, length=16)
    with torch.no_grad():
        setting.bare.get_submodule("model.layers.1.mlp.down_proj").weight.mul_(1e-2)
    return setting


def searched(setting, **asked: int):
    """A search from equal shares."""
    kept, held_out = setting.split(16)
    targets = setting.anatomy.targets
    measured, equal = measure(kept, targets, HALF), {target.name: target.numel // 2 for target in targets}
    masks = search(
        hold_out(held_out),
        targets,
        equal,
        lambda counts: sparsify._solved(kept, measured, HALF, counts),
        seed=1,
        **asked,
    )
    return Masks(targets, masks)


def test_zeros_move_to_where_the_loss_does_not_hear_them() -> None:
    setting = quiet_setting()
    _, held_out = setting.split(16)
    reference = from_dense(held_out)
    found = searched(setting, generations=12)
    kept, sizes = found.kept(setting.backend), {t.name: t.numel for t in setting.anatomy.targets}
    assert sum(kept.values()) == sum(sizes.values()) // 2
    for target in setting.anatomy.targets:  # the weights are those of the masks, at one of the levels
        weight = setting.bare.get_parameter(target.parameter)
        assert not weight[~found.by_name[target.name]].any()
        level = (target.numel // 2 - kept[target.name]) / _step(target)
        assert level == int(level) and abs(level) <= REACH
    quiet = [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    assert sum(kept[name] for name in quiet) < 0.5 * sum(sizes[name] for name in quiet)
    wanted, equal = mean_loss(reference, "here"), quiet_setting()
    measured = measure(equal.split(16)[0], equal.anatomy.targets, HALF)
    at_dense = from_dense(equal.split(16)[1])
    sparsify._solved(equal, measured, HALF, {name: size // 2 for name, size in sizes.items()})
    assert wanted < mean_loss(at_dense, "equal shares")
    assert "not taken" not in setting.notes[-1] and f"of {len(sizes)} weights moved" in setting.notes[-1]


def test_what_other_sequences_do_not_confirm_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense model is made to look worst on the sequences that check."""
    setting = quiet_setting()
    plain, calls, checking = evopress._Library.loss, Counter(), setting.batches[-1]["input_ids"]

    def loss(self, levels, where) -> float:
        found, checks = plain(self, levels, where), torch.equal(where.batches[-1]["input_ids"], checking)
        calls[checks] += 1
        return 1e9 if checks and any(levels.values()) else found

    monkeypatch.setattr(evopress._Library, "loss", loss)
    found = searched(setting, generations=3).kept(setting.backend)
    assert all(found[target.name] == target.numel - target.numel // 2 for target in setting.anatomy.targets)
    assert setting.notes[-1].endswith("not taken") and calls[True] == 2 and calls[False] > 20


def test_the_same_seed_gives_the_same_budgets() -> None:
    one, other = (searched(quiet_setting(), generations=3) for _ in range(2))
    assert all(torch.equal(mask, other.by_name[name]) for name, mask in one.by_name.items())


@pytest.mark.parametrize("family", ["llama", "bert-classifier"])
def test_divergence_from_the_dense_model(family: str) -> None:
    """KL(dense || now) per counted token, in float64 from logits."""
    setting = tiny.setting(family)
    reference = from_dense(setting)
    assert mean_loss(reference, "dense") == pytest.approx(0, abs=1e-4)

    def logits() -> list[torch.Tensor]:
        with torch.no_grad():
            inputs = [{k: v for k, v in b.items() if k != "labels"} for b in setting.batches]
            return [setting.model(**each).logits.double() for each in inputs]

    dense = logits()
    with torch.no_grad():
        for target in setting.anatomy.targets:
            setting.bare.get_parameter(target.parameter).mul_(0.8)
    total = count = 0
    for before, after, batch in zip(dense, logits(), setting.batches, strict=True):
        if family == "llama":
            real = batch["labels"][:, 1:] != -100
            before, after = before[:, :-1][real], after[:, :-1][real]
        total += float(F.kl_div(after.log_softmax(-1), before.log_softmax(-1), reduction="sum", log_target=True))
        count += len(before)
    with torch.no_grad():
        found = [reference.objective(setting.model, batch) for batch in reference.batches]
    assert sum(int(one.count.sum()) for one in found) == count
    assert float(sum(one.total.sum() for one in found)) == pytest.approx(total, rel=0.02)  # the dense logits are bf16


def test_the_last_pass_is_still_compared_with_the_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """In two passes the first divergence is that of the finished model, about what two passes without a search leave."""
    setting, options = tiny.setting("llama", count=8), HALF.model_copy(update={"sparsity": 0.75})
    targets = setting.anatomy.targets
    reference = evopress.hold_out(setting.split(4)[1]).choosing
    kept, _ = setting.split(4)
    sparsify.sparsify(kept, targets, options)
    wanted = mean_loss(reference, "two passes")
    again, seen = tiny.setting("llama", count=8), []
    plain = evopress._Library.loss
    monkeypatch.setattr(
        evopress._Library, "loss", lambda *asked: seen.append(plain(*asked)) or seen[-1]
    )  # fmt: skip
    asked = {"allocation": "search", "search_generations": 1, "search_samples": 4}
    sparsify.sparsify(again, targets, options.model_copy(update=asked))
    assert seen[0] == pytest.approx(wanted, rel=1e-5)


def test_search_from_the_options_and_its_refusal() -> None:
    setting = tiny.setting("llama", count=6)
    options = HALF.model_copy(update={"allocation": "search", "search_generations": 1, "search_samples": 4})
    targets = setting.anatomy.targets
    kept = sparsify.sparsify(setting, targets, options).kept(setting.backend)
    assert sum(kept.values()) == sum(target.numel for target in targets) // 2
    assert "allocation by search" in setting.notes[-1]
    with pytest.raises(
        UserError, match="allocation search solves all layers from one measurement, .* raise prune.gram_"
    ):
        sparsify.check(setting.anatomy, targets, options.model_copy(update={"gram_gib": 0.0}))
