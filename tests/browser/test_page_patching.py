"""The Patching page in a real browser: two prompts, a sweep, a click, a stop, a link, a run that is kept."""

from __future__ import annotations

import re
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch

from jambascope.hooks.sweep import logit_difference, patch_sweep
from jambascope.studies.runner.run import read

pytest.importorskip("playwright")
from browser_tools import (  # noqa: E402
    PACKAGED,
    cells,
    choose,
    eventually,
    expect_heat,
    expect_query,
    figure,
    heat,
    no_exception,
    query,
    type_prompt,
)
from playwright.sync_api import Page, expect  # noqa: E402

CLEAN = "map : stone river , leaf mud , moss pine ; leaf ->"
CORRUPTED = "map : stone river , leaf mud , moss pine ; stone ->"
FIRST = 12
"""Where they part."""


def corrupt(page: Page, text: str) -> None:
    box = page.get_by_label("Corrupted prompt", exact=True)
    box.fill(text)
    box.press("Control+Enter")


def sweep(model, node: str = "resid_pre", **options):
    metric = logit_difference("mud", "river")
    return patch_sweep(model, CLEAN, CORRUPTED, metric, node, progress=False, **options)


def effects(model, node: str = "resid_pre", **options) -> np.ndarray:
    """[layer position], from the first difference on."""
    return sweep(model, node, **options).effects()[node].values[0, 0, :, FIRST:]


def click_cell(page: Page, key: str, position: int, layer: int) -> None:
    grid = figure(page, key)
    grid.scroll_into_view_if_needed()
    x, y = grid.evaluate(
        f"""e => {{ const box = e.getBoundingClientRect(), {{xaxis, yaxis}} = e._fullLayout;
        return [box.x + xaxis._offset + xaxis.d2p({position}), box.y + yaxis._offset + yaxis.d2p({layer})]; }}"""
    )
    page.mouse.move(x - 4, y - 2)
    page.mouse.move(x, y)
    page.mouse.click(x, y)


def test_maps_a_click_and_a_link(open_page, model):
    page = open_page("patching", model=PACKAGED, prompt=CLEAN, corrupted=CORRUPTED)
    expect(page.locator(".aligned .other")).to_have_text(re.compile("leafstone"))
    figure(page, "map_resid_pre").wait_for()
    for node in ("resid_pre", "mixer_out"):
        wanted = effects(model, node)
        expect_heat(page, f"map_{node}", np.nan_to_num(wanted[np.isfinite(wanted).any(1)]), atol=2e-3)
    click_cell(page, "map_resid_pre", FIRST, 2)
    expect_query(page, cell_node="resid_pre", cell_layer="2", cell_position=str(FIRST))
    found = sweep(model)
    value = float(found.values["resid_pre"].sel(layer=2, position=FIRST)[0, 0])
    expect(figure(page, "patched_tokens").locator(".gtitle").first).to_contain_text("resid_pre of layer 2")
    expect(figure(page, "patched_tokens").locator(".gsubtitle, .gtitle-subtitle")).to_contain_text(
        f"patched {value:.3g}"
    )
    with torch.no_grad():
        shares = model(CORRUPTED)[0, -1].softmax(-1)

    def compare_table() -> None:
        ids = [model.to_single_token(text) for text in cells(page, "patched_table", 0)]
        shown = [float(text) for text in cells(page, "patched_table", 1)]
        assert len(ids) >= 5 and shown == pytest.approx(shares[ids].tolist(), rel=2e-2)

    eventually(page, compare_table)
    again = open_page("patching", fresh=True)
    again.goto(page.url)
    expect(figure(again, "patched_tokens").locator(".gtitle").first).to_contain_text("resid_pre of layer 2")
    expect_heat(again, "map_resid_pre", np.nan_to_num(heat(page, "map_resid_pre")))
    assert query(again) == query(page)
    no_exception(page)
    no_exception(again)


