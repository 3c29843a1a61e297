"""README and docs name only what exists: links, paths, config keys, tests."""

from __future__ import annotations

import re
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tinygn_dist.cli.main import _overrides, _parser
from tinygn_dist.config import Config, Section, load_config
from tinygn_dist.registry import experimental

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("tinygn_dist", "tests", "launch", "configs", "benchmarks", "docs")
"""a name that begins with one of these is a path of this project"""
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}


def sections_in(annotation: object) -> Iterator[type[Section]]:
    """Sections that a key can hold: alone, or None, or several."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from sections_in(inner)


def has_key(dotted: str, section: type[Section] = Config) -> bool:
    key, _, rest = dotted.partition(".")
    if key == "experiments" and rest:
        name, _, option = rest.partition(".")
        known = experimental("OPTIONS", type[Section])
        return name in known and (not option or has_key(option, known[name]))
    if key not in section.model_fields:
        return False
    inner = list(sections_in(section.model_fields[key].annotation))
    return not rest or any(has_key(rest, one) for one in inner)


def names_in_code(text: str) -> Iterator[str]:
    """Whatever stands in backquotes or in a fenced block, word by word; a/{b,c}.d is two words."""
    fenced = re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL)
    quoted = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for code in (*fenced, *quoted):
        for word in re.split(r"[\s\"'():;\[\]]+", code):
            stem, brace, rest = word.partition("{")
            inner, _, tail = rest.partition("}")
            yield from (stem + one + tail for one in inner.split(",")) if brace and stem else word.split(",")


def paths_in(text: str) -> Iterator[str]:
    for word in names_in_code(text):
        if re.match(rf"({'|'.join(FOLDERS)})/", word):
            yield word


def keys_in(text: str) -> Iterator[str]:
    """`--section.key`, and section.key in backquotes, of sections that Config has; not names of files."""
    yield from re.findall(r"--([a-z_]+(?:\.[a-z_]+)+)", text)
    for word in names_in_code(text):
        if re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", word) and word.split(".")[0] in Config.model_fields:
            yield word


def test_the_readers_find_what_they_look_for():
    text = "`--prune.nothing 3` and `recover.steps`, `tinygn_dist/no.py`\n```bash\npython benchmarks/{a,b}.py\n```"
    assert list(keys_in(text)) == ["prune.nothing", "recover.steps"]
    assert sorted(paths_in(text)) == ["benchmarks/a.py", "benchmarks/b.py", "tinygn_dist/no.py"]
    assert has_key("recover.steps") and has_key("prune.experiments.owl.spread")
    assert not has_key("prune.nothing") and not has_key("steps.x") and not has_key("prune.experiments.owl.x")


def test_links_lead_somewhere():
    links = [(page, link) for page, text in TEXTS.items() for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)]
    assert len(links) > 50
    assert not [
        pair for pair in links if "://" not in pair[1] and not (ROOT / pair[0]).parent.joinpath(pair[1]).exists()
    ]


def test_paths_exist():
    paths = [(page, path) for page, text in TEXTS.items() for path in paths_in(text)]
    assert len(paths) > 50
    assert not [pair for pair in paths if not list(ROOT.glob(pair[1].rstrip("/.")))]


def test_keys_exist():
    keys = [(page, key) for page, text in TEXTS.items() for key in keys_in(text)]
    assert len(keys) > 50
    assert not [pair for pair in keys if not has_key(pair[1])]


@pytest.mark.parametrize("page", TEXTS)
def test_recipes_and_commands_are_accepted(page: str):
    for block in re.findall(r"```yaml\n(.*?)```", TEXTS[page], flags=re.DOTALL):
        assert Config(**yaml.safe_load(block)).recipe
    for command in re.findall(r"tinygn (compress (?:\\\n|[^`\n])+)", TEXTS[page]):
        words = shlex.split(re.sub(r"\[--[^\]]*\]", "", command.replace("\\\n", " ")), comments=True)
        if "--help" not in words:
            arguments, rest = _parser().parse_known_args(words)
            overrides = {"model.name": "m"} | _overrides(arguments, rest)
            assert load_config(ROOT / arguments.recipe if arguments.recipe else None, overrides).recipe


def test_every_decision_is_listed():
    folder = ROOT / "docs" / "decisions"
    listed = re.findall(r"- \[([^\]]+)\]\(([^)]+)\)", (folder / "README.md").read_text(encoding="utf-8"))
    records = {path.name: path.read_text(encoding="utf-8").splitlines()[0] for path in folder.glob("*.md")}
    assert {name: f"# {title}" for title, name in listed} == {k: v for k, v in records.items() if k != "README.md"}


def test_the_map_has_every_folder():
    rows = set(re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "map.md").read_text(encoding="utf-8"), flags=re.M))
    folders = {path.parent.relative_to(ROOT / "tinygn_dist") for path in (ROOT / "tinygn_dist").rglob("__init__.py")}
    top = {f"{path}/" for path in map(str, folders) if path not in (".", "prune") and "/" not in path}
    assert top | {"prune/structured/", "prune/sparsity/"} <= rows
