"""SSM state in a real browser: sizes, channels, one channel over time, where a write survives, and changed states."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jambascope.hooks import predictions, run, ssm
from jambascope.hooks.memory_edits import memory_edits

pytest.importorskip("playwright")
from browser_tools import (  # noqa: E402
    PACKAGED,
    PROMPT,
    choose,
    eventually,
    expect_heat,
    expect_query,
    figure,
    no_exception,
    query,
    type_prompt,
    wait_for_title,
)
from playwright.sync_api import Page, expect  # noqa: E402

LAST = 12


def line(page: Page, key: str, trace: int) -> np.ndarray:
    """The heights of a line or of bars, as the browser holds them."""
    held = f"Array.from(e._fullData?.[{trace}]?.y ?? [], v => v ?? null)"
    return np.array(figure(page, key).evaluate(f"e => {held}"), dtype=float)


def expect_line(page: Page, key: str, trace: int, wanted, **tolerance: float) -> None:
    eventually(page, lambda: np.testing.assert_allclose(line(page, key, trace), np.asarray(wanted), **tolerance))


def click(page: Page, key: str, x: float, y: float) -> None:
    """A click on a cell of a map, given in its own coordinates."""
    plot = figure(page, key)
    plot.scroll_into_view_if_needed()
    at = plot.evaluate(
        """(e, [x, y]) => { const box = e.getBoundingClientRect(), {xaxis, yaxis} = e._fullLayout;
        return [box.x + xaxis._offset + xaxis.d2p(x), box.y + yaxis._offset + yaxis.d2p(y)]; }""",
        [x, y],
    )
    page.mouse.move(at[0] - 3, at[1] - 3)
    page.mouse.move(*at)
    page.mouse.click(*at)


def test_sizes_and_what_is_left_follow_layer_and_position(open_page, model):
    page = open_page("ssm_state", model=PACKAGED)
    type_prompt(page, PROMPT)
    expect(figure(page, "layer_norms")).to_contain_text("gripping 4")
    tokens = model.to_tokens(PROMPT)
    norms = ssm.state_norms(model, tokens)
    expect_heat(page, "layer_norms", torch.stack(list(norms.values())))
    choose(page, "Layer", "2")
    wait_for_title(page, "group_norms", "State size over time, layer 2")
    click(page, "layer_norms", 5, list(norms).index(3))
    expect_query(page, mamba_layer="3", position="5")
    wait_for_title(page, "survival", "Where the write of “.” (5) survives")
    captured = ssm.capture_states(model, tokens, 3)
    groups = ssm.channel_groups(ssm.half_life(captured.A, captured.dt))
    expect_line(page, "survival", 7, ssm.group_survival(captured.A, captured.dt, 5, groups)[7], rtol=1e-4)
    expect_line(page, "retention", 0, ssm.group_retention(captured.A, captured.dt, 5, groups)[0], rtol=1e-4)
    no_exception(page)


def test_a_channel_is_chosen_by_number_or_by_a_click(open_page, model):
    page = open_page("ssm_state", model=PACKAGED, prompt=PROMPT, mamba_layer="2", position="11", state_part="channels")
    captured = ssm.capture_states(model, model.to_tokens(PROMPT), 2)
    half_lives = ssm.half_life(captured.A, captured.dt)
    order = torch.cat(ssm.channel_groups(half_lives))
    expect_heat(page, "half_lives", half_lives[order].T.log10(), atol=1e-3)
    expect_heat(page, "state_matrices", captured.states[order, 11].T)
    expect(figure(page, "state_matrices")).to_contain_text("the final state")
    box = page.get_by_label("Channel", exact=True)
    box.fill("9")
    box.press("Enter")
    wait_for_title(page, "channel_over_time", "Channel 9 of layer 2: its 16 states over time")
    fastest = int(half_lives[9].argmin())
    expect_line(page, "channel_over_time", 0, captured.states[9, :, fastest], rtol=1e-3, atol=1e-6)
    expect_line(page, "channel_over_time", 16, captured.dt[:, 9], rtol=1e-3)
    for key, rank in (("half_lives", 40), ("state_matrices", 90)):
        click(page, key, rank, 3)
        expect_query(page, channel=str(int(order[rank])))
        wait_for_title(page, "channel_over_time", f"Channel {int(order[rank])} of layer 2: its 16 states over time")
    no_exception(page)


def test_erasing_and_pinning_states_changes_what_comes_next(open_page, model):
    link = {"model": PACKAGED, "prompt": PROMPT, "position": "4", "read": "4", "state_part": "what if"}
    page = open_page("ssm_state", **link)
    tokens = model.to_tokens(PROMPT)
    with torch.no_grad():
        before = run(model, tokens).logits[0]

    def expect_change(read: int, *arguments, **options) -> None:
        edits = memory_edits(model, tokens, *arguments, **options)
        with torch.no_grad():
            after = run(model, tokens, edits).logits[0]
        kl = predictions.divergence(before, after)
        expect_line(page, "change_over_prompt", 2, kl[:-1], rtol=1e-3, atol=1e-6)
        wanted = [c.after for c in predictions.changed_tokens(model, before[read], after[read])]
        bars = "e => Array.from(e._fullData?.[1]?.x ?? [])"
        found = lambda: figure(page, "next_tokens_compared").evaluate(bars)  # noqa: E731
        eventually(page, lambda: np.testing.assert_allclose(found(), wanted, rtol=1e-3, atol=1e-6))
        expect(page.get_by_text(f"{float(kl[read]):.3g} nats", exact=True)).to_be_visible()

    expect_change(4, [0], 4)
    page.get_by_role("radio", name="all Mamba layers").click()
    page.get_by_text("Convolution too").click()
    expect_change(4, None, 4, conv=True)
    page.get_by_role("radio", name="pin to another position").click()
    page.get_by_role("slider", name="Taken from position 12").press("ArrowLeft")
    choose(page, "Channel group", "8")
    expect_change(4, None, 4, source=11, conv=True, group=7)
    page.get_by_role("radio", name="one read-out").click()
    expect_change(4, None, 4, source=11, lasting=False, group=7)
    expect_query(page, state_source="11", channel_group="8", read="4")
    again = open_page("ssm_state", fresh=True, **query(page))
    wait_for_title(again, "next_tokens_compared", "Next token after “gripping” (4)")
    expect(again.get_by_role("radio", name="one read-out")).to_be_checked()
    wanted = line(page, "change_over_prompt", 2)
    expect_line(again, "change_over_prompt", 2, wanted)
    no_exception(again)
