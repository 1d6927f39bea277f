"""Attention patterns: every head small, one pattern large, one query in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from jambascope.studies.figures.theme import (
    AMOUNT,
    GUIDE,
    KIND_NAMES,
    READABLE,
    SELECTED,
    SIGNED,
    click_targets,
    color_bar,
    frame,
    integer_axis,
    label,
    named,
    reversed_token_axis,
    token_axis,
)

GRID_CELLS = 24
"""Cells along one side of a small pattern; longer prompts are pooled."""
LARGE_CELLS = 192
"""Cells along one side of the large pattern when a long prompt is shown whole."""
_TARGETS = 5
_BADGE_TILE = 110
"""Pixels of a small pattern that has room for more than a number."""


class Shown(NamedTuple):
    """What a pattern is of."""

    title: str
    subtitle: str = "each row sums to 1 over the keys at or before its query"
    unit: str = "attention weight (share of 1)"
    signed: bool = False


def of_head(layer: int, head: int) -> Shown:
    return Shown(f"Layer {layer}, head {head}")


def of_mixer(layer: int, kind: str, form: str) -> Shown:
    """Hidden attention, as ``hooks.hidden_attention.attention_map`` gives it."""
    about = "mean of |weight| over channels; each row sums to 1"
    return Shown(f"Layer {layer}, hidden attention of {KIND_NAMES[kind]} ({form})", about, "weight (share of 1)")


def of_difference(layer: int, head: int) -> Shown:
    about = "second prompt less first, so each row sums to 0; blue: more attention in the second"
    return Shown(f"Layer {layer}, head {head}: difference", about, "difference of attention weight", True)


def block_edges(length: int, cells: int) -> list[int]:
    """Starts of at most ``cells`` blocks of nearly equal size, and the end: positions, length min(...) + 1."""
    count = min(length, cells)
    return [i * length // count for i in range(count + 1)]


def pool(pattern: Float[np.ndarray, "... T T"], cells: int) -> Float[np.ndarray, "... cells cells"]:
    """A pattern of at most ``cells`` x ``cells``, each the maximum of its block; short prompts stay as they are."""
    edges = block_edges(pattern.shape[-1], cells)
    if len(edges) == pattern.shape[-1] + 1:
        return pattern
    rows = np.maximum.reduceat(pattern, edges[:-1], axis=-2)
    return np.maximum.reduceat(rows, edges[:-1], axis=-1)


def pool_signed(difference: Float[np.ndarray, "T T"], cells: int) -> Float[np.ndarray, "cells cells"]:
    """The same of signed values: of each block the one that is farthest from zero."""
    high, low = pool(difference, cells), -pool(-difference, cells)
    return np.where(high >= -low, high, low)


def head_grid(
    patterns: dict[int, Float[np.ndarray, "heads cells cells"]],
    selected: tuple[int, int] | None = None,
    badges: dict[int, Sequence[tuple[str, float]]] | None = None,
    notes: dict[int, Sequence[str]] | None = None,
) -> go.Figure:
    """Every head of every attention layer as a small pattern: heads across, layers up as in the other figures.

    Args:
        patterns: attention layer -> pooled patterns [H cells cells]; queries down, keys across.
        selected: (layer, head) to frame.
        badges: layer -> for each head a word and a number that its corner shows; small patterns show the number alone.
        notes: layer -> for each head what hovering tells.

    A click on a small pattern selects a point whose ``customdata`` is ``[layer, head]``.
    """
    layers = list(patterns)
    heads = patterns[layers[0]].shape[0]
    cells = patterns[layers[0]].shape[-1]
    pitch = cells + max(1, cells // 10)
    canvas = np.full((len(layers) * pitch, heads * pitch), np.nan, dtype=np.float32)
    hidden = np.triu(np.ones((cells, cells), dtype=bool), k=1)
    for row, layer in enumerate(layers):
        for head in range(heads):
            tile = np.where(hidden, np.nan, patterns[layer][head])
            canvas[row * pitch :, head * pitch :][:cells, :cells] = tile[::-1]
    middle = (cells - 1) / 2
    fig = go.Figure(
        go.Heatmap(
            z=canvas,
            colorscale=AMOUNT,
            zmin=0,
            zmax=1,
            hoverinfo="skip",
            colorbar=color_bar("attention weight (share of 1)"),
        )
    )
    tile = min(150, max(34, 980 // heads))
    fig.add_trace(_grid_targets(layers, heads, cells, pitch, notes or {}))
    if badges:
        fig.add_trace(_badges(layers, badges, cells, pitch, tile))
    if selected is not None and selected[0] in patterns:
        left, low = selected[1] * pitch - 0.5, layers.index(selected[0]) * pitch - 0.5
        box = {"x0": left, "x1": left + cells, "y0": low, "y1": low + cells}
        fig.add_shape(type="rect", line={"color": SELECTED, "width": 3}, **box)
    frame(
        fig,
        "All heads",
        "in each, queries down and keys across; click one to enlarge it",
        height=len(layers) * tile + 140,
    )
    across, up = integer_axis(range(heads), "head (index)"), integer_axis(layers, "layer (index)")
    for axis in (across, up):
        axis["tickvals"] = [value * pitch + middle for value in axis["tickvals"]]
        axis["ticks"] = ""
    across["range"] = [-0.5, heads * pitch - 0.5]
    up["range"] = [-0.5, len(layers) * pitch - 0.5]
    fig.update_xaxes(across | {"constrain": "domain", "constraintoward": "left"})
    fig.update_yaxes(up | {"scaleanchor": "x", "constrain": "domain"})
    return fig


def _badges(
    layers: list[int], badges: dict[int, Sequence[tuple[str, float]]], cells: int, pitch: int, tile: int
) -> go.Scatter:
    """In the upper right corner of every small pattern, where no query sees a key."""
    roomy = tile >= _BADGE_TILE
    texts = [
        f"{word}<br><b>{number:.2f}</b>" if roomy else f"{number:.2f}" for i in layers for word, number in badges[i]
    ]
    places = [(head, row) for row, layer in enumerate(layers) for head in range(len(badges[layer]))]
    return go.Scatter(
        x=[head * pitch + cells - 0.5 for head, _ in places], y=[row * pitch + cells - 0.5 for _, row in places],
        mode="text", text=texts, textposition="bottom left", hoverinfo="skip", showlegend=False, name="badge",
        textfont={"size": 12 if roomy else 9, "color": READABLE},
    )  # fmt: skip


def _grid_targets(layers: list[int], heads: int, cells: int, pitch: int, notes: dict[int, Sequence[str]]) -> go.Scatter:
    """Several points per small pattern, so that a click anywhere on it finds one near."""
    offsets = np.linspace(0, cells - 1, _TARGETS)
    x, y, custom, hover = [], [], [], []
    for row, layer in enumerate(layers):
        for head in range(heads):
            name = f"layer {layer}, head {head}" + (f"<br>{notes[layer][head]}" if layer in notes else "")
            for dy in offsets:
                for dx in offsets:
                    x.append(head * pitch + dx)
                    y.append(row * pitch + dy)
                    custom.append([layer, head])
                    hover.append(name)
    return click_targets(x, y, custom, hover, size=26)


def head_pattern(
    pattern: Float[np.ndarray, "queries keys"],
    query_tokens: Sequence[str],
    key_tokens: Sequence[str],
    layer: int,
    head: int,
    query_start: int = 0,
    key_start: int = 0,
    position: int | None = None,
    limit: float = 1.0,
) -> go.Figure:
    """One head's pattern with a token on every row and column; see :func:`token_pattern`."""
    shown = of_head(layer, head)
    return token_pattern(pattern, shown, query_tokens, key_tokens, query_start, key_start, position, limit)


