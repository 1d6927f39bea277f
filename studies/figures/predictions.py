"""How well each token of a prompt was expected, what each layer expects, which components speak for a token, and how
two runs differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from jambascope.studies.figures.theme import (
    AMOUNT,
    FIRST,
    GUIDE,
    KIND_COLORS,
    KIND_NAMES,
    SECOND,
    SELECTED,
    SHARE,
    click_targets,
    color_bar,
    frame,
    label,
    named,
    token_axis,
)

GRID = "rgba(128,128,128,0.25)"
WRITTEN_TOKENS = 16
"""Up to so many positions the likeliest token is written into each cell of the lens."""
Quantity = Literal["target", "rank", "top", "entropy", "kl"]


def expectation(
    tokens: Sequence[str],
    surprisal: Float[np.ndarray, " T-1"],
    entropy: Float[np.ndarray, " T"],
    position: int | None = None,
) -> go.Figure:
    """Surprisal of each token beside the entropy of the distribution it was drawn from, both in nats.

    Args:
        tokens: the text of each of the T tokens.
        surprisal: of tokens 1..T-1, each given those before it.
        entropy: of the prediction made at each position; the one at t is shown at token t + 1, which it predicts.
        position: a position to mark.
    """
    at = list(range(1, len(tokens)))
    hover = [f"{i} {label(tokens[i])}" for i in at]
    fig = go.Figure()
    fig.add_bar(
        x=at,
        y=surprisal,
        name="surprisal of the token",
        marker={"color": FIRST, "line": {"width": 0}},
        customdata=hover,
        hovertemplate="%{customdata}<br>surprisal %{y:.3f} nats<extra></extra>",
    )
    fig.add_scatter(
        x=at,
        y=entropy[:-1],
        name="entropy of the prediction",
        mode="lines+markers" if len(tokens) <= 200 else "lines",
        line={"color": SECOND, "width": 2},
        customdata=hover,
        hovertemplate="%{customdata}<br>entropy %{y:.3f} nats<extra></extra>",
    )
    if position is not None and len(tokens) > 1:
        fig.add_vline(x=position, line={"color": GUIDE, "width": 1.5, "dash": "dot"})
    mean = f"mean surprisal {np.mean(surprisal):.3f} nats" if len(at) else "a single token has no token before it"
    frame(fig, "How expected each token was", mean, height=430)
    fig.update_xaxes(token_axis(tokens, room=45))
    fig.update_yaxes(title="nats", rangemode="tozero")
    return fig


def compared(
    names: Sequence[str],
    before: Float[np.ndarray, " tokens"],
    after: Float[np.ndarray, " tokens"],
    token: str,
    position: int,
    divergence: float,
    runs: tuple[str, str] = ("before", "after"),
) -> go.Figure:
    """Probabilities of the likeliest next tokens in two runs, beside each other.

    Args:
        names: of the candidates, the likeliest first.
        token: after which is predicted.
        divergence: KL of the first run's prediction from the second's, nats.
        runs: what they are called.
    """
    rows = list(range(len(names)))
    fig = go.Figure()
    for run, values, color in zip(runs, (before, after), (FIRST, SECOND), strict=True):
        fig.add_bar(
            x=values, y=rows, name=run, orientation="h", customdata=[label(name) for name in names],
            marker={"color": color, "line": {"width": 0}},
            hovertemplate=f"%{{customdata}}, {run}: %{{x:.4g}}<extra></extra>",
        )  # fmt: skip
    subtitle = f"KL({runs[0]} || {runs[1]}) {divergence:.3g} nats"
    frame(fig, f"Next token after {named(token, position)}", subtitle, height=150 + 27 * max(6, len(names)))
    fig.update_layout(bargap=0.25, legend={"traceorder": "normal"}, margin_t=92)
    fig.update_xaxes(title="probability (share of 1)", rangemode="tozero", gridcolor="rgba(128,128,128,0.25)")
    return fig.update_yaxes(
        title="next token", tickmode="array", tickvals=rows, ticktext=[label(name) for name in names],
        range=[len(names) - 0.5, -0.5], showgrid=False, zeroline=False,
    )  # fmt: skip


def change_over_prompt(
    tokens: Sequence[str],
    before: Float[np.ndarray, " T-1"],
    after: Float[np.ndarray, " T-1"],
    divergence: Float[np.ndarray, " T"],
    edited: int | None = None,
) -> go.Figure:
    """How the prompt is read in two runs: surprisal of each token, and below it how far predictions are apart.

    Args:
        before: surprisal of tokens 1..T-1 in the first run, nats.
        divergence: KL(before || after) of the prediction made at each position, nats; shown at the token it predicts.
        edited: the position at which the runs part, to be marked.
    """
    fig = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.6, 0.4], vertical_spacing=0.07)
    at = list(range(1, len(tokens)))
    hover = [f"{t} {label(tokens[t])}" for t in at]
    mode = "lines+markers" if len(at) <= 200 else "lines"
    for name, values, color, symbol, width in (
        ("before", before, FIRST, "circle", 4),  # still seen where the two agree
        ("after", after, SECOND, "diamond", 1.5),
    ):
        mark = {"symbol": symbol, "size": 4 + width}
        fig.add_scatter(
            x=at, y=values, name=name, mode=mode, line={"color": color, "width": width}, marker=mark,
            customdata=hover, hovertemplate=f"%{{customdata}}<br>surprisal {name} %{{y:.3f}} nats<extra></extra>",
            row=1, col=1,
        )  # fmt: skip
    fig.add_bar(
        x=at, y=divergence[:-1], name="KL(before || after)", marker={"color": GUIDE, "line": {"width": 0}},
        customdata=hover, hovertemplate="prediction of %{customdata}<br>KL %{y:.4g} nats<extra></extra>",
        showlegend=False, row=2, col=1,
    )  # fmt: skip
    if edited is not None and len(tokens) > 1:
        fig.add_vline(x=edited, line={"color": SELECTED, "width": 1.5, "dash": "dot"})
    subtitle = "surprisal of each token; below, KL(before || after) of the prediction of it"
    frame(fig, "How the prompt is read before and after", subtitle, height=440)
    fig.update_layout(margin_t=92)
    fig.update_xaxes(token_axis(tokens) | {"title": {"text": ""}, "showticklabels": False}, row=1)
    fig.update_xaxes(token_axis(tokens, title="token that is predicted (position)"), row=2)
    fig.update_yaxes(title="surprisal (nats)", rangemode="tozero", row=1)
    return fig.update_yaxes(title="KL (nats)", rangemode="tozero", row=2)


class Lens(NamedTuple):
    """What entries of the residual stream predict at positions of a window. R entry, W position."""

    rows: tuple[str, ...]
    """What stands before each entry, from the embedding on."""
    start: int
    """The first position."""
    targets: tuple[str, ...]
    """[W]: the token whose probability and rank are followed at each position."""
    top: tuple[tuple[str, ...], ...]
    """[R W]: the likeliest token."""
    top_probability: Float[np.ndarray, "R W"]
    probability: Float[np.ndarray, "R W"]
    """Of the target."""
    rank: Float[np.ndarray, "R W"]
    """Of the target; 0 is the likeliest."""
    entropy: Float[np.ndarray, "R W"]
    kl: Float[np.ndarray, "R W"]
    """From the model's own prediction."""


