"""``jambascope study``: studies asked of models, kept, reported and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

RUNS = Path("runs/studies")
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""
WIDTH = 130
"""Columns of the tables where nobody's terminal says how many there are."""

study = typer.Typer(
    help="Ask a question of models and keep the answer: numbers with intervals, controls, a report.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


class WithRay(TyperCommand):
    """Takes ``--ray`` with and without an address."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        following = [*args[1:], "-"]
        alone = [arg == "--ray" and after.startswith("-") for arg, after in zip(args, following, strict=True)]
        return super().parse_args(ctx, ["--ray=local" if a else arg for arg, a in zip(args, alone, strict=True)])


Device = Annotated[str | None, typer.Option(help="Where models run: cpu, cuda, cuda:1, ... [default: cpu]")]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="[ADDRESS]",
        help="Measure on a Ray cluster (extra `ray`): one of this machine's own, or by its address one that runs.",
    ),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run, such as runs/studies/NAME-...")]


@study.command("list")
def list_studies(
    name: Annotated[str | None, typer.Argument(help="Tell all about this one, with its settings.")] = None,
) -> None:
    """The studies and what they ask; of one, its method, controls and settings."""
    from rich.console import Console
    from rich.table import Table

    from jambascope.studies.runner.study import load, questions

    console = Console()
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    if name is None:
        for heading in ("study", "question"):
            table.add_column(heading)
        for row in questions():
            table.add_row(*row)
        console.print(table)
        return
    from jambascope.studies.runner.spec import describe

    one = load(name)
    for words in (one.question, one.method, one.controls):
        console.print(words + "\n", highlight=False, markup=False)
    for heading in ("setting", "default", "meaning"):
        table.add_column(heading)
    for row in describe(one.spec):
        table.add_row(*row)
    console.print(table)


@study.command(cls=WithRay)
def run(
    name: Annotated[str, typer.Argument(help="A study of `study list`, or a .py file of yours that defines one.")],
    model: Annotated[
        list[str] | None,
        typer.Option(help="A packaged name, a checkpoint directory or a hub id; repeatable. [default: the study's]"),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Of the prompts, with commas. [default: the study's]")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the study; repeatable.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where runs are kept.")] = RUNS,
    device: Device = None,
    ray: Ray = None,
) -> None:
    """Ask a study. A question that was asked before is answered from what is kept, or gone on with."""
    from jambascope.errors import ConfigError
    from jambascope.studies.runner.spec import make_spec, parse_settings
    from jambascope.studies.runner.study import load

    values: dict[str, Any] = parse_settings(settings or ())
    for field, option, value in (("models", "--model", model and tuple(model)), ("seeds", "--seeds", seeds)):
        if value and field in values:
            raise ConfigError(f"{option} and --set {field} are both given; leave one out")
        values |= {field: value} if value else {}
    asked = load(name)
    spec = make_spec(asked.name, asked.spec, values)

    def start(tell: Any) -> Any:
        from jambascope.studies.runner import run as running

        return running.run(name, spec, runs, _workers(device, ray), tell)

    _carry_out(start)


@study.command(cls=WithRay)
def resume(run: RunArgument, device: Device = None, ray: Ray = None) -> None:
    """Go on with a run that was interrupted or killed."""

    def start(tell: Any) -> Any:
        from jambascope.studies.runner import run as running

        return running.resume(run, _workers(device, ray), tell)

    _carry_out(start)


@study.command()
def report(run: RunArgument) -> None:
    """Write the report of a finished run anew. Needs no model."""
    from jambascope.studies.runner.run import rewrite_report

    typer.echo(f"report: {rewrite_report(run)}")


@study.command()
def compare(
    first: RunArgument,
    second: RunArgument,
    out: Annotated[Path | None, typer.Option("--html", help="Write the comparison as a page to this file.")] = None,
) -> None:
    """The results of the second run less those of the first, with intervals."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from jambascope.errors import ConfigError
    from jambascope.files import write_text
    from jambascope.studies.runner import compare as comparing

    found = comparing.compare(first, second)
    columns, lines = comparing.lines(found)
    table = Table(*columns, box=SIMPLE_HEAD, title=found.study.question, title_justify="left", title_style="bold")
    for line in lines:
        table.add_row(*line)
    console = _console()
    console.print(table)
    for name, a, b in found.settings:
        console.print(f"{name}: {a} in the first, {b} in the second", highlight=False, markup=False)
    console.print(comparing.ABOUT, highlight=False)
    if out is not None:
        try:
            write_text(out, comparing.page_of(found))
        except OSError as e:
            raise ConfigError(f"{out} cannot be written: {e.strerror}; name another file") from None
        typer.echo(f"page: {out}")


def _workers(device: str | None, ray: str | None) -> Any:
    from jambascope.devices import parse_device
    from jambascope.errors import ConfigError
    from jambascope.studies.runner.run import Workers

    if ray is not None and ray not in ("local", "auto") and ":" not in ray:
        raise ConfigError(f"--ray {ray!r} is no address: HOST:PORT, ray://HOST:PORT, auto, or nothing for this machine")
    return Workers(device and str(parse_device(device)), ray)


def _carry_out(start: Any) -> None:
    """Run with a progress bar, then print what was found and where it is."""
    from contextlib import ExitStack

    from jambascope.studies.bench.models import quiet_libraries
    from jambascope.studies.bench.progress import show_progress
    from jambascope.studies.runner.report import print_run
    from jambascope.studies.runner.run import read

    quiet_libraries()
    try:
        with ExitStack() as stack:
            done = start(lambda cells: stack.enter_context(show_progress(cells)))
    except KeyboardInterrupt as e:
        typer.echo("; ".join(["jambascope: interrupted", *getattr(e, "__notes__", ())]), err=True)
        raise typer.Exit(INTERRUPTED) from None
    _, asked, spec, rows = read(done.path)
    print_run(asked, spec, rows, _console())
    if not done.measured:
        typer.echo("answered from what was kept; nothing was measured anew")
    typer.echo(f"report: {done.path / 'report.html'}; every number: {done.path / 'results.parquet'}")


def _console() -> Any:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)
