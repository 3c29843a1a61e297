"""What removed layers gave is taken over by the feed-forward before them: who does, and that it is the least-squares
fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from tests import plain, tiny
from tests.family_cases import CASES, build, logits, make_problem
from tests.options import pruning
from tests.removing import plan_mixes, remove_units
from tinygn_dist.backends.replicated import Replicated
from tinygn_dist.errors import UserError
from tinygn_dist.estimate.elimination import Choice, Ranking
from tinygn_dist.estimate.unit_moments import _with_one
from tinygn_dist.maths.counts import Mix
from tinygn_dist.models.anatomy import read_anatomy
from tinygn_dist.prune.structured import layer_order as depth
from tinygn_dist.prune.structured import trials
from tinygn_dist.prune.structured.absorb import absorbers_of, not_absorbed, segments_removed
from tinygn_dist.prune.structured.layer_order import worth_trying
from tinygn_dist.prune.structured.probing import RemovalOrder, UnitScores
from tinygn_dist.prune.structured.scores import score_units
from tinygn_dist.prune.structured.shrink import smaller_config, smaller_origin
from tinygn_dist.prune.structured.trials import Trials


@pytest.fixture(scope="module")
def backend() -> Replicated:
    return Replicated(Accelerator(cpu=True))


def _by_layer(absorbers) -> dict[int, tuple[tuple[int, ...], ...]]:
    return {group.layer: segments for group, segments in absorbers.items()}


@pytest.mark.parametrize(
    ("removals", "wanted"),
    [
        ([set()], {}),
        ([{3}], {2: ((3,),)}),
        ([{3, 4, 2}], {1: ((2, 3, 4),)}),
        ([{3}, {3, 4}, {2, 3, 4}], {2: ((3,), (4,)), 1: ((2, 3, 4),)}),
        ([{2}, {2, 3}, {2, 3, 4}], {1: ((2,), (3,), (4,))}),
        ([{2, 3}, {2, 3, 4, 5}], {1: ((2, 3), (4, 5))}),
        ([{0, 1}], {}),
        ([{5}, {5, 2}], {4: ((5,),), 1: ((2,),)}),
        ([{3}, {0, 1, 2, 3}], {2: ((3,),)}),
    ],
)
def test_the_feed_forward_before_a_run_of_layers_takes_it_over(removals, wanted):
    """Sums are kept apart only where one removal needs fewer layers than another."""
    anatomy = read_anatomy(tiny.build("llama", num_hidden_layers=6), needs_units=True)
    absorbers = absorbers_of(anatomy, removals)
    assert _by_layer(absorbers) == wanted
    for gone in removals:
        first = next(layer for layer in range(7) if layer not in gone)  # what goes at the front has nobody before it
        assert not_absorbed(absorbers, gone) == list(range(first))
        for group, segments in absorbers.items():
            taken = [layer for segment in segments[: segments_removed(segments, gone)] for layer in segment]
            assert set(taken) <= gone and (group.layer in gone or group.layer + len(taken) + 1 not in gone)


def test_nobody_takes_over_across_stacks():
    anatomy = read_anatomy(build("t5"), needs_units=True)  # layers 0 and 1 encode, 2 and 3 decode
    assert _by_layer(absorbers_of(anatomy, [{1, 3}])) == {0: ((1,),), 2: ((3,),)}
    assert _by_layer(absorbers_of(anatomy, [{2}])) == {} and not_absorbed(absorbers_of(anatomy, [{2}]), {2}) == [2]


ADDED = [name for name in CASES if name not in ("convnext", "bloom")]  # which have no described feed-forward
OTHERWISE = [("opt", {"do_layer_norm_before": False}), ("granite", {"residual_multiplier": 1.0})]


@pytest.mark.parametrize(("model_type", "changes"), [*((name, {}) for name in ADDED), *OTHERWISE])
def test_what_is_said_to_be_added_to_the_stream_is(model_type: str, changes: dict, backend):
    """`added` says so: a change of what the feed-forward gives changes what its layer gives by the same."""
    problem = make_problem(build(model_type, **changes), backend)
    generator = torch.Generator().manual_seed(5)
    for group in problem.anatomy.of_kind("channels"):
        layer, output = (
            problem.bare.get_submodule(name) for name in (problem.anatomy.path_of(group.layer), group.output)
        )
        seen: list[torch.Tensor] = []
        shift = torch.randn(32, generator=generator)
        watch = layer.register_forward_hook(lambda _, __, out, seen=seen: seen.append(plain.hidden(out)))
        logits(problem.model, problem.batches[0])
        moved = output.register_forward_hook(lambda _, __, out, shift=shift: out + shift)
        logits(problem.model, problem.batches[0])
        watch.remove()
        moved.remove()
        straight = torch.allclose(seen[1], seen[0] + shift, rtol=1e-4, atol=1e-4)
        assert straight == group.added, group.layer


class Recorded:
    """Of one layer's feed-forward what it read, of every layer what it gave, of real tokens, in fp64."""

    def __init__(self, problem, family: str, output: str) -> None:
        path, self.inputs, self.streams, handles = plain.LAYERS[family][0], [], {}, []
        module = problem.model.get_submodule(output)
        handles.append(module.register_forward_pre_hook(lambda _, args: self.inputs.append(args[0].flatten(0, -2))))
        for number, layer in enumerate(problem.model.get_submodule(path)):

            def seen(_, __, out, number=number):
                self.streams.setdefault(number, []).append(plain.hidden(out).flatten(0, -2))

            handles.append(layer.register_forward_hook(seen))
        for batch in problem.batches:
            plain.logits(problem.model, batch)
        for handle in handles:
            handle.remove()
        real = torch.cat([batch["attention_mask"].flatten() for batch in problem.batches]).bool()
        self.inputs = torch.cat(self.inputs)[real].double()
        self.streams = {number: torch.cat(seen)[real].double() for number, seen in self.streams.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("gone", [(2,), (2, 3)])
@pytest.mark.parametrize(("channels", "in_two_steps"), [(0, True), (9, True), (9, False), (1, False)])
def test_it_is_the_least_squares_fit(
    backend, monkeypatch, family: str, gone: tuple[int, ...], channels: int, in_two_steps: bool
):
    """torch.linalg.lstsq of what the feed-forward and the layers behind it gave, on the inputs that stay (and on a
    column of ones where there is a bias), every token divided by the root mean square of what its layer gives; padding
    left out. Of one channel that goes in the same fit, it is the one without which the fit is best."""
    _goes(monkeypatch, gone)
    if not in_two_steps:
        monkeypatch.setattr(Trials, "in_two_steps", lambda *_: False)
    changes = {"llama": {"num_hidden_layers": 5}, "gpt2": {"n_layer": 5}, "opt": {"num_hidden_layers": 5}}[family]
    problem = tiny.problem(family, backend, model=tiny.build(family, **changes), count=16, size=4, length=12)
    group = problem.anatomy.of_kind("channels")[1]
    seen = Recorded(problem, family, group.output)
    matrix = problem.anatomy.matrix_of(group.output)
    weight = matrix.oriented(problem.model.get_parameter(matrix.parameter)).detach().double().clone()
    bias = problem.model.get_submodule(group.output).bias
    given = seen.inputs @ weight.t() + seen.streams[gone[-1]] - seen.streams[1]

    counts = {"layers": len(gone), "channels": channels}
    options = pruning(pattern="units", counts=counts, damping=1e-6)
    kept, _, _, shifts, _ = remove_units(problem, plan_mixes(problem.anatomy, options), options)
    assert kept.layers == tuple(layer for layer in range(5) if layer not in gone)
    stays = list(kept.channels[1]) if channels else list(range(48))
    assert len(stays) == 48 - channels
    found = matrix.oriented(problem.model.get_parameter(matrix.parameter)).detach().double()
    assert not found[:, [unit for unit in range(48) if unit not in stays]].any()
    found = found[:, stays]
    if bias is not None:
        found = torch.cat([found, shifts[f"{group.output}.bias"].double()[:, None]], 1)
    else:
        assert not shifts
    share = 1 / seen.streams[1].square().mean(1, keepdim=True).sqrt()

    def columns(units: list[int]) -> torch.Tensor:
        ones = [torch.ones(len(seen.inputs), 1).double()] if bias is not None else []
        return torch.cat([seen.inputs[:, units], *ones], 1) * share

    def least(units: list[int]) -> float:
        inputs = columns(units)
        wanted = torch.linalg.lstsq(inputs, given * share, driver="gelsd").solution
        return float((inputs @ wanted - given * share).square().sum())

    error = float((columns(stays) @ found.t() - given * share).square().sum())
    assert error == pytest.approx(least(stays), rel=1e-3) and error < float((given * share).square().sum())
    if channels == 1 and family != "opt":  # some of its inputs are always 0, and damping decides between almost equals
        others = [[unit for unit in range(48) if unit != out] for out in range(48)]
        assert least(stays) == pytest.approx(min(map(least, others)), rel=1e-6)


def _goes(monkeypatch, gone: tuple[int, ...]) -> None:
    """Layers go in this order, whatever their scores."""

    def ordered(*_) -> UnitScores:
        return UnitScores(layer_order=list(gone))

    monkeypatch.setattr("tinygn_dist.prune.structured.layer_order.LayerOrder.score", ordered)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@pytest.mark.parametrize("gone", [(2,), (1, 2), (2, 1)])
def test_a_constant_goes_into_the_bias(backend, monkeypatch, family: str, gone: tuple[int, ...]):
    """Layers that add a constant to the stream leave nothing behind when they go."""
    _goes(monkeypatch, gone)
    depth = {"gpt2": "n_layer", "opt": "num_hidden_layers"}[family]
    model = tiny.build(family, **{depth: 4})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f".{layer}." in name for layer in gone) and parameter.dim() == 2:
                parameter.zero_()
            elif any(f".{layer}." in name for layer in gone) and "norm" not in name and "ln_" not in name:
                parameter.add_(torch.linspace(-1, 1, len(parameter)))
    problem = tiny.problem(family, backend, model=model, count=8, size=4, length=12)
    before = [plain.logits(problem.model, batch) for batch in problem.batches]
    lost = plain.without_layers(problem.model, family, list(gone))
    options = pruning(pattern="layers", counts={"layers": len(gone)})
    kept, _, _, shifts, notes = remove_units(problem, plan_mixes(problem.anatomy, options), options)
    assert list(shifts) == [f"{problem.anatomy.of_kind('channels')[0 if 1 in gone else 1].output}.bias"]
    assert kept.channels == {} and not notes
    config = smaller_config(problem.model.config, problem.anatomy, kept)
    origin = smaller_origin(
        lambda: type(problem.model)(config), problem.model, problem.anatomy, kept, problem.backend, shifts
    )
    small = origin.take_whole().eval()
    for batch, dense in zip(problem.batches, before, strict=True):
        near = 1e-4 * float(dense.abs().max())
        torch.testing.assert_close(plain.logits(small, batch), dense, rtol=1e-3, atol=near)
        assert float((plain.logits(lost, batch) - dense).abs().max()) > 50 * near


