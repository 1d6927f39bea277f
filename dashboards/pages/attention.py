"""Attention: every head small with its scores, one large, and who looks at whom; beside Mamba, and on two prompts."""

from __future__ import annotations

from functools import partial

import numpy as np
import streamlit as st

from jambascope.dashboards import session, widgets, work
from jambascope.dashboards.results import attention as results
from jambascope.dashboards.results.attention import DIFFERENCE, MAMBA, ONE_HEAD, Extent
from jambascope.dashboards.session import View
from jambascope.hooks.hidden_attention import FORMS
from jambascope.studies.figures import attention as figures
from jambascope.studies.figures import looks
from jambascope.studies.figures.theme import MAX_NAMED_TOKENS, signed_limit

WHOLE, WINDOW = "whole prompt", "window"
STRONGEST, NONE = "strongest", "none"
BADGES = {STRONGEST: None, **{word: kind for kind, word in results.KIND_WORDS.items()}}
FORM_HELP = (
    "alpha: the state alone, from what enters it. alpha+D: with the path past the state. conv: from before the "
    "convolution. gate: to after the gate, which is what the layer writes."
)
LIST_HEIGHT, LIST_LENGTH = 330, 8


def page(view: View) -> None:
    st.title("Attention")
    config = view.model.config
    if not config.attention_layers:
        st.info(
            "This model has no attention layers: its mixers are all Mamba. Below is their hidden attention, the "
            "matrices that they implicitly multiply by; what they remember is on the SSM state page.",
            icon=":material/info:",
        )
        _beside_mamba(view, None, widgets.choose_position(view, "The query that is followed."))
        return
    left, middle, third, right = st.columns([2, 2, 5, 6], gap="medium")
    with left:
        layer = widgets.choose_layer(config.attention_layers, "attention_layer", "Layer")
    with middle:
        head = widgets.choose_layer(tuple(range(config.n_heads)), "head", "Head")
    with third:
        shown = widgets.choose("View", (ONE_HEAD, MAMBA, DIFFERENCE), "attention_view")
    with right:
        position = widgets.choose_position(view, "The token that is followed: what it looks at, and who looks at it.")
    if shown == DIFFERENCE:
        _difference(view, layer, head, position)
        return
    if shown == MAMBA:
        _beside_mamba(view, (layer, head), position)
        return
    _one_head(view, layer, head, position)


# -- one head --------------------------------------------------------------------------------------------------


def _one_head(view: View, layer: int, head: int, position: int) -> None:
    left, right = st.columns([3, 2], gap="medium")
    with left:
        badge = widgets.choose(
            "Scores in the corners",
            (*BADGES, NONE),
            "head_score",
            "Of each head on this prompt: the share of its attention that goes where a head of that kind looks, from "
            "the tokens that have such a place. Strongest: the highest of the three.",
        )
    with right:
        stretched = widgets.choose_scale(
            "Of the large pattern. Stretched: it ends at the largest weight of queries with 8 keys or more."
        )
    corners, notes = ({}, {}) if badge == NONE else results.badges(view, BADGES[badge])
    if badge != NONE and not corners:
        st.caption("No token comes twice in this prompt, so that there is nothing for such a head to look at.")
    _grid(view, layer, head, corners, notes)
    pattern = results.pattern(view, layer, head)
    left, right = st.columns([7, 4], gap="medium")
    with left:
        extent = _extent(view)
        limit = figures.stretched_limit(pattern) if stretched else 1.0
        _large(view, _part(pattern, extent), figures.of_head(layer, head), extent, position, limit, "head_pattern")
    with right:
        _follow(pattern, view.texts, position)
    kinds = tuple(results.scores(view))
    widgets.code(view, results.code_of_head(layer, head, position, kinds))


def _grid(view: View, layer: int, head: int, badges: dict, notes: dict) -> None:
    grid = figures.head_grid(results.grid(view), (layer, head), badges, notes)
    widgets.show(grid, "head_grid", on_select=_take_click, selection_mode="points")
    config = view.model.config
    if config.n_key_value_heads < config.n_heads:
        shared = config.n_heads // config.n_key_value_heads
        st.caption(f"Heads share keys and values in groups of {shared}: head {head} reads pair {head // shared}.")


def _take_click() -> None:
    points = st.session_state.head_grid.selection.points
    if points:
        st.session_state.attention_layer, st.session_state.head = points[0]["customdata"]


def _follow(pattern: np.ndarray, texts: tuple[str, ...], position: int) -> None:
    """What a token looks at and who looks at it; a click on a bar follows that token."""
    sizes = {"top": LIST_LENGTH, "height": LIST_HEIGHT}
    for key, fig in (
        ("attended_keys", looks.attended_keys(pattern[position], texts, position, **sizes)),
        ("attending_queries", looks.attending_queries(pattern[:, position], texts, position, **sizes)),
    ):
        widgets.show(fig, key, on_select=partial(_take_position, key), selection_mode="points")


def _take_position(key: str) -> None:
    points = st.session_state[key].selection.points
    if points:
        st.session_state.position = points[0]["customdata"]


# -- a pattern, whole or in part -------------------------------------------------------------------------------


