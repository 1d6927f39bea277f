"""A run as one page that needs nothing else: question, reading, numbers, figures, controls, how to reproduce it."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jambascope.errors import RunError
from jambascope.studies import page
from jambascope.studies.runner.directory import ENVIRONMENT, RunDirectory, said
from jambascope.studies.runner.spec import Spec, as_text, describe
from jambascope.studies.runner.study import Study
from jambascope.studies.runner.summary import summarize

INTERVALS = (
    "Intervals are 95 %: of one training the percentile bootstrap over samples (prompts or sequences), over several "
    "trainings of a recipe the hierarchical one, trainings drawn with replacement and samples within them; shares of "
    "hits are stretched to hold Wilson's. n counts values, those of all trainings together. With few trainings "
    "intervals are too narrow, and each is of its number alone: of many, about one in twenty misses the truth."
)


def headline(study: Study, rows: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of the table of results."""
    return lines_of(summarize(rows, study.headline, study.by))


def lines_of(frame: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """A frame as text; mean, low and high become one column, labels that all lines lack none."""
    frame = frame.loc[:, [not frame[name].isna().all() and (frame[name] != "").any() for name in frame]]
    names = [name for name in frame if name not in ("low", "high")]
    lines = []
    for _, row in frame.iterrows():
        line = {name: text(row[name]) for name in names}
        if "low" in row and math.isfinite(row["low"]) and math.isfinite(row["high"]):
            line["mean"] += f" [{text(row['low'])}, {text(row['high'])}]".replace(" ", "\u00a0")
        lines.append(list(line.values()))
    heads = ["mean and 95 % interval" if name == "mean" and "low" in frame else str(name) for name in names]
    return [head.replace("_", " ") for head in heads], lines


def text(value: Any) -> str:
    """A number with three figures after the point, none where it is whole; nothing for none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.3f}" if abs(value) >= 0.0005 else f"{value:.1e}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def print_run(study: Study, spec: Spec, rows: pd.DataFrame, console: Console) -> None:
    """Question, reading and table of results on the terminal."""
    columns, lines = headline(study, rows)
    table = Table(*columns, title=study.question, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    console.print(study.reading(spec, rows), highlight=False, markup=False)


def environment_of(directory: RunDirectory) -> dict[str, str]:
    """
    Raises:
        RunError: ``environment.json`` is missing or damaged.
    """
    path = directory.path / ENVIRONMENT
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        remedy = f"move {directory.path} away and run it anew with: {directory.record['command']}"
        raise RunError(f"{path} cannot be read ({e}); {remedy}") from None


def page_of(
    study: Study,
    spec: Spec,
    rows: pd.DataFrame,
    record: dict[str, Any],
    cells: Sequence[dict[str, Any]],
    environment: dict[str, str],
) -> str:
    """The page of a finished run.

    Args:
        rows: the results.
        record: ``spec.json``.
        cells: of each its ``cell`` and ``seconds``.
        environment: ``environment.json``.
    """
    seconds = sum(cell["seconds"] for cell in cells)
    parts = [
        f"<h1>{html.escape(study.question)}</h1>",
        f"<p>Study {study.name}, version {study.version}; {html.escape(environment['date'])}, jambascope "
        f"{html.escape(record['package'])}. Reproduced by:</p>",
        f"<pre>{html.escape(record['command'])}</pre>",
        "<h2>Reading</h2>",
        paragraphs(study.reading(spec, rows)),
        page.section("Results", *headline(study, rows)),
        f"<p>{html.escape(INTERVALS)}</p>",
        "<h2>Figures</h2>",
        *map(page.plot, study.figures(spec, rows)),
        "<h2>Method</h2>",
        paragraphs(study.method),
        "<h2>Controls</h2>",
        paragraphs(study.controls),
        *(page.section(title, *lines_of(frame)) for title, frame in study.tables(spec, rows)),
        page.section("What was asked", ("setting", "value", "meaning"), settings(spec)),
        page.section("Weights", ("model", "recipe", "training seed", "sha256"), models(record)),
        page.section("Cells", ("cell", "seconds"), [(said(c["cell"]), f"{c['seconds']:.1f}") for c in cells]),
        page.section("Machine and versions", ("", ""), [*environment.items(), ("measuring took", f"{seconds:.0f} s")]),
    ]
    return page.render(f"{study.name}: {study.question}", parts)


def settings(spec: Spec) -> list[tuple[str, str, str]]:
    """Name, value and meaning of every field of a spec."""
    return [(name, as_text(getattr(spec, name)), meaning) for name, _, meaning in describe(type(spec))]


def models(record: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (m["model"], m["recipe"], "unknown" if m["training_seed"] is None else str(m["training_seed"]), m["identity"])
        for m in record["models"]
    ]


def paragraphs(words: str) -> str:
    """Text as HTML; blank lines part paragraphs."""
    return "".join(f"<p>{html.escape(part.strip())}</p>" for part in words.split("\n\n") if part.strip())
