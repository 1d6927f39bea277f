"""A run as tables on the terminal, as JSON and as a page that needs nothing else."""

from __future__ import annotations

import html
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from plotly.io import to_html
from plotly.offline import get_plotlyjs
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jambascope.studies.bench import peers, targets
from jambascope.studies.bench.race import Race, Results, Summary, summarize
from jambascope.studies.figures.bench import Point, cost_against_length, costs

TARGETS_TITLE = "Figures to reach, on a CPU"
UNITS = {"ms": "time (ms)", "us per token": "time per token (us)"}


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
    found = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}, Python {platform.python_version()}",
        "processor": _processor(),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB",
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }
    return found | peers.versions()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return f"{len(names)} x {names[0]}"
    except (OSError, IndexError):  # not Linux
        return f"{os.cpu_count()} x {platform.processor() or 'unknown'}"


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
    plots = [
        to_html(fig, include_plotlyjs=False, full_html=False, config={"displaylogo": False, "responsive": True})
        for fig in race_figures(report, races)
    ]
    parts = [
        "<h1>jambascope bench</h1>",
        f"<p>{html.escape(report.environment['date'])}, on {html.escape(report.environment['device'])}, "
        f"{html.escape(report.environment['processor'])}. Medians of interleaved runs in one process; ratios are "
        "medians over neighbouring runs.</p>",
        f"<pre>{html.escape(report.command)}</pre>",
        f"<p><strong>{html.escape(report.note)}</strong></p>" if report.note else "",
        _section(TARGETS_TITLE, VERDICT_COLUMNS, verdict_rows(report)),
        "<h2>Cost against length</h2>" if plots else "",
        *[f'<div class="plot">{plot}</div>' for plot in plots],
        "<h2>Distance from the bounds</h2><ul>" if report.bounds else "",
        *[f"<li>{html.escape(line)}</li>" for line in report.bounds],
        "</ul>" if report.bounds else "",
        *[_section(*table) for table in result_tables(report, races)],
        _section("Left out", SKIP_COLUMNS, skip_rows(report)),
        _section("Machine and versions", ("", ""), list(report.environment.items())),
    ]
    head = f"<title>jambascope bench</title><style>{STYLE}</style><script>{get_plotlyjs()}</script>"
    body = "\n".join(part for part in parts if part)
    page = f'<!doctype html><html lang="en"><head><meta charset="utf-8">{VIEWPORT}{head}</head><body>{body}'
    path.write_text(f"{page}<script>{PAINT}</script></body></html>\n", encoding="utf-8")


def _section(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = "".join(
        "<tr>" + "".join(f"<td{_mark(cell)}>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>{html.escape(title)}</h2><div class="wide">{table}</div>'


def _mark(cell: str) -> str:
    return {"reached": ' class="yes"', "not reached": ' class="no"'}.get(cell, "")


VIEWPORT = '<meta name="viewport" content="width=device-width, initial-scale=1">'
STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2733; --faint: #5b6673; --line: #dde2e7; --box: #f3f5f7;
  --yes: #00734f; --no: #b04a00; }
@media (prefers-color-scheme: dark) { :root { --page: #10151b; --ink: #e3e8ed; --faint: #9aa5b1; --line: #2e3945;
  --box: #1a222b; --yes: #35c796; --no: #f2954d; } }
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 1180px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
pre { background: var(--box); padding: .7rem 1rem; border-radius: 6px; white-space: pre-wrap; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--faint); font-weight: 600; }
.yes { color: var(--yes); white-space: nowrap; } .no { color: var(--no); white-space: nowrap; }
.plot { border: 1px solid var(--line); border-radius: 6px; padding: .4rem; margin: 1rem 0; }
"""
PAINT = """
const dark = window.matchMedia("(prefers-color-scheme: dark)");
function paint() {
  const ink = getComputedStyle(document.body).color;
  for (const plot of document.querySelectorAll(".js-plotly-plot")) Plotly.relayout(plot, {"font.color": ink});
}
dark.addEventListener("change", paint);
paint();
"""
