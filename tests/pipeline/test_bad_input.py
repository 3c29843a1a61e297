"""Everything a user can get wrong: a non-zero exit code, one clear line, early; and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf

from tests import tiny
from tests.conftest import Cli, save, told
from tests.pipeline.conftest import SMALL
from tests.pipeline.test_end_to_end import PATTERNS, check, overrides, stored
from tests.ranks import Ranks
from tinygn_dist import pipeline
from tinygn_dist.backends.base import Backend
from tinygn_dist.checkpoints import export, load, output_folder, verification
from tinygn_dist.config import load_config
from tinygn_dist.errors import UserError

CHANNELS = PATTERNS["channels"]


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading weights is an error: the request must be refused before."""

    def refuse(*_: Any) -> None:
        raise AssertionError("weights were loaded before the request was refused")

    monkeypatch.setattr(load, "load_model", refuse)


def changed(source: Path, folder: Path, **config: Any) -> Path:
    """A copy of a checkpoint with another config.json."""
    shutil.copytree(source, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "words, code, parts",
    [
        (("--sparsity=50",), 2, ("did you mean 0.5?",)),
        (("--sparsity=1.0",), 2, ("0 <= sparsity < 1",)),
        (("--sparsity=-0.1",), 2, ("0 <= sparsity < 1",)),
        (("--sparsity=half",), 2, ("prune.sparsity",)),
        (("--pattern=4:2",), 2, ("try 2:4",)),
        (("--pattern=columns",), 2, ("accepted: unstructured",)),
        (("--criterion=wanda",), 2, ("does not score pattern",)),
        (("--prune.sparsty=0.5",), 2, ("did you mean prune.sparsity?",)),
        (("--nonsense=1",), 2, ("unknown argument",)),
        (("--recipe=/nowhere/recipe.yaml",), 2, ("/nowhere/recipe.yaml",)),
        (("--pattern=2:4", "--prune.matrices=[does.not.exist]"), 2, ("matches no weight", "model.layers.0")),
        (("--pattern=3:5",), 2, ("does not divide",)),
        (("--pattern=layers", "--sparsity=0.99"), 2, ("cannot remove",)),
        (("--pattern=layers", "--prune.protect=[7]"), 2, ("layers 0 to 2",)),
        (("--data=/nowhere/rows.jsonl",), 2, ("/nowhere/rows.jsonl",)),
        (("--recover-steps=2", "--recover.batch_size=0"), 2, ("recover.batch_size",)),
        (("--num-processes=0",), 2, ("distributed.num_processes",)),
        (("--prune.probes.step=1e-3", "--model.dtype=bfloat16"), 2, ("bfloat16 gate", "at least 0.0078125")),
    ],
)
def test_bad_requests(compress, saved_model, tmp_path: Path, words: tuple[str, ...], code: int, parts: tuple[str, ...]):
    done = compress(saved_model("llama"), tmp_path / "out", *words)
    assert done.code == code and all(part in done.told for part in parts), done.told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", tiny.FIXED_HEADS)
def test_heads_that_cannot_be_cut(compress, no_loading, saved_model, tmp_path: Path, family: str):
    done = compress(saved_model(family), tmp_path / "out", "--pattern=heads", "--sparsity=0.1")
    assert done.code in (2, 3) and "head_dim" in done.told


def test_a_family_that_is_not_known_is_refused_with_those_that_are(compress, no_loading, tmp_path: Path):
    config = hf.BioGptConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = save(hf.AutoModelForCausalLM.from_config(config), tmp_path / "model")
    done = compress(model, tmp_path / "out", *CHANNELS)
    assert done.code == 3 and "biogpt" in done.told and "llama" in done.told


# -- models ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "no-such-model-anywhere", "/nowhere/model.gguf"])
def test_a_missing_model(compress, tmp_path: Path, name: str):
    done = compress(name, tmp_path / "out", *CHANNELS)
    assert done.code == 2 and name in done.told


