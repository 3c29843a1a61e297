"""How the package is built, counted on its syntax trees: rooms, imports, levels, arguments, lines, config keys.

    python benchmarks/house.py [FOLDER ...]      folders that hold a `tinygn_dist`; by default this one

A room is a folder of the package, or a file that lies directly in it. prune/ has two rooms, structured and sparsity.
To count an older state: `git worktree add /tmp/before 0a2abb2`, then `python benchmarks/house.py /tmp/before .`
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "tinygn_dist"
MANY_ARGUMENTS, LONG_FILE = 6, 320
QUARANTINE = "experiments"


@dataclass(frozen=True)
class House:
    """The syntax trees of one package by dotted name, such as tinygn_dist.maths.top_k."""

    trees: Mapping[str, ast.Module]
    lines: Mapping[str, int]
    arrows: frozenset[tuple[str, str]] = field(init=False)
    """(module, module it imports) between rooms; imports inside functions count too"""

    def __post_init__(self) -> None:
        pairs = {(name, other) for name, tree in self.trees.items() for other in imported(tree, self.trees)}
        apart = {(one, other) for one, other in pairs if room_of(one) != room_of(other)}
        object.__setattr__(self, "arrows", frozenset(pair for pair in apart if "" not in map(room_of, pair)))

    @property
    def rooms(self) -> frozenset[str]:
        return frozenset(map(room_of, self.trees)) - {"", "prune"}

    @property
    def room_arrows(self) -> frozenset[tuple[str, str]]:
        return frozenset((room_of(one), room_of(other)) for one, other in self.arrows)


def read(root: Path) -> House:
    paths = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((root / PACKAGE).rglob("*.py"))
    }
    if not paths:
        raise SystemExit(f"{root}: got no Python file in {root / PACKAGE}, accepted: a checkout of this project")
    texts = {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    return House(
        {name: ast.parse(text) for name, text in texts.items()},
        {name: len(text.splitlines()) for name, text in texts.items()},
    )


def room_of(name: str) -> str:
    inner = name.split(".")[1:]
    return ".".join(inner[:2] if inner[:1] == ["prune"] else inner[:1])


def imported(tree: ast.Module, known: Mapping[str, ast.Module]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in known or node.module in known:
                    yield full if full in known else node.module


def levels(arrows: frozenset[tuple[str, str]], rooms: frozenset[str]) -> int:
    """Rooms on the longest way along arrows, experiments/ left out. Raises SystemExit where the arrows go round."""
    depth: dict[str, int] = {}

    def visit(room: str, way: tuple[str, ...]) -> int:
        if room in way:
            raise SystemExit("arrows go round: " + " -> ".join((*way[way.index(room) :], room)))
        if room not in depth:
            below = (other for one, other in arrows if one == room and QUARANTINE not in (one, other))
            depth[room] = 1 + max((visit(other, (*way, room)) for other in below), default=0)
        return depth[room]

    return max(visit(room, ()) for room in rooms)


def functions(house: House) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for tree in house.trees.values():
        yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Named ones, without self and cls."""
    given = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return sum(argument.arg not in ("self", "cls") for argument in given)


def config_keys(house: House) -> tuple[int, int]:
    """(keys of the main sections, keys of experiments). A key that holds a section counts as the keys in it."""
    classes = [
        (name, node) for name, tree in house.trees.items() for node in tree.body if isinstance(node, ast.ClassDef)
    ]
    sections = {"Section"}
    for _ in classes:  # a section may derive from a section
        sections |= {node.name for _, node in classes if {ast.unparse(base) for base in node.bases} & sections}
    count = [0, 0]
    for name, node in classes:
        if node.name in sections - {"Section"}:
            experimental = QUARANTINE in name or "experiment" in node.name.lower()
            count[experimental] += sum(_is_value(entry, sections) for entry in node.body)
    return count[0], count[1]


def _is_value(entry: ast.stmt, sections: set[str]) -> bool:
    if not isinstance(entry, ast.AnnAssign):
        return False
    words = {node.id for node in ast.walk(entry.annotation) if isinstance(node, ast.Name)}
    return not words & sections and "ClassVar" not in words


def figures(house: House) -> dict[str, int]:
    main, experimental = config_keys(house)
    counts = [arguments(function) for function in functions(house)]
    return {
        "rooms": len(house.rooms),
        "levels of imports": levels(house.room_arrows, house.rooms),
        "arrows between rooms": len(house.room_arrows),
        "imports between rooms, module to module": len(house.arrows),
        f"functions with {MANY_ARGUMENTS} or more arguments": sum(count >= MANY_ARGUMENTS for count in counts),
        "most arguments": max(counts),
        "functions": len(counts),
        "files": len(house.lines),
        "lines": sum(house.lines.values()),
        f"lines without {QUARANTINE}": sum(n for name, n in house.lines.items() if room_of(name) != QUARANTINE),
        f"files over {LONG_FILE} lines": sum(n > LONG_FILE for n in house.lines.values()),
        "config keys of the main sections": main,
        "config keys of experiments": experimental,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, default=[Path(__file__).parents[1]])
    folders = parser.parse_args().folders
    columns = [figures(read(folder)) for folder in folders]
    print(f"| | {' | '.join(folder.resolve().name for folder in folders)} |\n|---|{'---|' * len(folders)}")
    for name in columns[0]:
        print(f"| {name} | {' | '.join(f'{column[name]:,}' for column in columns)} |")


if __name__ == "__main__":
    main()
