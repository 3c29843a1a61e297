"""Choosing and removing units in one process: scores, greedy order, the mixes tried, and forward passes only."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from tests import plain, tiny
from tests.removing import plan_mixes, remove_units
from tinygn_dist.config import PruneConfig
from tinygn_dist.errors import UserError
from tinygn_dist.maths.counts import Mix, largest_of
from tinygn_dist.maths.solve import least_squares
from tinygn_dist.models.anatomy import read_anatomy
from tinygn_dist.prune.sparsity.levels import Level
from tinygn_dist.prune.sparsity.mask_selection import check_nm, choose_masks
from tinygn_dist.prune.sparsity.sparsify import sparsify
from tinygn_dist.prune.structured import layers_heads_channels as units
from tinygn_dist.prune.structured.probing import UnitScores
from tinygn_dist.prune.structured.removal import Trial
from tinygn_dist.prune.structured.scores import UnitScorer, score_units
from tinygn_dist.prune.structured.shrink import smaller_config
from tinygn_dist.prune.structured.trials import Trials


@pytest.fixture
def no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any backward pass is an error: forward-only means the memory of inference."""

    def refuse(*_, **__):
        raise AssertionError("a backward pass in a forward-only method")

    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "grad", refuse)


def mean_loss(model: torch.nn.Module, batches: list, family: str) -> float:
    counts = sum(int(plain.loss(model, b, family).count.sum()) for b in batches)
    return float(plain.total_losses(model, batches, family).sum()) / counts


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_head_scores_are_losses_per_token_without_the_group(backend, family: str):
    problem = tiny.problem(family, backend)
    scores = score_units(problem, Mix(heads=1), PruneConfig(pattern="heads", probes={"adaptive": False}), None)
    base = mean_loss(problem.model, problem.batches, family)
    for layer, unit in itertools.product(range(3), range(2)):
        changed = plain.without_units(problem.model, family, "heads", {layer: [unit]})
        wanted = mean_loss(changed, problem.batches, family) - base
        row = next(r for r in scores.table if (r["layer"], r["unit"]) == (layer, unit))
        assert row["score"] == pytest.approx(wanted, abs=2e-5) and row["std_error"] > 0
    first, second = scores.by_group["heads", 0].tolist()
    rows = {r["unit"]: r["score"] for r in scores.table if r["layer"] == 0}
    assert (first < second) == (rows[0] < rows[1])


def test_adaptive_probing_spends_less_within_its_budget(backend):
    problem = tiny.problem("llama", backend, count=6)
    asked = PruneConfig(pattern="layers", probes={"adaptive": True, "forwards": 3})
    scores = score_units(problem, Mix(layers=1), asked, None)
    assert scores.forwards == 3 * 2 and scores.exhaustive == 3 * 6 and len(scores.layer_order) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-classifier"])
def test_layers_go_in_the_order_of_a_brute_force_greedy_search(backend, family: str):
    problem = tiny.problem(family, backend, model=tiny.build(family, num_hidden_layers=3))
    order = score_units(
        problem, Mix(layers=2), PruneConfig(pattern="layers", probes={"adaptive": False}), None
    ).layer_order
    gone: list[int] = []
    for _ in range(2):
        left = [layer for layer in range(3) if layer not in gone]
        losses = {
            layer: mean_loss(plain.without_layers(problem.model, family, [*gone, layer]), problem.batches, family)
            for layer in left
        }
        gone.append(min(losses, key=losses.get))
    assert order == gone


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("criterion", ["removal", "gate", "magnitude", "activation", "random"])
@pytest.mark.parametrize("free", [0, 1, 2])
def test_protected_layers_stay(backend, criterion: str, compensate: bool, free: int):
    protect = tuple(layer for layer in range(3) if layer != free)
    options = PruneConfig(
        pattern="layers", counts={"layers": 1}, criterion=criterion, compensate=compensate, protect=protect
    )
    problem = tiny.problem("llama", backend)
    kept, scores, *_ = remove_units(problem, plan_mixes(problem.anatomy, options), options)
    assert scores.layer_order == [free] and kept.layers == protect


@pytest.mark.parametrize("kind", ["heads", "channels"])
def test_gate_scores_by_forward_passes_are_those_of_backpropagation(backend, kind: str):
    problem = tiny.problem("llama", backend)
    found = []
    for estimator in ("finite-difference", "backprop"):
        options = PruneConfig(pattern=kind, criterion="gate", estimator=estimator)
        mix = Mix(heads=1) if kind == "heads" else Mix(channels=8)
        found.append(torch.cat(list(score_units(problem, mix, options, None).by_group.values())))
    assert torch.corrcoef(torch.stack(found))[0, 1] > 0.999
    torch.testing.assert_close(found[0], found[1], rtol=0.02, atol=2e-4)


