"""`compress` from the command line to a checkpoint that plain from_pretrained loads, one and two ranks."""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open

from tests import plain, tiny
from tests.conftest import Cli
from tests.pipeline.conftest import SMALL, report_of
from tinygn_dist import pipeline
from tinygn_dist.backends import make_backend
from tinygn_dist.backends.base import Backend
from tinygn_dist.checkpoints import sharded_load, verification
from tinygn_dist.cli.main import main
from tinygn_dist.config import DistributedConfig, load_config
from tinygn_dist.data import splits
from tinygn_dist.evaluate import quality
from tinygn_dist.prune.structured import latency
from tinygn_dist.prune.structured.scores import UnitScorer
from tinygn_dist.run import loading, verified_export
from tinygn_dist.runtime import cpu_matmul

AUTO = {
    "causal-lm": hf.AutoModelForCausalLM,
    "feature-extraction": hf.AutoModel,
    "sequence-classification": hf.AutoModelForSequenceClassification,
    "image-classification": hf.AutoModelForImageClassification,
}
PATTERNS = {
    "unstructured": ("--pattern=unstructured", "--sparsity=0.5"),
    "2:4": ("--pattern=2:4",),
    "4:8": ("--pattern=4:8", "--prune.solver.gram_gib=0"),
    "layers": ("--pattern=layers", "--sparsity=0.3"),
    "heads": ("--pattern=heads", "--sparsity=0.1"),
    "channels": ("--pattern=channels", "--sparsity=0.2"),
    "units": ("--pattern=units", "--sparsity=0.4"),
}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the files; a name in two files is an error."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118 - not a dict
                assert name not in tensors
                tensors[name] = content.get_tensor(name)
    return tensors


def check(folder: Path, family: str, pattern: str) -> dict[str, Any]:
    """What must hold for every output: stock loading, and a report whose figures are those of the files."""
    report, tensors = report_of(folder), stored(folder)
    model, info = AUTO[tiny.task_of(family)].from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    dense = tiny.build(family)
    total = sum(p.numel() for p in dense.parameters())
    count = sum(t.numel() for t in tensors.values())
    zeros = sum(int((t == 0).sum()) for t in tensors.values())
    masked = pattern in ("unstructured", "2:4", "4:8")
    assert report["before"]["num_params"] == total
    assert report["after"]["num_params"] == count == sum(p.numel() for p in model.parameters())
    assert report["after"]["bytes"] == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert report["sparsity"]["zeros"] == zeros
    assert report["sparsity"]["whole_checkpoint"] == pytest.approx(zeros / count)
    parameters = report["parameters"]
    assert parameters["dense"] == total
    if masked:
        matrices = {name: t for name, t in tensors.items() if name in report["selection"]["kept"]}
        kept = {name: int((t != 0).sum()) for name, t in matrices.items()}
        assert all(kept[name] <= number for name, number in report["selection"]["kept"].items())
        gone = sum(t.numel() for t in matrices.values()) - sum(report["selection"]["kept"].values())
        assert parameters["set_to_zero"] == gone == parameters["targeted"] // 2
        assert parameters["targeted"] + parameters["kept_by_pattern"] + parameters["kept_not_a_layer_matrix"] == total
        assert report["sparsity"]["targeted_weights"] >= 0.5
        if ":" in pattern:
            n, m = map(int, pattern.split(":"))
            rows = [t.t() if is_conv1d(model, name) else t for name, t in matrices.items()]
            assert all(int((t.reshape(-1, m) != 0).sum(1).max()) <= n for t in rows)
        assert count == total and not any(torch.signbit(t[t == 0]).any() for t in matrices.values())
    else:
        assert parameters["removed"] + parameters["kept"] == total and parameters["kept"] == count < total
    assert sorted(p.name for p in folder.parent.glob(f".partial-{folder.name}-*")) == []
    return report


def is_conv1d(model: torch.nn.Module, name: str) -> bool:
    """Whether a weight is stored (in, out): GPT-2's are, in some versions of transformers."""
    return type(model.get_submodule(name.removesuffix(".weight"))).__name__ == "Conv1D"


@pytest.mark.parametrize(
    "family, pattern",
    [
        *(("llama", pattern) for pattern in PATTERNS),
        ("llama-tied", "units"),
        ("llama-tied", "unstructured"),
        ("qwen2", "units"),
        ("qwen3", "heads"),
        ("gemma2", "units"),
        ("gpt2", "channels"),
        ("gpt2", "2:4"),
        ("opt", "units"),
        ("bert", "channels"),
        ("bert", "unstructured"),
    ],
)
def test_one_process(compress, tinygn, saved_model, tmp_path: Path, family: str, pattern: str):
    out = tmp_path / "out"
    done = compress(saved_model(family), out, *PATTERNS[pattern])
    assert done.code == 0, done.err
    report = check(out, family, pattern)
    if family == "bert":
        return
    told = tinygn("evaluate", out, "--json", "--no-latency")
    figures = json.loads(told.out)
    assert figures["perplexity"] == pytest.approx(report["after"]["perplexity"], rel=1e-6)
    assert figures["num_params"] == report["after"]["num_params"] and figures["bytes"] == report["after"]["bytes"]


