"""Attention: every head small, one head large, and where one query looks."""

from __future__ import annotations

import streamlit as st

from jambascope.dashboards import widgets
from jambascope.dashboards.results import attention as results
from jambascope.dashboards.session import View
from jambascope.studies.figures.attention import (
    LARGE_CELLS,
    attended_keys,
    head_grid,
    head_pattern,
    pool,
    pooled_pattern,
    stretched_limit,
)
from jambascope.studies.figures.theme import MAX_NAMED_TOKENS

WHOLE, WINDOW = "whole prompt", "window"


def page(view: View) -> None:
    st.title("Attention")
    config = view.model.config
    if not config.attention_layers:
        st.info(
            "This model has no attention layers: its mixers are all Mamba. Their memory is on the SSM state page, and "
            "the Overview shows the layers.",
            icon=":material/info:",
        )
        return
    left, middle, third, right = st.columns([2, 2, 3, 6], gap="medium")
    with left:
        layer = widgets.choose_layer(config.attention_layers, "attention_layer", "Layer")
    with middle:
        head = widgets.choose_layer(tuple(range(config.n_heads)), "head", "Head")
    with third:
        stretched = widgets.choose_scale(
            "Of the large pattern. Stretched: it ends at the largest weight of queries with 8 keys or more."
        )
    with right:
        position = widgets.choose_position(view, "The query whose keys are listed beside the pattern.")
    result = results.attend(view, layer, head)
    grid = head_grid(result.grid, (layer, head))
    widgets.show(grid, "head_grid", on_select=_take_click, selection_mode="points")
    if config.n_key_value_heads < config.n_heads:
        shared = config.n_heads // config.n_key_value_heads
        st.caption(f"Heads share keys and values in groups of {shared}: head {head} reads pair {head // shared}.")
    left, right = st.columns([7, 4], gap="medium")
    with left:
        limit = stretched_limit(result.pattern) if stretched else 1.0
        _large(view, result, layer, head, position, limit)
    with right:
        widgets.show(attended_keys(result.pattern[position], view.texts, position), "attended_keys")


def _take_click() -> None:
    points = st.session_state.head_grid.selection.points
    if points:
        st.session_state.attention_layer, st.session_state.head = points[0]["customdata"]


def _large(view: View, result: results.Attention, layer: int, head: int, position: int, limit: float) -> None:
    length = len(view.ids)
    if length <= MAX_NAMED_TOKENS:
        fig = head_pattern(result.pattern, view.texts, view.texts, layer, head, position=position, limit=limit)
        widgets.show(fig, "head_pattern")
        return
    choice = st.segmented_control(
        f"Above {MAX_NAMED_TOKENS} tokens a pattern is shown whole in blocks of tokens, or token by token in a window",
        (WHOLE, WINDOW),
        default=WHOLE,
        required=True,
        key="extent",
        bind="query-params",
    )
    if choice == WHOLE:
        widgets.show(pooled_pattern(pool(result.pattern, LARGE_CELLS), view.texts, layer, head, limit), "head_pattern")
        return
    span = MAX_NAMED_TOKENS
    latest = length - span
    widgets.keep_within("first_query", 0, latest)
    widgets.keep_within("first_key", 0, latest)
    left, right = st.columns(2)
    q = left.slider("First query", 0, latest, latest, key="first_query", bind="query-params")
    k = right.slider("First key", 0, latest, latest, key="first_key", bind="query-params")
    window = result.pattern[q : q + span, k : k + span]
    queries, keys = view.texts[q : q + span], view.texts[k : k + span]
    widgets.show(head_pattern(window, queries, keys, layer, head, q, k, position, limit), "head_pattern")
