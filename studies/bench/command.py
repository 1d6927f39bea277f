"""``jambascope bench``: races against transformers, TransformerLens, mambapy and mamba_ssm, as ratios."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

BUDGET, FULL_BUDGET = 10.0, 100.0
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""
WIDTH = 150
"""Columns of the tables where nobody's terminal says how many there are."""


def bench(
    race: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RACE",
            help="scan, scan-backward, experts, prefill, cache, generate, training-step, load, hooks, sweep "
            "(activation patching, minutes) or long (contexts to 262,144, minutes). [default: all but sweep and long]",
        ),
    ] = None,
    d_model: Annotated[
        list[int] | None, typer.Option(min=2, help="Width to race at; repeatable. [default: 128 and 512, of sweep 128]")
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(min=2, help="Tokens per sequence; repeatable. [default: 64, 128, 512, of sweep 64 and 256]"),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Lengths up to 32,768, and the budget for them.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per pass.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each side, at least; the median counts.")] = 7,
    budget: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Seconds that all timed runs of one side at one size may take. [default: 10, with --full 100]",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option("--json", help="Write every measurement to this file.")] = None,
    page: Annotated[Path | None, typer.Option("--html", help="Write a report with plots to this file.")] = None,
) -> None:
    """Race against the peers that are installed, on the same random weights, in one process.

    The sides of a race run in turns after a warm-up. A side that would take longer than --budget, or more memory than
    there is, is left out and named.
    """
    from rich.console import Console

    from jambascope.devices import parse_device
    from jambascope.errors import ConfigError
    from jambascope.studies.bench import models
    from jambascope.studies.bench.progress import show_progress
    from jambascope.studies.bench.race import FULL_LENGTHS, Results, choose, run, settings
    from jambascope.studies.bench.races import RACES
    from jambascope.studies.bench.report import make_report, print_report, write_html, write_json
    from jambascope.studies.bench.timing import clock_for

    if full and length:
        raise ConfigError(f"--full names lengths {list(FULL_LENGTHS)}; leave out --length or --full")
    for width in d_model or []:
        if width % 64 and width not in (2, 4, 8, 16, 32):
            raise ConfigError(f"d_model={width} must be a multiple of 64, for heads of 32 (or 16 or 32)")
    _check_writable([path for path in (out, page) if path is not None])
    where = parse_device(device)
    if where.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={device!r} cannot be raced on; it must be cpu or cuda")
    seconds = budget or (FULL_BUDGET if full else BUDGET)
    plan = list(settings(choose(race, RACES), d_model, batch, length, full))
    results, note, status = Results(), "", 0
    with models.temporary_directory() as directory, show_progress(len(plan)) as progress:
        models.quiet_libraries()
        lab = models.Lab(where, Path(directory), tuple(sorted(set(length or ()))))
        try:
            run(lab, clock_for(where), plan, repeats, seconds, progress, results)
        except KeyboardInterrupt:
            note = "Interrupted: what follows the last row was not measured."
            status = INTERRUPTED
    if not status and any(skip.failed for skip in results.skips):
        note, status = "A side of jambascope's own failed: see what was left out.", 1
    report = make_report(results, RACES, where, shlex.join(["jambascope", *sys.argv[1:]]), note)
    console = Console()
    print_report(report, RACES, console if console.is_terminal else Console(width=WIDTH))
    for path, write in ((out, lambda: write_json(report, out)), (page, lambda: write_html(report, RACES, page))):
        try:
            if path is not None:
                write()
        except OSError as e:  # the other may still be written
            typer.echo(f"{path} could not be written: {e}", err=True)
            status = status or 1
    if status:
        raise typer.Exit(status)


def _check_writable(paths: list[Path]) -> None:
    from jambascope.errors import ConfigError

    for path in paths:
        if path.is_dir():
            raise ConfigError(f"{path} cannot be written: it is a directory; name a file")
        if not path.parent.is_dir():
            raise ConfigError(f"{path} cannot be written: {path.parent} is not a directory; create it first")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ConfigError(f"{path} cannot be written: permission denied; name another file")
