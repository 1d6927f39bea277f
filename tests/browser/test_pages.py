"""Each page in a real headless Chromium: type a prompt, look at what appears."""

from __future__ import annotations

import re
from urllib.parse import urlparse

import numpy as np
import pytest
import torch

from jambascope.hooks import predictions, routing

pytest.importorskip("playwright")
from browser_tools import (  # noqa: E402
    OTHER,
    PACKAGED,
    PROMPT,
    axis_names,
    cells,
    choose,
    expect_heat,
    expect_numbers,
    expect_query,
    figure,
    heat,
    no_exception,
    query,
    type_prompt,
    wait_for_title,
    words,
)
from playwright.sync_api import expect  # noqa: E402

TITLES = ("Overview", "Attention", "SSM state", "Router", "Induction", "Format following", "Patching", "Runs")


def test_a_link_to_a_page_as_the_first_request_of_a_server(open_page):
    """Stands first in this file, so that the server has heard nothing before."""
    page = open_page("ssm_state", prompt="5 17 3", position="1", mamba_layer="2")
    expect(page.get_by_role("heading", name="SSM state", exact=True)).to_be_visible()
    expect(page.get_by_text("Position 1, token “17”")).to_be_visible()
    wait_for_title(page, "group_norms", "State size over time, layer 2")
    expect(page.get_by_test_id("stSidebarNavLink")).to_have_text([re.compile(title) for title in TITLES])
    no_exception(page)


def test_the_first_page_opens_by_its_name_and_what_a_link_sets_stays_when_pages_are_turned(open_page):
    page = open_page("overview", model=PACKAGED, prompt=PROMPT, position="2", inside="memory")
    expect(page.get_by_role("heading", name="Overview", exact=True)).to_be_visible()
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.get_by_test_id("stSidebarNavLink")).to_have_count(len(TITLES))
    for title in ("Attention", "SSM state", "Overview"):
        page.get_by_test_id("stSidebarNavLink").filter(has_text=title).click()
        expect(page.get_by_role("heading", name=title, exact=True)).to_be_visible()
        expect(page.get_by_label("Prompt", exact=True)).to_have_value(PROMPT)
        expect_query(page, model=PACKAGED, prompt=PROMPT.replace(" ", "+"), position="2")
    expect(page.get_by_role("radio", name="memory")).to_be_checked()
    no_exception(page)


def test_overview_shows_layers_tokens_and_what_comes_next(open_page, model):
    page = open_page(model=PACKAGED)
    type_prompt(page, PROMPT)
    names = [f"{t} {i}" for i, t in enumerate(words(model, PROMPT))]
    expect(figure(page, "expectation")).to_contain_text(names[5])
    assert axis_names(page, "expectation")[1:] == names[1:]
    wait_for_title(page, "anatomy", "Layers")
    expect(figure(page, "anatomy")).to_contain_text("mixture of experts")
    with torch.no_grad():
        logits = model(PROMPT)[0, -1]
    expected = predictions.next_tokens(model, logits, k=10)
    expect_numbers(page, "next_tokens", 3, [row.probability for row in expected])
    expect_numbers(page, "next_tokens", 4, [row.logit for row in expected])
    assert cells(page, "next_tokens", 1) == [row.text for row in expected]
    expect(page.get_by_text(f"Entropy {predictions.entropy(logits):.3f} nats")).to_be_visible()
    assert query(page)["prompt"] == PROMPT
    no_exception(page)

    no_exception(page)


