"""Sparsity and size that change during the training of `tinygn compress`."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import Cli
from tests.pipeline.conftest import SMALL, report_of

TRAINED = ["--recover.seq_len=16", "--recover.batch_size=2", "--schedule.every=2", "--recover-steps=8"]


def zeros_of(folder) -> dict[str, float]:
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return {name: float((w == 0).float().mean()) for name, w in state.items() if "_proj.weight" in name}


def test_sparsity_grows_by_the_schedule_and_ends_as_asked(compress, saved_model, text_file, tmp_path):
    asked = [
        "--pattern=unstructured",
        "--sparsity=0.5",
        "--criterion=wanda",
        "--schedule.kind=cubic",
        "--prune.scope=layer",
    ]
    done = compress(saved_model("llama"), tmp_path / "out", "--data", text_file, *asked, *TRAINED)
    assert done.code == 0, done.err
    report = report_of(tmp_path / "out")
    updates = report["recovery"]["updates"]
    assert [update["step"] for update in updates] == [2, 4, 6]
    # Zhu and Gupta's cubic from the first jump of 0.25: 0.5 - 0.25 * (1 - k / 3) ** 3
    assert [round(update["sparsity"], 2) for update in updates] == [0.43, 0.49, 0.5]
    assert all(update["removed"] > 0 == update["regrown"] for update in updates)
    assert all(share == pytest.approx(0.5, abs=0.001) for share in zeros_of(tmp_path / "out").values())
    gone = report["parameters"]["set_to_zero"]
    assert gone == report["parameters"]["targeted"] // 2


def test_two_processes_end_with_as_many_zeros_as_one(cli: Cli, saved_model, text_file, tmp_path):
    asked = ["--pattern=unstructured", "--sparsity=0.5", "--criterion=magnitude", "--schedule.regrow=gradient"]
    words = ["--model", saved_model("llama"), "--data", text_file, *SMALL, *asked, *TRAINED]
    done = cli.tinygn("compress", *words, "--output", tmp_path / "two", "--num-processes", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(share == 0.5 for share in zeros_of(tmp_path / "two").values())
    assert report_of(tmp_path / "two")["recovery"]["updates"][0]["regrown"] > 0


@pytest.mark.parametrize(("pattern", "sparsity", "earlier"), [("channels", 0.3, 2), ("layers", 0.6, 1)])
def test_units_go_round_by_round(
    compress, saved_model, text_file, tmp_path, pattern: str, sparsity: float, earlier: int
):
    """Of three layers the second round takes the second, and the third finds nothing left to do."""
    asked = [f"--pattern={pattern}", f"--sparsity={sparsity}", "--schedule.kind=iterative"]
    done = compress(saved_model("llama"), tmp_path / "out", "--data", text_file, *asked, *TRAINED, "--schedule.every=3")
    assert done.code == 0, done.err
    report = report_of(tmp_path / "out")
    assert len(report["earlier_selections"]) == earlier and report["recovery"]["steps"] == 8
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == report["after"]["num_params"]
    dense = AutoModelForCausalLM.from_pretrained(saved_model("llama"))
    layers = [sum(p.numel() for p in m.model.layers.parameters()) for m in (model, dense)]
    assert layers[0] <= (1 - sparsity) * layers[1]
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


def test_a_schedule_that_does_not_fit_is_refused_before_work(compress, saved_model, text_file, tmp_path):
    done = compress(saved_model("llama"), tmp_path / "out", "--pattern=unstructured", "--schedule.kind=cubic")
    assert done.code == 2 and "leaves no update in the first 75% of 0 optimizer steps" in done.told
