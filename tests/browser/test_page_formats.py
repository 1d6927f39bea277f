"""Format following in a real browser: models side by side, a prompt by hand, links to heads, many episodes."""

from __future__ import annotations

import re
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest
import torch

from jambascope import HookedJamba
from jambascope.dashboards import models
from jambascope.dashboards.results import formats as results
from jambascope.hooks.labels import label_attention
from jambascope.hooks.looks import looks
from jambascope.studies.episodes import few_shot
from jambascope.studies.figures import labels
from jambascope.studies.format_evaluation import MEASURES, evaluate
from jambascope.zoo.recipes import RECIPES
from jambascope.zoo.scoring import label_scores

pytest.importorskip("playwright")
from browser_tools import (  # noqa: E402
    PACKAGED,
    axis_names,
    cells,
    eventually,
    expect_query,
    figure,
    heat,
    no_exception,
    wait_for_title,
)
from playwright.sync_api import expect  # noqa: E402

ASKED = results.Asked("unseen", 2, 6, 0, 1)
QUERY = {"label_kind": "unseen", "shots": "6", "episode_seed": "1"}


@pytest.fixture(scope="module")
def pure(tmp_path_factory) -> str:
    """A pure Mamba of the packaged vocabulary, untrained, among the directories that were opened before."""
    model = HookedJamba.from_pretrained(PACKAGED)
    torch.manual_seed(0)
    mamba = HookedJamba(RECIPES["mamba-micro"].config)
    mamba.tokenizer = model.tokenizer
    directory = tmp_path_factory.mktemp("zoo") / "mamba<b>"
    mamba.save_pretrained(directory)
    models.remember(str(directory))
    return str(directory)


def traces(page, key: str) -> dict[str, list]:
    """Name -> x and y of every trace."""
    held = "Object.fromEntries((e._fullData ?? []).map(t => [t.name, [Array.from(t.x), Array.from(t.y)]]))"
    return figure(page, key).evaluate(f"e => {held}")


def open_formats(open_page, pure: str, **query: str):
    page = open_page("formats", **QUERY, **query)
    box = page.get_by_role("combobox", name="Models")
    box.click()
    page.get_by_role("option", name=pure, exact=True).click()
    page.keyboard.press("Escape")
    return page


def test_models_stand_side_by_side(open_page, model, pure):
    page = open_formats(open_page, pure, format_models=PACKAGED)
    episode, mamba = ASKED.draw(), HookedJamba.from_pretrained(pure)
    scores = [label_scores(one, [episode]) for one in (model, mamba)]

    expect(figure(page, "by_shots")).to_be_visible(timeout=60_000)  # the server's first models

    def check() -> None:
        found = traces(page, "by_shots")
        assert {PACKAGED, "mamba&lt;b&gt;"} <= set(found)
        for name, own in zip((PACKAGED, "mamba&lt;b&gt;"), scores, strict=True):
            np.testing.assert_allclose(found[name][1], own.mass[0], rtol=1e-3, atol=1e-6)
        assert [float(v) for v in cells(page, "label_choices", 5)] == pytest.approx(
            [float(own.mass[0, -1]) for own in scores], rel=1e-3
        )

    eventually(page, check)
    assert cells(page, "label_choices", 8)[0] == labels.SAID
    bars = traces(page, "next_mass")
    assert bars[labels.RIGHT][0][0] == pytest.approx(float(cells(page, "label_choices", 2)[0]), abs=1e-4)
    assert sum(x for name in labels.MASS_COLORS for x, y in zip(*bars[name], strict=True) if y == 0) == pytest.approx(1)
    prompt = few_shot(episode, 6)
    rows = looks(model, torch.tensor([prompt.tokens]), prompt.query_position)
    tops = label_attention(model, [prompt]).top(4)
    wanted = np.stack([rows[top["layer"]][top["head"]].numpy() for top in tops])
    eventually(page, lambda: np.testing.assert_allclose(heat(page, "label_rows")[:4], wanted, rtol=1e-3, atol=1e-5))
    expect(page.get_by_text("no attention heads")).to_be_visible()
    no_exception(page)