def test_the_reported_perplexity_is_that_of_plain_code(compress, saved_model, tmp_path: Path):
    out = tmp_path / "out"
    assert compress(saved_model("llama"), out, "--pattern=channels", "--sparsity=0.2").code == 0
    report = report_of(out)
    options = load_config(None, {"model.name": "m"}).data.model_copy(update=report["recipe"]["data"])
    tokenizer = hf.AutoTokenizer.from_pretrained(out)
    batches = splits.load_splits(options, splits.Reader("causal-lm", tokenizer)).evaluation
    for folder, figures in ((saved_model("llama"), report["before"]), (out, report["after"])):
        model = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
        losses = [plain.loss(model, {**b, "attention_mask": torch.ones_like(b["input_ids"])}, "llama") for b in batches]
        mean = sum(float(x.total.sum().detach()) for x in losses) / sum(int(x.count.sum()) for x in losses)
        assert figures["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)


def test_gate_derivatives_report_the_steps_they_took(compress, saved_model, tmp_path: Path):
    out, how = tmp_path / "out", ("--criterion=gate", "--estimator=finite-difference")
    assert compress(saved_model("llama"), out, *PATTERNS["heads"], *how).code == 0
    chosen = check(out, "llama", "heads")["selection"]
    assert [(step["kind"], step["layer"]) for step in chosen["probe_steps"]] == [("heads", layer) for layer in range(3)]
    for step in chosen["probe_steps"]:
        assert 2**-23 <= step["value"] <= 0.25 and 0 < step["noise"] < 1e-5 and step["error"] > 0
    spent = sum(step["evaluations"] for step in chosen["probe_steps"])
    suspected = chosen["probe_forwards"] - spent - 2 * 6 * 2  # 6 heads, 2 micro-batches; the rest looked for kinks
    assert suspected in range(0, 2 * 6 * 2, 4) and chosen["kinked_gates"] == 0


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "channels"])
def test_recovery_with_distillation(compress, saved_model, tmp_path: Path, pattern: str):
    """Zeros stay in the files after momentum and weight decay, the loss on the training text falls, nothing but the
    frozen embeddings stands still."""
    out = tmp_path / "out"
    recover = (
        "--recover-steps=12 --recover.seq_len=32 --recover.batch_size=2 --recover.learning_rate=3e-3 "
        "--recover.weight_decay=0.1"
    )
    done = compress(saved_model("llama"), out, *PATTERNS[pattern], "--data.num_samples=16", *recover.split())
    assert done.code == 0, done.err
    report = check(out, "llama", pattern)
    assert report["recovery"]["last_loss"] < report["recovery"]["first_loss"]
    assert report["after"]["loss"] < report["compressed"]["loss"]
    dense, small = hf.AutoModelForCausalLM.from_pretrained(saved_model("llama")), stored(out)
    assert torch.equal(small["model.embed_tokens.weight"], dense.model.embed_tokens.weight)
    assert not torch.equal(small["lm_head.weight"], dense.lm_head.weight)


def test_tied_embeddings_are_stored_once_and_shards_are_whole(compress, saved_model, tmp_path: Path):
    out = tmp_path / "out"
    done = compress(saved_model("llama-tied"), out, *PATTERNS["channels"], "--output.max_shard_gib=0.00005")
    assert done.code == 0, done.err
    assert len(list(out.glob("*.safetensors"))) > 1
    names = set(stored(out))
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    model = hf.AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check(out, "llama-tied", "channels")


@pytest.mark.parametrize("family", ["bert-classifier", "vit"])
def test_classifiers(compress, saved_model, tmp_path: Path, family: str):
    if family == "vit":
        pytest.importorskip("PIL", reason="image processors need Pillow")
        rows = tmp_path / "images"
        write_images(rows)
    else:
        rows = tmp_path / "rows.jsonl"
        lines = [{"text": " ".join(text.split()[:20]), "label": i % 3} for i, text in enumerate(tiny.texts()[:30])]
        rows.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    out = tmp_path / "out"
    done = compress(
        saved_model(family),
        out,
        "--data",
        rows,
        *PATTERNS["channels"],
        "--recover-steps=2",
        "--recover.batch_size=2",
        "--recover.seq_len=32",
    )
    assert done.code == 0, done.err
    report = check(out, family, "channels")
    assert 0 <= report["after"]["accuracy"] <= 1 and report["recovery"]["steps"] == 2


