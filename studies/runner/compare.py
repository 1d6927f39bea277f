"""Two runs of one study: the table of results of the second less that of the first."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from jambascope.errors import RunError
from jambascope.hooks.intervals import percentiles
from jambascope.studies import page
from jambascope.studies.runner import report
from jambascope.studies.runner.directory import RunDirectory
from jambascope.studies.runner.run import read
from jambascope.studies.runner.spec import Spec, as_text
from jambascope.studies.runner.study import Study
from jambascope.studies.runner.summary import as_tensor, of_agreeing_hits, samples_of
from jambascope.studies.zoo.summary import hierarchical_draws

ABOUT = (
    "Second run less first, 95 % intervals. Where both have the same samples (seed and number), those are drawn for "
    "both together (paired), and trainings too where both have the same weights; else each by itself. Intervals are of "
    "single numbers: of many, about one in twenty excludes zero where nothing differs."
)


@dataclass(frozen=True)
class Comparison:
    """What differs between two runs."""

    study: Study
    runs: tuple[RunDirectory, RunDirectory]
    specs: tuple[Spec, Spec]
    frame: pd.DataFrame
    """Columns: recipe, measure, labels, first, second, mean (second less first), low, high, pairing."""

    @property
    def settings(self) -> list[tuple[str, str, str]]:
        """Name and both values of every field of the spec that differs."""
        first, second = self.specs
        return [
            (name, as_text(getattr(first, name)), as_text(getattr(second, name)))
            for name in type(first).model_fields
            if getattr(first, name) != getattr(second, name)
        ]


def compare(first: Path, second: Path, tell: Callable[[float, str], bool] = lambda *_: True) -> Comparison | None:
    """The results of ``second`` less those of ``first``, number by number; a recipe with itself, or, where each run has
    one alone, whatever the two are.

    Args:
        tell: is told the share done and what comes next; where it returns False the result is None.

    Raises:
        RunError: runs of different studies or versions, unfinished or damaged ones, or with no number in common.
    """
    directories = tuple(RunDirectory.open(path) for path in (first, second))
    studies = [(d.record["study"], d.record["version"]) for d in directories]
    if studies[0] != studies[1]:
        said = " and ".join(
            f"{path} of {name} version {v}" for path, (name, v) in zip((first, second), studies, strict=True)
        )
        raise RunError(f"runs of different studies cannot be compared: {said}; give two of one study and version")
    (_, study, spec, rows), (_, _, other_spec, other_rows) = (read(path) for path in (first, second))
    weights = [{m["model"]: m["identity"] for m in d.record["models"]} for d in directories]
    lone = [frame.recipe.unique() for frame in (rows, other_rows)]
    if all(len(recipes) == 1 for recipes in lone) and lone[0][0] != lone[1][0]:
        name = f"{lone[1][0]} less {lone[0][0]}"
        rows, other_rows = (frame.assign(recipe=name) for frame in (rows, other_rows))
    common = []
    for measure in study.headline:
        own, other = (samples_of(frame[frame.measure == measure], study.by) for frame in (rows, other_rows))
        kinds = rows.loc[rows.measure == measure, "kind"] if "kind" in rows else []
        kind = next(iter(kinds), None)
        common += [(key, kind, own[key], other[key]) for key in own if key in other]
    if not common:
        raise RunError(
            f"{first} and {second} have no number in common: recipes are {', '.join(lone[0])} and {', '.join(lone[1])}"
        )
    lines = []
    for i, (key, kind, *samples) in enumerate(common):
        line = dict(zip(("recipe", "measure", *study.by), key, strict=True))
        if not tell(i / len(common), f"drawing samples: {line['measure']}"):
            return None
        lines.append(line | _difference(*map(_by_weights, samples, weights), kind))
    return Comparison(study, directories, (spec, other_spec), pd.DataFrame(lines))


def _by_weights(values: pd.DataFrame, weights: dict[str, str]) -> pd.DataFrame:
    """Trainings under what their weights are, in that order, so that the same ones stand in the same place."""
    return values.rename(index=weights).sort_index()


def _difference(first: pd.DataFrame, second: pd.DataFrame, kind: str | None = None) -> dict[str, float | str]:
    """Means of both, and the second's less the first's with its interval; ``kind`` as rows say it."""
    same_samples = set(first.columns) == set(second.columns)
    same_trainings = list(first.index) == list(second.index)
    a, b = as_tensor(first), as_tensor(second[list(first.columns)] if same_samples else second)
    means = [float(t.nanmean(1).nanmean()) for t in (a, b)]
    if same_samples and same_trainings:
        drawn = hierarchical_draws(b - a)
    else:
        drawn = hierarchical_draws(b) - hierarchical_draws(a, 0 if same_samples else 1, of_seeds=2)
    low, high = (end.item() for end in percentiles(drawn))
    n = min(a.shape[1], b.shape[1])
    if kind in ("hit", "change of hits"):
        low, high = of_agreeing_hits(means[1] - means[0], low, high, n)
    few = n < 2
    pairing = " and ".join(["samples"] * same_samples + ["trainings"] * same_trainings)
    return {
        "first": means[0],
        "second": means[1],
        "mean": means[1] - means[0],
        "low": -float("inf") if few else low,
        "high": float("inf") if few else high,
        "paired": pairing or "no",
    }


def lines(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of the table."""
    columns, found = report.lines_of(comparison.frame)
    return [column.replace("mean and", "difference and") for column in columns], found


def page_of(comparison: Comparison) -> str:
    """The comparison as one page that needs nothing else."""
    first, second = comparison.runs
    commands: Sequence[str] = [f"{run.path.name}: {run.record['command']}" for run in (first, second)]
    parts = [
        f"<h1>{html.escape(comparison.study.question)}</h1>",
        f"<p>{html.escape(second.path.name)} less {html.escape(first.path.name)}.</p>",
        f"<pre>{html.escape(chr(10).join(commands))}</pre>",
        page.section("Differences", *lines(comparison)),
        f"<p>{html.escape(ABOUT)}</p>",
        page.section("Settings that differ", ("setting", "first", "second"), comparison.settings),
        page.section(
            "Weights of the first", ("model", "recipe", "training seed", "sha256"), report.models(first.record)
        ),
        page.section(
            "Weights of the second", ("model", "recipe", "training seed", "sha256"), report.models(second.record)
        ),
    ]
    return page.render(f"{comparison.study.name}: two runs compared", parts)
