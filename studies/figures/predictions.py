"""How well each token of a prompt was expected, and how two runs differ in that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from jambascope.studies.figures.theme import FIRST, GUIDE, SECOND, SELECTED, frame, label, named, token_axis


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
