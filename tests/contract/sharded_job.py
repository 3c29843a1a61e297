"""What every rank of a launched job checks and measures for tests/contract/test_sharded.py.

`accelerate launch --config_file ... tests/contract/sharded_job.py FOLDER SHARDED [--offload KIND] [CHECK ...]`: asserts
what can be judged inside the job, and writes what must be the same on every backend (fingerprints, digests, losses) to
FOLDER/facts.json.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import transformers as hf
from torch import nn

from tests import plain
from tests.contract.gradual_checks import gradual, resumed
from tests.contract.reconstruct_checks import reconstructed
from tests.contract.sharded_models import NO_DOWN, deepseek, digest, gpt2, llama, mixtral, problem, rows
from tests.contract.unit_checks import stacks, to_a_latency
from tests.one_card import share_cards
from tests.options import pruning
from tests.removing import plan_mixes, remove_units
from tinygn_dist.backends import Backend, make_backend
from tinygn_dist.backends.offload import Offloaded
from tinygn_dist.backends.pieces import tensors_of
from tinygn_dist.checkpoints import load
from tinygn_dist.checkpoints.run_checkpoint import Checkpoints
from tinygn_dist.checkpoints.safetensors_io import StoredTensors
from tinygn_dist.checkpoints.sharded_load import from_checkpoint
from tinygn_dist.cli.main import leave
from tinygn_dist.config import Config, DistributedConfig, ModelConfig, RecoverConfig
from tinygn_dist.errors import Stopped
from tinygn_dist.estimate.backprop import weight_gradients
from tinygn_dist.estimate.problem import Problem
from tinygn_dist.evaluate.quality import mean_loss
from tinygn_dist.maths.schedules import Plan
from tinygn_dist.models.anatomy import read_anatomy
from tinygn_dist.models.objective import objective_of
from tinygn_dist.pipeline import compress
from tinygn_dist.prune.sparsity.masks import Masks
from tinygn_dist.prune.sparsity.sparsify import sparsify
from tinygn_dist.runtime.progress import Progress
from tinygn_dist.train.loop import Recovery, freeze, make_optimizer
from tinygn_dist.train.state_io import saved_origin, write_weights

WEIGHT_CASES = {
    "magnitude": [{}, {"scope": "global"}, {"scope": "row"}, {"pattern": "2:4", **NO_DOWN}],
    "wanda": [{"scope": "layer"}, {"scope": "global"}, {"scope": "row"}, {"pattern": "2:4", **NO_DOWN}],
    "taylor": [{}, {"scope": "global"}, {"scope": "row"}, {"pattern": "2:4", **NO_DOWN}],
    "fisher": [{}, {"scope": "global"}, {"scope": "row"}, {"pattern": "2:4", **NO_DOWN}],
    "obs": [{}, {"scope": "global"}, {"scope": "row"}, {"pattern": "2:4", **NO_DOWN}, {"gram_gib": 0}],
    "ria": [{}, {"scope": "layer"}],
    "gblm": [{}],
    "random": [{}],
}
CONV1D_CASES = [
    ("wanda", {"scope": "row"}),
    ("taylor", {"pattern": "2:4"}),
    ("obs", {}),
    ("wanda", {"scope": "global"}),
]
EXPERT_CASES = [
    ("ria", {}),
    ("wanda", {}),
    ("taylor", {"scope": "global"}),
    ("fisher", {"pattern": "2:4"}),
    ("obs", {}),
    ("obs", {"gram_gib": 0}),
]
UNIT_CASES = [
    {"pattern": "layers", "sparsity": 0.3},
    {"pattern": "layers", "sparsity": 0.3, "criterion": "magnitude"},
    {"pattern": "heads", "sparsity": 0.1, "criterion": "gate", "estimator": "backprop"},
    {"pattern": "heads", "sparsity": 0.1, "criterion": "gate"},
    {"pattern": "channels", "sparsity": 0.2, "multiple_of": 7, "criterion": "gate"},
    {"pattern": "heads", "sparsity": 0.1},
    {"pattern": "channels", "sparsity": 0.2, "multiple_of": 7},
    {"pattern": "channels", "sparsity": 0.2, "multiple_of": 7, "criterion": "activation"},
    {"pattern": "channels", "sparsity": 0.2, "multiple_of": 7, "criterion": "magnitude"},
    {"pattern": "units", "sparsity": 0.35, "multiple_of": 7},
    {"pattern": "experts", "sparsity": 0.2},
    {"pattern": "experts", "sparsity": 0.2, "criterion": "magnitude"},
]

HALF = {"pattern": "unstructured", "sparsity": 0.5, "criterion": "magnitude"}
FEWER_CHANNELS = {"pattern": "channels", "sparsity": 0.2, "multiple_of": 7}
HARMFUL = {"learning_rate": 50.0, "optimizer": "sgd", "evaluate_every": 2, "keep_best": True}
# name -> (prune, steps of recovery, more of recover)
RUNS: dict[str, tuple[dict, int, dict]] = {
    "units": (FEWER_CHANNELS, 0, {}),
    "units recovered": (FEWER_CHANNELS, 3, {}),
    "sparse recovered": ({"pattern": "unstructured", "sparsity": 0.5, "estimator": "finite-difference"}, 3, {}),
    "best kept": (HALF, 3, HARMFUL),
    "lora": (HALF, 3, {"train": "lora"}),
    "norms": ({"pattern": "2:4", "criterion": "magnitude", **NO_DOWN}, 3, {"train": "norms-and-biases"}),
}
# name -> (schedule, recover.train)
STOPPED: dict[str, tuple[dict, str]] = {
    "cubic": ({"kind": "cubic"}, "all"),
    "movement": ({"kind": "linear", "criterion": "movement"}, "all"),
    "top-kast": ({"regrow": "top-kast"}, "all"),
    "lora": ({}, "lora"),
}
TRAINED = {"steps": 6, "batch_size": 4, "seq_len": 12, "learning_rate": 1e-3, "evaluate_every": 2, "keep_best": True}
RECIPE = [
    {"prune": FEWER_CHANNELS},
    {"prune": {"pattern": "2:4", "criterion": "magnitude", **NO_DOWN}},
    {"recover": TRAINED},
]


def pieces(backend: Backend) -> None:
    """Shards partition every weight, at the offsets they claim; gather and cut are each other's inverse."""
    for model in (llama(), gpt2(), mixtral()):
        reference = {name: p.detach().to(backend.device, copy=True) for name, p in model.named_parameters()}
        here = problem(backend, model)
        for matrix in here.anatomy.matrices:
            shard, whole = backend.shard(here.model, matrix), matrix.within(reference[matrix.parameter])
            flat = whole.reshape(-1)[shard.offset : shard.offset + shard.weight.numel()]
            assert torch.equal(shard.weight.reshape(-1), flat), matrix.name
            held = torch.zeros(matrix.numel, dtype=torch.int64)
            held[shard.offset : shard.offset + shard.weight.numel()] += 1
            assert backend.sum_over_shards(held).eq(1).all(), f"{matrix.name}: not a partition"
            assert torch.equal(backend.gather(here.model, matrix, shard.weight), whole)
            assert torch.equal(backend.shard_of(here.model, matrix, whole), shard.weight)
            positive = backend.gather(here.model, matrix, shard.weight > 0)
            assert torch.equal(positive, whole > 0)


