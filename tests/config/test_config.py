"""Every bad value is refused in one line that says what was got and what is accepted."""

from pathlib import Path

import pytest

from tinygn_dist.cli.main import _overrides, _parser
from tinygn_dist.config import NM, Config, load_config
from tinygn_dist.errors import UserError

MODEL = {"model.name": "m"}


def refused(overrides: dict, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, MODEL | overrides)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("value", [0, 1e-6, 0.5, 0.999999])
def test_sparsity_accepts(value: float):
    assert load_config(None, MODEL | {"prune.sparsity": value}).prune.sparsity == value


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, 50, 100, 1e9, float("nan"), float("inf"), "half", None, True, [0.5]])
def test_sparsity_refuses(value: object):
    refused({"prune.sparsity": value}, "prune.sparsity")


def test_fifty_percent_typo_is_answered_with_the_fraction():
    refused({"prune.sparsity": 50}, "got 50", "0 <= sparsity < 1", "did you mean 0.5?")


@pytest.mark.parametrize("pattern", ["", "2;4", "2:4:8", "layer", "0:4", "4:4", "5:4", "2:", ":4", "-1:4", "2:4 "])
def test_bad_patterns(pattern: str):
    refused({"prune.pattern": pattern}, "prune.pattern", repr(pattern))


@pytest.mark.parametrize("pattern, nm", [("2:4", NM(2, 4)), ("1:3", NM(1, 3)), ("unstructured", None), ("units", None)])
def test_good_patterns(pattern: str, nm: NM | None):
    assert load_config(None, MODEL | {"prune.pattern": pattern}).prune.nm == nm


def test_unknown_keys_are_answered_with_the_nearest():
    refused({"prune.sparsty": 0.5}, "unknown key prune.sparsty", "did you mean prune.sparsity?")
    refused({"prun.sparsity": 0.5}, "unknown key prun", "did you mean prune?")
    refused({"data.zzz": 1}, "unknown key data.zzz", "accepted: name")
    refused({"prune.sparsity.more": 1}, "prune.sparsity")


@pytest.mark.parametrize(
    "pattern, criterion",
    [("layers", "wanda"), ("heads", "taylor"), ("units", "fisher"), ("2:4", "removal"), ("unstructured", "gate")],
)
def test_a_criterion_that_does_not_fit(pattern: str, criterion: str):
    refused({"prune.pattern": pattern, "prune.criterion": criterion}, criterion, pattern, "accepted: auto")


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_single_weights_are_not_ranked_by_finite_differences(criterion: str):
    asked = {"prune.pattern": "unstructured", "prune.criterion": criterion, "prune.estimator": "finite-difference"}
    refused(asked, "backprop")


@pytest.mark.parametrize(
    "key, value",
    [
        ("data.num_samples", 0),
        ("data.seq_len", 1),
        ("data.micro_batch", 0),
        ("prune.damping", 0),
        ("prune.damping", 1),
        ("prune.multiple_of", 0),
        ("prune.counts", {"layer": 1}),
        ("prune.counts", {"layers": -1}),
        ("recover.steps", -1),
        ("recover.learning_rate", 0),
        ("recover.distill", 1.1),
        ("recover.temperature", 0),
        ("recover.batch_size", 0),
        ("distributed.num_processes", 0),
        ("distributed.timeout_seconds", 0),
        ("output.max_shard_gib", 0),
        ("model.dtype", "int8"),
        ("model.task", "chat"),
    ],
)
def test_out_of_range(key: str, value: object):
    refused({key: value}, key)


def test_the_model_is_required():
    with pytest.raises(UserError, match="model.*--model"):
        load_config()


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_overrides_win_over_the_recipe(tmp_path: Path):
    recipe = write(tmp_path, "model: {name: a}\nprune: {pattern: '2:4', sparsity: 0.3}\n")
    config = load_config(recipe, {"model.name": "b", "data.seq_len": 64})
    assert (config.model.name, config.prune.pattern, config.prune.sparsity, config.data.seq_len) == (
        "b",
        "2:4",
        0.3,
        64,
    )


@pytest.mark.parametrize(
    "text, part",
    [
        ("model: {name: a}\nprun: {pattern: heads}\n", "did you mean prune?"),
        ("model: {name: a}\nprune: {patern: heads}\n", "did you mean prune.pattern?"),
        ("- a\n- b\n", "accepted: a mapping"),
        ("", "accepted: a mapping"),
        ("model: [", "is not YAML"),
        ("model: {name: a}\nprune: 0.5\n", "prune"),
        ("model: {name: a}\nprune:\n", "prune"),
        ("model: {name: a}\n1: 2\n", "1"),
    ],
)
@pytest.mark.parametrize("overridden", [False, True])
def test_recipe_typos(tmp_path: Path, text: str, part: str, overridden: bool):
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, text), {"prune.multiple_of": 8} if overridden else None)
    assert "\n" not in str(caught.value) and part in str(caught.value)


def test_a_missing_recipe(tmp_path: Path):
    with pytest.raises(UserError, match="no.yaml"):
        load_config(tmp_path / "no.yaml")


def overrides(*words: str) -> dict:
    arguments, rest = _parser().parse_known_args(["compress", *words])
    return _overrides(arguments, rest)


