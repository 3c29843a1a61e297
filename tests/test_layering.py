"""Who may import what, checked on the syntax trees."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tinygn_dist"
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
FLOORS = (
    ("cli",),
    ("integrations",),
    ("pipeline",),
    ("run",),
    ("plan",),
    ("train",),
    ("prune.structured",),
    ("prune.sparsity",),
    ("quantize",),
    ("evaluate",),
    ("step",),
    ("estimate",),
    ("checkpoints",),
    ("data",),
    ("backends",),
    ("models",),
    ("config",),
    ("maths",),
    ("runtime",),
    ("registry",),
    ("errors",),
)
"""docs/map.md from top to bottom: a room imports rooms below it"""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
QUARANTINE = "experiments"
MAX_FUNCTION, MAX_FILE = 60, 320


@functools.cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


@functools.cache
def attributes_of(name: str) -> tuple[tuple[str, int], ...]:
    """(dotted name, line) of every `a.b.c` in a module; begins with a dot where it hangs on a call or an index."""
    found = []
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Attribute):
            words, inner = [node.attr], node.value
            while isinstance(inner, ast.Attribute):
                words.append(inner.attr)
                inner = inner.value
            words.append(inner.id if isinstance(inner, ast.Name) else "")
            found.append((".".join(reversed(words)), node.lineno))
    return tuple(found)


@functools.cache
def imports_of(name: str) -> tuple[tuple[str, int], ...]:
    return tuple(_imports(name))


def _imports(name: str) -> Iterator[tuple[str, int]]:
    """(dotted name, column) of everything a module imports; column 0 = when it is itself imported."""
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.col_offset) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in FILES or node.module == "torch" else node.module), node.col_offset


def room_of(name: str) -> str:
    """The folder that a module lies in, as FLOORS has it; a module of the package itself is a room of its own."""
    inner = name.split(".")[1:]
    return ".".join(inner[:2] if inner[:1] == ["prune"] else inner[:1])


def is_pure(name: str) -> bool:
    return room_of(name) in ("maths", "errors")


def test_the_walk_sees_the_package():
    assert len(FILES) > 30 and "tinygn_dist.maths.solve.obs" in FILES
    assert ("torch.distributed", 0) in set(imports_of("tinygn_dist.backends.collectives"))


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("tinygn_dist.backends")])
def test_only_backends_know_of_process_groups(name: str):
    forbidden = ("torch.distributed", "deepspeed", "accelerate.state", "accelerate.utils")
    bad = [what for what, _ in imports_of(name) if what.startswith(forbidden) or "DTensor" in what]
    assert not bad, f"{name} imports {bad}"
    collectives = {"all_reduce", "all_gather", "full_tensor", "to_local"}
    for dotted, line in attributes_of(name):
        assert dotted.split(".")[-1] not in collectives, f"{name}:{line}"
        assert not dotted.startswith(("torch.distributed", "dist.")), f"{name}:{line}"


@pytest.mark.parametrize("name", [name for name in FILES if is_pure(name)])
def test_pure_modules_import_torch_the_standard_library_and_each_other(name: str):
    for what, _ in imports_of(name):
        ours = what.startswith("tinygn_dist")
        assert is_pure(what) if ours else what.split(".")[0] in (*sys.stdlib_module_names, "torch"), f"{name}: {what}"


def test_every_room_has_a_floor():
    rooms = {room_of(name) for name in FILES} - {"", "prune", QUARANTINE}
    assert rooms <= set(FLOOR), f"say in FLOORS and docs/map.md where {sorted(rooms - set(FLOOR))} lie"


@pytest.mark.parametrize("name", [name for name in FILES if name != "tinygn_dist"])
def test_arrows_run_down(name: str):
    """Imports inside functions count too: they would only hide an arrow that runs up."""
    here = room_of(name)
    for what, _ in imports_of(name):
        there = room_of(what) if what in FILES else here
        if there == here:
            continue
        assert there != QUARANTINE, f"{name} imports {what}, and nothing imports an experiment"
        if here not in (QUARANTINE, "prune"):
            assert FLOOR[here] < FLOOR[there], f"{name} imports {what}, which lies above it"


@pytest.mark.parametrize("path", [p.parent for p in PACKAGE.rglob("__init__.py")], ids=lambda path: path.name)
def test_a_folder_says_its_question(path: Path):
    doc = ast.get_docstring(ast.parse((path / "__init__.py").read_text(encoding="utf-8")))
    assert doc, f"{path}: what question does it answer?"
    assert path == PACKAGE or "?" in doc.splitlines()[0] + doc, f"{path}: {doc.splitlines()[0]} asks nothing"


def test_no_import_cycles():
    graph = {
        name: {what for what, column in imports_of(name) if what in FILES and column == 0 and what != name}
        for name in FILES
        if name != "tinygn_dist"
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "cycle: " + " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert len(done) == len(graph)


@pytest.mark.parametrize("name", FILES)
def test_only_the_command_line_reads_argv_and_the_environment(name: str):
    may_read_environ = name == "tinygn_dist.cli.main" or name.startswith(
        "tinygn_dist.backends"
    )  # how the job was launched
    for dotted, line in attributes_of(name):
        assert name == "tinygn_dist.cli.main" or dotted != "sys.argv", f"{name}:{line}"
        assert may_read_environ or dotted not in ("os.environ", "os.getenv"), f"{name}:{line}"
        configures = dotted in ("logging.basicConfig", "logging.disable")
        assert name == "tinygn_dist.cli.main" or not configures, f"{name}:{line}"


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_stay_short(name: str):
    lines = FILES[name].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_FILE, f"{name} has {len(lines)} lines"
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{name}.{node.name} has {length} lines"


def test_no_vague_module_names():
    assert not [name for name in FILES if name.split(".")[-1] in ("utils", "helpers", "manager", "core", "common")]