def test_a_link_opened_elsewhere_shows_the_same(open_page, server):
    page = open_page("attention", model=PACKAGED)
    type_prompt(page, PROMPT)
    expect(figure(page, "head_pattern")).to_contain_text("gripping 4")
    choose(page, "Head", "3")
    page.get_by_role("slider").press("ArrowLeft")
    expect_query(page, head="3", position="11")
    title = re.compile(r"Where “Bob” \(11\) looks")
    expect(figure(page, "attended_keys").locator(".gtitle").first).to_have_text(title)
    address = urlparse(page.url)
    again = open_page(address.path.lstrip("/"), fresh=True, **query(page))
    expect(figure(again, "attended_keys").locator(".gtitle").first).to_have_text(title)
    wait_for_title(again, "head_pattern", figure(page, "head_pattern").locator(".gtitle").text_content())
    expect(again.get_by_label("Prompt", exact=True)).to_have_value(PROMPT)
    expect_heat(again, "head_pattern", np.nan_to_num(heat(page, "head_pattern")))
    no_exception(again)


def test_two_people_at_once_see_their_own_results(open_page, model):
    first, second = (open_page("router", fresh=True, model=PACKAGED) for _ in range(2))
    type_prompt(first, PROMPT)
    type_prompt(second, OTHER)
    layer = model.config.moe_layers[0]
    for page, prompt, word in ((first, PROMPT, "gripping 4"), (second, OTHER, "whale 1")):
        expect(figure(page, "token_routes")).to_contain_text(word)
        route = routing.capture_routing(model, model.to_tokens(prompt))[layer]
        expect_heat(page, "token_routes", routing.kept_weights(route).T)
        no_exception(page)


def test_a_checkpoint_directory_opens_and_the_prompt_stays_from_page_to_page(open_page):
    """A directory saved by transformers, without a tokenizer: a prompt is token ids."""
    page = open_page()
    type_prompt(page, "5 17 3")
    expect(figure(page, "expectation")).to_contain_text("17 1")
    expect_numbers(page, "tokens", 2, [5, 17, 3])
    for title, key in zip(TITLES[1:4], ("head_pattern", "layer_norms", "token_routes"), strict=True):
        page.get_by_test_id("stSidebarNavLink").filter(has_text=title).click()
        expect(page.get_by_role("heading", name=title, exact=True)).to_be_visible()
        expect(figure(page, key)).to_contain_text("17 1")
        expect(page.get_by_label("Prompt", exact=True)).to_have_value("5 17 3")
        assert query(page)["prompt"] == "5 17 3"
        no_exception(page)


def test_mistakes_are_told_in_one_line(open_page):
    page = open_page("ssm_state")
    for prompt, message in {
        "the plot": "this checkpoint has no tokenizer, so a prompt is token ids such as '5 17 3'",
        "5 999": "token id 999 is outside the vocabulary; ids run from 0 to 49",
        " ": "the prompt is empty",
        "5 " * 5000: "the prompt has 5,000 tokens; the pages take at most 4,096",
    }.items():
        type_prompt(page, prompt)
        expect(page.get_by_test_id("stAlert")).to_contain_text(message)
        no_exception(page)


def test_unknown_words_are_named(open_page):
    page = open_page("router", model=PACKAGED)
    type_prompt(page, "the flumph was gripping")
    expect(page.get_by_test_id("stAlert")).to_contain_text("1 word is not in this model's vocabulary")
    expect(figure(page, "token_routes")).to_contain_text("<unk> 2")
    no_exception(page)


def test_one_token_and_long_prompts(open_page):
    page = open_page("attention", prompt="5")
    expect(page.get_by_text("the prompt's only token")).to_be_visible()
    wait_for_title(page, "attended_keys", "Where “5” (0) looks")
    no_exception(page)
    type_prompt(page, " ".join(str(i % 50) for i in range(600)))
    for title, key in zip(TITLES[:4], ("expectation", "head_pattern", "layer_norms", "token_routes"), strict=True):
        page.get_by_test_id("stSidebarNavLink").filter(has_text=title).click()
        expect(page.get_by_role("heading", name=title, exact=True)).to_be_visible()
        expect(page.get_by_text("Position 599, token")).to_be_visible()
        expect(figure(page, key)).to_contain_text(re.compile("position \\(tokens\\)"))
        no_exception(page)