def test_a_large_constant_input_does_not_drown_the_rest():
    """Inputs near 100 with deviations of 1e-3: about the mean, against fp64."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4000, 8, generator=generator)
    outputs = inputs[:, :5] + 0.1 * torch.randn(4000, 5, generator=generator) + 3
    inputs[:, :3] = 100 + 1e-3 * inputs[:, :3]
    weights = torch.rand(4000, generator=generator)
    found = sum(
        _with_one(outputs[part] * weights[part][:, None], inputs[part], weights[part])
        for part in (slice(2500), slice(2500, None))
    )
    mean = (weights.double() @ inputs.double()) / weights.double().sum()
    wanted = (outputs.double() * weights.double()[:, None]).t() @ (inputs.double() - mean)
    centred = found[:, :-1] - torch.outer(found[:, -1], mean)
    size = wanted.abs().amax(0)
    assert float(((centred - wanted).abs() / size).max()) < 1e-3
    torch.testing.assert_close(
        found[:, -1], (outputs.double() * weights.double()[:, None]).sum(0), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    ("family", "gone", "told"),
    [("llama", (0,), [0]), ("llama", (1, 0), [0, 1]), ("gemma2", (1,), [1]), ("llama", (1,), []), ("bert", (2,), [2])],
)
@pytest.mark.parametrize("compensate", [True, False])
def test_the_report_names_the_layers_that_nothing_takes_over(backend, monkeypatch, family, gone, told, compensate):
    _goes(monkeypatch, gone)
    problem = tiny.problem(family, backend)
    before = {name: tensor.clone() for name, tensor in problem.model.state_dict().items()}
    options = pruning(pattern="layers", counts={"layers": len(gone)}, compensate=compensate)
    found = remove_units(problem, plan_mixes(problem.anatomy, options), options)
    notes = [note for note in found.notes if "is not reproduced" in note]
    assert [f"removed layers {told} is not" in note for note in notes] == [True] * bool(told and compensate)
    changed = [name for name, tensor in problem.model.state_dict().items() if not torch.equal(before[name], tensor)]
    wanted = [f"model.layers.{gone[0] - 1}.mlp.down_proj.weight"] if compensate and not told else []
    assert changed == wanted


def test_experts_take_nothing_over(backend):
    problem = make_problem(build("mixtral"), backend)
    options = pruning(pattern="layers", counts={"layers": 1})
    kept, *_, notes = remove_units(problem, plan_mixes(problem.anatomy, options), options)
    assert len(kept.layers) == 3 and any("is not reproduced" in note for note in notes)


def test_a_linear_layer_leaves_nothing_behind(backend, monkeypatch):
    """A layer whose gift is a linear function of what the feed-forward before it reads: removal is exact at every later
    layer, and by plain cutting it is not."""
    _goes(monkeypatch, (1,))
    model = tiny.build("llama")
    first, second = model.model.layers[:2]
    with torch.no_grad():
        second.self_attn.o_proj.weight.zero_()
        second.mlp.down_proj.weight.zero_()
    read, weight = {}, torch.randn(32, 48, generator=torch.Generator().manual_seed(3))
    first.mlp.down_proj.register_forward_pre_hook(lambda _, args: read.update(hidden=args[0]))
    second.mlp.register_forward_hook(lambda _, __, out: out + read["hidden"] @ weight.t())
    problem = tiny.problem("llama", backend, model=model, count=16, size=4, length=12)
    before = [plain.logits(model, batch) for batch in problem.batches]
    options = pruning(pattern="layers", counts={"layers": 1}, damping=1e-6)
    remove_units(problem, plan_mixes(problem.anatomy, options), options)
    short = plain.without_layers(model, "llama", [1])
    for batch, dense in zip(problem.batches, before, strict=True):
        torch.testing.assert_close(plain.logits(short, batch), dense, rtol=1e-2, atol=1e-3 * float(dense.abs().max()))


@pytest.mark.parametrize(
    ("able", "gone", "wanted"),
    [
        ([5, 3, 9, 1, 7, 2, 8, 6, 4, 0], [], [5, 3, 9, 1, 7, 2, 8, 6]),
        ([9, 1, 7, 2, 8, 6, 4, 0], [5, 3], [9, 1, 7, 2, 6, 4]),
        ([1, 0], [2], [1, 0]),
    ],
)
def test_the_best_and_the_neighbours_of_those_gone_are_tried(able, gone, wanted):
    assert worth_trying(able, gone) == wanted


def _left_loss(family: str, backend: Replicated, order: list[int], fitted: slice, tried: slice) -> float:
    """Of a new model without these layers, fitted on some micro-batches, on others."""
    problem = tiny.problem(family, backend, model=_deep(family), count=8)
    batches, options = problem.batches, pruning(pattern="layers", counts={"layers": len(order)})
    with pytest.MonkeyPatch.context() as patched:
        _goes(patched, tuple(order))
        here = replace(problem, batches=batches[fitted])
        _, _, _, shifts, _ = remove_units(here, plan_mixes(problem.anatomy, options), options)
    with torch.no_grad():
        for name, shift in shifts.items():
            problem.model.get_parameter(name).add_(shift)
    short = plain.without_layers(problem.model, family, order)
    totals = plain.total_losses(short, batches[tried], family)
    return float(totals.sum()) / sum(int(plain.loss(short, b, family).count.sum()) for b in batches[tried])


def _deep(family: str):
    """Layers that add much to the stream, so that it matters which ones go."""
    model = tiny.build(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 5})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("down_proj.weight", "o_proj.weight", "c_proj.weight")):
                parameter.mul_(3)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_go_in_the_order_of_a_brute_force_greedy_search(backend, family: str):
    """Each judged with what is taken over, on the last quarter of the sequences, fitted on the others; weights come
    back to the last bit, and the final fit is made on all."""
    fitted, tried = slice(None, -2), slice(-2, None)
    gone: list[int] = []
    left = {(): None}
    while len(gone) < 3:
        losses = {
            layer: _left_loss(family, backend, [*gone, layer], fitted, tried) for layer in range(5) if layer not in gone
        }
        gone.append(min(losses, key=losses.get))
        left |= {(*gone[:-1], layer): loss for layer, loss in losses.items()}
    problem = tiny.problem(family, backend, model=_deep(family), count=8)
    options = pruning(pattern="layers", counts={"layers": 3})
    kept, scores, *_ = remove_units(problem, plan_mixes(problem.anatomy, options), options)
    assert scores.layer_order == gone and set(range(5)) - set(kept.layers) == set(gone)
    rows = [row for row in scores.table if row.get("absorbed")]
    assert [len(row["without"]) for row in rows] == [0] * 5 + [1] * 4 + [2] * 3
    for row in rows:
        before, after = tuple(row["without"]), (*row["without"], row["layer"])
        if before:
            assert row["score"] == pytest.approx(left[after] - left[before], abs=2e-5)
    trials, fits = (1 + 5 + 4 + 3) * 2, 3 * 6  # on two micro-batches, and on six for each layer
    assert 0 < scores.forwards - trials - fits <= 5 * 4  # plain probes

    alone = tiny.problem(family, backend, model=_deep(family), count=8)
    with pytest.MonkeyPatch.context() as patched:
        _goes(patched, tuple(gone))
        remove_units(alone, plan_mixes(alone.anatomy, options), options)
    for name, tensor in alone.model.state_dict().items():
        assert torch.equal(tensor, problem.model.state_dict()[name]), name


@pytest.mark.parametrize(("criterion", "compensate"), [("auto", False), ("gate", True), ("activation", True)])
def test_other_criteria_judge_layers_alone(backend, criterion: str, compensate: bool):
    problem = tiny.problem("llama", backend, count=8)
    options = pruning(pattern="layers", counts={"layers": 1}, criterion=criterion, compensate=compensate)
    _, scores, *_ = remove_units(problem, plan_mixes(problem.anatomy, options), options)
    probed = problem.first(options.probes.samples)
    alone = score_units(replace(probed, model=tiny.build("llama")), Mix(layers=1), options)
    assert scores.layer_order[:1] == alone.layer_order[:1]
    assert not any(row.get("absorbed") for row in scores.table)


def test_few_tokens_fit_and_all_that_are_held_out_judge(backend, monkeypatch):
    """Of 16 micro-batches of two sequences four are held out; three of ten tokens each make the 48 of 48 inputs, and of
    images all that are not held out are taken."""
    monkeypatch.setattr(depth, "_TOKENS_PER_INPUT", 1)
    for family, fits in (("llama", 3), ("vit", 12)):
        problem = tiny.problem(family, backend, count=16)
        options = pruning(pattern="layers", counts={"layers": 1}, probes={"adaptive": False})
        _, scores, *_ = remove_units(problem, plan_mixes(problem.anatomy, options), options)
        assert scores.forwards == 3 * 4 + (1 + 3) * 4 + fits


def test_layers_are_judged_on_as_many_sequences_as_tell_them_apart(backend, monkeypatch):
    """With losses that are known: 2 and 0 are close, and on the first sequences 2 looks better; 1, 3 and 4 are far off
    and soon out, although what 3 does on the later sequences would make it the best. Each loss is told relative to the
    dense one."""
    problem = tiny.problem("llama", backend, model=_deep("llama"), count=64, size=1)
    place = {id(batch): number for number, batch in enumerate(problem.batches[48:])}
    generator, early = torch.Generator().manual_seed(0), torch.arange(16) < 6
    dense = 10 * torch.rand(16, generator=generator, dtype=torch.float64) + 20
    noise = 0.05 * torch.randn(5, 16, generator=generator, dtype=torch.float64)
    added = (
        torch.tensor([1.0, 3.0, 1.02, 3.0, 3.0])[:, None]
        + noise
        - 0.05 * early * torch.tensor([0, 0, 1, 0, 0])[:, None]
    )
    added[2, ~early] += 0.3
    added[3, ~early] -= 9.0
    seen: dict[int, list[int]] = {layer: [] for layer in range(5)}

    def told(_, mix: Mix, scores: UnitScores, some) -> tuple[torch.Tensor, torch.Tensor]:
        (layer,), numbers = scores.layer_order, [place[id(batch)] for batch in some.batches]
        seen[layer] += numbers
        return dense[numbers] + added[layer, numbers], torch.ones(len(numbers), dtype=torch.float64)

    monkeypatch.setattr(Trials, "losses_of", told)
    monkeypatch.setattr(depth, "sequence_losses", lambda *_: (dense, torch.ones(16)))
    options = pruning(pattern="layers", counts={"layers": 1}, probes={"samples": 4})
    scores = depth.LayerOrder(problem.first(4), *problem.split(16), options).score(1)
    assert scores.layer_order == [0] and seen[0] == list(range(len(seen[0]))) and len(seen[0]) > 6
    assert all(len(seen[layer]) < 6 for layer in (1, 3, 4))
    (row,) = [row for row in scores.table if row.get("absorbed") and row["layer"] == 0]
    assert row["score"] == pytest.approx(float(added[0, seen[0]].mean()))
    plain_probes, fits = 5 * 4, 20  # of four tokens for each of 48 inputs
    assert scores.exhaustive == plain_probes + 16 + fits + 5 * 16
    assert 0 < scores.forwards - 16 - fits - sum(map(len, seen.values())) <= plain_probes


def test_where_there_is_little_room_layers_are_judged_one_by_one(backend):
    def found(room: float):
        problem = tiny.problem("llama", backend, model=_deep("llama"), count=8)
        options = pruning(pattern="layers", counts={"layers": 3}, gram_gib=room)
        kept, scores, *_ = remove_units(problem, plan_mixes(problem.anatomy, options), options)
        judged = [(row["without"], row["layer"], row["score"]) for row in scores.table if row.get("absorbed")]
        return kept, judged, scores.forwards

    (kept, judged, forwards), (other, alone, more) = found(16), found(0)
    assert kept == other and [row[:2] for row in judged] == [row[:2] for row in alone]
    assert [row[2] for row in judged] == pytest.approx([row[2] for row in alone], abs=1e-6)
    assert more - forwards == (5 + 4 + 3 - 3) * 6, "a pass for each"


def test_a_layer_that_was_not_judged_does_not_go_before_one_that_was():
    mean = torch.tensor([0.3, 0.2, 0.1, 0.0], dtype=torch.float64)
    ranking = Ranking(mean, mean * 0, (mean * 0).long(), mean.argsort(stable=True).argsort(), 0, 0, 0)
    judged, order = {0: 0.6, 1: 0.5}, RemovalOrder([Choice((0, 1, 2, 3), 3)], ranking)
    while able := order.candidates():
        losses = {i: judged[i] for i in able if i in judged}
        order.update(losses)
        order.remove_least(losses)
    assert order.removed == [1, 0, 3]  # of the others none is judged


def test_a_budget_that_ends_between_layers(backend):
    """After the first layer's trials what is known decides."""
    problem = tiny.problem("llama", backend, model=_deep("llama"), count=8)
    options = pruning(pattern="layers", counts={"layers": 3}, probes={"forwards": 5 * 4 + 6 + 6 * 2, "adaptive": False})
    _, scores, *_ = remove_units(problem, plan_mixes(problem.anatomy, options), options)
    assert [row["without"] for row in scores.table if row.get("absorbed")] == [[]] * 5
    assert scores.forwards == options.probes.forwards and len(scores.layer_order) == 3


def test_a_trial_that_fails_leaves_the_weights(backend, monkeypatch):
    problem = tiny.problem("llama", backend, model=_deep("llama"), count=8)
    before = {name: tensor.clone() for name, tensor in problem.model.state_dict().items()}

    def refuse(*_):
        raise UserError("the loss of sequence 0 is NaN or inf")

    monkeypatch.setattr(trials, "sequence_losses", refuse)
    options = pruning(pattern="layers", counts={"layers": 1})
    with pytest.raises(UserError, match="NaN or inf"):
        remove_units(problem, plan_mixes(problem.anatomy, options), options)
    assert all(torch.equal(before[name], tensor) for name, tensor in problem.model.state_dict().items())


def test_a_spent_budget_ends_the_trials(backend):
    problem = tiny.problem("llama", backend, model=_deep("llama"), count=8)
    options = pruning(pattern="layers", counts={"layers": 2}, probes={"forwards": 1, "adaptive": False})
    _, scores, *_ = remove_units(problem, plan_mixes(problem.anatomy, options), options)
    assert len(scores.layer_order) == 2 and not any(row.get("absorbed") for row in scores.table)
