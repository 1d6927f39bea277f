"""The Induction page in a real Chromium: scores, one head, and heads taken away with progress and a stop button."""

from __future__ import annotations

import pytest
import torch

from jambascope.hooks.copying import ov_copying
from jambascope.hooks.heads import repeated_random_tokens, score_heads
from jambascope.hooks.repetition import ablate_repetition

pytest.importorskip("playwright")
from browser_tools import (  # noqa: E402
    OTHER,
    PACKAGED,
    PROMPT,
    cells,
    click_point,
    eventually,
    expect_heat,
    expect_numbers,
    expect_query,
    figure,
    no_exception,
    query,
    wait_for_title,
)
from playwright.sync_api import expect  # noqa: E402

FEW = {"random_length": "10", "random_sequences": "8"}


@pytest.fixture(scope="module")
def tokens(model) -> torch.Tensor:
    return repeated_random_tokens(model, 8, 10)


def test_heads_are_scored_ranked_and_shown(open_page, model, tokens):
    page = open_page("induction", model=PACKAGED, prompt=OTHER, **FEW)
    scores = score_heads(model, tokens)
    induction = scores["induction"].mean
    expect_heat(page, "score_map", induction)
    order = induction[0].argsort(descending=True, stable=True).tolist()
    expect_numbers(page, "head_scores", 2, order)
    expect_numbers(page, "head_scores", 3, induction[0, order].tolist())
    first = order[0]
    wait_for_title(page, "random_pattern", f"Layer 4, head {first}, on the first of the random sequences")
    last = order[-1]
    click_point(page, "score_map", 3, last)
    wait_for_title(page, "random_pattern", f"Layer 4, head {last}, on the first of the random sequences")
    name = "blocks.4.attn.hook_pattern"
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens[:1], names_filter=name)
    expect_heat(page, "random_pattern", cache[name][0, last])
    page.get_by_role("radio", name="copying (OV)", exact=True).click()
    expect_heat(page, "score_map", ov_copying(model).score)
    expect_query(page, induction_head=f"L4+H{last}")
    assert query(page)["induction_score"] == "copying (OV)"
    again = open_page("induction", fresh=True, **query(page))
    expect_heat(again, "score_map", ov_copying(model).score)
    wait_for_title(again, "random_pattern", f"Layer 4, head {last}, on the first of the random sequences")
    no_exception(again)


def test_scores_on_the_prompt(open_page, model):
    page = open_page("induction", model=PACKAGED, prompt=OTHER, scored_on="this prompt", **FEW)
    expect_heat(page, "score_map", score_heads(model, OTHER, control=False)["induction"].mean)
    no_exception(page)
    page = open_page("induction", model=PACKAGED, prompt="the plot was", scored_on="this prompt", **FEW)
    expect(page.get_by_text("There is no induction score: in this prompt no token has such a place")).to_be_visible()
    no_exception(page)


def test_heads_are_taken_away_on_request(open_page, model, tokens):
    page = open_page("induction", model=PACKAGED, prompt=PROMPT, **FEW)
    page.get_by_role("button", name="Take them away").click()
    wait_for_title(page, "ablation_loss", "Change of loss without the heads")
    best = int(score_heads(model, tokens)["induction"].mean[0].argmax())
    fresh = repeated_random_tokens(model, 16, 10)[8:]
    found = ablate_repetition(model, [(4, best)], tokens, fresh)
    rows = [row["mean"] for one in found.values() for row in one.rows()]
    names = ["on the repetition", "before it (control)", "accuracy on the repetition"]
    fields = {"loss_before": "before it (control)", "loss": "on the repetition", "accuracy": names[2]}
    eventually(page, lambda: _equal(cells(page, "ablation_rows", 0), [fields[f] for f in found for _ in range(4)]))
    expect_numbers(page, "ablation_rows", 2, rows)
    expect(page.get_by_text("against 3 random sets")).to_have_count(1)
    no_exception(page)


def _equal(found: list, wanted: list) -> None:
    assert found == wanted


def test_a_long_ablation_can_be_stopped(open_page):
    page = open_page("induction", model=PACKAGED, prompt=PROMPT, random_length="200", random_sequences="128")
    stop = page.get_by_role("button", name="Stop")
    expect(stop.first).to_be_visible()
    stop.first.click()
    expect(page.get_by_text("Stopped at")).to_be_visible(timeout=60_000)
    expect(page.get_by_role("button", name="Score heads", exact=True)).to_be_visible()
    no_exception(page)


def test_a_checkpoint_of_many_sizes_opens(open_page, bare_checkpoint):
    page = open_page("induction", prompt="5 17 3 5 17", ablate_count="2")
    expect(figure(page, "score_map")).to_contain_text("head (index)")
    expect(page.get_by_text("First by induction: layer 4 head")).to_be_visible()
    no_exception(page)
