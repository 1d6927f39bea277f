"""SSM state: how much each Mamba layer holds, for how long, what stands in it, and what if it did not."""

from __future__ import annotations

from functools import partial

import numpy as np
import streamlit as st

from jambascope.dashboards import what_if, widgets
from jambascope.dashboards.results import ssm_state as results
from jambascope.dashboards.session import View
from jambascope.studies.figures import ssm as figures
from jambascope.studies.figures.theme import named

MEMORY, CHANNELS, WHAT_IF = "memory", "channels", "what if"
ERASE, PIN = "erase", "pin to another position"
ONE, EVERY = "this layer", "all Mamba layers"
LASTING, ONCE = "from there on", "one read-out"
ALL = "all"


def page(view: View) -> None:
    st.title("SSM state")
    config = view.model.config
    if not config.ssm_layers:
        st.info(
            "This model has no Mamba layers, so it keeps no SSM state: see the Attention page.", icon=":material/info:"
        )
        return
    left, middle, right = st.columns([2, 4, 7], gap="medium")
    with left:
        layer = widgets.choose_layer(config.ssm_layers, "mamba_layer", "Layer")
    with middle:
        part = widgets.choose("Show", (MEMORY, CHANNELS, WHAT_IF), "state_part")
    with right:
        position = widgets.choose_position(view, "The state after this token is shown, or changed.")
    {MEMORY: _memory, CHANNELS: _channels, WHAT_IF: _what_if}[part](view, layer, position)


def _memory(view: View, layer: int, position: int) -> None:
    fig = figures.layer_norms(results.norms(view), view.texts, layer, position)
    widgets.show(fig, "layer_norms", on_select=_take_cell, selection_mode="points")
    memory = results.remember(view, layer)
    _about_groups(view, memory, layer)
    lines = partial(figures.group_lines, half_lives=memory.bounds, tokens=view.texts, position=position)
    fig = lines(
        memory.norms,
        title=f"State size over time, layer {layer}",
        subtitle="one line per group of channels",
        unit="state RMS",
    )
    widgets.show(fig, "group_norms")
    fig = lines(
        results.retained(memory, position),
        title=f"What is left of earlier states after {named(view.texts[position], position)}",
        subtitle="mean over the group of exp(A · sum of Δ from each token to here)",
        unit="retention (share of 1)",
    )
    widgets.show(fig, "retention")
    if position < len(view.ids) - 1:
        fig = lines(
            results.surviving(memory, position),
            title=f"Where the write of {named(view.texts[position], position)} survives",
            subtitle="mean over the group of exp(A · sum of Δ from here to each later token): the share that is left",
            unit="left (share of 1)",
            start=position,
        )
        widgets.show(fig, "survival")
    else:
        st.caption("Nothing comes after the last token: choose an earlier one to see how long its write survives.")
    widgets.code(view, results.memory_code(layer, position))


def _about_groups(view: View, memory: results.Memory, layer: int) -> None:
    config = view.model.config
    st.caption(
        f"Channel groups: the {config.d_inner:,} channels of layer {layer}, sorted by their half-life (the median over "
        f"their {config.d_state} states) and split into {len(memory.groups)} groups of equal size. Half-life of an "
        "entry: ln 2 / (|A| · mean Δ) tokens, at the mean step size Δ over this prompt. "
        "Sizes are root mean squares: the Euclidean norm over the square root of the number of entries."
    )


def _take_cell() -> None:
    points = st.session_state.layer_norms.selection.points
    if points:
        st.session_state.mamba_layer, st.session_state.position = points[0]["customdata"]


def _channels(view: View, layer: int, position: int) -> None:
    memory = results.remember(view, layer)
    order = np.concatenate(memory.groups)
    edges = np.cumsum([len(members) for members in memory.groups])[:-1].tolist()
    channel = _choose_channel(len(order), memory)
    clicked = {"selection_mode": "points"}
    fig = figures.half_lives(memory.half_lives, order, edges, channel)
    widgets.show(fig, "half_lives", on_select=lambda: _take_channel("half_lives"), **clicked)
    fig = figures.channel_over_time(
        memory.states[channel], memory.half_lives[channel], memory.dt[:, channel], view.texts, channel, layer, position
    )
    widgets.show(fig, "channel_over_time")
    fig = figures.state_matrices(memory.states, order, view.texts, position, channel)
    widgets.show(fig, "state_matrices", on_select=lambda: _take_channel("state_matrices"), **clicked)
    widgets.code(view, results.channel_code(layer, position, channel))


def _choose_channel(count: int, memory: results.Memory) -> int:
    left, right = st.columns([2, 11], gap="medium", vertical_alignment="bottom")
    widgets.keep_within("channel", 0, count - 1)
    with left:
        channel = st.number_input("Channel", 0, count - 1, 0, key="channel", bind="query-params")
    with right:
        middle = figures.tokens_text(float(np.median(memory.half_lives[channel])))
        group = next(g for g, members in enumerate(memory.groups) if channel in members)
        st.caption(
            f"Half-life {middle} tokens (median of its states): group {group + 1} of {len(memory.groups)}, of which 1 "
            "forgets fastest. A click on either map takes the channel under it."
        )
    return channel


def _take_channel(key: str) -> None:
    points = st.session_state[key].selection.points
    if points:
        st.session_state.channel = points[0]["customdata"]


# -- what if --------------------------------------------------------------------------------------------------


def _what_if(view: View, layer: int, position: int) -> None:
    edit = _choose_edit(view, layer, position)
    read = what_if.choose_read(view)
    what_if.show(view, results.change(view, edit, read), read, position)
    widgets.code(view, results.what_if_code(edit, read))


def _choose_edit(view: View, layer: int, position: int) -> results.Edit:
    groups = len(results.remember(view, layer).groups)
    first, second, third, fourth, fifth = st.columns([4, 3, 3, 2, 2], gap="small", vertical_alignment="bottom")
    with first:
        done = widgets.choose("The state is to", (ERASE, PIN), "state_edit", "Erased: zero after the position above.")
    with second:
        where = widgets.choose("Of", (ONE, EVERY), "state_layers")
    with third:
        help = "From there on: the recurrence goes on from the changed state. One read-out: no later state changes."
        lasts = widgets.choose("It counts", (LASTING, ONCE), "state_lasts", help)
    with fourth:
        help = "Which channels, by half-life on this prompt: group 1 forgets fastest."
        options = (ALL, *(str(i + 1) for i in range(groups)))
        group = widgets.choose_layer(options, "channel_group", "Channel group", help)
    with fifth:
        conv = st.toggle(
            "Convolution too",
            key="state_conv",
            bind="query-params",
            disabled=lasts == ONCE or view.model.config.d_conv == 1,
            help="Also the last inputs that the convolution remembers; they have no read-out of their own.",
        )
    source = None
    if done == PIN:
        help = "The state after the selected position becomes what it was after this one, without an edit."
        source = what_if.choose_token(view, "state_source", "Taken from", help)
    return results.Edit(
        layers=(layer,) if where == ONE else view.model.config.ssm_layers,
        position=position,
        source=source,
        lasting=lasts == LASTING,
        conv=conv and lasts == LASTING and view.model.config.d_conv > 1,
        group=None if group == ALL else int(group) - 1,
    )
