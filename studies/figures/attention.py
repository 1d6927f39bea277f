"""Attention patterns: every head small, one head large, one query's keys."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from jambascope.studies.figures.theme import (
    AMOUNT,
    FIRST,
    GUIDE,
    KIND_NAMES,
    SELECTED,
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


def head_grid(
    patterns: dict[int, Float[np.ndarray, "heads cells cells"]], selected: tuple[int, int] | None = None
) -> go.Figure:
    """Every head of every attention layer as a small pattern: heads across, layers up as in the other figures.

    Args:
        patterns: attention layer -> pooled patterns [H cells cells]; queries down, keys across.
        selected: (layer, head) to frame.

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
    fig.add_trace(_grid_targets(layers, heads, cells, pitch))
    if selected is not None and selected[0] in patterns:
        left, low = selected[1] * pitch - 0.5, layers.index(selected[0]) * pitch - 0.5
        box = {"x0": left, "x1": left + cells, "y0": low, "y1": low + cells}
        fig.add_shape(type="rect", line={"color": SELECTED, "width": 3}, **box)
    tile = min(150, max(34, 980 // heads))
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


def _grid_targets(layers: list[int], heads: int, cells: int, pitch: int) -> go.Scatter:
    """Several points per small pattern, so that a click anywhere on it finds one near."""
    offsets = np.linspace(0, cells - 1, _TARGETS)
    x, y, custom, hover = [], [], [], []
    for row, layer in enumerate(layers):
        for head in range(heads):
            for dy in offsets:
                for dx in offsets:
                    x.append(head * pitch + dx)
                    y.append(row * pitch + dy)
                    custom.append([layer, head])
                    hover.append(f"layer {layer}, head {head}")
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
    """One head's pattern with a token on every row and column.

    Args:
        pattern: weights from the queries to the keys of the windows that start at ``query_start``, ``key_start``.
        position: a query position to mark.
        limit: the weight at which the colour scale ends.
    """
    queries = np.arange(query_start, query_start + len(query_tokens))
    keys = np.arange(key_start, key_start + len(key_tokens))
    shown = np.where(keys[None, :] > queries[:, None], np.nan, pattern)
    names = [f"{k} {label(t)}" for k, t in zip(keys, key_tokens, strict=True)]
    hover = [
        [f"query {q} {label(t)}<br>key   {name}" for name in names] for q, t in zip(queries, query_tokens, strict=True)
    ]
    fig = go.Figure(
        go.Heatmap(
            z=shown,
            x=keys,
            y=queries,
            text=hover,
            colorscale=AMOUNT,
            zmin=0,
            zmax=limit,
            hoverongaps=False,
            hovertemplate="%{text}<br>weight %{z:.4f}<extra></extra>",
            colorbar=color_bar("attention weight (share of 1)"),
        )
    )
    if position is not None and position in queries:
        _mark_row(fig, position, keys)
    frame(fig, f"Layer {layer}, head {head}", "each row sums to 1 over the keys at or before its query", height=660)
    fig.update_xaxes(token_axis(key_tokens, key_start, "key token (position)", room=40))
    fig.update_yaxes(reversed_token_axis(query_tokens, query_start, "query token (position)", room=50))
    return fig


def _mark_row(fig: go.Figure, position: int, keys: np.ndarray) -> None:
    box = {"x0": keys[0] - 0.5, "x1": keys[-1] + 0.5, "y0": position - 0.5, "y1": position + 0.5}
    fig.add_shape(type="rect", line={"color": GUIDE, "width": 1.5}, **box)


def stretched_limit(pattern: Float[np.ndarray, "T T"]) -> float:
    """Where a colour scale should end to show a diffuse head: the largest weight of queries with 8 keys or more.

    Queries with fewer keys weigh each heavily whatever the head does. Short prompts keep the whole scale.
    """
    return float(pattern[7:].max()) if len(pattern) > 8 else 1.0


def pooled_pattern(
    pattern: Float[np.ndarray, "cells cells"], tokens: Sequence[str], layer: int, head: int, limit: float = 1.0
) -> go.Figure:
    """One head's pattern over a whole long prompt; each cell is the maximum over a block of queries and keys."""
    edges = block_edges(len(tokens), pattern.shape[-1])
    names = [f"{a}..{b - 1} {label(tokens[a])}…" for a, b in zip(edges[:-1], edges[1:], strict=True)]
    starts = np.array(edges[:-1])
    hidden = starts[None, :] > np.array(edges[1:])[:, None] - 1
    fig = go.Figure(
        go.Heatmap(
            z=np.where(hidden, np.nan, pattern),
            x=starts,
            y=starts,
            text=[[f"queries {q}<br>keys    {k}" for k in names] for q in names],
            colorscale=AMOUNT,
            zmin=0,
            zmax=limit,
            hoverongaps=False,
            hovertemplate="%{text}<br>largest weight %{z:.4f}<extra></extra>",
            colorbar=color_bar("largest attention weight in the block (share of 1)"),
        )
    )
    block = -(-len(tokens) // pattern.shape[-1])
    frame(fig, f"Layer {layer}, head {head}", f"each cell: the maximum over about {block} x {block} tokens", height=660)
    fig.update_xaxes(title="key position (tokens)", showgrid=False, zeroline=False)
    fig.update_yaxes(title="query position (tokens)", autorange="reversed", showgrid=False, zeroline=False)
    return fig


def attended_keys(row: Float[np.ndarray, " T"], tokens: Sequence[str], query: int, top: int = 15) -> go.Figure:
    """The keys that one query attends to most, heaviest on top."""
    order = np.argsort(-row[: query + 1], kind="stable")[:top]
    weights = row[order]
    names = [f"{label(tokens[k])} {k}" for k in order]
    fig = go.Figure(
        go.Bar(
            x=weights,
            y=list(range(len(order))),
            orientation="h",
            marker={"color": FIRST, "line": {"width": 0}},
            text=[f"{w:.3f}" for w in weights],
            textposition="outside",
            cliponaxis=False,
            customdata=names,
            hovertemplate="key %{customdata}<br>weight %{x:.4f}<extra></extra>",
        )
    )
    covered = f"{len(order)} of {query + 1} keys, {weights.sum():.1%} of the weight"
    frame(fig, f"Where {named(tokens[query], query)} looks", covered, height=660)
    limit = max(0.05, float(weights.max()) * 1.18)
    fig.update_xaxes(title="attention weight (share of 1)", range=[0, limit], zeroline=False)
    ticks = {"tickmode": "array", "tickvals": list(range(len(order))), "ticktext": names}
    fig.update_yaxes(title="key token (position)", range=[max(len(order), 8) - 0.5, -0.5], showgrid=False, **ticks)
    return fig


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