def nothing_stays(backend: Backend) -> None:
    """A model that is no longer used is freed when the next is placed: after a cut, the dense one."""
    here = problem(backend, llama())
    mean_loss(here, "evaluating")
    model = weakref.ref(here.model)
    del here
    backend.prepare(gpt2())
    gc.collect()
    assert model() is None


def loading(backend: Backend, sharded: int, folder: Path) -> None:
    """From a checkpoint, the same model; where `sharded` ranks hold it, each reads and keeps its share and nothing
    else."""
    for name, build in (("tied", lambda: llama(True)), ("experts", mixtral)):
        reference = build()
        wanted, expected = tensors_of(reference), {n: t.dtype for n, t in reference.state_dict().items()}
        before = held_storage()
        origin = from_checkpoint(load.find_model(ModelConfig(name=str(folder / name))), backend)
        if sharded > 1:
            with mock.patch.object(load, "load_model", None), counted_reads() as read:
                model = backend.place(origin)
            # rows and experts are dealt whole, and fused experts are read part by part before they are cut
            share = sum(-(-len(t) // sharded) * t[0].numel() for t in wanted.values())
            joined = sum(t.numel() for n, t in wanted.items() if "experts" in n)
            assert sum(p.numel() for p in backend.pieces(model).values()) <= share
            assert sum(read) <= share and sum(read) <= share - joined // sharded + len(wanted), name
            held = held_storage() - before
            assert held < 4 * share * 1.2, f"{held} bytes are alive for {share} weights"
        else:
            model = backend.place(origin)
        found = dict(backend.full_tensors(model))
        assert found.keys() == wanted.keys() and all(torch.equal(found[n].cpu(), t) for n, t in wanted.items())
        assert origin.dtypes == expected
        del found, model, origin
        gc.collect()


def restoring(backend: Backend, sharded: int, folder: Path) -> None:
    """A model of another size than the source's, from a run's own checkpoint: each rank reads its share of it."""
    here = problem(backend, llama(True))
    reference = tensors_of(llama(True))
    with Checkpoints(folder / "saved", {}, backend, keep=1).writing("all") as writer:
        write_weights(writer, here.model, None, backend)
    saved = Checkpoints(folder / "saved", {}, backend, keep=1).newest()
    origin = saved_origin(saved, lambda: llama(True), here.model)
    with counted_reads() as read:
        model = backend.place(origin)
    share = sum(-(-len(tensor) // sharded) * tensor[0].numel() for tensor in reference.values())
    assert sum(read) <= share, f"{sum(read)} of {share} read"
    found = dict(backend.full_tensors(model))
    assert found.keys() == reference.keys() and all(torch.equal(found[n].cpu(), t) for n, t in reference.items())


@contextlib.contextmanager
def counted_reads() -> Iterator[list[int]]:
    """How many elements each read of a run took."""
    sizes, real = [], StoredTensors.run

    def run(self: StoredTensors, name: str, low: int, high: int) -> torch.Tensor:
        sizes.append(high - low)
        return real(self, name, low, high)

    with mock.patch.object(StoredTensors, "run", run):
        yield sizes


def held_storage() -> int:
    """Bytes of all tensors that are alive."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and t.device.type == "cpu"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def sums(backend: Backend, sharded: int) -> None:
    """`sharded`: ranks that hold the weights once between them. Data differ on all ranks, whatever holds the
    weights."""
    problem(backend, llama())
    assert int(backend.sum_over_shards(torch.ones(1))) == sharded
    data = torch.tensor([float(2**backend.rank)])
    backend.sum_over_data([data])
    assert int(data) == 2**backend.num_ranks - 1
    for count in (1, 2, 5, 8):
        mine = backend.dealt(range(count))
        counted = [item for part in backend.everyone([i for i, real in mine if real]) for item in part]
        assert sorted(counted) == list(range(count))
        lengths = backend.everyone(len(mine))
        assert sharded == 1 or len(set(lengths)) == 1, lengths


def masks(backend: Backend) -> dict[str, dict[str, object]]:
    """Fingerprint of the mask, digest and norm of the weights of every criterion and pattern."""
    found = {}
    cases = [("llama", llama, name, case) for name, cases in WEIGHT_CASES.items() for case in cases]
    cases += [("gpt2", gpt2, name, case) for name, case in CONV1D_CASES]
    cases += [("mixtral", mixtral, name, case) for name, case in EXPERT_CASES]
    for family, build, criterion, case in cases:
        here = problem(backend, build())
        before = digest(backend, here.model) if criterion == "fisher" and not case else None
        options = pruning(**{"pattern": "unstructured", "sparsity": 0.5, "criterion": criterion, **case})
        matrices = here.anatomy.choose_matrices(options.matrices, options.ignore)
        chosen = sparsify(here, matrices, options)
        fingerprint = chosen.fingerprint(here.model, backend)
        backend.agree(fingerprint, "the mask")
        assert chosen.violations(here.model, backend) == 0
        kept = sum(chosen.kept(backend).values())
        name = f"{family} {criterion} {case.get('pattern', case.get('scope', 'layer'))}"
        name += " in groups" if "gram_gib" in case else ""
        norm = sum(float(t.double().square().sum()) for t in plain.full_state(backend, here.model).values()) ** 0.5
        found[name] = {
            "mask": fingerprint,
            "kept": kept,
            "weights": digest(backend, here.model),
            "norm": backend.everyone(norm)[0],
        }
        assert before is None or before != digest(backend, here.model)
    return found


def units(backend: Backend) -> dict[str, str]:
    found = {}
    for case in UNIT_CASES:
        build = mixtral if case["pattern"] == "experts" else llama
        here, options = problem(backend, build()), pruning(**case)
        kept, _, trials, _, _ = remove_units(here, plan_mixes(here.anatomy, options), options)
        backend.agree(kept.fingerprint(), "the kept units")
        found[json.dumps(case)] = f"{kept.fingerprint()} {len(trials)} tried, weights {digest(backend, here.model)}"
    return found


def training_keeps_zeros(backend: Backend, dtype: torch.dtype, tied: bool) -> dict[str, float]:
    """5 steps of AdamW with momentum, weight decay, clipping and 2 or 4 micro-batches per step and rank."""
    model = llama(tied).to(dtype)
    here = problem(backend, model)
    options = pruning(pattern="unstructured", criterion="magnitude", sparsity=0.5)
    chosen = sparsify(here, here.anatomy.matrices, options)
    fingerprint = chosen.fingerprint(here.model, backend)
    asked = RecoverConfig(steps=5, learning_rate=5e-3, batch_size=8, weight_decay=0.1, clip_norm=0.5, distill=0)
    dtypes = [tensor.dtype for tensor in here.model.state_dict().values()]
    with backend.in_fp32(here.model):
        losses = _five_steps(backend, here.model, chosen, asked)
        assert chosen.violations(here.model, backend) == 0, "the masters regrew"
    assert dtypes == [tensor.dtype for tensor in here.model.state_dict().values()]
    assert chosen.violations(here.model, backend) == 0
    assert chosen.fingerprint(here.model, backend) == fingerprint
    return _told(backend, here, losses, chosen)


def _five_steps(backend: Backend, model: nn.Module, chosen: Masks, asked: RecoverConfig) -> list[float]:
    frozen = freeze(model, asked, backend)
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], asked)
    wrapped, prepared = backend.prepare(model, optimizer)
    chosen.enforce(wrapped, prepared, backend)
    losses, recovery = [], Recovery(None, "causal-lm", (), asked, Plan(asked.steps), backend, Progress())
    for step in range(asked.steps):
        batch = [rows(5)[(step + i) % 5] for i in range(asked.batch_size)]
        losses.append(recovery._one_step(wrapped, prepared, batch)[0])
        assert chosen.violations(wrapped, backend) == 0, f"live weights regrew in step {step}"
    backend.release(model, wrapped, prepared)
    for parameter in frozen:
        parameter.requires_grad_(True)
    return losses


def two_dtypes(backend: Backend) -> dict[str, object]:
    """A model in bf16 that keeps its routers in fp32: masks, gradients, and training, after which all is as it was."""
    found: dict[str, object] = {}
    for name, case in {"wanda": {"criterion": "wanda"}, "obs": {"estimator": "finite-difference"}}.items():
        model = deepseek()
        anatomy = read_anatomy(model, needs_units=False)
        here = Problem(backend.prepare(model), anatomy, objective_of("causal-lm"), rows(), backend, Progress())
        assert {p.dtype for p in here.model.parameters()} == {torch.bfloat16, torch.float32}
        options = pruning(pattern="unstructured", sparsity=0.5, **case)
        chosen = sparsify(here, here.anatomy.choose_matrices(options.matrices, options.ignore), options)
        found[name] = chosen.fingerprint(here.model, backend)
    gradients = weight_gradients(here, here.anatomy.matrices[:2], squares=True)
    assert all(bool(gradients.sum(matrix.name).isfinite().all()) for matrix in here.anatomy.matrices[:2])
    before = {name: (tensor.dtype, tensor.requires_grad) for name, tensor in here.model.named_parameters()}
    with backend.in_fp32(here.model):
        assert all(parameter.requires_grad for parameter in here.model.parameters())
        losses = _five_steps(backend, here.model, chosen, RecoverConfig(steps=2, batch_size=8, distill=0))
    assert before == {name: (tensor.dtype, tensor.requires_grad) for name, tensor in here.model.named_parameters()}
    return found | {"loss": losses[0]}


def _told(backend: Backend, here: Problem, losses: list[float], chosen: Masks) -> dict[str, float]:
    """Losses, and sums over the trained weights as they would be exported."""
    facts = {f"loss {step}": loss for step, loss in enumerate(losses)}
    facts["loss after"] = mean_loss(here, "evaluating")
    state = plain.full_state(backend, here.model)
    if backend.is_main:
        for matrix in here.anatomy.matrices:
            assert int((state[matrix.name] == 0).sum()) >= matrix.numel // 2
        facts["norm"] = float(sum(t.double().square().sum() for t in state.values()) ** 0.5)
        facts["zeros"] = float(sum(int((state[t.name] == 0).sum()) for t in here.anatomy.matrices))
    return facts


def whole_runs(backend: Backend, folder: Path) -> dict[str, object]:
    """The pipeline from a saved model to a checkpoint that was read back, without and with training."""
    found = {}
    base = {"model": {"name": str(folder / "model")}, "evaluate": {"prefill_tokens": 8, "decode_tokens": 2}}
    base["data"] = {"name": str(folder / "rows.txt"), "num_samples": 3, "seq_len": 12, "eval_samples": 3}
    for name, (prune, steps, more) in RUNS.items():
        output = folder / name.replace(" ", "-")
        recover = {"steps": steps, "batch_size": 4, "seq_len": 12, "learning_rate": 1e-3, **more}
        config = Config(**base, prune=prune, recover=recover, output={"dir": str(output), "overwrite": True})
        if name == "lora" and type(backend) is Offloaded:
            continue  # refused by the config, which tests/config/test_config.py sees
        report = compress(config, backend)
        facts = {"fingerprint": report.selection["fingerprint"], "loss": report.after["loss"]}
        facts |= {"params": report.after["num_params"], "zeros": report.sparsity["zeros"]}
        if not steps:
            facts["file"] = hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()[:16]
        found[name] = facts
        if name == "norms" and backend.is_main:
            _only_vectors_moved(*(StoredTensors([home / "model.safetensors"]) for home in (folder / "model", output)))
    return found


def _only_vectors_moved(before: StoredTensors, after: StoredTensors) -> None:
    """What is kept of a matrix is as it was, or rounded, where an engine computes in bf16 and has no master of it."""
    for name in after.names:
        old, new = (stored.whole(name) for stored in (before, after))
        if old.dim() > 1:
            kept = new != 0
            assert torch.equal(new, old * kept) or torch.equal(new, old.bfloat16().float() * kept), name
        else:
            assert not torch.equal(new, old), name


def stopped_runs(backend: Backend, folder: Path) -> dict[str, float]:
    """A run that is stopped twice ends bit by bit as one that was not; returns the losses, which all backends share."""
    found = {}
    for name, (schedule, train) in STOPPED.items():
        if train == "lora" and type(backend) is Offloaded:
            continue
        asked = {"prune": HALF, "schedule": {"every": 2, **schedule}, "recover": TRAINED | {"train": train}}
        found[name] = _stopped(backend, folder, name, asked, (2, 2))
    found["recipe"] = _stopped(
        backend, folder, "recipe", {"steps": RECIPE}, (0, 2)
    )  # after its first step, and in the last
    return found


def _stopped(backend: Backend, folder: Path, name: str, asked: dict[str, object], stops: tuple[int, ...]) -> float:
    """stops: how often each part of the run is asked whether to stop, and is told no."""
    done, loss = {}, 0.0
    for way in ("whole", "parts"):
        output = folder / f"stopped-{name}-{way}"
        config = Config(
            model={"name": str(folder / "model")},
            data={"name": str(folder / "rows.txt"), "num_samples": 3, "seq_len": 12, "eval_samples": 3},
            evaluate={"latency": False},
            checkpoint={"resume": "auto"},
            output={"dir": str(output)},
            **asked,
        )
        for steps in stops if way == "parts" else ():
            calls = iter(range(99))
            try:
                compress(config, backend, lambda calls=calls, steps=steps: next(calls) >= steps)
            except Stopped:
                continue
            raise AssertionError("the run was not stopped")
        report = compress(config, backend)
        assert len(report.recovery.get("resumed_after_steps", [])) == 2 * (way == "parts")
        done[way] = hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()
        loss = report.after["loss"]
        if name == "recipe":
            assert [row["step"] for row in report.steps] == ["prune", "prune", "recover"]
            assert report.sparsity["targeted_weights"] == 0.5 and report.parameters["removed"] > 0
    assert done["whole"] == done["parts"], f"{name}: another result after two stops"
    return loss


def main(folder: Path, sharded: int, offload: str, wanted: list[str]) -> None:
    torch.set_num_threads(1)
    share_cards()
    # a part of the offloaded model stays on the device
    backend = make_backend(DistributedConfig(timeout_seconds=60, offload=offload, device_gib=6e-5))
    hf.logging.disable_progress_bar()
    facts: dict[str, object] = {"backend": type(backend).__name__, "ranks": backend.num_ranks, "seconds": {}}
    facts["device"] = backend.device.type
    torch.use_deterministic_algorithms(backend.device.type == "cuda", warn_only=True)
    for name, check in (
        ("pieces", lambda: pieces(backend)),
        ("loading", lambda: loading(backend, sharded, folder)),
        ("restoring", lambda: restoring(backend, sharded, folder)),
        ("nothing stays", lambda: nothing_stays(backend)),
        ("sums", lambda: sums(backend, sharded)),
        ("masks", lambda: masks(backend)),
        ("units", lambda: units(backend)),
        ("reconstructed", lambda: reconstructed(backend)),
        ("stacks", lambda: stacks(backend)),
        ("latency", lambda: None if offload != "none" else to_a_latency(backend, folder)),  # refused by the config
        # DeepSpeed's stage 3 has one dtype for all weights
        ("two dtypes", lambda: None if type(backend).__name__ == "ZeroParameters" else two_dtypes(backend)),
        ("training", lambda: training_keeps_zeros(backend, torch.float32, False)),
        ("training tied", lambda: training_keeps_zeros(backend, torch.float32, True)),
        ("training bf16", lambda: training_keeps_zeros(backend, torch.bfloat16, False)),
        ("gradual", lambda: gradual(backend, torch.float32)),
        ("gradual bf16", lambda: gradual(backend, torch.bfloat16)),
        ("resumed", lambda: resumed(backend)),
        ("runs", lambda: whole_runs(backend, folder)),
        ("stopped", lambda: stopped_runs(backend, folder)),
    ):
        if wanted and name not in wanted:
            continue
        start = time.monotonic()
        facts[name] = check()
        facts["seconds"][name] = round(time.monotonic() - start, 1)
    if backend.is_main:
        (folder / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    backend.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("sharded", type=int)
    parser.add_argument("--offload", default="none")
    parser.add_argument("checks", nargs="*")
    asked = parser.parse_intermixed_args()
    main(asked.folder, asked.sharded, asked.offload, asked.checks)
    leave(0)  # gloo sometimes aborts in the teardown of a finished rank
