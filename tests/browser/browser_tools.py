"""What the browser tests share: typing, choosing, and what the page's figures and tables hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest
from playwright.sync_api import Page, expect

PACKAGED = "jamba-micro"
PROMPT = "the plot was gripping . Alice gave the book to Bob ."
OTHER = "whale Clara near lamp whale Clara near"


def type_prompt(page: Page, text: str) -> None:
    box = page.get_by_label("Prompt", exact=True)
    box.fill(text)
    box.press("Control+Enter")


def figure(page: Page, key: str):
    # The first: while a figure is drawn anew, the one before it may still be there for a moment.
    return page.locator(f".st-key-{key}:not([data-stale=true]) .js-plotly-plot").first


def wait_for_title(page: Page, key: str, title: str) -> None:
    expect(figure(page, key).locator(".gtitle").first).to_have_text(title)


def axis_names(page: Page, key: str, axis: str = "x") -> list[str]:
    return figure(page, key).evaluate(f"e => Array.from(e.layout.{axis}axis.ticktext)")


def heat(page: Page, key: str) -> np.ndarray:
    """The numbers behind a heatmap, as the browser holds them; None becomes NaN. None yet while it is drawn anew."""
    held = "Array.from(e._fullData?.[0]?.z ?? [], row => Array.from(row, v => v ?? null))"
    return np.array(figure(page, key).evaluate(f"e => {held}"), dtype=float)


def query(page: Page) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlparse(page.url).query).items()}


def expect_query(page: Page, **wanted: str) -> None:
    for name, value in wanted.items():
        expect(page).to_have_url(re.compile(rf"[?&]{name}={re.escape(value)}(&|$)"))


def choose(page: Page, label: str, option: str) -> None:
    page.get_by_role("combobox", name=re.compile(rf"\b{label}$")).click()
    page.get_by_role("option", name=option, exact=True).click()


def click_point(page: Page, key: str, trace: int, point: int) -> None:
    """Click on a point (or the end of a bar) of a figure, as a person would: the mouse comes from elsewhere."""
    plot = figure(page, key)
    plot.scroll_into_view_if_needed()
    x, y = plot.evaluate(
        """(e, [trace, i]) => { const t = e._fullData[trace], box = e.getBoundingClientRect();
        const {xaxis, yaxis} = e._fullLayout, inside = t.type === "bar" ? 3 : 0;
        return [box.x + xaxis._offset + xaxis.d2p(t.x[i]) - inside, box.y + yaxis._offset + yaxis.d2p(t.y[i])]; }""",
        [trace, point],
    )
    page.mouse.move(x - 4, y - 4)
    page.mouse.move(x, y)
    page.mouse.click(x, y)


def cells(page: Page, key: str, column: int) -> list[str]:
    """One column of a table, from the accessible copy that it keeps inside its canvas."""
    rows = page.locator(f".st-key-{key} canvas [role=row] [role=gridcell]:nth-child({column + 1})")
    return rows.evaluate_all("all => all.map(cell => cell.textContent)")


def eventually(page: Page, check: Callable[[], None]) -> None:
    """Figures of one page arrive one after the other: try until the assertion holds, for ten seconds."""
    for _ in range(100):
        try:
            return check()
        except AssertionError:
            page.wait_for_timeout(100)
    check()


def expect_heat(page: Page, key: str, wanted: np.ndarray, rtol: float = 1e-3, atol: float = 1e-5) -> None:
    """The cells of a heatmap, empty ones as 0."""
    wanted = np.asarray(wanted)
    eventually(page, lambda: np.testing.assert_allclose(np.nan_to_num(heat(page, key)), wanted, rtol=rtol, atol=atol))


def expect_numbers(page: Page, key: str, column: int, wanted: list[float]) -> None:
    """A column of numbers, as precise as a float32."""

    def check() -> None:
        assert [float(text) for text in cells(page, key, column)] == pytest.approx(wanted, rel=1e-4)

    eventually(page, check)


def no_exception(page: Page) -> None:
    expect(page.locator('[data-testid="stException"]')).to_have_count(0)


def words(model, prompt: str) -> list[str]:
    return model.to_str_tokens(prompt)