_LENS = {
    "target": ("probability", "probability of the token that follows", SHARE),
    "rank": ("rank", "rank of the token that follows, 1 is the likeliest", AMOUNT + "_r"),
    "top": ("top_probability", "probability of the likeliest token", SHARE),
    "entropy": ("entropy", "entropy of the prediction (nats)", AMOUNT),
    "kl": ("kl", "KL from the model's own prediction (nats)", AMOUNT),
}


def logit_lens(lens: Lens, tokens: Sequence[str], quantity: Quantity, position: int, note: str = "") -> go.Figure:
    """The prediction of every entry of the stream (up) at every position (across), the likeliest tokens written in.

    Args:
        tokens: of the window.
        quantity: what colours say.
        position: the position to mark; a click selects a point whose ``customdata`` is its position.
        note: the rule by which positions were left out, if any were.
    """
    field, unit, scale = _LENS[quantity]
    values = getattr(lens, field)
    z = np.log10(values + 1) if quantity == "rank" else values
    end = {"target": 1.0, "top": 1.0}.get(quantity, max(float(z.max()), 1e-3))
    at = list(range(lens.start, lens.start + len(tokens)))
    bar = color_bar(unit)
    if quantity == "rank":
        bar |= {"tickvals": list(range(int(end) + 1)), "ticktext": [f"{10**i:,}" for i in range(int(end) + 1)]}
    fig = go.Figure(
        go.Heatmap(
            z=z, x=at, y=list(range(len(lens.rows))), colorscale=scale, zmin=0, zmax=end, xgap=1, ygap=1,
            hoverinfo="skip", colorbar=bar,
        )
    )  # fmt: skip
    if len(tokens) <= WRITTEN_TOKENS:
        _write(fig, lens, z / end, at, scale)
    cells = [(row, column) for row in range(len(lens.rows)) for column in range(len(at))]
    hover = [_lens_hover(lens, tokens, row, column) for row, column in cells]
    places = [at[column] for _, column in cells]
    fig.add_trace(click_targets(places, [row for row, _ in cells], places, hover, size=16))
    if position in at:
        box = {"x0": position - 0.5, "x1": position + 0.5, "y0": -0.5, "y1": len(lens.rows) - 0.5}
        fig.add_shape(type="rect", line={"color": SELECTED, "width": 2}, **box)
    subtitle = "the stream after each part, read through the final norm and the unembedding; click one to select it"
    frame(fig, "Logit lens", f"{note}{subtitle}", height=190 + max(150, 23 * len(lens.rows)))
    fig.update_xaxes(token_axis(tokens, lens.start))
    ticks = {"tickmode": "array", "tickvals": list(range(len(lens.rows))), "ticktext": list(lens.rows)}
    return fig.update_yaxes(title="after", showgrid=False, zeroline=False, **ticks)


