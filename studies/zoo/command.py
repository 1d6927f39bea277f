"""``jambascope zoo eval``: what the models of the zoo can do, over all tasks and seeds."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

OUT = Path("runs/zoo/evaluation")
EPISODES = 96
WIDTH = 170
"""Columns of the table where nobody's terminal says how many there are."""


def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="Models of the zoo, or checkpoint directories over its vocabulary. [default: all that are packaged, "
            "and with --runs all that were trained]",
        ),
    ] = None,
    runs: Annotated[
        Path | None,
        typer.Option(help="Of names with finished runs here, evaluate those: RUNS/NAME/seed-*/, such as runs/zoo."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Directory for report.html, results.parquet and what belongs to them.")
    ] = OUT,
    episodes: Annotated[int, typer.Option(min=2, help="Documents of a task; of long ones fewer.")] = EPISODES,
) -> None:
    """Measure models of the zoo on held-out tasks, with intervals over documents and seeds, and write a report.

    About a minute for each model on one core. What a model said is kept in OUT/values: a run that was interrupted goes
    on where it stopped.
    """
    from jambascope.errors import ConfigError

    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={str(out)!r} is a file; give a directory for the results")
    from rich.console import Console

    from jambascope.studies.bench.models import quiet_libraries
    from jambascope.studies.bench.progress import show_progress
    from jambascope.studies.zoo import differences, evaluation, report, summary

    quiet_libraries()
    found = evaluation.find_runs(models or (), runs)
    if not found:
        raise ConfigError("no model is packaged; name one, or give --runs DIR with finished runs")
    with show_progress(len(found)) as progress:
        values = evaluation.evaluate(found, out / "values", episodes, progress)
    rows = summary.rows_of(found, values)
    command = shlex.join(["jambascope", *sys.argv[1:]])
    less = differences.differences_of(found, values)
    report.write(report.Evaluation(command, episodes, found, rows, less), out)
    console = Console()
    report.print_headline(rows, console if console.is_terminal else Console(width=WIDTH))
    typer.echo(f"report: {out / 'report.html'}; every number: {out / 'results.parquet'}")