def test_command_line_values_keep_their_meaning():
    """YAML alone would read 2:4 as a base-60 number and a folder named 1 as an integer."""
    found = overrides(
        "--model", "1", "--pattern", "2:4", "--sparsity", "0.5", "--prune.ignore", "[a, b]", "--overwrite"
    )
    assert found == {
        "model.name": "1",
        "prune.pattern": "2:4",
        "prune.sparsity": 0.5,
        "prune.ignore": ["a", "b"],
        "output.overwrite": True,
    }
    config = load_config(None, overrides("--model", "m", "--recover-steps=3", "--prune.counts", "{layers: 1}"))
    assert config.recover.steps == 3 and config.prune.counts == {"layers": 1}


def test_one_pattern_is_not_split_into_letters():
    """--prune.ignore NAME is one regular expression; a string must not become a tuple of characters."""
    try:
        config = load_config(None, overrides("--model", "m", "--prune.ignore", "down_proj"))
    except UserError as error:
        assert "prune.ignore" in str(error)
    else:
        assert config.prune.ignore == ("down_proj",)


@pytest.mark.parametrize("words", [["--nonsense", "1"], ["stray"], ["--prune.sparsity"]])
def test_arguments_that_mean_nothing(words: list[str]):
    with pytest.raises(UserError):
        overrides("--model", "m", *words)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_low_rank_training_and_offloaded_weights_do_not_go_together(where: str):
    asked = {"recover.steps": 2, "recover.train": "lora", "prune.pattern": "unstructured"}
    load_config(None, MODEL | asked)
    with pytest.raises(UserError, match="recover.train lora|recover.optimizer adamw with distributed.offload disk"):
        load_config(None, MODEL | asked | {"distributed.offload": where})


@pytest.mark.parametrize("value", [2, -0.1, "half", "nan", None])
def test_allocation_is_a_share_or_auto(value: object):
    for good in (0, 0.5, 1, "0.25", "auto", "search"):
        load_config(None, MODEL | {"prune.pattern": "unstructured", "prune.solver.allocation": good})
    with pytest.raises(
        UserError, match="prune.solver.allocation: got .*, accepted: 0 .* to 1 .*, auto, .*owl.*search|search.*owl"
    ):
        load_config(None, MODEL | {"prune.solver.allocation": value})


@pytest.mark.parametrize("more", [{"pattern": "2:4"}, {"pattern": "channels"}, {"scope": "global"}], ids=str)
def test_owl_is_for_layers_that_may_differ(more: dict):
    asked = {"prune.pattern": "unstructured", "prune.solver.allocation": "owl"}
    load_config(None, MODEL | asked)
    with pytest.raises(
        UserError, match="solver.allocation owl gives every layer a number of zeros, got pattern .*, accepted"
    ):
        load_config(None, MODEL | asked | {f"prune.{key}": value for key, value in more.items()})


@pytest.mark.parametrize("more", [{"pattern": "2:4"}, {"scope": "row"}, {"criterion": "wanda"}], ids=str)
def test_search_is_for_the_solver(more: dict):
    asked = {"prune.pattern": "unstructured", "prune.solver.allocation": "search"}
    load_config(None, MODEL | asked)
    with pytest.raises(
        UserError, match="solver.allocation search is for criterion obs, got pattern .*, accepted: pattern unst"
    ):
        load_config(None, MODEL | asked | {f"prune.{key}": value for key, value in more.items()})
    with pytest.raises(UserError, match="search with 3 micro-batches of calibration data, accepted: 4 or more"):
        load_config(None, MODEL | asked | {"data.num_samples": 3, "data.micro_batch": 1})


@pytest.mark.parametrize("more", [{"pattern": "channels"}, {"criterion": "wanda"}], ids=str)
def test_admm_is_a_solver_of_weights(more: dict):
    asked = {"prune.pattern": "2:4", "prune.solver.method": "admm"}
    load_config(None, MODEL | asked)
    with pytest.raises(UserError, match="solver.method admm solves weights of criterion obs, got pattern"):
        load_config(None, MODEL | asked | {f"prune.{key}": value for key, value in more.items()})


def test_auto_allocation_needs_something_to_hold_out():
    asked = {"prune.solver.allocation": "auto", "data.num_samples": 4}
    load_config(None, MODEL | asked | {"data.micro_batch": 3})
    with pytest.raises(UserError, match="auto with 1 micro-batches of calibration data, accepted: 2 or more"):
        load_config(None, MODEL | asked | {"data.micro_batch": 4})


def test_fingerprint_covers_what_changes_the_result_and_nothing_else():
    base = load_config(None, MODEL)
    same = load_config(None, MODEL | {"output.dir": "elsewhere", "distributed.num_processes": 4})
    assert base.fingerprint() == same.fingerprint()
    changes = {
        "prune.sparsity": 0.3,
        "data.seed": 1,
        "recover.steps": 5,
        "model.dtype": "bfloat16",
        "data.micro_batch": 2,
    }
    prints = {load_config(None, MODEL | {key: value}).fingerprint() for key, value in changes.items()}
    assert len(prints) == len(changes) and base.fingerprint() not in prints


def test_a_config_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        Config(model={"name": "m"}).prune.sparsity = 0.9