def test_fewer_shots_and_the_link_to_a_head(open_page, model):
    page = open_page("formats", format_models=PACKAGED, **QUERY)
    wait_for_title(page, "next_mass", "What comes where a label is due, after 6 shots")
    page.get_by_role("slider").press("ArrowLeft")
    wait_for_title(page, "next_mass", "What comes where a label is due, after 5 shots")
    expect_query(page, after_shots="5", label_kind="unseen")
    prompt = few_shot(ASKED.draw(), 5)
    wait_for_title(page, "label_rows", f"Where “:” ({prompt.query_position}) looks")
    top = label_attention(model, [prompt]).top(1)[0]
    link = page.get_by_role("link", name=f"layer {top['layer']}, head {top['head']}")
    address = urlparse(link.get_attribute("href"))
    asked = {name: value[0] for name, value in parse_qs(address.query).items()}
    assert asked["prompt"] == results.prompt_of(ASKED.draw(), 5)
    there = open_page("attention", **asked)
    wait_for_title(there, "head_pattern", f"Layer {top['layer']}, head {top['head']}")
    wait_for_title(there, "attended_keys", f"Where “:” ({prompt.query_position}) looks")
    again = open_page("formats", fresh=True, **{n: v[0] for n, v in parse_qs(urlparse(page.url).query).items()})
    wait_for_title(again, "next_mass", "What comes where a label is due, after 5 shots")
    eventually(again, lambda: np.testing.assert_allclose(heat(again, "label_rows"), heat(page, "label_rows")))
    no_exception(again)


def test_a_prompt_by_hand_and_its_mistakes(open_page):
    page = open_page("formats", format_models=PACKAGED, episode_from="by hand")
    box = page.get_by_role("textbox", name="Text that ends where a label is wanted")
    box.fill("Review : the <script>alert(1)</script> was dull . Sentiment :")
    box.press("Control+Enter")
    expect(page.get_by_test_id("stAlert")).to_contain_text("'<script>alert(1)</script>' is not a word of the packaged")
    box.fill("Review : the plot was dull . Sentiment : lamp Review : the cast was superb . Sentiment :")
    box.press("Control+Enter")
    given = page.get_by_role("textbox", name="Labels")
    given.fill("whale, lamp")
    given.press("Enter")
    wait_for_title(page, "next_mass", "What comes where a label is due, after 1 shot")
    expect(page.get_by_text("The right one where it ends is “whale”, which was not shown before.")).to_be_visible()
    assert "lamp 10" in axis_names(page, "label_rows")
    expect_query(page, episode_labels="whale%2C+lamp")
    no_exception(page)


def test_many_episodes_can_be_stopped_and_end_in_what_the_library_computes(open_page, model):
    query = {"formats_of": "many episodes", "format_models": PACKAGED, "label_kinds": "unseen", "most_shots": "4"}
    page = open_page("formats", **query, episodes="1024")
    page.get_by_role("button", name="Run the batch evaluation").click()
    page.locator(".st-key-formats-stop button").click()
    expect(page.get_by_text(re.compile("Stopped at"))).to_be_visible()
    box = page.get_by_role("spinbutton", name="Episodes")
    box.fill("8")
    box.press("Enter")
    expect_query(page, episodes="8")
    expect(page.get_by_text(re.compile("^8 episodes of 5 reviews"))).to_be_visible()
    page.get_by_role("button", name="Run the batch evaluation").click()
    expect(figure(page, "format_curves")).to_contain_text("unseen labels")
    expect(figure(page, "format_curves")).to_contain_text("means over 8 episodes")
    rows = evaluate([(PACKAGED, lambda: model)], ["unseen"], episodes=8, shots=4)
    held = figure(page, "format_curves").evaluate(
        "e => e._fullData.filter(t => t.name === 'jamba-micro' && t.mode === 'lines+markers').map(t => Array.from(t.y))"
    )
    wanted = [[row.mean for row in rows if row.measure == measure] for measure in MEASURES]
    for found, own in zip(held, wanted, strict=True):
        np.testing.assert_allclose(found, own, atol=1e-5)
    page.get_by_test_id("stSidebarNavLink").filter(has_text="Runs").click()
    page.get_by_test_id("stSidebarNavLink").filter(has_text="Format following").click()
    expect(figure(page, "format_curves")).to_contain_text("means over 8 episodes")  # kept, not computed again
    no_exception(page)