def token_pattern(
    pattern: Float[np.ndarray, "queries keys"],
    shown: Shown,
    query_tokens: Sequence[str],
    key_tokens: Sequence[str],
    query_start: int = 0,
    key_start: int = 0,
    position: int | None = None,
    limit: float = 1.0,
    clickable: bool = False,
    room: int = 40,
) -> go.Figure:
    """A pattern with a token on every row and column.

    Args:
        pattern: weights from the queries to the keys of the windows that start at ``query_start``, ``key_start``.
        shown: what it is of.
        position: a position to mark, as query and as key.
        limit: the weight at which the colour scale ends.
        clickable: a click on a weight selects a point whose ``customdata`` is its query; a click on the empty half, in
            which keys come after their queries, one whose ``customdata`` is the key.
        room: how many keys can be named side by side.
    """
    queries = np.arange(query_start, query_start + len(query_tokens))
    keys = np.arange(key_start, key_start + len(key_tokens))
    values = np.where(keys[None, :] > queries[:, None], np.nan, pattern)
    names = [f"{k} {label(t)}" for k, t in zip(keys, key_tokens, strict=True)]
    hover = [
        [f"query {q} {label(t)}<br>key   {name}" for name in names] for q, t in zip(queries, query_tokens, strict=True)
    ]
    sign = "+" if shown.signed else ""
    fig = go.Figure(
        go.Heatmap(
            z=values, x=keys, y=queries, text=hover, **_scale(shown, limit), hoverongaps=False,
            hovertemplate=f"%{{text}}<br>weight %{{z:{sign}.4f}}<extra></extra>", colorbar=color_bar(shown.unit),
        )
    )  # fmt: skip
    if clickable:
        fig.data[0].update(hoverinfo="skip", hovertemplate=None)
        fig.add_trace(_cell_targets(values, queries, keys, hover, sign))
    if position is not None:
        _mark(fig, position, queries, keys)
    frame(fig, shown.title, shown.subtitle, height=660)
    fig.update_xaxes(token_axis(key_tokens, key_start, "key token (position)", room))
    fig.update_yaxes(reversed_token_axis(query_tokens, query_start, "query token (position)", room=50))
    return fig


