"""How far a sweep is: a bar with the time that is left, or somebody's function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jambascope.hooks.sweep.result import Effects

Progress = Callable[[float, Effects], Any]
"""Given the share that is done and the result so far; False ends the sweep."""


@contextmanager
def watched(progress: bool | Progress) -> Iterator[Callable[[float, Callable[[], Effects]], Any]]:
    """What a sweep is to call after each batch, with the share done and a function that gives the result so far."""
    if callable(progress):
        yield lambda share, result: progress(share, result())
        return
    if not progress:
        yield lambda share, result: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("patching"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Bar(*columns, console=console, transient=True, disable=not (console.is_terminal or console.is_jupyter)) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda share, result: bar.update(task, completed=share)