def test_what_is_asked_can_be_changed(open_page, model):
    page = open_page("patching", model=PACKAGED, prompt=CLEAN, corrupted=CORRUPTED, patch_nodes="resid_pre")
    page.get_by_role("radio", name="noise", exact=True).click()
    wanted = effects(model, direction="noise")
    expect_heat(page, "map_resid_pre", np.nan_to_num(wanted), atol=2e-3)
    page.get_by_role("radio", name="raw value").click()
    found = sweep(model, direction="noise")
    expect_heat(page, "map_resid_pre", found.values["resid_pre"].values[0, 0, :, FIRST:], atol=2e-3)
    choose(page, "Metric", "KL divergence")
    expect_query(page, patch_metric="KL divergence".replace(" ", "+"), direction="noise")
    eventually(page, lambda: np.testing.assert_array_less(-1e-6, heat(page, "map_resid_pre")))
    choose(page, "Example pairs", "one adjective of a review")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(re.compile("wonderful"))
    expect(page.get_by_label("Corrupted prompt", exact=True)).to_have_value(re.compile("terrible"))
    expect(page.locator(".aligned .other")).to_have_text(re.compile("wonderfulterrible"))
    no_exception(page)


def test_mistakes_and_hostile_prompts_are_told_in_a_line(open_page):
    page = open_page("patching", model=PACKAGED, prompt=CLEAN, corrupted=CORRUPTED)
    dialogs: list = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    for text, message in {
        CLEAN: "are the same; change a word of the corrupted one",
        CLEAN + " mud": "shorten the corrupted one by 1",
        " ": "the corrupted prompt is empty",
    }.items():
        corrupt(page, text)
        expect(page.get_by_test_id("stAlert").last).to_contain_text(message)
        no_exception(page)
    type_prompt(page, "<img src=x onerror=alert(1)> a <script>alert(2)</script> book")
    corrupt(page, "<img src=x onerror=alert(1)> a <script>alert(2)</script> lamp")
    expect(page.locator(".aligned .other")).to_have_text(re.compile("booklamp"))
    expect(figure(page, "map_resid_pre")).to_contain_text("book/lamp")
    assert not dialogs and page.locator("[data-testid=stMain] img[src=x]").count() == 0
    no_exception(page)


def test_a_long_sweep_fills_in_and_can_be_stopped(open_page):
    """Of a checkpoint without a tokenizer; a turn to another page does not end it."""
    ids = [str(i % 50) for i in range(500)]
    other = " ".join([ids[0], "7", *ids[2:]])
    page = open_page("patching", prompt=" ".join(ids), corrupted=other, patch_nodes="resid_pre", patch_shown="change")
    page.get_by_role("button", name="Patch every cell").click()
    stop = page.get_by_test_id("stMain").get_by_role("button", name="Stop")
    stop.wait_for()
    figure(page, "map_resid_pre").wait_for()
    for _ in range(200):
        if np.isfinite(heat(page, "map_resid_pre")).any():
            break
        page.wait_for_timeout(200)
    page.get_by_test_id("stSidebarNavLink").filter(has_text="Runs").click()
    expect(page.get_by_role("heading", name="Runs", exact=True)).to_be_visible()
    page.get_by_test_id("stSidebarNavLink").filter(has_text="Patching").click()
    stop.click()
    expect(page.get_by_text(re.compile(r"Stopped at \d+%"))).to_be_visible()
    shown = heat(page, "map_resid_pre")
    assert np.isfinite(shown).any()
    expect(page.get_by_text("Largest changes of the metric")).to_be_visible()
    no_exception(page)


def test_a_run_is_saved_and_opened(open_page, runs_root):
    page = open_page("patching", model=PACKAGED, prompt=CLEAN, corrupted=CORRUPTED, patch_nodes="z")
    page.get_by_text("Save as a study run").first.click()
    page.get_by_role("button", name="Save as a study run").click()
    link = page.get_by_role("link", name="open it on the Runs page")
    link.wait_for()
    name = parse_qs(urlsplit(link.get_attribute("href")).query)["run"][0]
    path = runs_root / name  # beside what other tests have kept
    spec = read(path)[2]
    assert (spec.clean, spec.corrupted, spec.answer, spec.wrong) == (CLEAN, CORRUPTED, "mud", "river")
    again = open_page("runs")
    again.goto(page.url.partition("/patching")[0] + link.get_attribute("href"))
    expect(again.get_by_role("heading", name=path.name)).to_be_visible()
    no_exception(again)
