"""Router in a real browser: routes of the prompt, experts over a text, uploads, and experts that are changed."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from jambascope.hooks import predictions, routing, routing_dependence, routing_sets, run
from jambascope.hooks.interventions import AblateExperts, ForceRoute, hooks
from jambascope.studies.corpus import corpus, text_windows

pytest.importorskip("playwright")
from browser_tools import (  # noqa: E402
    PACKAGED,
    PROMPT,
    choose,
    eventually,
    expect_heat,
    expect_numbers,
    expect_query,
    figure,
    heat,
    no_exception,
    query,
    type_prompt,
    wait_for_title,
)
from playwright.sync_api import TimeoutError, expect  # noqa: E402


def test_the_experts_of_each_token(open_page, model):
    page = open_page("router", model=PACKAGED)
    type_prompt(page, PROMPT)
    expect(figure(page, "token_routes")).to_contain_text("gripping 4")
    choose(page, "Layer", "3")
    wait_for_title(page, "token_routes", "Experts by token, layer 3")
    expect_query(page, moe_layer="3")
    routes = routing.capture_routing(model, model.to_tokens(PROMPT))
    expect_heat(page, "token_routes", routing.kept_weights(routes[3]).T)
    loads = [routing.expert_load(r.indices, model.config.num_experts).numpy() for r in routes.values()]
    expect_heat(page, "expert_loads", 100 * np.stack(loads))
    bars, held = figure(page, "layer_load"), "e => Array.from(e._fullData?.[0]?.y ?? [])"  # none while drawn anew

    def check() -> None:
        assert bars.evaluate(held) == pytest.approx(100 * loads[1])

    eventually(page, check)
    expect_numbers(page, "balance", 2, [routing.summarize(r).max_violation for r in routes.values()])
    page.get_by_role("radio", name="all probabilities").click()
    expect(page).to_have_url(re.compile("weights=all"))
    expect_heat(page, "token_routes", routes[3].probabilities.T)
    no_exception(page)


def test_experts_over_the_packaged_language(open_page, model):
    page = open_page("router", model=PACKAGED, router_part="over a text", moe_layer="5", windows="2", least="4")
    texts = corpus(model, (), 2, 128, seed=0)
    route = routing.capture_routing(model, texts.tokens)[5]
    domains = routing_dependence.domain_specialization(route, texts.domains[route.prompts])
    expect_heat(page, "domain_layer", domains.share)
    pairs = routing_sets.coactivation(route)
    expect_heat(page, "coactivation_map", pairs.share.nan_to_num())
    page.get_by_role("radio", name="beyond independence").click()
    expect_heat(page, "coactivation_map", (pairs.share - pairs.expected).nan_to_num())
    found = routing_dependence.vocabulary_specialization(route, least=4)
    expect(page.get_by_text(f"Of {len(found.labels)} tokens that occur 4 times or more")).to_be_visible()
    page.get_by_role("radio", name="this prompt").last.click()
    expect(figure(page, "domain_layer")).to_have_count(0)
    no_exception(page)


def test_a_text_that_is_read_can_be_stopped(open_page):
    for windows in ("256", "255", "254"):
        page = open_page("router", model=PACKAGED, router_part="over a text", windows=windows)
        page.get_by_role("button", name="Stop", exact=True).click()
        try:
            page.get_by_text(re.compile("Stopped at")).wait_for(timeout=8000)
            break
        except TimeoutError:  # it was over before the click
            continue
    expect(page.get_by_text(re.compile("Stopped at"))).to_be_visible()
    expect(page.get_by_role("button", name="Read the text")).to_be_visible()
    no_exception(page)


def test_files_are_read_as_text_and_nothing_else(open_page, model):
    page = open_page("router", model=PACKAGED, router_part="over a text", router_text="text files", moe_layer="5")
    words = {"<i>1.txt": "the plot was dull . " * 40, "two.txt": "Alice gave the book to flumph . " * 30}
    files = [{"name": name, "mimeType": "text/plain", "buffer": text.encode()} for name, text in words.items()]
    upload = page.locator("input[type=file]")
    upload.set_input_files(files)
    expect(page.get_by_text("2 domains: <i>1.txt, two.txt.")).to_be_visible()
    rows = [text_windows(model, text, 16, 128) for text in words.values()]
    routes = [routing.capture_routing(model, part)[5] for part in rows]
    shares = [routing.chosen_experts(route).double().mean(0).numpy() for route in routes]
    expect_heat(page, "domain_layer", np.stack(shares))
    names = figure(page, "domain_layer").evaluate("e => e.layout.yaxis.ticktext")
    assert names == ["&lt;i&gt;1.txt", "two.txt"]
    assert "two.txt" not in page.url
    upload.set_input_files([{"name": "x.bin", "mimeType": "text/plain", "buffer": b"\xff\xfe\x00"}])
    expect(page.get_by_test_id("stAlert")).to_contain_text("'x.bin' is not UTF-8 text")
    no_exception(page)


def test_experts_that_are_off_and_routes_that_are_forced(open_page, model):
    link = {"model": PACKAGED, "prompt": PROMPT, "moe_layer": "3", "position": "6", "router_part": "what if"}
    page = open_page("router", **link)
    tokens = model.to_tokens(PROMPT)
    before, routes = run(model, tokens).logits[0].detach(), routing.capture_routing(model, tokens)

    def expect_change(edit) -> None:
        with torch.no_grad():
            after = run(model, tokens, edit).logits[0]
        with model.hooks(hooks(model, edit, *tokens.shape)):
            changed = routing.capture_routing(model, tokens)
        kept = torch.stack([routing_sets.overlap(routes[i], changed[i]) for i in routes])
        expect_heat(page, "route_changes", 1 - kept)
        bars = "e => Array.from(e._fullData?.[2]?.y ?? [])"
        kl = predictions.divergence(before, after)[:-1].numpy()
        found = lambda: figure(page, "change_over_prompt").evaluate(bars)  # noqa: E731
        eventually(page, lambda: np.testing.assert_allclose(found(), kl, rtol=1e-3, atol=1e-6))

    expect_change(AblateExperts(3, experts=0, form="masked"))
    page.get_by_role("radio", name="off, output zero").click()
    page.get_by_role("radio", name="all MoE layers").click()
    expect_change(AblateExperts(experts=0, form="zeroed"))
    page.get_by_role("radio", name="forced route").click()
    page.get_by_role("radio", name="the selected one").click()
    expect_change(ForceRoute(positions=6, indices=torch.tensor([0, 1])))
    expect_query(page, moe_layer="3", position="6")
    again = open_page("router", fresh=True, **query(page))
    expect(again.get_by_role("radio", name="forced route")).to_be_checked()
    expect_heat(again, "route_changes", np.nan_to_num(heat(page, "route_changes")))
    page.get_by_role("button", name=re.compile("Clear")).first.click()
    expect(page.get_by_text("Choose at least one expert.")).to_be_visible()
    no_exception(again)