def write_images(folder: Path) -> None:
    import datasets
    from PIL import Image

    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (24, 16, 16, 3), generator=draw, dtype=torch.uint8).numpy()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [Image.fromarray(p) for p in pixels], "label": [i % 3 for i in range(24)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "rows.parquet")


def test_text_written_by_the_model_itself(compress, saved_model, tmp_path: Path):
    out = tmp_path / "out"
    done = compress(saved_model("llama"), out, "--data=self", *PATTERNS["channels"])
    assert done.code == 0, done.err
    assert check(out, "llama", "channels")["data"]["calibration"]["source"] == "text sampled from the model itself"


def test_bf16_stays_bf16(compress, saved_model, tmp_path: Path):
    for name, pattern in (("a", "2:4"), ("b", "units")):
        done = compress(saved_model("llama"), tmp_path / name, *PATTERNS[pattern], "--model.dtype=bfloat16")
        assert done.code == 0, done.err
        assert {t.dtype for t in stored(tmp_path / name).values()} == {torch.bfloat16}
        check(tmp_path / name, "llama", pattern)


def test_sparsity_zero_changes_nothing(compress, saved_model, tmp_path: Path):
    for name, words in (
        ("a", ("--pattern=unstructured", "--sparsity=0")),
        ("b", ("--pattern=channels", "--sparsity=0")),
    ):
        assert compress(saved_model("llama"), tmp_path / name, *words).code == 0
        before, after = stored(saved_model("llama")), stored(tmp_path / name)
        assert before.keys() == after.keys()
        assert all(torch.allclose(before[n], after[n], rtol=1e-4, atol=1e-6) for n in before)


def test_the_same_run_twice_gives_the_same_files(compress, saved_model, tmp_path: Path):
    for name in ("a", "b"):
        assert compress(saved_model("llama"), tmp_path / name, *PATTERNS["units"]).code == 0
    one, other = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# -- two ranks ---------------------------------------------------------------------------------------------------------
def _compress(backend: Backend, overrides: dict[str, Any]) -> dict[str, Any]:
    """On the products that the command line asks for."""
    with cpu_matmul.fast_matmul(backend.device):
        return json.loads(pipeline.compress(load_config(None, overrides), backend).to_json())


