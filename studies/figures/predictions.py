"""How well each token of a prompt was expected."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from jambascope.studies.figures.theme import FIRST, GUIDE, SECOND, frame, label, token_axis


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