CHOICES = [("layers", 0.3), ("heads", 0.1), ("channels", 0.2), ("units", 0.4)]


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "gpt2", "opt", "bert", "vit"])
@pytest.mark.parametrize("pattern, sparsity", CHOICES)
@pytest.mark.parametrize("at_once", [False, True])
def test_the_live_model_computes_what_the_smaller_one_will(
    backend, no_backward, monkeypatch, family: str, pattern: str, sparsity: float, at_once: bool
):
    """After remove_units the dense-shaped model is zeroed, re-fitted and its biases shifted; cutting it must not change
    the outputs; as many units are gone as were planned; the loss told for the chosen mix is the loss of the result,
    where mixes are compared on what they were fitted on because there is one micro-batch, and all is fitted at once (or
    no layer goes)."""
    if at_once:
        monkeypatch.setattr(Trials, "in_two_steps", lambda *_: False)
    if pattern == "heads" and family in tiny.FIXED_HEADS:
        assert not read_anatomy(tiny.build(family), needs_units=True).of_kind("heads")
        return
    problem = tiny.problem(family, backend, count=1, size=6)
    options = PruneConfig(pattern=pattern, sparsity=sparsity, multiple_of=8, probes={"samples": 64})
    candidates = plan_mixes(problem.anatomy, options)
    kept, _, trials, shifts, _ = remove_units(problem, candidates, options)
    with torch.no_grad():  # what the live model lacks until it is cut
        for name, shift in shifts.items():
            problem.model.get_parameter(name).add_(shift)
    small = type(problem.model)(smaller_config(problem.model.config, problem.anatomy, kept)).eval()
    small.load_state_dict(tiny.smaller_state(problem.model.state_dict(), problem.anatomy, kept))
    small.tie_weights()
    gone = [layer for layer in range(3) if layer not in kept.layers]
    shorter = plain.without_layers(problem.model, family, gone)
    for batch in problem.batches:
        wanted = plain.logits(shorter, batch)
        torch.testing.assert_close(plain.logits(small, batch), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    removed = problem.anatomy.total_params - sum(p.numel() for p in small.parameters())
    assert removed >= round(sparsity * sum(problem.anatomy.layer_params))
    for counts in (kept.heads, kept.channels):
        assert len({len(units) for units in counts.values()}) <= 1
    if trials and (at_once or len(kept.layers) == 3):
        best = min(trial.loss for trial in trials)
        assert mean_loss(small, problem.batches, family) == pytest.approx(best, rel=1e-4)
    assert (pattern == "units") == bool(trials)


def test_what_was_tried_before_does_not_change_a_trial(backend):
    """Candidates are undone to the last bit: a mix has the same loss whether others were tried before it or not."""

    def losses(candidates: list[Mix] | None = None) -> dict[Mix, float]:
        problem = tiny.problem("llama", backend, model=tiny.build("llama", num_hidden_layers=6))
        options = PruneConfig(pattern="units", sparsity=0.5, multiple_of=8, probes={"samples": 64})
        _, _, trials, _, _ = remove_units(problem, candidates or plan_mixes(problem.anatomy, options), options)
        return {trial.mix: trial.loss for trial in trials}

    everything = losses()
    assert len(everything) > 2
    largest = {
        max(everything, key=lambda mix, kind=kind: getattr(mix, kind)) for kind in ("layers", "heads", "channels")
    }
    last = max(everything)
    fewer = losses(sorted({last, *largest}))
    assert fewer.keys() < everything.keys()
    assert all(everything[mix] == loss for mix, loss in fewer.items())


@pytest.mark.parametrize("most", [1, 2])
def test_the_report_says_how_many_mixes_were_left_out(backend, most: int):
    problem = tiny.problem("llama", backend, model=tiny.build("llama", num_hidden_layers=6))
    options = PruneConfig(pattern="units", sparsity=0.5, multiple_of=8, most_mixes=most)
    candidates = plan_mixes(problem.anatomy, options)
    kept, _, trials, _, notes = remove_units(problem, candidates, options)
    assert len(trials) == most < len(candidates)
    (note,) = [note for note in notes if "left out" in note]
    assert note.startswith(f"{len(trials)} of the mixes") and f"{len(candidates) - len(trials)} left out" in note
    assert 6 - len(kept.layers) == min(trials, key=lambda trial: trial.loss).mix.layers


@pytest.mark.parametrize(("tokens", "micro_batches"), [(20, 1), (21, 2), (10**6, 3)])
def test_where_mixes_are_tried_few_tokens_rank_the_units(backend, monkeypatch, tokens: int, micro_batches: int):
    """Three micro-batches of two sequences of ten tokens."""
    monkeypatch.setattr(units, "_PROBE_TOKENS", tokens)
    problem = tiny.problem("llama", backend)
    options = PruneConfig(pattern="units", sparsity=0.4, multiple_of=8, probes={"adaptive": False}, compensate=False)
    _, scores, *_ = remove_units(problem, plan_mixes(problem.anatomy, options), options)
    assert scores.forwards == micro_batches * len(scores.table) > 0


@pytest.mark.parametrize(("family", "criterion"), [("llama", "magnitude"), ("opt", "auto"), ("gpt2", "auto")])
@pytest.mark.parametrize(("count", "held", "tried"), [(2, 1, 1), (8, 2, 2), (16, 4, 3), (28, 5, 3)])
@pytest.mark.parametrize("replanned", [False, True])
def test_mixes_are_compared_on_what_they_were_not_fitted_on(
    backend, monkeypatch, family: str, criterion: str, count: int, held: int, tried: int, replanned: bool
):
    """The last quarter of the sequences (of two micro-batches one, and no more than ten here) are held out, and as many
    of them tried as are probed: the loss told for each mix is that of the model that the others alone give, all fitted
    at once, whatever was tried before; what is left in the end is fitted on all. Also where there was one mix, until it
    was looked at more closely."""
    monkeypatch.setattr(units, "_HELD_OUT", 10)
    deeper = {"n_layer" if family == "gpt2" else "num_hidden_layers": 4}
    options = PruneConfig(pattern="units", sparsity=0.3, multiple_of=8, criterion=criterion, probes={"samples": 6})
    monkeypatch.setattr(units.LayerOrder, "score", lambda *_: UnitScores(layer_order=[1, 2]))
    planned = plan_mixes(read_anatomy(tiny.build(family, **deeper), needs_units=True), options)
    largest = largest_of(planned)
    real = least_squares.elimination_order  # how many rounds it has depends on how many go at most: here always as many
    monkeypatch.setattr(
        least_squares, "elimination_order", lambda w, g, n, _, damping: real(w, g, n, n - 1, damping=damping)
    )

    def model_without(mix: Mix | None, batches: slice) -> tuple[torch.nn.Module, list[Trial], list]:
        problem = tiny.problem(family, backend, model=tiny.build(family, **deeper), count=count, size=2)
        whole = list(problem.batches)
        problem = replace(problem, batches=whole[batches])
        asked, later = ([mix], None) if mix else (planned, None)
        if replanned and not mix:
            asked, later = [largest], lambda best: planned
        with pytest.MonkeyPatch.context() as patched:
            if batches != slice(None):
                patched.setattr(Trials, "in_two_steps", lambda *_: False)
            kept, _, trials, shifts, _ = remove_units(problem, asked, options, later)
        with torch.no_grad():
            for name, shift in shifts.items():
                problem.model.get_parameter(name).add_(shift)
        small = type(problem.model)(smaller_config(problem.model.config, problem.anatomy, kept)).eval()
        small.load_state_dict(tiny.smaller_state(problem.model.state_dict(), problem.anatomy, kept))
        return small, trials, whole[-held:][:tried]

    found, trials, apart = model_without(None, slice(None))
    assert {(bool(trial.mix.layers), bool(trial.mix.channels)) for trial in trials} >= {(False, True), (True, True)}
    for trial in trials:
        small, _, _ = model_without(trial.mix, slice(None, -held))
        assert trial.loss == pytest.approx(mean_loss(small, apart, family), rel=1e-5)
    on_all, _, _ = model_without(min(trials, key=lambda trial: trial.loss).mix, slice(None))
    for name, value in on_all.state_dict().items():
        torch.testing.assert_close(
            found.state_dict()[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n} {m}"
        )


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_heads_and_channels_are_fitted_to_the_shorter_model(backend, monkeypatch, family: str):
    """As two runs would: one that removes the layers, and one of what it left. Of heads the first go."""
    inner = {"channels": 9} | ({"heads": 1} if family == "llama" else {})

    class FirstHeads(UnitScorer):
        def score(self, most: Mix) -> UnitScores:
            for group in self.problem.anatomy.of_kind("heads"):
                self.scores.by_group["heads", group.layer] = torch.arange(group.num_units, dtype=torch.float64)
            return self.scores

    monkeypatch.setattr(units, "UnitScorer", FirstHeads)

    def run(problem, counts: dict[str, int]):
        """The smaller model, in the setting of its own."""
        options = PruneConfig(pattern="units", counts=counts)
        kept, _, _, shifts, _ = remove_units(problem, plan_mixes(problem.anatomy, options), options)
        with torch.no_grad():
            for name, shift in shifts.items():
                problem.model.get_parameter(name).add_(shift)
        small = type(problem.model)(smaller_config(problem.model.config, problem.anatomy, kept)).eval()
        small.load_state_dict(tiny.smaller_state(problem.model.state_dict(), problem.anatomy, kept))
        small.tie_weights()
        return replace(problem, model=small, anatomy=read_anatomy(small, needs_units=True), notes=[])

    def dense():
        return tiny.problem(family, backend, count=12)

    found, wanted = run(dense(), {"layers": 1} | inner), run(run(dense(), {"layers": 1}), inner)
    for name, value in wanted.model.state_dict().items():
        torch.testing.assert_close(
            found.model.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n} {m}"
        )