def overrides(model: Path, out: Path, *words: str) -> dict[str, Any]:
    from tinygn_dist.cli.main import _overrides, _parser

    given = ["compress", "--model", str(model), "--output", str(out), *SMALL, *words]
    return _overrides(*_parser().parse_known_args(given))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_two_ranks_give_the_result_of_one(process_groups, compress, saved_model, tmp_path: Path, pattern: str):
    assert compress(saved_model("llama"), tmp_path / "one", *PATTERNS[pattern]).code == 0
    wanted = report_of(tmp_path / "one")
    asked = overrides(saved_model("llama"), tmp_path / "two", *PATTERNS[pattern])
    told = process_groups(2).call(_compress, asked)
    report = check(tmp_path / "two", "llama", pattern)
    assert report["num_processes"] == 2 and len(report["peak_memory_gib"]) == 2 and report["peak_device_gib"] == []
    for other in told:
        assert (
            other["selection"]["fingerprint"]
            == report["selection"]["fingerprint"]
            == wanted["selection"]["fingerprint"]
        )
        assert other["after"]["perplexity"] == pytest.approx(wanted["after"]["perplexity"], rel=1e-4)
    one, two = stored(tmp_path / "one"), stored(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("repeat", range(3))
def test_four_ranks_overwrite_one_folder(process_groups, saved_model, tmp_path_factory, repeat: int):
    """One writer: all ranks creating or deleting the same folder would fail at random."""
    folder = tmp_path_factory.getbasetemp() / "shared-output"
    asked = overrides(saved_model("llama"), folder, *PATTERNS["channels"], "--overwrite")
    process_groups(4).call(_compress, asked)
    check(folder, "llama", "channels")


def test_accelerate_launch(cli: Cli, saved_model, tmp_path: Path):
    """The shipped config really starts two connected processes; recovery keeps the zeros."""
    out = tmp_path / "out"
    recover = ("--recover-steps=4", "--recover.seq_len=32", "--recover.batch_size=2", "--recover.weight_decay=0.1")
    words = ("--model", saved_model("llama"), "--output", out, *SMALL, *PATTERNS["2:4"], *recover)
    done = cli.accelerate(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert check(out, "llama", "2:4")["num_processes"] == 2
    assert done.stdout.count("perplexity before recovery") == 1  # one rank speaks


def test_num_processes_starts_connected_processes(cli: Cli, saved_model, tmp_path: Path):
    out = tmp_path / "out"
    done = cli.tinygn(
        "compress",
        "--model",
        saved_model("llama-tied"),
        "--output",
        out,
        *SMALL,
        *PATTERNS["units"],
        "--num-processes=2",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert check(out, "llama-tied", "units")["num_processes"] == 2


class _Backward(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["zo-sgd", "zo-nesterov", "zo-adam"])
@pytest.mark.parametrize("pattern", ["unstructured", "units"])
def test_forward_only_compression_never_calls_backward(
    compress, saved_model, tmp_path: Path, monkeypatch, pattern: str, optimizer: str
):
    """The quickstart's recipe and a sparse one, with recovery: every way to run autograd raises."""

    def refuse(*_: Any, **__: Any) -> None:
        raise _Backward("backward was called")

    for owner, name in (
        (torch.Tensor, "backward"), (torch.autograd, "backward"), (torch.autograd, "grad"),
        (torch.autograd.graph, "_engine_run_backward"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, refuse)
    out = tmp_path / "out"
    recover = f"--recover-steps=15 --recover.optimizer={optimizer} --recover.seq_len=32 --recover.clip_norm=50"
    words = (*PATTERNS[pattern], "--estimator=finite-difference", "--data.num_samples=16", *recover.split())
    done = compress(saved_model("llama"), out, *words)
    assert done.code == 0, done.err
    report = check(out, "llama", pattern)
    assert report["after"]["loss"] < report["compressed"]["loss"]
    assert report["recovery"]["probes"]["learning_rate"] > 0 and report["recovery"]["probes"]["step"]["noise"] > 0


@pytest.mark.parametrize("pattern", [("unstructured", {"recover.steps": 2, "recover.distill": 0.5}), ("channels", {})])
def test_the_compressed_model_is_gone_before_its_files_are_read_back(
    saved_model, text_file, tmp_path, monkeypatch, pattern
):
    """With its teacher; the largest model that a run has room for is then not half of what it could be."""
    placed, alive = sharded_load.placed, []
    seen: list[weakref.ref] = []

    def noted(source, backend):
        alive.append(sum(one() is not None for one in seen))
        model, dtypes = placed(source, backend)
        seen.extend(map(weakref.ref, model.parameters()))
        return model, dtypes

    for place in (loading, verified_export):
        monkeypatch.setattr(place, "placed", noted)
    asked = {"model.name": str(saved_model("llama")), "data.name": str(text_file), "output.dir": str(tmp_path / "out")}
    asked |= {"prune.pattern": pattern[0], "data.seq_len": 32, "data.num_samples": 8} | pattern[1]
    pipeline.compress(load_config(overrides=asked))
    assert len(alive) > 1 and alive[-1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_other_bit_in_what_was_reloaded_is_refused(dtype: torch.dtype):
    backend, model = make_backend(DistributedConfig()), tiny.build("llama").to(dtype)
    dtypes = {name: dtype for name, _ in model.named_parameters()}
    written = verification.digests(model, dtypes, backend)
    verification.check_reloaded(model, written, dtypes, backend)
    name, weight = next(iter(model.named_parameters()))
    bits = weight.data.view({2: torch.int16, 4: torch.int32}[dtype.itemsize])
    bits[-1, -1] ^= 1
    with pytest.raises(RuntimeError, match=f"{name} was reloaded with other values"):
        verification.check_reloaded(model, written, dtypes, backend)


def test_losses_come_by_fast_products_and_speeds_by_those_of_stock_torch(saved_model, text_file, tmp_path, monkeypatch):
    """A speed is what others will see who run the model."""
    matmul, seen = torch.backends.mkldnn.matmul, {}

    def noting(owner, name: str) -> None:
        real = getattr(owner, name)

        def noted(*arguments, **named):
            seen.setdefault(name, set()).add(matmul.fp32_precision)
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, noted)

    monkeypatch.setattr(cpu_matmul, "_allowed_and_exact", lambda: True)
    before = matmul.fp32_precision
    for owner, name in (
        (quality, "mean_loss"),
        (quality, "_median_seconds"),
        (latency, "_timed"),
        (UnitScorer, "score"),
    ):
        noting(owner, name)
    asked = {"model.name": str(saved_model("llama")), "data.name": str(text_file), "output.dir": str(tmp_path / "out")}
    asked |= {"prune.pattern": "layers", "prune.goal": "latency=0.9", "data.seq_len": 32, "data.num_samples": 8}
    assert main(["compress", *(f"--{key}={value}" for key, value in asked.items())]) == 0
    assert seen == {"mean_loss": {"bf16"}, "_median_seconds": {before}, "_timed": {before}, "score": {"bf16"}}
