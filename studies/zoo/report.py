"""An evaluation as a table on the terminal, and as files: results, what was asked, on what machine, a page to read."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jambascope.files import write_table, write_text
from jambascope.studies import page
from jambascope.studies.bench.peers import versions
from jambascope.studies.environment import machine
from jambascope.studies.zoo import differences, summary, tasks
from jambascope.studies.zoo.differences import REFERENCE, Difference
from jambascope.studies.zoo.evaluation import UNKNOWN_SEED, Run, fingerprint
from jambascope.studies.zoo.plots import Plots
from jambascope.studies.zoo.summary import Row

UNSEEN, LONG = "unseen arbitrary labels", "unseen arbitrary labels, 16 filler sentences"
HEADLINE = (
    ("label mass", "few-shot", UNSEEN, 8, "label mass"),
    ("accuracy free", "few-shot", UNSEEN, 8, "accuracy free"),
    ("format gap", "few-shot", UNSEEN, 8, "format gap"),
    ("format gap, long reviews", "few-shot", LONG, 8, "format gap"),
    ("recall 16 pairs", "recall", "up to 8 questions", 16, "accuracy"),
    ("phones 8 entries", "phones", "up to 3 calls", 8, "accuracy"),
    ("ICL score", "held-out rows", "mixture", None, "ICL score"),
    ("loss on answers", "held-out rows", "mixture", None, "loss on answers"),
)
"""Title, task, condition, x, measure."""
HEADLINE_NOTE = (
    "Labels: unseen arbitrary label words, two classes, 8 shots; long reviews have 16 sentences more. Phones: numbers "
    "right in all digits. Losses in nats on packed rows of the mixture. All held out."
)
INTERVALS = (
    "Intervals are 95 %: of one training, the percentile bootstrap over documents; over several seeds, the "
    "hierarchical one (seeds drawn with replacement, and documents within them). Of hits and misses they are "
    "stretched to hold Wilson's, so that all hits do not look certain. With two or three seeds they are too narrow: "
    "look at the seeds."
)


@dataclass(frozen=True)
class Evaluation:
    """All that was measured."""

    command: str
    episodes: int
    runs: Sequence[Run]
    rows: Sequence[Row]
    differences: Sequence[Difference]


def write(evaluation: Evaluation, out: Path) -> None:
    """``results.parquet``, ``differences.parquet``, ``spec.json``, ``environment.json`` and ``report.html``, each
    replaced as a whole."""
    environment = machine(torch.device("cpu")) | versions()
    write_table(out / "results.parquet", summary.table(evaluation.rows))
    write_table(out / "differences.parquet", differences.table(evaluation.differences))
    write_text(out / "spec.json", json.dumps(_spec(evaluation), indent=1) + "\n")
    write_text(out / "environment.json", json.dumps(environment, indent=1) + "\n")
    write_text(out / "report.html", _page(evaluation, environment))


def _spec(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "command": evaluation.command,
        "episodes": evaluation.episodes,
        "fingerprint": fingerprint(evaluation.episodes),
        "models": [asdict(run) | {"directory": str(run.directory)} for run in evaluation.runs],
        "tasks": [asdict(task) | {"documents": task.count(evaluation.episodes)} for task in tasks.grid()],
    }


# -- tables --------------------------------------------------------------------------------------------------


def headline(rows: Sequence[Row]) -> list[tuple[str, str, list[Row | None]]]:
    """For every model its name, its seeds, and the row of each number of ``HEADLINE``: over seeds where there are
    several, else of its one training."""
    found = {(r.model, r.seed, r.task, r.condition, r.x, r.measure): r for r in rows}
    table = []
    for model in dict.fromkeys(row.model for row in rows):
        seeds = list(dict.fromkeys(row.seed for row in rows if row.model == model))
        whole = None if None in seeds else seeds[0]
        told = [seed for seed in seeds if seed not in (None, UNKNOWN_SEED)]
        numbers = [found.get((model, whole, *where)) for _, *where in HEADLINE]
        table.append((model, ", ".join(map(str, told)) or "-", numbers))
    return table


def number(row: Row | Difference | None) -> tuple[str, str]:
    """Mean and interval, as terminal, page and model cards show them."""
    if row is None or math.isnan(row.mean):
        return "-", ""
    ends = (row.low, row.high)
    return f"{row.mean:.2f}", "" if not all(map(math.isfinite, ends)) else "[{:.2f}, {:.2f}]".format(*ends)


def _cell(row: Row | Difference | None) -> str:
    """Both on one line, which may break between them only."""
    mean, interval = number(row)
    return f"{mean} {interval.replace(' ', chr(160))}".strip()


def print_headline(rows: Sequence[Row], console: Console) -> None:
    """A line of numbers and one of intervals for each model."""
    table = Table(title="Zoo evaluation", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", max_width=28, overflow="fold")
    table.add_column("seeds")
    for title, *_ in HEADLINE:
        table.add_column(title, justify="right")
    for model, seeds, numbers in headline(rows):
        means, intervals = zip(*map(number, numbers), strict=True)
        table.add_row(model, seeds, *(Text(f"{mean}\n{ends}") for mean, ends in zip(means, intervals, strict=True)))
    console.print(table)
    console.print(HEADLINE_NOTE, highlight=False)
    console.print(INTERVALS, highlight=False)


def _headline_section(rows: Sequence[Row]) -> str:
    columns = ("model", "seeds", *(title for title, *_ in HEADLINE))
    cells = []
    for model, seeds, numbers in headline(rows):
        cells.append((model, seeds, *map(_cell, numbers)))
    return page.section("In short", columns, cells) + f"<p>{html.escape(HEADLINE_NOTE)}</p>"


def _difference_section(rows: Sequence[Difference]) -> str:
    """The numbers in short, each model less the reference."""
    found = {(row.model, row.task, row.condition, row.x, row.measure): row for row in rows}
    columns = ("model", "seeds", *(title for title, *_ in HEADLINE))
    cells = []
    for model, seeds in dict.fromkeys((row.model, row.seeds) for row in rows):
        cells.append((model, str(seeds), *(_cell(found.get((model, *where))) for _, *where in HEADLINE)))
    about = (
        f"Mean over seeds less that of {REFERENCE}, on the same documents; documents are drawn for both together, "
        "seeds by themselves. Of a model with one seed the interval leaves out how trainings differ. Intervals are of "
        "single numbers: of many, about one in twenty excludes zero where nothing differs, with few seeds more."
    )
    section = page.section(f"Less {REFERENCE}", columns, cells)
    return section and section + f"<p>{html.escape(about)}</p>"


RUN_COLUMNS = ("model", "seed", "steps", "tokens", "weights", "sha256")


def _run_rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    def shown(number: int | None) -> str:
        return "unknown" if number is None else f"{number:,}"

    return [
        (
            run.model,
            "unknown" if run.seed == UNKNOWN_SEED else str(run.seed),
            shown(run.steps),
            shown(run.tokens),
            str(run.directory),
            run.identity[:16],
        )
        for run in runs
    ]


TASK_COLUMNS = ("task", "condition", "size", "in training", "documents")


def _task_rows(episodes: int) -> list[tuple[str, ...]]:
    """The grid, the sizes of a task in one line."""
    grouped: dict[tuple, list[tasks.Task]] = {}
    for task in tasks.grid():
        grouped.setdefault((task.task, task.condition, task.measured), []).append(task)
    rows = []
    for (name, condition, measured), group in grouped.items():
        sizes = ", ".join(f"{task.x:g}" for task in group if task.x is not None)
        if measured in ("labels", "competitors"):
            sizes = f"0 to {dict(group[0].options)['shots'] - 1}"
        elif measured == "positions":
            sizes = f"1 to {group[0].length - 1}"
        size = f"{group[0].x_name} {sizes}".strip() if group[0].x_name else ""
        trained = "{} to {}".format(*group[0].trained) if group[0].trained else ""
        counts = sorted({task.count(episodes) for task in group})
        extra = ": competing words" if measured == "competitors" else ""
        rows.append((name, condition + extra, size, trained, " or ".join(map(str, counts))))
    return rows


# -- the page ------------------------------------------------------------------------------------------------


def _page(evaluation: Evaluation, environment: dict[str, str]) -> str:
    rows = evaluation.rows
    parts = [
        "<h1>The zoo, evaluated</h1>",
        f"<p>{html.escape(environment['date'])}, on {html.escape(environment['processor'])}. The same held-out "
        f"documents for every model. {html.escape(INTERVALS)}</p>",
        f"<pre>{html.escape(evaluation.command)}</pre>",
        _headline_section(rows),
        _difference_section(evaluation.differences),
        "<p>Figures: crosses and circles are single seeds, lines and bars the mean over them. Click a name in a legend "
        "to show or hide a model, twice to see it alone.</p>",
    ]
    for title, about, figures in Plots(rows).sections():
        parts += [f"<h2>{html.escape(title)}</h2>", f"<p>{html.escape(about)}</p>", *map(page.plot, figures)]
    parts += [
        page.section("Weights", RUN_COLUMNS, _run_rows(evaluation.runs)),
        page.section("What was asked", TASK_COLUMNS, _task_rows(evaluation.episodes)),
        page.section("Machine and versions", ("", ""), list(environment.items())),
    ]
    return page.render("jambascope zoo eval", parts)
