"""A run as tables on the terminal, as JSON and as a page that needs nothing else."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jambascope.studies import page
from jambascope.studies.bench import peers, targets
from jambascope.studies.bench.race import Race, Results, Summary, summarize
from jambascope.studies.environment import machine
from jambascope.studies.figures.bench import Point, cost_against_length, costs

TARGETS_TITLE = "Figures to reach, on a CPU"
UNITS = {"ms": "time (ms)", "us per token": "time per token (us)", "ms per cell": "time per cell (ms)"}


@dataclass
class Report:
    """Everything that a run has to say."""

    command: str
    environment: dict[str, str]
    summaries: list[Summary]
    results: Results
    verdicts: list[targets.Verdict]
    bounds: list[str]
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Rows (one per measurement), skips, summaries, figures, bounds and environment."""
        return {
            "command": self.command,
            "environment": self.environment,
            "note": self.note,
            **self.results.as_dict(),
            "summaries": [asdict(s) for s in self.summaries],
            "figures": [asdict(v) for v in self.verdicts],
            "bounds": self.bounds,
        }


def make_report(results: Results, races: dict[str, Race], device: torch.device, command: str, note: str = "") -> Report:
    summaries = summarize(results, races)
    verdicts = targets.judge(summaries, results.skips, device.type)
    bounds = targets.against_bounds(summaries)
    return Report(command, environment(device), summaries, results, verdicts, bounds, note)


def environment(device: torch.device) -> dict[str, str]:
    """Machine, device, threads and versions."""
    return machine(device) | peers.versions()


# -- rows that every form shows --------------------------------------------------------------------------------


def result_tables(report: Report, races: dict[str, Race]) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """For every race its title, columns, and a row for each side at each size."""
    tables: dict[str, list[tuple[str, ...]]] = {}
    for s in report.summaries:
        spread = f"{s.low:.4g} to {s.high:.4g}" if s.runs > 1 else ""
        length = f"{s.length:,}" if s.length else ""
        median = f"{s.median:.4g} {s.quantity}"
        ratio = targets.ratio_text(s, races[s.race])
        row = str(s.d_model), str(s.batch), length, s.side, median, spread, str(s.runs), ratio
        tables.setdefault(s.race, []).append(row)
    return [(f"{name}: {races[name].title}", _columns(races[name]), rows) for name, rows in tables.items()]


def _columns(race: Race) -> tuple[str, ...]:
    over = "" if race.per_token else f"time / {race.baseline}'s"
    return ("d_model", "batch", "T", "side", "median", "lowest to highest", "runs", over)


def skip_rows(report: Report) -> list[tuple[str, ...]]:
    """Each side and reason once, with the sizes at which it holds."""
    where: dict[tuple[str, str, str], list[str]] = {}
    for s in report.results.skips:
        size = f"d_model {s.d_model}" + (f" T {s.length:,}" if s.length else "")
        where.setdefault((s.race, s.side, s.reason), []).append(size)
    return [(race, side, "; ".join(sizes), reason) for (race, side, reason), sizes in where.items()]


SKIP_COLUMNS = ("race", "side", "where", "reason")


def verdict_rows(report: Report) -> list[tuple[str, ...]]:
    said = {True: "reached", False: "not reached", None: "not measured"}
    return [(v.text, v.where, v.measured, said[v.reached]) for v in report.verdicts]


VERDICT_COLUMNS = ("figure", "where", "measured", "")


# -- terminal and JSON -----------------------------------------------------------------------------------------


def print_report(report: Report, races: dict[str, Race], console: Console) -> None:
    """Results, what was left out, the distance from the bounds, and the figures to reach."""
    for title, columns, rows in result_tables(report, races):
        _print_table(title, columns, rows, console, sections=True)
    _print_table("Left out", SKIP_COLUMNS, skip_rows(report), console)
    _print_table("Distance from the bounds", ("",), [(line,) for line in report.bounds], console)
    _print_table(TARGETS_TITLE, VERDICT_COLUMNS, verdict_rows(report), console)
    if report.note:
        console.print(report.note, highlight=False)


def _print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console, sections: bool = False
) -> None:
    """Nothing without rows; with ``sections`` a line between rows that differ in the first three columns."""
    if not rows:
        return
    table = Table(*columns, title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.show_header = any(columns)
    for row, following in zip(rows, [*rows[1:], rows[-1]], strict=True):
        table.add_row(*row, end_section=sections and following[:3] != row[:3])
    console.print(table)


def write_json(report: Report, path: Path) -> None:
    path.write_text(json.dumps(report.as_dict(), indent=1) + "\n")


# -- the page --------------------------------------------------------------------------------------------------


def race_figures(report: Report, races: dict[str, Race]) -> list[go.Figure]:
    """A figure for every race, and for what else several sides of one were measured by."""
    groups: dict[tuple[str, str], list[Summary]] = {}
    for s in report.summaries:
        groups.setdefault((s.race, s.quantity), []).append(s)
    figures = []
    for (name, quantity), found in groups.items():
        race = races[name]
        if quantity not in UNITS and len({s.side for s in found}) == 1:
            continue  # nothing beside it: the table says it
        points = [Point(s.side, s.d_model, s.length, s.median, s.low, s.high) for s in found]
        batch, runs = found[0].batch, max(s.runs for s in found)
        widths = {p.d_model for p in points}
        text = f"d_model {min(widths)}, " if len(widths) == 1 else ""
        text += f"batch {batch}, " if any(p.length for p in points) else ""
        text += "medians, whiskers from the lowest to the highest run" if runs > 1 else "one run"
        bounds, unit = race.bounds, UNITS.get(quantity, quantity)
        if race.per_token and quantity in UNITS:
            line = [p._replace(side="jambascope, pure Mamba") for p in points]
            figures.append(cost_against_length(race.title, text, line, unit, first=line[0].side, log_cost=False))
        elif quantity in UNITS and all(p.length for p in points):
            figures.append(cost_against_length(race.title, text, points, unit, bounds))
        else:
            title = race.title if quantity in UNITS else f"{race.title}: {quantity}"
            figures.append(costs(title, text, points, unit, bounds))
    return figures


def write_html(report: Report, races: dict[str, Race], path: Path) -> None:
    """One file with its plots, tables, machine and command; light or dark as the reader's system is."""
    plots = [page.plot(figure) for figure in race_figures(report, races)]
    parts = [
        "<h1>jambascope bench</h1>",
        f"<p>{html.escape(report.environment['date'])}, on {html.escape(report.environment['device'])}, "
        f"{html.escape(report.environment['processor'])}. Medians of interleaved runs in one process; ratios are "
        "medians over neighbouring runs.</p>",
        f"<pre>{html.escape(report.command)}</pre>",
        f"<p><strong>{html.escape(report.note)}</strong></p>" if report.note else "",
        page.section(TARGETS_TITLE, VERDICT_COLUMNS, verdict_rows(report), {"reached": "yes", "not reached": "no"}),
        "<h2>Cost against length</h2>" if plots else "",
        *plots,
        "<h2>Distance from the bounds</h2><ul>" if report.bounds else "",
        *[f"<li>{html.escape(line)}</li>" for line in report.bounds],
        "</ul>" if report.bounds else "",
        *[page.section(*table) for table in result_tables(report, races)],
        page.section("Left out", SKIP_COLUMNS, skip_rows(report)),
        page.section("Machine and versions", ("", ""), list(report.environment.items())),
    ]
    path.write_text(page.render("jambascope bench", parts), encoding="utf-8")
