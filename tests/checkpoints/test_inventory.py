"""Every stored tensor: placed, carried over, named in a note with its entry of the config, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.conftest import save
from tests.family_cases import CASES, build
from tinygn_dist.checkpoints import load
from tinygn_dist.checkpoints.companions import Companions
from tinygn_dist.checkpoints.inventory import beside, take_inventory
from tinygn_dist.config import ModelConfig
from tinygn_dist.errors import Refused, UserError
from tinygn_dist.models.anatomy import read_anatomy

HEAD = {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)}
MTP = {"mtp.layers.0.mlp.up_proj.weight": torch.ones(48, 32), "mtp.norm.weight": torch.ones(32)}
NEXT = {f"model.layers.{n}.{x}": torch.ones(32) for n in (3, 4) for x in ("enorm.weight", "mlp.up_proj.weight")}


def with_tensors(model: torch.nn.Module, folder: Path, extra: dict[str, torch.Tensor], **entries: object) -> Path:
    """A saved model whose file holds more tensors (None: fewer), and whose config.json says more."""
    save(model, folder)
    file = folder / "model.safetensors"
    made = {**load_file(file), **extra}
    save_file({name: t for name, t in made.items() if t is not None}, file, metadata={"format": "pt"})
    facts = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


def looked_into(folder: Path, units: bool = False, **options: object) -> Companions:
    source = load.find_model(ModelConfig(name=str(folder), **options))
    skeleton = load.skeleton(source)
    return beside(source, skeleton, read_anatomy(skeleton, needs_units=False), units)


@pytest.mark.parametrize(
    "extra, units, carried",
    [
        (HEAD, False, True),
        (HEAD, True, True),
        (MTP, False, True),
        (MTP, True, False),
        (NEXT, False, True),
        (NEXT, True, False),
        ({"model.layers.0.adapter.weight": torch.ones(4)}, False, True),
        ({"model.layers.0.adapter.weight": torch.ones(4)}, True, False),
    ],
)
def test_what_the_class_has_no_module_for(tmp_path: Path, extra: dict, units: bool, carried: bool):
    folder = with_tensors(tiny.build("llama"), tmp_path / "model", extra, num_nextn_predict_layers=1)
    found = looked_into(folder, units)
    assert found.tensors == (tuple(sorted(extra)) if carried else ())
    assert found.dropped == (() if carried else tuple(sorted(extra)))
    broken = not carried and extra is not HEAD and "model.layers.0.adapter.weight" not in extra
    assert found.broken_promises == (("num_nextn_predict_layers",) if broken else ())
    assert any(sorted(extra)[0] in note for note in found.notes)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "bert-classifier", "vit", "opt", "llama-tied"])
def test_a_plain_checkpoint_has_nothing_to_say(family: str, saved_model):
    found = looked_into(saved_model(family))
    assert (found.tensors, found.dropped, found.notes) == ((), (), [])


@pytest.mark.parametrize("family", CASES)
def test_names_that_are_translated_are_known(family: str, tmp_path: Path):
    """Fused experts are stored one by one, towers and norms under older names."""
    save(build(family), tmp_path)
    found = looked_into(tmp_path)
    assert (found.tensors, found.dropped) == ((), ())


def test_buffers_of_old_checkpoints_are_computed_anew(tmp_path: Path):
    names = [f"model.layers.{n}.self_attn.rotary_emb.inv_freq" for n in range(3)]
    masks = {f"transformer.h.{n}.attn.bias": torch.ones(4) for n in range(3)}
    folder = with_tensors(tiny.build("gpt2"), tmp_path / "gpt2", masks)
    assert looked_into(folder).tensors == ()
    source = load.find_model(ModelConfig(name=str(folder)))
    assert take_inventory(source, load.skeleton(source)).recomputed == tuple(masks)
    folder = with_tensors(tiny.build("llama"), tmp_path / "llama", {name: torch.ones(4) for name in names})
    found = looked_into(folder, units=True)
    assert (found.tensors, found.dropped) == ((), ())


@pytest.mark.parametrize(
    "extra, part",
    [
        ({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1)}, "belongs to a quantised format"),
        ({"model.layers.1.mlp.up_proj.weight_scale": torch.ones(48, 1)}, "belongs to a quantised format"),
        ({"model.layers.0.mlp.up_proj.qzeros": torch.ones(4, dtype=torch.int32)}, "belongs to a quantised format"),
        ({"model.layers.0.mlp.up_proj.SCB": torch.ones(48)}, "belongs to a quantised format"),
        ({"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}, "is stored as F8_E4M3"),
        ({"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32, dtype=torch.int8)}, "is stored as I8"),
    ],
)
def test_scales_and_codes_of_an_unnamed_format_are_refused(tmp_path: Path, extra: dict, part: str):
    folder = with_tensors(tiny.build("llama"), tmp_path / "model", extra)
    with pytest.raises(Refused, match=f"{sorted(extra)[0]} {part}, and config.json names none"):
        looked_into(folder)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "bert-classifier"])
def test_half_a_checkpoint_is_refused_before_its_weights_load(tmp_path: Path, family: str):
    model = tiny.build(family)
    lost = [name for name in model.state_dict() if ".1." in name]
    folder = with_tensors(model, tmp_path / "model", dict.fromkeys(lost))
    with pytest.raises(UserError, match=rf"lacks {len(lost)} weights of .*, such as {sorted(lost)[0]}"):
        looked_into(folder)


def test_a_shard_that_is_not_there(tmp_path: Path):
    tiny.build("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(UserError, match="cannot be loaded.*model-00002"):
        looked_into(tmp_path)


def test_a_file_that_breaks_off(tmp_path: Path):
    save(tiny.build("llama"), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(UserError, match="cannot be loaded"):
        looked_into(tmp_path)


def test_a_draft_head_is_no_model(tmp_path: Path):
    """EAGLE: one layer and a projection, in a folder whose config says Llama."""
    facts = {"fc.weight": torch.ones(32, 96), "midlayer.mlp.up_proj.weight": torch.ones(48, 32), "d2t": torch.ones(8)}
    folder = with_tensors(tiny.build("llama", num_hidden_layers=1), tmp_path, facts)
    kept = load_file(folder / "model.safetensors")
    rest = {name: t for name, t in kept.items() if "layers" not in name}
    save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 9 weights of LlamaForCausalLM"):
        looked_into(folder)


def test_another_head_of_the_same_body(tmp_path: Path):
    config = tiny.CONFIGS["bert"]()
    save(hf.BertForPreTraining(config), tmp_path, "bert")
    found = looked_into(tmp_path, task="feature-extraction")
    assert "cls.predictions.transform.dense.weight" in found.tensors and not found.dropped


def test_old_files_of_pytorch(tmp_path: Path):
    model = tiny.build("llama")
    save(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({**model.state_dict(), **HEAD}, tmp_path / "pytorch_model.bin")
    found = looked_into(tmp_path)
    assert found.tensors == () and found.dropped == tuple(sorted(HEAD))