def test_refitting_lowers_the_loss_of_the_layer_outputs(backend):
    def error(compensate: bool) -> float:
        problem, dense = tiny.problem("llama", backend), tiny.build("llama")
        options = PruneConfig(pattern="channels", sparsity=0.3, multiple_of=8, compensate=compensate)
        remove_units(problem, plan_mixes(problem.anatomy, options), options)
        return sum(
            float((plain.logits(problem.model, b) - plain.logits(dense, b)).square().sum()) for b in problem.batches
        )

    assert error(True) < error(False)


def test_counts_are_met_exactly(backend):
    problem = tiny.problem("llama", backend)
    options = PruneConfig(pattern="units", counts={"layers": 1, "heads": 1, "channels": 7})
    kept, *_ = remove_units(problem, plan_mixes(problem.anatomy, options), options)
    assert len(kept.layers) == 2 and set(kept.heads) == set(kept.channels) == set(kept.layers)
    assert {len(u) for u in kept.heads.values()} == {1} and {len(u) for u in kept.channels.values()} == {41}


@pytest.mark.parametrize("criterion", ["removal", "gate", "obs", "magnitude", "activation", "random"])
def test_every_criterion_removes_the_same_number(backend, no_backward, criterion: str):
    problem = tiny.problem("qwen2", backend)
    options = PruneConfig(
        pattern="channels", sparsity=0.2, multiple_of=8, criterion=criterion, estimator="finite-difference"
    )
    (mix,) = plan_mixes(problem.anatomy, options)
    kept, *_ = remove_units(problem, [mix], options)
    assert mix.channels > 0 and {len(u) for u in kept.channels.values()} == {48 - mix.channels}


