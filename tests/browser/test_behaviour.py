"""What holds of every page: hostile text is text, links open nothing else, people do not disturb each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from jambascope.hooks import routing

pytest.importorskip("playwright")
from browser_tools import (  # noqa: E402
    PACKAGED,
    expect_heat,
    figure,
    no_exception,
    type_prompt,
)
from playwright.sync_api import Page, expect  # noqa: E402

PAGES = {
    "": "Overview",
    "attention": "Attention",
    "ssm_state": "SSM state",
    "router": "Router",
    "induction": "Induction",
    "formats": "Format following",
    "patching": "Patching",
    "runs": "Runs",
}
HOSTILE = (
    "<img src=x onerror=window.hacked=1> <script>window.hacked=1</script> **bold** [a](javascript:alert(1)) $x$ :smile:"
)
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
QUIET_MS, DEADLINE_MS = 1_200, 40_000


def settle(page: Page) -> None:
    """Wait until nothing runs and nothing is drawn anew for a moment."""
    quiet, waited = 0, 0
    while quiet < QUIET_MS and waited < DEADLINE_MS:
        page.wait_for_timeout(200)
        waited += 200
        busy = page.locator('[data-testid="stStatusWidget"], [data-stale="true"], [data-testid="stProgress"]').count()
        quiet = 0 if busy else quiet + 200


@pytest.mark.parametrize("path", PAGES)
def test_a_prompt_with_markup_shows_as_text(open_page, path):
    page = open_page(path, model=PACKAGED, prompt=HOSTILE)
    expect(page.get_by_role("heading", name=PAGES[path], exact=True)).to_be_visible()
    settle(page)
    assert page.evaluate("window.hacked") is None
    main = page.get_by_test_id("stMain")
    assert main.locator("script, img[src=x], a[href^=javascript]").count() == 0
    no_exception(page)


@pytest.mark.parametrize("name", ["/etc", "../../../etc", "//127.0.0.1/share", "~"])
def test_a_link_opens_no_other_directory(open_page, bare_checkpoint, name):
    page = open_page(model=name)
    settle(page)
    chosen = page.get_by_role("combobox", name="Model").first
    expect(chosen).not_to_have_value(name)
    expect(page.get_by_test_id("stMain")).not_to_contain_text("/etc")
    no_exception(page)


def test_eight_people_at_once_get_what_each_would_alone(open_page, model):
    names = ["Alice", "Bob", "Carol", "David", "Emma", "Frank", "Grace", "Henry"]
    prompts = [f"the plot was gripping . {name} gave the book to Bob . {name}" for name in names]
    prompts = [prompt for prompt in prompts if 3 not in model.to_tokens(prompt)]  # of words that it knows
    prompts += ["whale Clara near lamp " * n for n in range(1, 9 - len(prompts))]
    assert len(set(prompts)) == 8
    pages = [open_page("router", fresh=True, model=PACKAGED) for _ in prompts]
    for page, prompt in zip(pages, prompts, strict=True):
        type_prompt(page, prompt)
    layer = model.config.moe_layers[0]
    for page, prompt in zip(pages, prompts, strict=True):
        route = routing.capture_routing(model, model.to_tokens(prompt.strip()))[layer]
        expect_heat(page, "token_routes", routing.kept_weights(route).T)
        no_exception(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshots_of_every_page(browser, server, scheme):
    """For a person to look at: ``build/screenshots/PAGE-SCHEME.png``."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    context = browser.new_context(viewport={"width": 1440, "height": 1000}, color_scheme=scheme)
    try:
        page = context.new_page()
        for path, title in PAGES.items():
            page.goto(f"{server}/{path}?model={PACKAGED}")
            expect(page.get_by_role("heading", name=title, exact=True)).to_be_visible()
            settle(page)
            picture = SCREENSHOTS / f"{path or 'overview'}-{scheme}.png"
            page.screenshot(path=picture)
            assert picture.stat().st_size > 10_000, "an empty page is smaller"
            no_exception(page)
    finally:
        context.close()


def test_a_figure_is_saved_as_numbers(open_page, model, tmp_path):
    import pandas as pd

    page = open_page("router", model=PACKAGED, prompt="the plot was gripping")
    expect(figure(page, "token_routes")).to_contain_text("gripping 4")
    page.locator(".st-key-save_token_routes button").click()
    for label, read in (("CSV", pd.read_csv), ("Parquet", pd.read_parquet)):
        with page.expect_download() as saved:
            page.get_by_test_id("stPopoverBody").get_by_role("button", name=label, exact=True).click()
        path = tmp_path / saved.value.suggested_filename
        saved.value.save_as(path)
        weights = routing.kept_weights(routing.capture_routing(model, model.to_tokens("the plot was gripping"))[1])
        found = read(path)
        (values,) = (found[column] for column in found if "weight" in column)
        assert sorted(values) == pytest.approx(sorted(weights[weights > 0].tolist()), rel=1e-5)