def test_folders_that_are_no_checkpoint(compress, saved_model, tmp_path: Path):
    empty = tmp_path / "empty"
    empty.mkdir()
    done = compress(empty, tmp_path / "out", *CHANNELS)
    assert done.code == 2 and "no config.json" in done.told
    bare = changed(saved_model("llama"), tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    done = compress(bare, tmp_path / "out", *CHANNELS)
    assert done.code == 2 and str(bare) in done.told
    odd = changed(saved_model("llama"), tmp_path / "odd", model_type="llamo")
    done = compress(odd, tmp_path / "out", *CHANNELS)
    assert done.code in (2, 3) and str(odd) in done.told
    broken = changed(saved_model("llama"), tmp_path / "broken")
    (broken / "config.json").write_text("{", encoding="utf-8")
    done = compress(broken, tmp_path / "out", *CHANNELS)
    assert done.code == 2 and str(broken) in done.told
    cut = changed(saved_model("llama"), tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:5000])
    done = compress(cut, tmp_path / "out", *CHANNELS)
    assert done.code == 2 and str(cut) in done.told
    assert not (tmp_path / "out").exists()


def test_weights_of_another_shape_are_not_reinitialised(compress, saved_model, tmp_path: Path):
    """Config says 24 channels, the files hold 48: never a silent random layer."""
    odd = changed(saved_model("llama"), tmp_path / "odd", intermediate_size=24)
    done = compress(odd, tmp_path / "out", "--pattern=2:4")
    assert done.code == 2 and str(odd) in done.told


def test_missing_weights_are_named(compress, saved_model, tmp_path: Path):
    deeper = changed(saved_model("llama"), tmp_path / "deeper", num_hidden_layers=4)
    done = compress(deeper, tmp_path / "out", "--pattern=2:4")
    assert done.code == 2 and "lacks 9 weights" in done.told and "model.layers.3" in done.told


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(compress, tmp_path: Path, value: float):
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    done = compress(save(model, tmp_path / "model"), tmp_path / "out", *CHANNELS)
    assert done.code == 2 and "model.layers.1.mlp.up_proj.weight" in done.told


@pytest.mark.parametrize(
    "quantised",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors", "config_groups": {}, "format": "pack-quantized"},
    ],
)
def test_an_already_quantised_checkpoint(compress, no_loading, saved_model, tmp_path: Path, quantised: dict):
    model = changed(saved_model("llama"), tmp_path / "model", quantization_config=quantised)
    done = compress(model, tmp_path / "out", *CHANNELS)
    assert done.code == 3 and quantised["quant_method"] in done.told and "already quantised" in done.told


def test_pruned_heads_of_an_old_config(compress, no_loading, saved_model, tmp_path: Path):
    model = changed(saved_model("bert"), tmp_path / "model", pruned_heads={"0": [1]})
    done = compress(model, tmp_path / "out", *CHANNELS)
    assert done.code == 3 and "pruned_heads" in done.told


def test_a_checkpoint_without_tokenizer(compress, tmp_path: Path):
    tiny.build("llama").save_pretrained(tmp_path / "model")
    done = compress(tmp_path / "model", tmp_path / "out", *CHANNELS)
    assert done.code == 2 and "tokenizer" in done.told


def test_an_image_model_without_the_image_library(compress, saved_model, tmp_path: Path, monkeypatch):
    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("ViTImageProcessor requires the PIL library\nbut it was not found")

    monkeypatch.setattr(load, "AutoImageProcessor", SimpleNamespace(from_pretrained=missing))
    done = compress(saved_model("vit"), tmp_path / "out", *CHANNELS)
    assert done.code == 2 and "PIL" in done.told


def test_an_invalid_generation_config_does_not_lose_the_run(compress, saved_model, tmp_path: Path):
    """transformers refuses to save it at the very end, after all the work."""
    model = changed(saved_model("llama"), tmp_path / "model")
    facts = {"do_sample": False, "temperature": 0.5, "top_p": 0.3, "bos_token_id": 1, "eos_token_id": 2}
    (model / "generation_config.json").write_text(json.dumps(facts), encoding="utf-8")
    for name, pattern in (("a", "2:4"), ("b", "channels")):
        done = compress(model, tmp_path / name, *PATTERNS[pattern])
        assert done.code == 0, done.err
        check(tmp_path / name, "llama", pattern)