def _extent(view: View) -> Extent:
    """All of a short prompt; of a long one what is chosen here."""
    length, span = len(view.ids), MAX_NAMED_TOKENS
    if length <= span:
        return results.everything(length)
    choice = widgets.choose(
        f"Above {span} tokens a pattern is shown whole in blocks of tokens, or token by token in a window",
        (WHOLE, WINDOW),
        "extent",
    )
    if choice == WHOLE:
        return results.everything(length)
    latest = length - span
    widgets.keep_within("first_query", 0, latest)
    widgets.keep_within("first_key", 0, latest)
    left, right = st.columns(2)
    q = left.slider("First query", 0, latest, latest, key="first_query", bind="query-params")
    k = right.slider("First key", 0, latest, latest, key="first_key", bind="query-params")
    return Extent(False, q, k, span)


def _part(pattern: np.ndarray, extent: Extent, signed: bool = False) -> np.ndarray:
    if extent.pooled:
        return (figures.pool_signed if signed else figures.pool)(pattern, figures.LARGE_CELLS)
    q, k, span = extent.first_query, extent.first_key, extent.span
    return pattern[q : q + span, k : k + span]


def _large(
    view: View,
    part: np.ndarray,
    shown: figures.Shown,
    extent: Extent,
    position: int,
    limit: float,
    key: str,
    texts: tuple[str, ...] | None = None,
    room: int = 40,
) -> None:
    """The pattern in large; where tokens are named, a click follows one of them."""
    texts = view.texts if texts is None else texts
    if extent.pooled:
        widgets.show(figures.pooled(part, shown, texts, limit), key)
        return
    q, k, span = extent.first_query, extent.first_key, extent.span
    fig = figures.token_pattern(
        part, shown, texts[q : q + span], texts[k : k + span], q, k, position, limit, True, room
    )
    widgets.show(fig, key, on_select=partial(_take_position, key), selection_mode="points")
    st.caption("Click a weight to follow its query, or the empty half to follow the token of that column.")


# -- beside Mamba ----------------------------------------------------------------------------------------------


def _beside_mamba(view: View, head: tuple[int, int] | None, position: int) -> None:
    config = view.model.config
    if not config.ssm_layers:
        st.info("This model has no Mamba layers, so that nothing stands beside its attention.", icon=":material/info:")
        return
    left, middle, right = st.columns([2, 4, 5], gap="medium")
    with left:
        layer = widgets.choose_layer(config.ssm_layers, "mamba_layer", "Mamba layer")
    with middle:
        form = widgets.choose("Form of hidden attention", FORMS, "hidden_form", FORM_HELP)
    with right:
        stretched = widgets.choose_scale("Of both patterns. Stretched: they end at their own largest weights.")
    extent = _extent(view)
    left, right = st.columns(2, gap="medium") if head else (None, st.container())
    if head:
        with left:
            part = _part(results.pattern(view, *head), extent)
            limit = figures.stretched_limit(part) if stretched else 1.0
            _large(view, part, figures.of_head(*head), extent, position, limit, "head_pattern", room=24)
    with right:
        found = work.result(
            "hidden attention",
            (view.key, layer, form, extent),
            partial(results.hidden, view, layer, form, extent),
            start="Compute hidden attention",
            automatic=True,
        )
        if found is not None and found.value is not None:
            shown = figures.of_mixer(layer, config.mixers[layer], form)
            limit = figures.stretched_limit(found.value) if stretched else 1.0
            _large(view, found.value, shown, extent, position, limit, "hidden_pattern", room=24 if head else 40)
    rows, kinds = results.looks(view, position, form), dict(enumerate(config.mixers))
    widgets.show(figures.looks_by_layer(rows, kinds, view.texts, position), "looks_by_layer")
    st.caption(f"Attention layers: the mean over heads. Mamba layers: the mean of |weight| over channels, form {form}.")
    widgets.code(view, results.code_of_mixer(layer, form, position))


# -- two prompts -----------------------------------------------------------------------------------------------


def _difference(view: View, layer: int, head: int, position: int) -> None:
    other_prompt = st.text_area(
        "Second prompt, of as many tokens",
        key="other_prompt",
        bind="query-params",
        height=90,
        placeholder="the prompt again, with a word or two replaced",
        help="Shown is its attention less that of the prompt in the sidebar. Ctrl+Enter runs it.",
    )
    if not other_prompt.strip():
        st.caption("Write a second prompt to see how attention differs: the first with another word, for example.")
        return
    other = session.view(view.address, other_prompt)
    found = results.difference(view, other, layer, head)
    badges = {i: [("variation", float(v)) for v in values] for i, values in found.variation.items()}
    notes = {
        i: [f"total variation between the prompts {v:.3f}, mean over queries" for v in values]
        for i, values in found.variation.items()
    }
    _grid(view, layer, head, badges, notes)
    st.caption(
        "Small: the first prompt; in the corners how much of a query's attention moves in the second, on average."
    )
    texts = tuple(a if a == b else f"{a}→{b}" for a, b in zip(view.texts, other.texts, strict=True))
    left, right = st.columns([7, 4], gap="medium")
    with left:
        extent, shown = _extent(view), figures.of_difference(layer, head)
        limit = signed_limit(found.pattern, 1.0)
        _large(view, _part(found.pattern, extent, True), shown, extent, position, limit, "head_pattern", texts)
    with right:
        fig = looks.attention_changes(found.pattern[position], texts, position)
        widgets.show(fig, "attention_changes", on_select=partial(_take_position, "attention_changes"))
    widgets.code(view, results.code_of_difference(layer, head, other_prompt))
