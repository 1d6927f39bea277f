"""The Attention page in a real Chromium: heads, tokens that are followed, Mamba beside attention, two prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jambascope.hooks.heads import score_heads
from jambascope.hooks.hidden_attention import attention_map
from jambascope.hooks.looks import looks_by_layer
from jambascope.hooks.mixer_terms import capture_terms

pytest.importorskip("playwright")
from browser_tools import (  # noqa: E402
    OTHER,
    PACKAGED,
    PROMPT,
    axis_names,
    choose,
    click_point,
    eventually,
    expect_heat,
    expect_query,
    figure,
    no_exception,
    query,
    type_prompt,
    wait_for_title,
    words,
)
from playwright.sync_api import Page, expect  # noqa: E402

LAYER = 4
CHANGED = PROMPT.replace("gripping", "dull")


@pytest.fixture(scope="module")
def patterns(model) -> dict[str, np.ndarray]:
    """Prompt -> [head, query, key] of its only attention layer."""
    name = f"blocks.{LAYER}.attn.hook_pattern"
    with torch.no_grad():
        caches = {p: model.run_with_cache(p, names_filter=name)[1] for p in (PROMPT, OTHER, CHANGED)}
    return {prompt: cache[name][0].float().numpy() for prompt, cache in caches.items()}


def bars(page: Page, key: str) -> list[float]:
    return figure(page, key).evaluate("e => Array.from(e._fullData?.[0]?.x ?? [])")


def badges(page: Page) -> list[str]:
    return figure(page, "head_grid").evaluate("e => Array.from(e._fullData?.[2]?.text ?? [])")


def test_attention_follows_prompt_selection_and_click(open_page, model, patterns):
    page = open_page("attention", model=PACKAGED)
    type_prompt(page, PROMPT)
    expect(figure(page, "head_pattern")).to_contain_text("gripping 4")
    assert axis_names(page, "head_pattern")[1:] == [f"{t} {i}" for i, t in enumerate(words(model, PROMPT))][1:]
    choose(page, "Head", "2")
    wait_for_title(page, "head_pattern", f"Layer {LAYER}, head 2")
    expect_query(page, head="2")
    expect_heat(page, "head_pattern", patterns[PROMPT][2])
    first_of_head_1 = 25 * 1 + 12
    click_point(page, "head_grid", 1, first_of_head_1)
    wait_for_title(page, "head_pattern", f"Layer {LAYER}, head 1")
    expect_query(page, head="1")
    no_exception(page)


def test_a_token_is_followed_by_clicks_on_weights_and_bars(open_page, patterns):
    page = open_page("attention", model=PACKAGED, prompt=PROMPT, head="1")
    length = patterns[PROMPT].shape[-1]
    wait_for_title(page, "attended_keys", f"Where “.” ({length - 1}) looks")
    click_point(page, "head_pattern", 1, 6 * length + 2)  # query 6 looks at key 2
    expect_query(page, position="6")
    wait_for_title(page, "attended_keys", "Where “Alice” (6) looks")
    wait_for_title(page, "attending_queries", "Who looks at “Alice” (6)")
    row, column = patterns[PROMPT][1][6], patterns[PROMPT][1][:, 6]
    eventually(page, lambda: np.testing.assert_allclose(bars(page, "attended_keys"), np.sort(row[:7])[::-1], rtol=1e-4))
    looking = np.sort(column[6:])[::-1][:8]
    eventually(page, lambda: np.testing.assert_allclose(bars(page, "attending_queries"), looking, rtol=1e-4))
    click_point(page, "attended_keys", 0, 0)
    expect_query(page, position=str(row.argmax()))
    click_point(page, "head_pattern", 1, 3 * length + 8)  # key 8 comes after query 3
    expect_query(page, position="8")
    no_exception(page)


def test_scores_stand_in_the_corners(open_page, model):
    page = open_page("attention", model=PACKAGED, prompt=OTHER)
    scores = score_heads(model, OTHER, control=False)
    for option, kind in (("previous token", "previous_token"), ("induction", "induction")):
        page.get_by_role("radio", name=option, exact=True).click()
        wanted = [f"{option}<br><b>{value:.2f}</b>" for value in scores[kind].mean[0].tolist()]
        eventually(page, lambda wanted=wanted: _equal(badges(page), wanted))
    expect_query(page, head_score="induction")
    type_prompt(page, "the plot was gripping")
    expect(page.get_by_text("No token comes twice in this prompt")).to_be_visible()
    page.get_by_role("radio", name="none", exact=True).click()
    eventually(page, lambda: _equal(badges(page), []))
    no_exception(page)


def _equal(found: list, wanted: list) -> None:
    assert found == wanted


def test_mamba_stands_beside_attention(open_page, model, patterns):
    page = open_page("attention", model=PACKAGED, prompt=PROMPT, attention_view="attention and Mamba", position="9")
    tokens = model.to_tokens(PROMPT)
    terms = capture_terms(model, tokens)
    expect_heat(page, "head_pattern", patterns[PROMPT][0])
    expect_heat(page, "hidden_pattern", attention_map(terms[0], range(tokens.shape[1]))[0])
    choose(page, "Mamba layer", "5")
    page.get_by_role("radio", name="gate", exact=True).click()
    expect_heat(page, "hidden_pattern", attention_map(terms[5], range(tokens.shape[1]), "gate")[0])
    rows = looks_by_layer(model, tokens, 9, "gate")
    wait_for_title(page, "looks_by_layer", "Where “book” (9) looks, layer by layer")
    expect_heat(page, "looks_by_layer", torch.stack(list(rows.values()))[:, :10])
    again = open_page("attention", fresh=True, **query(page))
    expect_heat(again, "hidden_pattern", attention_map(terms[5], range(tokens.shape[1]), "gate")[0])
    no_exception(again)


def test_two_prompts_are_compared_and_must_be_of_one_length(open_page, patterns):
    page = open_page("attention", model=PACKAGED, prompt=PROMPT, head="2")
    page.get_by_role("radio", name="difference", exact=True).click()
    box = page.get_by_role("textbox", name="Second prompt, of as many tokens")
    box.fill(OTHER)
    box.press("Control+Enter")
    expect(page.get_by_test_id("stAlert")).to_contain_text("the second prompt has 8 tokens and the first 13")
    box.fill(CHANGED)
    box.press("Control+Enter")
    difference = patterns[CHANGED] - patterns[PROMPT]
    expect_heat(page, "head_pattern", difference[2])
    expect(figure(page, "head_pattern")).to_contain_text("gripping→dull 4")
    moved = [f"variation<br><b>{v:.2f}</b>" for v in 0.5 * np.abs(difference).sum(-1).mean(-1)]
    eventually(page, lambda: _equal(badges(page), moved))
    expect_query(page, attention_view="difference")
    again = open_page("attention", fresh=True, **query(page))
    expect(again.get_by_role("textbox", name="Second prompt, of as many tokens")).to_have_value(CHANGED)
    expect_heat(again, "head_pattern", difference[2])
    no_exception(again)
