"""What is running and how much is left, on stderr: a bar on a terminal, a line for each part otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def show_progress(total: int) -> Iterator[Callable[[int, str], None]]:
    """A function to call with the number of parts done and what is being done."""
    console = Console(stderr=True)
    if console.is_terminal:
        with _bar(console, total) as update:
            yield update
        return
    seen: set[int] = set()

    def line(done: int, doing: str) -> None:
        if done not in seen:
            seen.add(done)
            console.print(f"[{done + 1} of {total}] {doing.split(':')[0]}", markup=False, highlight=False)

    yield line


@contextmanager
def _bar(console: Console, total: int) -> Iterator[Callable[[int, str], None]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    times = TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
    columns = BarColumn(bar_width=20), MofNCompleteColumn(), *times, TextColumn("{task.description}")
    # Speed is that of the last hour: a part may take minutes.
    with Progress(*columns, console=console, transient=True, speed_estimate_period=3600) as bar:
        task = bar.add_task("", total=total)
        yield lambda done, doing: bar.update(task, completed=done, description=doing)