def test_many_channels_are_probed_in_blocks_of_similar_energy(backend):
    """The blocks whose removal costs least go, as a search over the blocks by plain code finds them."""
    model = tiny.build("llama", intermediate_size=96)
    problem = tiny.problem("llama", backend, model=model)
    asked = dict(counts={"channels": 32}, probes={"channels": 16, "samples": 64}, compensate=False)
    wanted: dict[int, list[int]] = {}
    for layer in range(3):
        weight, seen, here = plain.columns_of(model, "llama", layer, "channels"), [], model.model.layers[layer]
        handles = [
            here.mlp.down_proj.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach())),
            here.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out.detach())),
        ]
        rows = []
        for batch in problem.batches:
            plain.logits(model, batch)
            stream, inputs = seen.pop(), seen.pop()  # a token counts by the size of the stream it is added to
            rows.append((inputs / stream.square().mean(-1, keepdim=True).sqrt())[batch["attention_mask"].bool()])
        for handle in handles:
            handle.remove()
        energy = torch.cat(rows).square().sum(0) * weight.square().sum(0)
        blocks = energy.argsort().split(16)
        cost = [
            mean_loss(plain.without_units(model, "llama", "channels", {layer: b.tolist()}), problem.batches, "llama")
            for b in blocks
        ]
        best = sorted(range(6), key=cost.__getitem__)[:2]
        gone = set(torch.cat([blocks[i] for i in best]).tolist())
        wanted[layer] = [unit for unit in range(96) if unit not in gone]
    options = PruneConfig(pattern="channels", criterion="removal", **asked)
    kept, *_ = remove_units(problem, plan_mixes(problem.anatomy, options), options)
    assert {layer: list(units) for layer, units in kept.channels.items()} == wanted


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "obs", "random"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_masks_without_gradients_need_no_backward(backend, no_backward, criterion: str, pattern: str):
    problem = tiny.problem("llama", backend)
    matrices = problem.anatomy.matrices
    asked = PruneConfig(pattern=pattern, sparsity=0.5, criterion=criterion, estimator="finite-difference")
    masks = sparsify(problem, matrices, asked)
    assert masks.violations(problem.model, backend) == 0
    kept = {matrix.name: int(masks.by_name[matrix.name].sum()) for matrix in matrices}
    assert sum(kept.values()) == sum(matrix.numel for matrix in matrices) // 2
    for matrix in matrices:
        weight, keep = problem.model.get_parameter(matrix.name), masks.by_name[matrix.name]
        assert not torch.signbit(weight[~keep]).any()
        if criterion != "obs" or pattern == "2:4":  # its budgets between matrices come from forward passes too
            assert kept[matrix.name] == matrix.numel // 2


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "ria", "gblm", "taylor", "fisher", "obs"])
@pytest.mark.parametrize("scope", ["row", "layer", "global"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_exact_counts_per_group(backend, criterion: str, scope: str, sparsity: float):
    """Exactly round(s * n) per row, per weight, or over the model, whatever the criterion."""
    problem = tiny.problem("gpt2", backend)  # Conv1D: rows of the matrix are columns of the storage
    matrices = problem.anatomy.matrices
    masks = sparsify(
        problem, matrices, PruneConfig(pattern="unstructured", sparsity=sparsity, criterion=criterion, scope=scope)
    )
    gone = {t.name: t.oriented(~masks.by_name[t.name]) for t in matrices}
    if scope == "row":
        for matrix in matrices:
            assert set(gone[matrix.name].sum(1).tolist()) == {round(sparsity * matrix.shape[1])}
    elif scope == "layer":
        assert [int(gone[t.name].sum()) for t in matrices] == [round(sparsity * t.numel) for t in matrices]
    else:
        assert sum(int(g.sum()) for g in gone.values()) == round(sparsity * sum(t.numel for t in matrices))
    if criterion == "magnitude" and scope == "layer" and sparsity == 0.3:
        dense = tiny.build("gpt2")
        for matrix in matrices:
            weights = dense.get_parameter(matrix.name).detach().abs().flatten()
            order = weights.argsort(stable=True)[: round(0.3 * matrix.numel)]
            assert torch.equal((~masks.by_name[matrix.name]).flatten().nonzero()[:, 0], order.sort().values)


def test_global_competition_empties_no_layer(backend):
    """A layer scaled by 1e-4 would lose everything; a floor stays."""
    model = tiny.build("llama")
    with torch.no_grad():
        for parameter in model.model.layers[1].parameters():
            parameter.mul_(1e-4)
    problem = tiny.problem("llama", backend, model=model)
    matrices = problem.anatomy.matrices
    options = PruneConfig(pattern="unstructured", sparsity=0.6, criterion="magnitude", scope="global")
    masks = sparsify(problem, matrices, options)
    assert min(int(mask.sum()) for mask in masks.by_name.values()) >= 1
    total = sum(t.numel for t in matrices)
    assert sum(int(mask.sum()) for mask in masks.by_name.values()) == total - round(0.6 * total)
    assert plain.logits(problem.model, problem.batches[0]).isfinite().all()


def test_nan_scores_name_the_weight(backend):
    problem = tiny.problem("llama", backend)
    matrices = problem.anatomy.matrices[:2]
    scores = {t.name: torch.ones(t.shape) for t in matrices}
    scores[matrices[1].name][0, 0] = torch.nan
    with pytest.raises(UserError, match=matrices[1].name):
        choose_masks(problem, matrices, scores, Level(0.5), "layer")


def test_n_of_m_that_does_not_divide_is_refused_with_the_weight():
    matrices = read_anatomy(tiny.build("llama", intermediate_size=50), needs_units=False).matrices
    with pytest.raises(UserError, match="50 inputs of model.layers.0.mlp.down_proj.weight"):
        check_nm(matrices, 4)
    check_nm([t for t in matrices if "down_proj" not in t.name], 4)


@pytest.mark.parametrize(
    "wanted, ignored, part",
    [
        (("does.not.exist",), (), "does.not.exist"),
        ((".*",), ("nothing",), "nothing"),
        ((".*",), (".*",), "no weight"),
        (("(",), (), "regular expression"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(wanted: tuple, ignored: tuple, part: str):
    """Success without having pruned anything would be a lie."""
    with pytest.raises(UserError, match=part):
        read_anatomy(tiny.build("llama"), needs_units=False).choose_matrices(wanted, ignored)
