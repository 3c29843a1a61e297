"""Who may import what, checked on the syntax trees."""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path

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
def nodes_of(name: str) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))))


@functools.cache
def attributes_of(name: str) -> tuple[tuple[str, int], ...]:
    """(dotted name, line) of every `a.b.c` in a module; begins with a dot where it hangs on a call or an index."""
    found = []
    for node in nodes_of(name):
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
    """(dotted name, column) of everything a module imports; column 0 = when it is itself imported."""
    found = []
    for node in nodes_of(name):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.col_offset) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.append((full if full in FILES or node.module == "torch" else node.module, node.col_offset))
    return tuple(found)


def room_of(name: str) -> str:
    """The folder that a module lies in, as FLOORS has it; a module of the package itself is a room of its own."""
    inner = name.split(".")[1:]
    return ".".join(inner[:2] if inner[:1] == ["prune"] else inner[:1])


def is_pure(name: str) -> bool:
    return room_of(name) in ("maths", "errors")


def test_the_walk_sees_the_package():
    assert len(FILES) > 30 and "tinygn_dist.maths.solve.obs" in FILES
    assert ("torch.distributed", 0) in set(imports_of("tinygn_dist.backends.collectives"))


def test_only_backends_know_of_process_groups():
    modules = ("torch.distributed", "deepspeed", "accelerate.state", "accelerate.utils")
    collectives = {"all_reduce", "all_gather", "full_tensor", "to_local"}
    outside = [name for name in FILES if not name.startswith("tinygn_dist.backends")]
    wrong = [
        f"{name} imports {what}"
        for name in outside
        for what, _ in imports_of(name)
        if what.startswith(modules) or "DTensor" in what
    ]
    wrong += [
        f"{name}:{line}: {dotted}"
        for name in outside
        for dotted, line in attributes_of(name)
        if dotted.split(".")[-1] in collectives or dotted.startswith(("torch.distributed", "dist."))
    ]
    assert not wrong


def test_pure_modules_import_torch_the_standard_library_and_each_other():
    pure = [name for name in FILES if is_pure(name)]
    may_import = {*sys.stdlib_module_names, "torch"}
    assert not [
        f"{name} imports {what}"
        for name in pure
        for what, _ in imports_of(name)
        if not (is_pure(what) if what.startswith("tinygn_dist") else what.split(".")[0] in may_import)
    ]


def test_every_room_has_a_floor():
    rooms = {room_of(name) for name in FILES} - {"", "prune", QUARANTINE}
    assert rooms <= set(FLOOR), f"say in FLOORS and docs/map.md where {sorted(rooms - set(FLOOR))} lie"


def test_arrows_run_down():
    """Imports inside functions count too: they would only hide an arrow that runs up."""
    wrong = []
    for name in FILES.keys() - {"tinygn_dist"}:
        here = room_of(name)
        for what in {what for what, _ in imports_of(name) if what in FILES and room_of(what) != here}:
            if room_of(what) == QUARANTINE:
                wrong.append(f"{name} imports {what}, and nothing imports an experiment")
            elif here not in (QUARANTINE, "prune") and FLOOR[here] >= FLOOR[room_of(what)]:
                wrong.append(f"{name} imports {what}, which lies above it")
    assert not wrong


def test_a_folder_says_its_question():
    docs = {name: ast.get_docstring(nodes_of(name)[0]) for name, path in FILES.items() if path.name == "__init__.py"}
    assert not [name for name, doc in docs.items() if not doc or name != "tinygn_dist" and "?" not in doc]


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


def test_only_the_command_line_reads_argv_and_the_environment():
    """Backends too may read the environment: how the job was launched."""
    command_line = "tinygn_dist.cli.main"
    wrong = []
    for name in FILES.keys() - {command_line}:
        forbidden = {"sys.argv", "logging.basicConfig", "logging.disable"}
        if not name.startswith("tinygn_dist.backends"):
            forbidden |= {"os.environ", "os.getenv"}
        wrong += [f"{name}:{line}: {dotted}" for dotted, line in attributes_of(name) if dotted in forbidden]
    assert not wrong


def test_files_and_functions_stay_short():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    wrong = [f"{name} has {length} lines" for name, length in lengths.items() if length > MAX_FILE]
    wrong += [
        f"{name}.{node.name} has {node.end_lineno - node.lineno + 1} lines"
        for name in FILES
        for node in nodes_of(name)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if node.end_lineno - node.lineno >= MAX_FUNCTION
    ]
    assert not wrong


def test_no_vague_module_names():
    assert not [name for name in FILES if name.split(".")[-1] in ("utils", "helpers", "manager", "core", "common")]
