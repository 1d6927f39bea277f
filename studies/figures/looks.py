"""One token followed: what it looks at, who looks at it, and how that differs between two prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from jambascope.studies.figures.theme import FIRST, SECOND, SELECTED, frame, label, named


def attended_keys(
    row: Float[np.ndarray, " T"], tokens: Sequence[str], query: int, top: int = 15, height: int = 660
) -> go.Figure:
    """The keys that one query attends to most, heaviest on top; a click on a bar has its position as ``customdata``."""
    order = np.argsort(-row[: query + 1], kind="stable")[:top]
    covered = f"{len(order)} of {query + 1} keys, {row[order].sum():.1%} of the weight"
    fig = _bars(row, order, tokens, "key", FIRST)
    return _framed(fig, f"Where {named(tokens[query], query)} looks", covered, "key", height)


def attending_queries(
    column: Float[np.ndarray, " T"], tokens: Sequence[str], key: int, top: int = 15, height: int = 660
) -> go.Figure:
    """The queries that attend to one key most, as :func:`attended_keys`; no query before it sees it."""
    order = key + np.argsort(-column[key:], kind="stable")[:top]
    seen = f"{len(order)} of {len(column) - key} queries; mean weight of all {column[key:].mean():.3f}"
    fig = _bars(column, order, tokens, "query", SECOND)
    return _framed(fig, f"Who looks at {named(tokens[key], key)}", seen, "query", height)


def attention_changes(
    row: Float[np.ndarray, " T"], tokens: Sequence[str], query: int, top: int = 15, height: int = 660
) -> go.Figure:
    """The keys whose weight for one query differs most between two prompts."""
    order = np.argsort(-np.abs(row[: query + 1]), kind="stable")[:top]
    fig = _bars(row, order, tokens, "key", [FIRST if row[k] >= 0 else SELECTED for k in order], "+")
    moved = f"{np.abs(row).sum() / 2:.1%} of the weight has moved"
    _framed(fig, f"Where {named(tokens[query], query)} looks more, or less", moved, "key", height)
    limit = max(0.05, float(np.abs(row).max()) * 1.3)
    return fig.update_xaxes(title="difference of attention weight", range=[-limit, limit], zeroline=True)


def _bars(
    weights: Float[np.ndarray, " T"],
    order: np.ndarray,
    tokens: Sequence[str],
    what: str,
    color: str | list[str],
    sign: str = "",
) -> go.Figure:
    values = weights[order]
    names = [f"{label(tokens[k])} {k}" for k in order]
    fig = go.Figure(
        go.Bar(
            x=values, y=list(range(len(order))), orientation="h", marker={"color": color, "line": {"width": 0}},
            text=[f"{w:{sign}z.3f}" for w in values], textposition="outside", cliponaxis=False,
            customdata=order.tolist(), hovertext=names, selected={"marker": {"opacity": 1}},
            unselected={"marker": {"opacity": 1}},
            hovertemplate=f"{what} %{{hovertext}}<br>weight %{{x:{sign}.4f}}<extra></extra>",
        )
    )  # fmt: skip
    ticks = {"tickmode": "array", "tickvals": list(range(len(order))), "ticktext": names}
    fig.update_yaxes(range=[max(len(order), 8) - 0.5, -0.5], showgrid=False, **ticks)
    limit = max(0.05, float(values.max()) * 1.18)
    return fig.update_xaxes(title="attention weight (share of 1)", range=[0, limit], zeroline=False)


def _framed(fig: go.Figure, title: str, subtitle: str, what: str, height: int) -> go.Figure:
    frame(fig, title, subtitle, height=height)
    return fig.update_yaxes(title=f"{what} token (position)")