def _scale(shown: Shown, limit: float) -> dict:
    if shown.signed:
        return {"colorscale": SIGNED, "zmin": -limit, "zmax": limit}
    return {"colorscale": AMOUNT, "zmin": 0, "zmax": limit}


def _cell_targets(
    values: Float[np.ndarray, "queries keys"],
    queries: np.ndarray,
    keys: np.ndarray,
    hover: list[list[str]],
    sign: str,
) -> go.Scatter:
    """A target on every cell."""
    x, y, custom, texts = [], [], [], []
    for i, query in enumerate(queries.tolist()):
        for j, key in enumerate(keys.tolist()):
            x.append(key)
            y.append(query)
            custom.append(query if key <= query else key)
            weight = f"<br>weight {values[i, j]:{sign}.4f}"
            texts.append(hover[i][j] + weight if key <= query else f"follow {hover[i][j].rpartition('<br>')[2]}")
    return click_targets(x, y, custom, texts, size=max(5, 480 // max(len(queries), len(keys))))


def _mark(fig: go.Figure, position: int, queries: np.ndarray, keys: np.ndarray) -> None:
    """Frames around what a position looks at, and around what looks at it."""
    line = {"color": GUIDE, "width": 1.5}
    if position in queries:
        fig.add_shape(
            type="rect", line=line, x0=keys[0] - 0.5, x1=max(keys[0], min(position, keys[-1])) + 0.5,
            y0=position - 0.5, y1=position + 0.5,
        )  # fmt: skip
    if position in keys:
        fig.add_shape(
            type="rect", line=line | {"dash": "dot"}, x0=position - 0.5, x1=position + 0.5,
            y0=min(queries[-1], max(position, queries[0])) - 0.5, y1=queries[-1] + 0.5,
        )  # fmt: skip


def stretched_limit(pattern: Float[np.ndarray, "T T"]) -> float:
    """Where a colour scale should end to show a diffuse head: the largest weight of queries with 8 keys or more.

    Queries with fewer keys weigh each heavily whatever the head does. Short prompts keep the whole scale.
    """
    return float(pattern[7:].max()) if len(pattern) > 8 else 1.0


def pooled_pattern(
    pattern: Float[np.ndarray, "cells cells"], tokens: Sequence[str], layer: int, head: int, limit: float = 1.0
) -> go.Figure:
    """One head's pattern over a whole long prompt; each cell is the maximum over a block of queries and keys."""
    return pooled(pattern, of_head(layer, head), tokens, limit)


def pooled(
    pattern: Float[np.ndarray, "cells cells"], shown: Shown, tokens: Sequence[str], limit: float = 1.0
) -> go.Figure:
    """A pattern over a whole long prompt, as :func:`pool` or, where signed, :func:`pool_signed` gives it."""
    edges = block_edges(len(tokens), pattern.shape[-1])
    names = [f"{a}..{b - 1} {label(tokens[a])}…" for a, b in zip(edges[:-1], edges[1:], strict=True)]
    starts = np.array(edges[:-1])
    hidden = starts[None, :] > np.array(edges[1:])[:, None] - 1
    fig = go.Figure(
        go.Heatmap(
            z=np.where(hidden, np.nan, pattern), x=starts, y=starts, **_scale(shown, limit), hoverongaps=False,
            text=[[f"queries {q}<br>keys    {k}" for k in names] for q in names],
            hovertemplate="%{text}<br>largest weight %{z:.4f}<extra></extra>",
            colorbar=color_bar(f"largest {shown.unit} in the block" if pattern.shape[-1] < len(tokens) else shown.unit),
        )
    )  # fmt: skip
    block = -(-len(tokens) // pattern.shape[-1])
    largest = "the value farthest from zero" if shown.signed else "the maximum"
    rule = f"each cell: {largest} over about {block} x {block} tokens" if block > 1 else shown.subtitle
    frame(fig, shown.title, rule, height=660)
    fig.update_xaxes(title="key position (tokens)", showgrid=False, zeroline=False)
    fig.update_yaxes(title="query position (tokens)", autorange="reversed", showgrid=False, zeroline=False)
    return fig


def mark_targets(fig: go.Figure, queries: Sequence[int], keys: Sequence[int]) -> go.Figure:
    """Dots where a perfect head of some kind would look."""
    look = {"symbol": "circle-open", "size": 6, "color": SELECTED, "line": {"width": 1.5}}
    return fig.add_trace(
        go.Scatter(x=keys, y=queries, mode="markers", marker=look, hoverinfo="skip", showlegend=False, name="targets")
    )


def looks_by_layer(
    rows: dict[int, Float[np.ndarray, " T"]], kinds: dict[int, str], tokens: Sequence[str], query: int
) -> go.Figure:
    """Where one query looks in every layer: rows of attention patterns and of hidden attention, each summing to 1.

    Args:
        rows: layer -> weights on the keys 0..query.
        kinds: layer -> the mixer, as ``KIND_NAMES`` knows it.
    """
    layers = list(rows)
    shown = tokens[: query + 1]
    text = [[f"layer {i}, {KIND_NAMES[kinds[i]]}<br>key {k} {label(t)}" for k, t in enumerate(shown)] for i in layers]
    fig = go.Figure(
        go.Heatmap(
            z=np.stack([rows[i][: query + 1] for i in layers]), text=text, colorscale=AMOUNT, zmin=0, zmax=1,
            xgap=1 if len(shown) <= 100 else 0, ygap=1, hovertemplate="%{text}<br>weight %{z:.4f}<extra></extra>",
            colorbar=color_bar("weight (share of 1)"),
        )
    )  # fmt: skip
    subtitle = f"each row sums to 1; even would be {1 / (query + 1):.3f}"
    height = 210 + max(90, min(28, 600 // len(layers)) * len(layers))
    frame(fig, f"Where {named(tokens[query], query)} looks, layer by layer", subtitle, height=height)
    fig.update_xaxes(token_axis(shown, title="key token (position)"))
    axis = integer_axis([f"{KIND_NAMES[kinds[i]]} {i}" for i in layers], "layer")
    fig.update_yaxes(axis)
    return fig
