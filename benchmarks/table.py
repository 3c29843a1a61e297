"""A Markdown table that grows row by row, in a file where one is named: a stopped benchmark goes on after the rows it
holds."""

from __future__ import annotations

from pathlib import Path


class Table:
    """Rows that are printed, and appended to a file where there is one. The first cells of a row are its name."""

    def __init__(self, path: Path | None, settings: str, head: str, name_cells: int) -> None:
        """settings: what all rows share. Ends the program when the file is of others."""
        self._path, self._there, self._name_cells = path, set(), name_cells
        if path and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            if lines[0] != settings:
                raise SystemExit(f"{path} is of {lines[0]!r}, asked was {settings!r}; use another --table")
            self._there = {_cells(line)[:name_cells] for line in lines}
        else:
            self._say(f"{settings}\n\n{head}")

    def has(self, *name: str) -> bool:
        assert len(name) == self._name_cells
        return name in self._there

    def add(self, *cells: str) -> None:
        self._say(f"| {' | '.join(cells)} |")

    def _say(self, text: str) -> None:
        print(text, flush=True)
        if self._path:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{text}\n")


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.split("|")[1:-1])
