"""Progress bars, drawn by one rank only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


class Progress:
    """On a terminal a live bar; in a log file one line per finished stretch. Silent with shown=False."""

    def __init__(self, shown: bool = False) -> None:
        self._console = Console(stderr=True) if shown else None

    @contextlib.contextmanager
    def bar(self, doing: str, total: int) -> Iterator[Callable[[], None]]:
        """`advance()` to be called `total` times."""
        if self._console is None:
            yield lambda: None
            return
        columns = (
            TextColumn("{task.description:<18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=self._console, transient=False) as bars:
            task = bars.add_task(doing, total=total)
            yield lambda: bars.advance(task)