def _write(fig: go.Figure, lens: Lens, shade: Float[np.ndarray, "R W"], at: Sequence[int], scale: str) -> None:
    """The likeliest tokens: dark on light cells, light on dark ones, whatever the page."""
    light = shade < 0.45 if scale.endswith("_r") else shade > 0.55
    for color, where in (("#1c2733", light), ("#ffffff", ~light)):
        rows, columns = where.nonzero()
        texts = [label(lens.top[row][column]) for row, column in zip(rows, columns, strict=True)]
        look = dict(mode="text", textfont={"color": color, "size": 11}, hoverinfo="skip", showlegend=False)
        fig.add_scatter(x=[at[c] for c in columns], y=rows, text=texts, name="likeliest token", **look)


def _lens_hover(lens: Lens, tokens: Sequence[str], row: int, column: int) -> str:
    here = row, column
    return (
        f"after {lens.rows[row]}, at {lens.start + column} {label(tokens[column])}<br>"
        f"likeliest: {label(lens.top[row][column])} {lens.top_probability[here]:.4f}<br>"
        f"{label(lens.targets[column])}: {lens.probability[here]:.4f}, rank {int(lens.rank[here]) + 1}<br>"
        f"entropy {lens.entropy[here]:.3f}, KL {lens.kl[here]:.3f} nats"
    )


class Contribution(NamedTuple):
    """What one component adds to the difference of two logits."""

    name: str
    kind: str
    """One of ``KIND_COLORS``, or ``embed``."""
    value: float


def contributions(
    found: Sequence[Contribution], target: str, other: str, total: float, token: str, position: int, top: int = 15
) -> go.Figure:
    """The components that speak most for ``target`` against ``other``, by size, and what the others add together.

    Args:
        total: the difference of logits, which all components sum to.
        token, position: where the logits are read.
    """
    order = sorted(found, key=lambda c: -abs(c.value))
    rest = sum(c.value for c in order[top:])
    shown = order[:top] + ([Contribution(f"{len(order) - top} others", "rest", rest)] if order[top:] else [])
    fig = go.Figure()
    for kind, color in (KIND_COLORS | {"embed": "#CC79A7", "rest": "rgba(128,128,128,0.45)"}).items():
        own = [(row, c) for row, c in enumerate(shown) if c.kind == kind]
        if own:
            fig.add_bar(
                x=[c.value for _, c in own], y=[row for row, _ in own], orientation="h", width=0.72,
                marker={"color": color},
                name={"embed": "embedding", "rest": "all others"}.get(kind) or KIND_NAMES[kind],
                text=[f"{c.value:+.3f}" for _, c in own], textposition="outside", cliponaxis=False,
                customdata=[c.name for _, c in own], hovertemplate="%{customdata}: %{x:+.4f}<extra></extra>",
            )  # fmt: skip
    title = f"Which parts speak for “{label(target)}” against “{label(other)}”"
    subtitle = f"after {named(token, position)}; all {len(found)} sum to the difference of logits, {total:+.3f}"
    frame(fig, title, subtitle, height=205 + 24 * len(shown), barmode="overlay")
    limit = 1.25 * max([abs(c.value) for c in shown] + [1e-6])
    unit = "added to the difference of logits; right of 0: for the first token"
    fig.update_xaxes(title=unit, range=[-limit, limit], gridcolor=GRID, zerolinecolor=GUIDE)
    ticks = {"tickmode": "array", "tickvals": list(range(len(shown))), "ticktext": [c.name for c in shown]}
    fig.update_yaxes(title="component", range=[len(shown) - 0.5, -0.5], showgrid=False, zeroline=False, **ticks)
    below = {"orientation": "h", "yanchor": "bottom", "y": 0, "yref": "container", "xanchor": "left", "x": 0}
    return fig.update_layout(legend=below, showlegend=True, margin={"b": 100})
