"""Few-shot labels, models side by side: what is expected where one is due, by shots, and who looks at the labels."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from jambascope.studies.figures.theme import (
    AMOUNT,
    GUIDE,
    KIND_NAMES,
    MAX_NAMED_TOKENS,
    SELECTED,
    color_bar,
    frame,
    label,
    named,
    token_axis,
)
from jambascope.studies.figures.zoo import looks

GRID = "rgba(128,128,128,0.25)"
RIGHT, OTHER, OUTSIDE, REST = "the right label", "other labels", "likely words outside", "all other words"
MASS_COLORS = {RIGHT: "#0072B2", OTHER: "#56B4E9", OUTSIDE: "#E69F00", REST: "rgba(128,128,128,0.35)"}
MOST_NAMED = 32
"""Labels that are named below a long prompt."""
WRITTEN = 0.06
"""A share from which on its word is written into the bar."""

SAID, SWALLOWED, WRONG, LOST, UNSHOWN = (
    "right",
    "right of the labels, but another word is likelier: the format gap",
    "another label",
    "another label, and another word is likelier",
    "its label was not shown before",
)
OUTCOMES = {
    SAID: ("#0072B2", "circle"),
    SWALLOWED: ("#E69F00", "diamond"),
    WRONG: ("#D55E00", "x"),
    LOST: ("#CC79A7", "triangle-up"),
    UNSHOWN: (GUIDE, "circle-open"),
}


class Share(NamedTuple):
    """A word with its probability; ``kind`` is one of ``MASS_COLORS``."""

    word: str
    probability: float
    kind: str


def next_mass(models: Mapping[str, Sequence[Share]], shots: int) -> go.Figure:
    """A bar of length 1 for each model: first the labels, then what stands outside the label set.

    Args:
        models: name -> shares in the order in which they are drawn.
    """
    names = list(models)
    fig = go.Figure()
    for kind, color in MASS_COLORS.items():
        starts, rows, widths, words, hover = [], [], [], [], []
        for row, name in enumerate(names):
            ends = np.cumsum([0.0, *(share.probability for share in models[name])])
            for share, start in zip(models[name], ends[:-1], strict=True):
                if share.kind != kind:
                    continue
                word = share.word if kind == REST else label(share.word)
                starts.append(float(start))
                rows.append(row)
                widths.append(share.probability)
                words.append(word if share.probability >= WRITTEN and kind != REST else "")
                hover.append(f"{html.escape(name)}<br>{word}: {share.probability:.4f} ({kind})")
        fig.add_bar(
            x=widths, y=rows, base=starts, orientation="h", name=kind, text=words, hovertext=hover, width=0.72,
            textposition="inside", insidetextanchor="middle", textangle=0, cliponaxis=False,
            textfont={"color": "white" if kind == RIGHT else "black"},
            marker={"color": color, "line": {"width": 1, "color": "rgba(255,255,255,0.7)"}},
            hovertemplate="%{hovertext}<extra></extra>",
        )  # fmt: skip
    after = "before any label was shown" if shots == 0 else f"after {shots} shot{'s' * (shots > 1)}"
    frame(fig, f"What comes where a label is due, {after}", "probability of each next word", barmode="overlay")
    fig.update_layout(height=185 + 44 * len(names), uniformtext={"mode": "hide", "minsize": 9}, margin={"t": 100})
    fig.update_xaxes(title="probability (share of 1)", range=[0, 1], gridcolor=GRID, zeroline=False)
    ticks = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": [html.escape(n) for n in names]}
    return fig.update_yaxes(title="model", range=[len(names) - 0.5, -0.5], showgrid=False, zeroline=False, **ticks)


def outcome(valid: float, free: float, among: float) -> str:
    """Which of ``OUTCOMES`` one label of one model is.

    Args:
        valid: 1 where the likeliest word is a label of the set.
        free, among: 1 where the right label is the likeliest word, and the likeliest label; NaN where it was not shown.
    """
    if among != among:
        return UNSHOWN
    if among:
        return SAID if free else SWALLOWED
    return WRONG if valid else LOST


def by_shots(
    mass: Mapping[str, Float[np.ndarray, " shots"]], outcomes: Mapping[str, Sequence[str]], shown: int
) -> go.Figure:
    """Label mass as shots are added, and below it how each review of the episode was labelled.

    Args:
        mass: model -> M after 0, 1, 2 ... shots.
        outcomes: model -> of :func:`outcome`, in the same order.
        shown: the number of shots that the other figures show.
    """
    names, shots = list(mass), len(next(iter(mass.values())))
    low = 36 * len(names) + 20
    fig = make_subplots(
        2, 1, shared_xaxes=True, vertical_spacing=34 / (224 + low), row_heights=[190, low],
        subplot_titles=["probability of all labels together", "which label is the likeliest"],
    )  # fmt: skip
    for name, (color, dash) in looks(names).items():
        fig.add_scatter(
            x=list(range(shots)), y=mass[name], name=html.escape(name), mode="lines+markers", row=1, col=1,
            line={"color": color, "dash": dash, "width": 2}, marker={"size": 5}, legend="legend",
            hovertemplate=f"{html.escape(name)}, %{{x}} shots: %{{y:.4f}}<extra></extra>",
        )  # fmt: skip
    for kind, (color, symbol) in OUTCOMES.items():
        at = [(s, row) for row, name in enumerate(names) for s, found in enumerate(outcomes[name]) if found == kind]
        if at:
            x, y = zip(*at, strict=True)
            hover = [f"{html.escape(names[row])}, after {s} shots: {kind}" for s, row in at]
            fig.add_scatter(
                x=x, y=y, name=kind, mode="markers", text=hover, hovertemplate="%{text}<extra></extra>", row=2, col=1,
                marker={"color": color, "symbol": symbol, "size": 11}, legend="legend2",
            )  # fmt: skip
    fig.add_vline(x=shown, line={"color": SELECTED, "width": 1.5, "dash": "dot"})
    frame(
        fig, "The episode as shots are added", "one forward pass: before each label, the reviews before are its shots"
    )
    axis = {"dtick": 1} if shots <= 20 else {"nticks": 17}
    fig.update_xaxes(range=[-0.5, shots - 0.5], showgrid=False, zeroline=False, **axis)
    fig.update_xaxes(title={"text": "shots (labelled reviews before)", "standoff": 6}, row=2)
    fig.update_yaxes(title="label mass", range=[-0.03, 1.03], gridcolor=GRID, zeroline=False, row=1)
    ticks = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": [html.escape(n) for n in names]}
    fig.update_yaxes(title="model", range=[len(names) - 0.5, -0.5], showgrid=False, zeroline=False, **ticks, row=2)
    height = 224 + low + 235
    place = {"orientation": "h", "xanchor": "left", "x": 0, "yref": "container"}
    fig.update_layout(height=height, margin={"t": 125, "b": 110})
    fig.update_layout(legend=place | {"yanchor": "top", "y": 1 - 62 / height})
    return fig.update_layout(legend2=place | {"yanchor": "bottom", "y": 0})


class Look(NamedTuple):
    """Where a head, or a whole Mamba layer, looks from the place where a label is due."""

    model: str
    kind: str
    """The mixer of its layer, as ``KIND_NAMES`` has it."""
    layer: int
    head: int | None
    """None of a Mamba layer."""
    row: Float[np.ndarray, " keys"]
    attention: float
    """To all labels together."""
    lift: float | None = None
    """Over the attention to other tokens at like places; None where it was not measured."""

    @property
    def name(self) -> str:
        """As in ``L4H2`` or ``Mamba 3``."""
        return f"{KIND_NAMES[self.kind]} {self.layer}" if self.head is None else f"L{self.layer}H{self.head}"


def label_rows(found: Sequence[Look], tokens: Sequence[str], labels: Sequence[int]) -> go.Figure:
    """A row of weights for each head and layer over the prompt's tokens, those with labels marked above.

    Args:
        found: with rows over all of ``tokens``, the last of which is the query.
        labels: positions of the labels.
    """
    names = [f"{html.escape(look.model)} {look.name}" for look in found]
    ends = [f"{name}: {look.attention:.2f}" for name, look in zip(names, found, strict=True)]
    hover = [[f"{name}<br>key {k} {label(t)}" for k, t in enumerate(tokens)] for name in names]
    fig = go.Figure(
        go.Heatmap(
            z=np.stack([look.row for look in found]), text=hover, colorscale=AMOUNT, zmin=0, zmax=1, ygap=2,
            hovertemplate="%{text}<br>weight %{z:.4f}<extra></extra>", colorbar=color_bar("weight (share of 1)"),
        )
    )  # fmt: skip
    fig.add_scatter(
        x=list(labels), y=[-0.85] * len(labels), mode="markers", name="labels", showlegend=True,
        marker={"symbol": "triangle-down", "size": 10, "color": SELECTED},
        text=[f"label {label(tokens[i])} {i}" for i in labels], hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip
    last = len(tokens) - 1
    even = len(labels) / len(tokens)
    subtitle = f"rows sum to 1; beside each name what labels get in all; an even spread: {even:.2f}"
    frame(fig, f"Where {named(tokens[last], last)} looks", subtitle, height=210 + max(60, 24 * len(found)))
    fig.update_xaxes(_label_axis(tokens, labels))
    ticks = {"tickmode": "array", "tickvals": list(range(len(found))), "ticktext": ends}
    return fig.update_yaxes(
        title="head, or Mamba layer: to labels", range=[len(found) - 0.5, -1.4], showgrid=False, zeroline=False, **ticks
    )


def _label_axis(tokens: Sequence[str], labels: Sequence[int]) -> dict:
    """Every token named while there is room for it; of longer prompts the labels, and the query."""
    axis = token_axis(tokens, title="key token (position)")
    if len(tokens) <= MAX_NAMED_TOKENS:
        return axis
    step = -(-len(labels) // MOST_NAMED)
    at = [*labels[::step], len(tokens) - 1]
    return axis | {
        "title": {"text": "key token (position): labels and the query are named; drag to zoom in"},
        "tickmode": "array",
        "tickvals": at,
        "ticktext": [f"{label(tokens[i])} {i}" for i in at],
        "tickangle": -60,
    }