def test_pickled_weights_are_not_run(compress, saved_model, tmp_path: Path):
    model, mark = changed(saved_model("llama"), tmp_path / "model"), tmp_path / "was-run"
    (model / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {mark}",))

    torch.save({"x": Bomb()}, model / "pytorch_model.bin")
    done = compress(model, tmp_path / "out", *CHANNELS)
    assert done.code == 2 and not mark.exists()


# -- outputs -----------------------------------------------------------------------------------------------------------
def test_a_folder_that_is_not_empty_is_refused_before_loading(compress, no_loading, saved_model, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    done = compress(saved_model("llama"), out, *CHANNELS)
    assert done.code == 2 and "not empty" in done.told and "--overwrite" in done.told
    assert [f.name for f in out.iterdir()] == ["precious.txt"]


def test_overwrite_leaves_no_stale_file(compress, saved_model, tmp_path: Path):
    out = tmp_path / "out"
    assert compress(saved_model("llama"), out, *CHANNELS, "--output.max_shard_gib=0.00003").code == 0
    assert len(list(out.glob("model-*.safetensors"))) > 1
    (out / "stale.bin").write_text("old")
    assert compress(saved_model("llama"), out, *PATTERNS["layers"], "--overwrite").code == 0
    assert [f.name for f in out.glob("*.safetensors")] == ["model.safetensors"]
    assert not (out / "stale.bin").exists() and not list(out.glob("*.index.json"))
    check(out, "llama", "layers")


def test_the_output_is_readable_by_others(compress, saved_model, tmp_path: Path):
    """Temporary folders and safetensors files are private; a published checkpoint is not."""
    out = tmp_path / "out"
    assert compress(saved_model("llama"), out, *CHANNELS).code == 0
    assert out.stat().st_mode & 0o777 == 0o755 and all(f.stat().st_mode & 0o044 == 0o044 for f in out.iterdir())


@pytest.mark.parametrize("umask, folders, files", [(0o022, 0o755, 0o644), (0o002, 0o775, 0o664), (0o077, 0o700, 0o600)])
def test_modes_follow_the_umask_and_the_group_of_the_folder(
    backend, tmp_path: Path, umask: int, folders: int, files: int
):
    """Subfolders can be entered (`additional_chat_templates/`), a team's shared folder stays the team's, and what is
    private stays so."""
    tmp_path.chmod(0o2775)
    before = os.umask(umask)
    try:
        with output_folder.draft(tmp_path / "out", backend) as draft:
            (draft / "deep" / "deeper").mkdir(parents=True, mode=0o700)
            for file in (draft / "one", draft / "deep" / "deeper" / "two"):
                file.write_text("text", encoding="utf-8")
                file.chmod(0o600)
    finally:
        os.umask(before)
    made = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert len(made) == 5
    for path in made:
        assert path.stat().st_mode & 0o777 == (folders if path.is_dir() else files), path
        assert bool(path.stat().st_mode & stat.S_ISGID) == path.is_dir(), path


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_exporting_onto_the_source(compress, no_loading, saved_model, tmp_path: Path, overwrite: tuple[str, ...]):
    model, link = changed(saved_model("llama"), tmp_path / "model"), tmp_path / "link"
    link.symlink_to(model)
    before = sorted(f.name for f in model.iterdir())
    for out in (model, link, tmp_path / "elsewhere" / ".." / "model"):
        done = compress(model, out, *CHANNELS, *overwrite)
        assert done.code == 2 and "own folder" in done.told
    assert sorted(f.name for f in model.iterdir()) == before


def test_overwriting_a_folder_that_holds_the_source(compress, no_loading, saved_model, tmp_path: Path):
    """--output models --model models/llama --overwrite would delete the model."""
    model = changed(saved_model("llama"), tmp_path / "models" / "llama")
    done = compress(model, tmp_path / "models", *CHANNELS, "--overwrite")
    assert done.code == 2 and str(tmp_path / "models") in done.told
    assert (model / "model.safetensors").exists()


def test_an_output_that_is_a_file_or_cannot_be_written(compress, no_loading, saved_model, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        done = compress(saved_model("llama"), out, *CHANNELS)
        assert done.code == 2 and str(tmp_path / "file") in done.told


def test_a_disk_without_room_is_refused_before_loading(compress, no_loading, saved_model, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(
        output_folder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000)
    )
    done = compress(saved_model("llama"), tmp_path / "out", *CHANNELS)
    assert done.code == 2 and "5,000 free" in done.told and str(tmp_path / "out") in done.told


def files_of(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


LIMITED = (
    "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
    "from tinygn_dist.cli.main import main; sys.exit(main())"
)


def test_a_disk_that_fills_up_while_writing(cli: Cli, compress, saved_model, tmp_path: Path):
    """Files cannot grow beyond 50 kB, as on a full disk: the old output stays, no partial folder is left."""
    out = tmp_path / "out"
    assert compress(saved_model("llama"), out, *CHANNELS).code == 0
    before = files_of(out)
    done = cli.python(
        LIMITED, "compress", "--model", saved_model("llama"), "--output", out, "--overwrite", *SMALL, *CHANNELS
    )
    assert done.returncode == 2 and str(tmp_path) in told(done)
    assert files_of(out) == before and [f.name for f in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "module, where", [(export, "write_checkpoint"), (verification, "read_back"), (verification, "sparsity_figures")]
)
def test_a_crash_during_export_leaves_the_old_folder(
    compress, saved_model, tmp_path: Path, monkeypatch, module: ModuleType, where: str
):
    out, real = tmp_path / "out", getattr(module, where)
    assert compress(saved_model("llama"), out, *CHANNELS).code == 0
    before = files_of(out)

    def crash(*arguments: Any) -> None:
        real(*arguments)
        raise RuntimeError("as if the machine had died")

    monkeypatch.setattr(module, where, crash)
    with pytest.raises(RuntimeError, match="machine had died"):
        compress(saved_model("llama"), out, *PATTERNS["layers"], "--overwrite")
    with pytest.raises(RuntimeError, match="machine had died"):
        compress(saved_model("llama"), tmp_path / "new", *CHANNELS)
    assert files_of(out) == before and [f.name for f in tmp_path.iterdir()] == ["out"]


def test_a_failed_rename_puts_the_old_folder_back(compress, saved_model, tmp_path: Path, monkeypatch):
    out, real = tmp_path / "out", os.rename
    assert compress(saved_model("llama"), out, *CHANNELS).code == 0
    before = files_of(out)

    def rename(source: Any, target: Any) -> None:
        if Path(target) == out and "-old-" not in str(source):
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(output_folder.os, "rename", rename)
    with pytest.raises((OSError, UserError)):
        done = compress(saved_model("llama"), out, *PATTERNS["layers"], "--overwrite")
        raise UserError(done.told)
    assert files_of(out) == before and [f.name for f in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_run_left_is_cleared_away_but_never_the_only_copy(compress, saved_model, tmp_path: Path):
    """Killed between the two renames, the old output lies under a temporary name: it must come back, not be deleted."""
    out = tmp_path / "out"
    assert compress(saved_model("llama"), out, *CHANNELS).code == 0
    before = files_of(out)
    (tmp_path / ".partial-out-abcdefgh").mkdir()
    os.rename(out, tmp_path / ".partial-out-old-123")
    done = compress(saved_model("llama"), out, *PATTERNS["layers"])
    assert done.code == 2 and "not empty" in done.told
    assert files_of(out) == before
    done = compress(saved_model("llama"), out, *PATTERNS["layers"], "--overwrite")
    assert done.code == 0 and [f.name for f in tmp_path.iterdir()] == ["out"]


# -- several processes -------------------------------------------------------------------------------------------------
def test_accelerate_launch_that_starts_one_process_is_refused(cli: Cli, saved_model, tmp_path: Path):
    """`accelerate launch --cpu --num_processes 2` starts one process and says nothing."""
    words = ("--model", saved_model("llama"), "--output", tmp_path / "out", *SMALL, *CHANNELS)
    done = cli.accelerate(*words, launcher=("--cpu", "--num_processes", "2", "--num_machines", "1"))
    line = [row for row in done.stderr.splitlines() if row.startswith("tinygn: ")]
    assert done.returncode != 0 and len(line) == 1 and "2 processes were asked for, 1 are running" in line[0]
    assert not (tmp_path / "out").exists()


def test_bad_data_on_two_ranks_is_told_once(cli: Cli, saved_model, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"a": "x", "b": "y"}\n', encoding="utf-8")
    words = ("--model", saved_model("llama"), "--output", tmp_path / "out", *SMALL, *CHANNELS)
    done = cli.accelerate(*words, "--data", tmp_path / "rows.jsonl")
    lines = [row for row in done.stderr.splitlines() if row.startswith("tinygn: ")]
    assert done.returncode != 0 and len(lines) == 1 and "--data.column" in lines[0]
    assert not (tmp_path / "out").exists()


def _told(backend: Backend, asked: list[dict[str, Any]], broken: str | None = None) -> str:
    """What each rank is told when it runs its own config, with one function broken on the last rank."""
    monkeypatch = pytest.MonkeyPatch()
    if broken and backend.rank == backend.num_ranks - 1:

        def fail(*_: Any, **__: Any) -> None:
            raise UserError("this rank cannot")

        monkeypatch.setattr(broken, fail)
    try:
        pipeline.compress(load_config(None, asked[backend.rank]), backend)
    except UserError as error:
        return str(error)
    finally:
        monkeypatch.undo()
    return "done"


def test_ranks_that_disagree_about_the_config(process_groups, saved_model, tmp_path: Path):
    asked = [overrides(saved_model("llama"), tmp_path / "out", *CHANNELS, f"--data.seed={rank}") for rank in range(2)]
    one, other = process_groups(2).call(_told, asked)
    assert one == other and "ranks disagree about the config" in one
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "broken",
    [
        "tinygn_dist.checkpoints.load.load_model",
        "tinygn_dist.run.loading.load_splits",
        "tinygn_dist.checkpoints.output_folder.claim",
        "tinygn_dist.checkpoints.verification.read_back",
    ],
)
def test_one_rank_that_fails_ends_all_with_one_line(process_groups, saved_model, tmp_path: Path, broken: str):
    group: Ranks = process_groups(2)
    asked = [overrides(saved_model("llama"), tmp_path / "out", *CHANNELS)] * 2
    one, other = group.call(_told, asked, broken)
    assert one == other and "failed on rank 1: this rank cannot" in one
    assert list(tmp_path.iterdir()) == []
    assert group.call(_told, asked) == ["done", "done"]  # nobody is out of step


def test_ranks_that_see_other_data_are_stopped(process_groups, saved_model, tmp_path: Path):
    for rank, texts in enumerate((tiny.texts()[:150], tiny.texts()[1:151])):
        (tmp_path / f"rows{rank}").mkdir()
        (tmp_path / f"rows{rank}" / "rows.txt").write_text("\n".join(" ".join(t.split()) for t in texts))
    asked = overrides(saved_model("llama"), tmp_path / "out", *CHANNELS, "--data", "WHERE/rows.txt")
    told_by = process_groups(2).call(_told_on_other_files, asked, [str(tmp_path / "rows0"), str(tmp_path / "rows1")])
    assert told_by[0] == told_by[1] and "ranks disagree about the data" in told_by[0]


def _told_on_other_files(backend: Backend, asked: dict[str, Any], folders: list[str]) -> str:
    """As on two machines whose file of the same name differs."""
    before = os.getcwd()
    os.chdir(folders[backend.rank])
    try:
        return _told(backend, [asked | {"data.name": "rows.txt"}] * 2)
    finally:
        os.chdir(before)


DYING = """
import os, sys
from tinygn_dist.cli.main import main
from tinygn_dist.prune.structured.layers_heads_channels import LayersHeadsChannels
real = LayersHeadsChannels.remove
def die(*a, **k):
    if os.environ["RANK"] == "1":
        raise MemoryError("as if out of memory")
    return real(*a, **k)
LayersHeadsChannels.remove = die
sys.exit(main())
"""


def test_a_rank_that_dies_ends_the_others(cli: Cli, saved_model, tmp_path: Path):
    """Rank 1 raises where rank 0 waits for it: all processes end, nothing is written."""
    script = tmp_path / "dying.py"
    script.write_text(DYING, encoding="utf-8")
    start = "import sys; from torch.distributed.run import main; sys.argv[0] = 'torchrun'; main()"
    done = cli.python(
        start,
        "--standalone",
        "--nproc_per_node",
        2,
        script,
        "compress",
        "--model",
        saved_model("llama"),
        "--output",
        tmp_path / "out",
        *SMALL,
        *CHANNELS,
        "--distributed.timeout_seconds=30",
        seconds=90,
    )
    assert done.returncode != 0 and "as if out of memory" in done.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["dying.py"]


def test_a_batch_that_cannot_be_dealt_is_refused_before_loading(process_groups, saved_model, tmp_path: Path):
    words = ("--recover-steps=2", "--recover.batch_size=3")
    asked = [overrides(saved_model("llama"), tmp_path / "out", *CHANNELS, *words)] * 2
    one, other = process_groups(2).call(_told, asked, "tinygn_dist.checkpoints.load.load_model")
    assert one == other and "accepted: a multiple of 2" in one


# -- evaluate and inspect ----------------------------------------------------------------------------------------------
def test_inspect_reads_no_weights(tinygn, no_loading, saved_model):
    done = tinygn("inspect", saved_model("llama"), "--json")
    facts = json.loads(done.out)
    model = tiny.build("llama")
    assert facts["num_params"] == sum(p.numel() for p in model.parameters())
    assert facts["units"]["layers"]["count"] == 3 and facts["units"]["heads"]["count"] == 2
    assert facts["units"]["channels"] | {"share": 0} == {"count": 48, "params_each": 96, "removable": True, "share": 0}
    targeted = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    assert sum(t["share"] for t in facts["matrices"].values()) == pytest.approx(targeted / facts["num_params"])
    assert tinygn("inspect", saved_model("gpt2")).code == 0


@pytest.mark.parametrize("verb", ["inspect", "evaluate"])
def test_the_other_verbs_tell_one_line_too(tinygn, saved_model, verb: str):
    assert tinygn(verb, "/nowhere/model").told
    assert "unknown argument" in tinygn(verb, saved_model("llama"), "--surplus").told


def test_evaluate_on_another_dataset(tinygn, saved_model, text_file: Path):
    done = tinygn(
        "evaluate", saved_model("llama"), "--data", text_file, "--samples", 2, "--seq-len", 24, "--json", "--no-latency"
    )
    figures = json.loads(done.out)
    assert figures["evaluation"]["sequences"] == 2 and figures["evaluation"]["tokens"] == 48
    assert figures["perplexity"] > 1 and len(stored(saved_model("llama"))) == 30


@pytest.mark.parametrize(
    "words, part",
    [
        (("--seq-len", 1), "seq_len"),
        (("--samples", -3), "eval_samples"),
        (("--samples", 0), "eval_samples"),
        (("--task", "chat"), "task"),
        (("--dtype", "int8"), "dtype"),
    ],
)
def test_evaluate_refuses_impossible_values(tinygn, saved_model, words: tuple, part: str):
    done = tinygn("evaluate", saved_model("llama"), *words, "--no-latency")
    assert done.code == 2 and part in done.told


def test_evaluate_with_a_broken_report(tinygn, saved_model, tmp_path: Path):
    model = changed(saved_model("llama"), tmp_path / "model")
    for content in ("{", '{"surplus": 1}'):
        (model / "tinygn_report.json").write_text(content, encoding="utf-8")
        assert "tinygn_report.json cannot be read" in tinygn("evaluate", model, "--no-latency").told


def test_a_neighbour_that_is_still_being_written_is_left_alone(compress, saved_model, tmp_path: Path):
    """Two jobs side by side, for `out` and `out-2`: the first must not clear away the draft of the second."""
    (tmp_path / ".partial-out-2-abcdefgh").mkdir()
    (tmp_path / ".partial-out-deadbeef").mkdir()
    assert compress(saved_model("llama"), tmp_path / "out", *CHANNELS).code == 0
    assert sorted(f.name for f in tmp_path.iterdir()) == [".partial-out-2-abcdefgh", "out"]
