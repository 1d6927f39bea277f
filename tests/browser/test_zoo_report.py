"""The page that ``jambascope zoo eval`` writes, opened from disk on a dark system."""

from __future__ import annotations

from pathlib import Path

import pytest

from jambascope.studies.zoo import report, tasks
from jambascope.studies.zoo.differences import Difference
from jambascope.studies.zoo.evaluation import Run
from jambascope.studies.zoo.summary import Row

MODELS = ("jamba-micro", "mamba-micro", "some/checkpoint")
MEASURES = {
    "labels": ("label mass", "valid rate", "accuracy free", "accuracy restricted", "format gap", "chance"),
    "competitors": ("verdict mass", "mass of other labels"),
    "verdicts": ("verdict mass", "class known", "chance"),
    "answers": ("accuracy", "loss", "chance"),
    "rows": ("loss", "loss on answers", "ICL score"),
    "positions": ("loss",),
}


def rows_of(model: str, seed: int | None) -> list[Row]:
    """A number for all that the grid asks; its value says which model it is of."""
    rows, mean = [], 0.2 * (1 + MODELS.index(model))
    for task in tasks.grid():
        several = {"labels": tasks.SHOTS, "competitors": tasks.SHOTS, "positions": (8.5, 384)}
        for measure in MEASURES[task.measured]:
            for x in several.get(task.measured, (task.x,)):
                where = (task.task, task.condition, task.x_name, x, measure)
                rows.append(
                    Row(model, seed, None, *where, mean, mean - 0.1, mean + 0.1, 9, 1 if seed is not None else 2)
                )
    return rows


@pytest.fixture(scope="module")
def page_path(tmp_path_factory) -> Path:
    own = [(MODELS[0], None), (MODELS[0], 0), (MODELS[0], 1), (MODELS[1], 0), (MODELS[2], 5)]
    rows = [row for model, seed in own for row in rows_of(model, seed)]
    runs = [Run(model, seed, Path("runs") / model, "0" * 64, None, 7) for model, seed in own if seed is not None]
    less = [
        Difference(MODELS[1], task, condition, None, x, measure, -0.2, -0.3, -0.1, 9, 1, MODELS[0], 2)
        for _, task, condition, x, measure in report.HEADLINE
    ]
    out = tmp_path_factory.mktemp("zoo")
    report.write(report.Evaluation("jambascope zoo eval <x>", 9, runs, rows, less), out)
    return out / "report.html"


def test_the_page_draws_all_models_in_its_colours(browser, page_path):
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="dark", offline=True)
    page = context.new_page()
    errors = []
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.goto(page_path.as_uri())
    page.wait_for_selector(".js-plotly-plot .main-svg")
    plots = page.locator(".js-plotly-plot")
    assert plots.count() == 13
    legend = plots.nth(0).locator(".legendtext")
    assert legend.all_text_contents() == [*MODELS, "chance"]
    # A band and a line for each of three models, and marks for the seeds of one, in each of 25 panels; chance in ten.
    assert plots.nth(0).locator(".scatterlayer .trace").count() == 25 * 7 + 10
    page.wait_for_function("getComputedStyle(document.querySelector('.gtitle')).fill === 'rgb(227, 232, 237)'")
    assert page.locator("pre").inner_text() == "jambascope zoo eval <x>"
    first = page.locator("table").first.locator("tbody tr").first
    assert first.inner_text().split("\t")[:3] == [MODELS[0], "0, 1", "0.20 [0.10,\u00a00.30]"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert errors == []
    context.close()
