"""``jambascope zoo family``: search, seeds, and what is seen of them meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from jambascope.studies.zoo.family import Family, Show
    from jambascope.studies.zoo.jobs import Job

WIDTH = 100
"""Columns where nobody's terminal says how many there are."""
LINE_SECONDS = 600.0
"""Between two lines on what runs, where there is no terminal."""


def family(
    names: Annotated[
        list[str] | None, typer.Argument(help="Recipes to train. [default: all, the controls too]")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Directory of all runs.")] = Path("runs/zoo"),
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once; they share the cores evenly.")] = 2,
    first: Annotated[
        list[str] | None, typer.Option(help="A recipe whose runs come before the others'; repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and how far each is.")] = False,
) -> None:
    """Train the whole family: an equal learning-rate search for every recipe, then all seeds at the chosen rates.

    Whatever is finished is kept; after a kill or Ctrl-C the same command goes on from the last checkpoints.
    """
    from rich.console import Console

    from jambascope.studies.zoo.family import Family, train
    from jambascope.zoo.recipes import RECIPES

    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    chosen = Family(list(dict.fromkeys(names or RECIPES)), runs, tuple(first or ()))
    broken: dict[Job, str] = {}
    if not dry_run:
        with _shown(chosen, jobs, Console(stderr=True, highlight=False, markup=False)) as show:
            broken = train(chosen, jobs, show)
    console.print(runs_table(chosen))
    failed = [name for name in chosen.names if chosen.searched(name) and chosen.chosen(name) is None]
    for name in failed:
        typer.echo(f"{name}: every learning rate of the search failed, so that no seed was trained", err=True)
    for job, error in broken.items():
        typer.echo(f"{job.title} {error}; the same command goes on with it", err=True)
    if failed or broken:
        raise typer.Exit(1)


def runs_table(family: Family) -> Table:
    """Every run in its order: how far it is, its held-out loss, its minutes; the chosen rate is marked."""
    from rich.table import Table

    from jambascope.studies.zoo.family import SEEDS

    found = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("run", "rate", "steps", "held-out loss", "minutes"):
        found.add_column(heading, no_wrap=True, justify="left" if heading in ("run", "rate") else "right")
    for job in family.jobs():
        now = family.state(job)
        steps = "failed" if now.kind == "failed" else f"{now.step} of {job.total_steps}"
        chosen = job.seed == SEEDS[0] and job.learning_rate == family.chosen(job.name)
        found.add_row(
            job.title,
            "" if job.learning_rate is None else f"{job.learning_rate:g}{' *' if chosen else ''}",
            steps,
            "" if now.held_out is None else f"{now.held_out:.3f}",
            f"{now.seconds / 60:.1f}" if now.seconds else "",
        )
    over = sum(family.state(job).over for job in family.jobs())
    found.caption = f"{over} of {len(family.jobs())} runs are over; * the rate that the search chose"
    found.caption_justify = "left"
    return found


@contextmanager
def _shown(family: Family, jobs: int, console: Console) -> Iterator[Show]:
    """What ``family.train`` is to call: a live table on a terminal, else lines."""
    if not console.is_terminal:
        yield _lines(console, family, jobs)
        return
    from rich.live import Live

    with Live(console=console, transient=True, auto_refresh=False) as live:

        def show(running: Sequence[Job], job: Job | None, event: str | None) -> None:
            if job is not None:
                live.console.print(f"{job.title}: {event}")
            live.update(_running_table(family, jobs, running), refresh=True)

        yield show


def _lines(console: Console, family: Family, jobs: int) -> Show:
    last = time.monotonic()

    def show(running: Sequence[Job], job: Job | None, event: str | None) -> None:
        nonlocal last
        if job is not None:
            console.print(f"{job.title}: {event}", soft_wrap=True)
        elif time.monotonic() - last > LINE_SECONDS:
            last = time.monotonic()
            steps = "  ".join(f"{job.title} {_steps(family, job)}" for job in running)
            console.print(f"{steps}  {_overall(family, jobs)}", soft_wrap=True)

    return show


def _steps(family: Family, job: Job) -> str:
    now = family.state(job)
    return f"step {now.step}/{job.total_steps}" + ("" if now.loss is None else f" loss {now.loss:.3f}")


def _overall(family: Family, jobs: int) -> str:
    left, every = family.minutes_left(jobs), family.jobs()
    over = sum(family.state(job).over for job in every)
    return f"{over} of {len(every)} runs over" + ("" if left is None else f", {left:.0f} min left")


def _running_table(family: Family, jobs: int, running: Sequence[Job]) -> Table:
    from rich.table import Table

    found = Table(box=None, padding=(0, 2, 0, 0), caption=_overall(family, jobs), caption_justify="left")
    for heading in ("run", "rate", "step", "loss"):
        found.add_column(heading, no_wrap=True)
    for job in running:
        now = family.state(job)
        loss = "" if now.loss is None else f"{now.loss:.3f}"
        found.add_row(job.title, f"{job.learning_rate:g}", f"{now.step}/{job.total_steps}", loss)
    return found
