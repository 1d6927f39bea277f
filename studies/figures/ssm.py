"""The memory of Mamba layers: how much they hold, for how long, and what stands in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int
from plotly.subplots import make_subplots

from jambascope.studies.figures.theme import (
    AMOUNT,
    GUIDE,
    SELECTED,
    SIGNED,
    click_targets,
    color_bar,
    frame,
    integer_axis,
    label,
    named,
    ordered_colors,
    signed_limit,
    token_axis,
)

MAX_CHANNELS = 512
"""Columns of a channel axis; wider layers show every nth channel of the sorted order."""
MAX_TARGETS = 4096
"""Cells of a map up to which each can be clicked."""
MAX_LISTED_STATES = 16
"""States of a channel up to which a legend lists them."""
_DECADES = [-2, -1, 0, 1, 2, 3, 4, 5, 6]


def layer_norms(
    norms: dict[int, Float[np.ndarray, " T"]], tokens: Sequence[str], layer: int, position: int
) -> go.Figure:
    """Size of the state of every Mamba layer after every token, with the selected cell framed.

    Args:
        norms: Mamba layer -> root mean square of its state after each position.

    A click on a cell selects a point whose ``customdata`` is ``[layer, position]``, while there are few enough cells.
    """
    layers = list(norms)
    z = np.stack([norms[i] for i in layers])
    text = [[f"layer {i}, after {t} {label(token)}" for t, token in enumerate(tokens)] for i in layers]
    fig = go.Figure(
        go.Heatmap(
            z=z,
            text=text,
            colorscale=AMOUNT,
            hovertemplate="%{text}<br>state RMS %{z:.4g}<extra></extra>",
            colorbar=color_bar("state RMS"),
        )
    )
    if z.size <= MAX_TARGETS:
        cells = [(t, row) for row in range(len(layers)) for t in range(len(tokens))]
        hover = [f"{text[row][t]}<br>state RMS {z[row, t]:.4g}" for t, row in cells]
        custom = [[layers[row], t] for t, row in cells]
        fig.add_trace(click_targets(*zip(*cells, strict=True), custom, hover, size=12))
    row = layers.index(layer)
    box = {"x0": position - 0.5, "x1": position + 0.5, "y0": row - 0.5, "y1": row + 0.5}
    fig.add_shape(type="rect", line={"color": SELECTED, "width": 3}, **box)
    height = 170 + max(90, min(26, 600 // len(layers)) * len(layers))
    frame(fig, "State size by layer", "root mean square over the layer's channels and states", height=height)
    fig.update_xaxes(token_axis(tokens))
    fig.update_yaxes(integer_axis(layers, "layer (index)"))
    return fig


def group_lines(
    values: Float[np.ndarray, "groups times"],
    half_lives: Sequence[tuple[float, float]],
    tokens: Sequence[str],
    *,
    title: str,
    subtitle: str,
    unit: str,
    position: int | None = None,
    start: int = 0,
) -> go.Figure:
    """One line per group of channels over some of the prompt's positions.

    Args:
        half_lives: shortest and longest channel half-life of each group, in tokens.
        position: a position to mark.
        start: the first of the positions that there are values of.
    """
    fig = go.Figure()
    at = list(range(start, start + values.shape[1]))
    hover = [f"{t} {label(tokens[t])}" for t in at]
    colors = ordered_colors(len(values))
    for group, (line, (low, high)) in enumerate(zip(values, half_lives, strict=True)):
        low, high = tokens_text(low), tokens_text(high)
        name = low if low == high else f"{low} to {high}"
        fig.add_scatter(
            x=at,
            y=line,
            name=name,
            mode="lines+markers" if len(at) <= 60 else "lines",
            marker={"size": 5},
            line={"color": colors[group], "width": 2},
            customdata=hover,
            hovertemplate=f"half-life {name} tokens<br>%{{customdata}}<br>%{{y:.4g}}<extra></extra>",
        )
    if position is not None:
        fig.add_vline(x=position, line={"color": GUIDE, "width": 1.5, "dash": "dot"})
    frame(fig, title, subtitle, height=390)
    fig.update_layout(
        legend={"orientation": "v", "x": 1.01, "xanchor": "left", "y": 1, "yanchor": "top"}
        | {"title": {"text": "half-life (tokens)"}, "traceorder": "reversed"}
    )
    fig.update_xaxes(token_axis(tokens))
    fig.update_yaxes(title=unit, rangemode="tozero")
    return fig


def tokens_text(value: float) -> str:
    """A number of tokens in at most three digits."""
    if not np.isfinite(value):
        return "∞"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def shown_channels(order: Int[np.ndarray, " E"]) -> Int[np.ndarray, " shown"]:
    """The sorted channels that a channel axis has room for: all, or every nth."""
    return order[:: -(-len(order) // MAX_CHANNELS)]


def half_lives(
    values: Float[np.ndarray, "E N"],
    order: Int[np.ndarray, " E"],
    edges: Sequence[int],
    selected: int | None = None,
) -> go.Figure:
    """Half-life of every entry of the state on a logarithmic scale, channels from short to long.

    Args:
        values: [E N] in tokens.
        order: channels sorted by half-life.
        edges: places in ``order`` at which a new group of channels begins, to be marked.
        selected: a channel to frame; a click on a cell then selects a point whose ``customdata`` is its channel.
    """
    channels = shown_channels(order)
    shown = np.clip(values[channels].T, 1e-6, 1e6)
    text = [[f"channel {c}, state {n}<br>half-life {tokens_text(values[c, n])} tokens" for c in channels]
            for n in range(values.shape[1])]  # fmt: skip
    ticks = [d for d in _DECADES if np.log10(shown.min()) - 0.5 <= d <= np.log10(shown.max()) + 0.5]
    bar = color_bar("half-life (tokens)", tickvals=ticks, ticktext=[f"{10.0**d:g}" for d in ticks])
    fig = go.Figure(
        go.Heatmap(
            z=np.log10(shown), text=text, colorscale=AMOUNT, colorbar=bar, hovertemplate="%{text}<extra></extra>"
        )
    )
    step = len(order) / len(channels)
    for edge in edges:
        fig.add_vline(x=edge / step - 0.5, line={"color": "white", "width": 1})
    if selected is not None:
        fig.add_trace(_channel_targets(channels, text))
        _frame_channel(fig, order, channels, selected, values.shape[1])
    frame(fig, "Decay half-life of every state entry", _channel_note(order, channels, values), height=320)
    fig.update_xaxes(_channel_axis(len(channels)))
    fig.update_yaxes(integer_axis(range(values.shape[1]), "state n (index)"))
    return fig


def state_matrices(
    states: Float[np.ndarray, "E T N"],
    order: Int[np.ndarray, " E"],
    tokens: Sequence[str],
    position: int,
    selected: int | None = None,
) -> go.Figure:
    """What stands in the state after ``position`` and at the end, on one signed scale and the same channel order.

    Args:
        selected: a channel to frame; a click on a cell then selects a point whose ``customdata`` is its channel.
    """
    channels = shown_channels(order)
    last = len(tokens) - 1
    shown = [last] if position == last else [position, last]
    limit = signed_limit(states[:, shown])
    titles = [f"after {named(tokens[t], t)}" + (": the final state" if t == last else "") for t in shown]
    fig = make_subplots(rows=len(shown), cols=1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.12)
    for row, t in enumerate(shown, 1):
        z = states[channels, t].T
        fig.add_heatmap(
            z=z,
            customdata=np.broadcast_to(channels, z.shape),
            coloraxis="coloraxis",
            hovertemplate="channel %{customdata}, state %{y}<br>%{z:.4g}<extra></extra>",
            row=row,
            col=1,
        )
        if selected is not None:
            text = [[f"channel {c}, state {n}<br>{z[n, i]:.4g}" for i, c in enumerate(channels)] for n in range(len(z))]
            fig.add_trace(_channel_targets(channels, text), row, 1)
            _frame_channel(fig, order, channels, selected, len(z), row=row, col=1)
    subtitle = "channels in the order of the figure above; blue is positive; colours end at the 99.5th percentile"
    frame(fig, "The state itself", subtitle, height=110 + 230 * len(shown))
    fig.update_layout(
        coloraxis={"colorscale": SIGNED, "cmin": -limit, "cmax": limit, "colorbar": color_bar("state value")},
        margin_t=100,
    )
    fig.update_annotations(x=0, xanchor="left", font={"size": 13})
    fig.update_xaxes(_channel_axis(len(channels)) | {"title": {"text": ""}})
    fig.update_xaxes(_channel_axis(len(channels)), row=len(shown))
    fig.update_yaxes(integer_axis(range(states.shape[2]), "state n (index)"))
    return fig


def _channel_targets(channels: np.ndarray, text: Sequence[Sequence[str]]) -> go.Scatter:
    """A point on every cell of a map of channels and states, and of wide ones on every nth row."""
    rows = range(0, len(text), max(1, -(-len(text) * len(channels) // MAX_TARGETS)))
    cells = [(i, n) for n in rows for i in range(len(channels))]
    custom = [int(channels[i]) for i, _ in cells]
    return click_targets(*zip(*cells, strict=True), custom, [text[n][i] for i, n in cells], size=12)


def _frame_channel(
    fig: go.Figure, order: np.ndarray, channels: np.ndarray, selected: int, states: int, **where: int
) -> None:
    at = int(np.flatnonzero(order == selected)[0]) // (-(-len(order) // len(channels)))
    box = {"x0": at - 0.5, "x1": at + 0.5, "y0": -0.5, "y1": states - 0.5}
    fig.add_shape(type="rect", line={"color": SELECTED, "width": 2}, **box, **where)


def channel_over_time(
    states: Float[np.ndarray, "T N"],
    half_lives: Float[np.ndarray, " N"],
    dt: Float[np.ndarray, " T"],
    tokens: Sequence[str],
    channel: int,
    layer: int,
    position: int,
) -> go.Figure:
    """The N states of one channel after every token, and below them its step sizes.

    Args:
        half_lives: of its states, in tokens; lines are coloured by them.
        dt: step size at each token: how far the states decay there, and how strongly the token is written.
        position: a position to mark.
    """
    fig = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.72, 0.28], vertical_spacing=0.06)
    at, hover = list(range(len(tokens))), [f"{t} {label(token)}" for t, token in enumerate(tokens)]
    colors = ordered_colors(states.shape[1])
    mode = "lines+markers" if len(at) <= 60 else "lines"
    for rank, n in enumerate(np.argsort(half_lives, kind="stable")):
        name = f"n {n}: {tokens_text(half_lives[n])}"
        fig.add_scatter(
            x=at, y=states[:, n], name=name, mode=mode, line={"color": colors[rank], "width": 1.5}, marker={"size": 4},
            customdata=hover, hovertemplate=f"state {name} tokens<br>%{{customdata}}<br>%{{y:.4g}}<extra></extra>",
            showlegend=states.shape[1] <= MAX_LISTED_STATES, row=1, col=1,
        )  # fmt: skip
    fig.add_bar(
        x=at, y=dt, name="step size Δ", marker={"color": GUIDE, "line": {"width": 0}}, customdata=hover, row=2, col=1,
        hovertemplate="%{customdata}<br>Δ %{y:.4g}<extra></extra>", showlegend=False,
    )  # fmt: skip
    fig.add_vline(x=position, line={"color": SELECTED, "width": 1.5, "dash": "dot"})
    subtitle = "blue states forget first, orange ones last; a large step size Δ forgets more and writes more"
    frame(fig, f"Channel {channel} of layer {layer}: its {states.shape[1]} states over time", subtitle, height=530)
    side = {"orientation": "v", "x": 1.01, "xanchor": "left", "y": 1, "yanchor": "top", "traceorder": "reversed"}
    fig.update_layout(legend=side | {"title": {"text": "state: half-life (tokens)"}, "font": {"size": 11}})
    fig.update_xaxes(token_axis(tokens) | {"title": {"text": ""}, "showticklabels": False}, row=1)
    fig.update_xaxes(token_axis(tokens), row=2)
    fig.update_yaxes(title="state value", zeroline=True, zerolinecolor=GUIDE, row=1)
    return fig.update_yaxes(title="Δ", rangemode="tozero", row=2)


def _channel_axis(count: int) -> dict:
    return {
        "title": {"text": "channel (rank by half-life, short to long)"},
        "range": [-0.5, count - 0.5],
        "showgrid": False,
        "zeroline": False,
    }


def _channel_note(order: np.ndarray, channels: np.ndarray, values: np.ndarray) -> str:
    note = f"median {tokens_text(float(np.median(values)))} tokens; white lines part the channel groups"
    skipped = "" if len(channels) == len(order) else f"; {len(channels)} of {len(order)} channels shown, evenly"
    return note + skipped
