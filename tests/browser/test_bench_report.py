"""The page that ``jambascope bench --html`` writes, opened from disk in both colour schemes."""

from __future__ import annotations

import pytest
import torch

from jambascope.studies.bench.race import OURS, Results, Row
from jambascope.studies.bench.races import RACES
from jambascope.studies.bench.report import make_report, write_html


@pytest.fixture(scope="module")
def page_path(tmp_path_factory):
    rows = [
        Row("scan", side, width, 4, length, k, "ms", cost * length * (1 + 0.1 * k))
        for side, cost in ((OURS, 0.01), ("transformers", 0.3), ("torch.exp", 0.02))
        for width in (128, 512)
        for length in (64, 512)
        for k in range(3)
    ]
    rows += [Row("load", side, 128, 4, 0, 0, "ms", 50.0) for side in (OURS, "transformers")]
    path = tmp_path_factory.mktemp("report") / "bench.html"
    write_html(make_report(Results(rows), RACES, torch.device("cpu"), "jambascope bench <x>"), RACES, path)
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_plots_are_drawn_in_the_page_colours(browser, page_path, scheme):
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=scheme, offline=True)
    page = context.new_page()
    errors = []
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.goto(page_path.as_uri())
    page.wait_for_selector(".js-plotly-plot .main-svg")
    assert page.locator(".js-plotly-plot").count() == 2
    assert page.locator(".js-plotly-plot .scatterlayer .trace").count() == 6
    assert page.locator(".js-plotly-plot .barlayer .trace").count() == 2
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert ink == {"light": "rgb(28, 39, 51)", "dark": "rgb(227, 232, 237)"}[scheme]
    page.wait_for_function(f"getComputedStyle(document.querySelector('.gtitle')).fill === '{ink}'")
    assert page.locator("pre").inner_text() == "jambascope bench <x>"
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert errors == []
    context.close()
