"""What patches do: maps over layers and positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from jambascope.studies.figures.theme import (
    AMOUNT,
    BLANK,
    FIRST,
    SECOND,
    SELECTED,
    SIGNED,
    click_targets,
    color_bar,
    frame,
    integer_axis,
    label,
    token_axis,
)

HALF_A_PAGE = 78
"""Letters of a subtitle: maps stand two by two."""
MAX_COLUMNS = 256
"""Maps of more positions are pooled."""
BETWEEN = "#009E73"


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


def strongest(values: Float[np.ndarray, "... n"]) -> tuple[Float[np.ndarray, "..."], np.ndarray]:
    """The value farthest from 0 along the last axis, and which it is; NaN (and 0) where all are NaN."""
    which = np.where(np.isnan(values), -1.0, np.abs(values)).argmax(-1)
    return np.take_along_axis(values, which[..., None], -1)[..., 0], which


def cell_map(
    title: str,
    subtitle: str,
    values: Float[np.ndarray, "rows positions"],
    rows: Sequence[str],
    cells: Sequence[Sequence[Sequence]] | None,
    tokens: Sequence[str],
    start: int = 0,
    unit: str = "effect (share of 1)",
    row_title: str = "layer (index)",
    limit: float = 1.0,
    signed: bool = True,
    chosen: tuple[int, int] | None = None,
) -> go.Figure:
    """What a patch of each cell does: rows up, positions across, each cell a click target; cells that do not exist or
    were not reached (NaN) are blank. Above ``MAX_COLUMNS`` positions, blocks of them show their strongest.

    Args:
        rows: names of the rows, bottom first.
        cells: [row][position]: what a click on that cell reports; None where there is nothing to click.
        tokens: those of the positions shown, the first of which is ``start``.
        signed: False for what is never negative.
        chosen: row and column (before pooling) of a cell that gets a frame.
    """
    block = -(-len(tokens) // MAX_COLUMNS)
    at = np.tile(np.arange(len(tokens)), (len(rows), 1))
    if block > 1:
        values, at = _pooled(values, block)
        subtitle = f"{subtitle}; each column the strongest of {block} positions"
    x = start + np.arange(values.shape[1]) * block + (block - 1) / 2
    hover = [
        [f"{row}, {start + p} {label(tokens[p])}<br>{value:.3f}" for p, value in zip(places, line, strict=True)]
        for row, places, line in zip(rows, at, values, strict=True)
    ]
    ground = {"colorscale": SIGNED if signed else AMOUNT, "zmin": -limit if signed else 0, "zmax": limit}
    fig = go.Figure(
        go.Heatmap(
            z=values,
            x=x,
            text=np.asarray(hover),
            hovertemplate="%{text}<extra></extra>",
            hoverongaps=False,
            colorbar=color_bar(unit),
            **gaps(block),
            **ground,
        )
    )
    if cells is not None:
        known = np.argwhere(np.isfinite(values)).tolist()
        custom = [cells[r][at[r][c]] for r, c in known]
        places = [x[c] for _, c in known], [r for r, _ in known]
        fig.add_trace(click_targets(*places, custom, [hover[r][c] for r, c in known], 14))
    if chosen is not None:
        r, c = chosen[0], start + chosen[1] // block * block + (block - 1) / 2
        half = block / 2
        line = {"color": SELECTED, "width": 2.5}
        fig.add_shape(type="rect", x0=c - half, x1=c + half, y0=r - 0.5, y1=r + 0.5, line=line)
    each = max(18, min(28, 560 // len(rows)))
    frame(fig, title, subtitle, height=215 + max(90, each * len(rows)), room=HALF_A_PAGE, plot_bgcolor=BLANK)
    fig.update_xaxes(token_axis(tokens, start, "patched token (position)", room=40))
    axis = integer_axis(range(len(rows)), row_title)
    fig.update_yaxes(axis | {"ticktext": [rows[i] for i in axis["tickvals"]]})
    return fig


def gaps(block: int) -> dict:
    """Lines between cells, while these are wide enough."""
    return {"xgap": 1, "ygap": 1} if block == 1 else {"ygap": 1}


def _pooled(values: Float[np.ndarray, "rows positions"], block: int) -> tuple[np.ndarray, np.ndarray]:
    """The strongest value of each block of positions, and where it stands."""
    rows, length = values.shape
    columns = -(-length // block)
    padded = np.full((rows, columns * block), np.nan)
    padded[:, :length] = values
    found, which = strongest(padded.reshape(rows, columns, block))
    return found, np.minimum(which + np.arange(columns) * block, length - 1)


def next_tokens(
    tokens: Sequence[str], runs: Sequence[tuple[str, Float[np.ndarray, " tokens"]]], title: str, subtitle: str
) -> go.Figure:
    """Probabilities of the same tokens in three runs, such as corrupted, patched and clean, as bars side by side."""
    names = [label(token) for token in tokens]
    fig = go.Figure()
    for (run, shares), color in zip(runs, (SECOND, BETWEEN, FIRST), strict=True):
        fig.add_bar(
            x=list(range(len(names))), y=shares, name=run, marker={"color": color, "line": {"width": 0}},
            customdata=names, hovertemplate=f"%{{customdata}}, {run}<br>probability %{{y:.4g}}<extra></extra>",
        )  # fmt: skip
    frame(fig, title, subtitle, height=330, barmode="group", bargap=0.25)
    fig.update_xaxes(tickvals=list(range(len(names))), ticktext=names, title="next token", showgrid=False)
    fig.update_yaxes(title="probability (share of 1)", range=[0, 1.02], gridcolor="rgba(128,128,128,0.25)")
    below = {"orientation": "h", "yanchor": "bottom", "y": 0, "yref": "container", "xanchor": "left", "x": 0}
    return fig.update_layout(legend=below, margin={"b": 95})
