"""What patches do: maps over layers and positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from jambascope.studies.figures.theme import AMOUNT, BLANK, SIGNED, color_bar, frame, integer_axis, label, token_axis


def effect_map(
    title: str,
    subtitle: str,
    effects: Float[np.ndarray, "layers positions"],
    layers: Sequence[int],
    positions: Sequence[str],
    unit: str = "effect (1: all of the difference)",
    limit: float = 1.0,
    signed: bool = True,
    position_title: str = "patched token (position)",
    numbered: bool = True,
) -> go.Figure:
    """The effect of patching every layer at every position: layers up, positions across; layers that lack the component
    (NaN) are left blank.

    Args:
        positions: the tokens; or names of groups of positions, which are not ``numbered``.
        limit: where the colours end, on both sides of 0.
        signed: False for what is never negative, such as a divergence.
    """
    names = [label(name) for name in positions]
    where = [f"{t} {name}" for t, name in enumerate(names)] if numbered else names
    text = [[f"layer {layer}, {name}" for name in where] for layer in layers]
    fig = go.Figure(
        go.Heatmap(
            z=effects, text=text, xgap=1, ygap=1, hoverongaps=False,
            colorscale=SIGNED if signed else AMOUNT, zmin=-limit if signed else 0, zmax=limit,
            hovertemplate="%{text}<br>%{z:.3f}<extra></extra>", colorbar=color_bar(unit),
        )
    )  # fmt: skip
    frame(fig, title, subtitle, height=210 + max(90, min(28, 600 // len(layers)) * len(layers)), plot_bgcolor=BLANK)
    axis = token_axis(positions, title=position_title)
    fig.update_xaxes(axis if numbered else axis | {"ticktext": names, "tickangle": 0})
    fig.update_yaxes(integer_axis(list(layers), "layer (index)"))
    return fig
