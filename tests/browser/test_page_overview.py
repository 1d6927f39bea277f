"""The inside of the Overview in a real browser: the lens and its clicks, attribution against the library, memory."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from jambascope.hooks.attribution import direct_logit_attribution
from jambascope.hooks.logit_lens import logit_lens
from jambascope.memory import kv_cache_bytes_per_token, readable_bytes

pytest.importorskip("playwright")
from browser_tools import (  # noqa: E402
    PACKAGED,
    PROMPT,
    cells,
    eventually,
    expect_heat,
    expect_query,
    figure,
    no_exception,
    query,
    wait_for_title,
)
from playwright.sync_api import expect  # noqa: E402

CELL = """(e, [row, position]) => {
const t = e._fullData[e._fullData.length - 1], i = t.customdata.findIndex((p, n) => p === position && t.y[n] === row);
const box = e.getBoundingClientRect(), {xaxis, yaxis} = e._fullLayout;
return [box.x + xaxis._offset + xaxis.d2p(t.x[i]), box.y + yaxis._offset + yaxis.d2p(t.y[i])]; }"""


def test_the_lens_shows_every_layer_and_a_click_selects_a_position(open_page, model):
    page = open_page(model=PACKAGED, prompt=PROMPT)
    tokens = model.to_tokens(PROMPT)
    with torch.no_grad():
        own = model(tokens)[:, -1:].argmax(-1)
    lens = logit_lens(model, tokens, incl_mid=True, targets=torch.cat([tokens[:, 1:], own], 1), top_k=1)
    expect_heat(page, "logit_lens", lens.target_probabilities[:, 0])
    expect(figure(page, "logit_lens")).to_contain_text("attention 4")
    page.get_by_role("radio", name="KL to the end").click()
    expect_query(page, lens_of="KL+to+the+end")
    expect_heat(page, "logit_lens", lens.kl[:, 0])
    graph = figure(page, "logit_lens")
    graph.scroll_into_view_if_needed()
    x, y = graph.evaluate(CELL, [8, 4])
    page.mouse.move(x - 3, y - 3)
    page.mouse.move(x, y)
    page.mouse.click(x, y)
    expect_query(page, position="4")
    expect(page.get_by_text("Next token after “gripping” (4)")).to_be_visible()
    no_exception(page)


def test_attribution_compares_two_tokens_and_its_link_shows_the_same(open_page, model):
    page = open_page(model=PACKAGED, prompt=PROMPT, position="4", inside="logit attribution")
    tokens = model.to_tokens(PROMPT)[:, :5]
    with torch.no_grad():
        first, second = model(tokens)[0, -1].topk(2).indices.tolist()
    names = [model.to_string([i]) for i in (first, second)]
    wait_for_title(page, "contributions", f"Which parts speak for “{names[0]}” against “{names[1]}”")
    for label, word in (("Token", "Bob"), ("Against", "Alice")):
        box = page.get_by_label(label, exact=True)
        box.fill(word)
        box.press("Enter")
    wait_for_title(page, "contributions", "Which parts speak for “Bob” against “Alice”")
    found = direct_logit_attribution(model, tokens, "Bob", "Alice")
    expect_heat(page, "attribution_map", found.by_layer(8)[..., 0, 0], atol=1e-4)

    def check() -> None:
        held = figure(page, "contributions").evaluate("e => e._fullData.flatMap(t => Array.from(t.x))")
        assert sum(held) == pytest.approx(float(found.logits), abs=1e-4)
        biggest = max(held, key=abs)
        assert biggest == pytest.approx(float(found.values.flatten()[found.values.abs().argmax()]), abs=1e-4)

    eventually(page, check)
    expect_query(page, target="Bob", against="Alice")
    again = open_page("", fresh=True, **query(page))
    wait_for_title(again, "contributions", "Which parts speak for “Bob” against “Alice”")
    page.get_by_label("Against", exact=True).fill("two words")
    page.get_by_label("Against", exact=True).press("Enter")
    expect(page.get_by_test_id("stAlert")).to_contain_text("'two words' is 2 tokens, not one")
    no_exception(page)


def test_memory_by_length_and_a_window_of_long_prompts(open_page, model):
    page = open_page(model=PACKAGED, inside="memory", prompt=" ".join([PROMPT] * 20))
    wait_for_title(page, "memory_by_length", "Memory by length")
    kv = kv_cache_bytes_per_token(model.config, model.dtype)
    eventually(page, lambda: _same(cells(page, "memory", 1)[-1:], [readable_bytes(kv * 2**18)]))
    page.get_by_role("radio", name="logit lens").click()
    expect(figure(page, "logit_lens")).to_contain_text(re.compile("80 of 241 positions"))
    slider = page.get_by_role("slider", name="First position")
    slider.press("ArrowLeft")
    expect_query(page, lens_from="160")
    shown, held = figure(page, "logit_lens"), "e => Array.from(e._fullData?.[0]?.x ?? [])"  # none while drawn anew
    eventually(page, lambda: _same(shown.evaluate(held), list(np.arange(160, 240))))
    no_exception(page)


def _same(found, wanted) -> None:
    assert found == wanted
