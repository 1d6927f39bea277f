"""What models of the zoo were measured to do: lines against a size, and bars; a colour and dash for each model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import plotly.graph_objects as go
from plotly.colors import hex_to_rgb
from plotly.subplots import make_subplots

from jambascope.studies.figures.theme import GUIDE, frame

# Okabe and Ito's colours; what changes one thing in a model is dashed, a control of pure Mamba has Mamba's colour.
LOOKS = {
    "jamba-micro": ("#009E73", "solid"),
    "jamba-micro-1to3": ("#D55E00", "solid"),
    "mamba-micro": ("#0072B2", "solid"),
    "attention-micro": ("#E69F00", "solid"),
    "jamba-micro-dense": ("#8A8F98", "dash"),
    "jamba-micro-rope": ("#56B4E9", "dash"),
    "jamba-micro-no-inner-norm": ("#CC79A7", "dash"),
    "jamba-micro-mamba2": ("#D55E00", "dash"),
    "mamba-micro-state-4": ("#0072B2", "dot"),
    "mamba-micro-state-64": ("#56B4E9", "dot"),
    "mamba-micro-mimetic": ("#CC79A7", "dot"),
    # One model with parts of it taken away.
    "nothing taken away": ("#009E73", "solid"),
    "without attention": ("#E69F00", "solid"),
    "without random Mamba layers": ("#0072B2", "dash"),
    "without random Mamba channels": ("#56B4E9", "dot"),
}
OTHERS = ("#8A8F98", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2")
"""Of models that are not named above, in turn, with long dashes."""
GRID = "rgba(128,128,128,0.25)"
TRAINED = "rgba(128,128,128,0.13)"
BAND = 0.12
"""Opacity of intervals."""
MOST_LINES = 6
"""With more models than this, lines show ``FEW`` of them until others are asked for in the legend."""
FEW = 4
PANEL, AROUND = 170, 210
"""Pixels of a row of panels; of title, axis and legend together."""


class Point(NamedTuple):
    """A number with its interval; of one training (``seed``), or over several (None)."""

    model: str
    seed: int | None
    x: float | None
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Panel:
    """What one pair of axes shows."""

    title: str
    points: Sequence[Point]
    trained: tuple[float, float] | None = None
    """The range of x in training."""
    guides: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """Name -> (x, y) of a line that is no model, such as chance."""


def looks(models: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Model -> colour and dash, the same in every figure."""
    others = [model for model in models if model not in LOOKS]
    return {m: LOOKS.get(m) or (OTHERS[others.index(m) % len(OTHERS)], "longdash") for m in models}


def lines(
    title: str,
    subtitle: str,
    rows: Sequence[tuple[str, Sequence[Panel]]],
    x_title: str,
    unit_range: bool = True,
) -> go.Figure:
    """Small multiples: a row of panels for each quantity, a line with its interval for each model.

    Args:
        rows: title of the y axis, and the row's panels; titles of the first row stand above the columns.
        x_title: of all x axes, which double from mark to mark; zero stands one mark before one.
        unit_range: whether y runs from 0 to 1.

    A model with several seeds is shown by its mean over them, and each seed by a point. Of many models the first few
    are shown, the others when their names in the legend are clicked.
    """
    columns = max(len(panels) for _, panels in rows)
    titles = [panel.title for panel in rows[0][1]]
    height = AROUND + PANEL * len(rows) + (60 if len(rows) == 1 else 0)
    fig = make_subplots(
        len(rows), columns, subplot_titles=titles, shared_xaxes="columns", shared_yaxes="rows",
        horizontal_spacing=0.02, vertical_spacing=0.16 / (len(rows) + 1),
    )  # fmt: skip
    models = list(dict.fromkeys(p.model for _, panels in rows for panel in panels for p in panel.points))
    look, shown = looks(models), set()
    for c in range(1, columns + 1):
        own = [panels[c - 1] for _, panels in rows if len(panels) >= c]
        xs = sorted({p.x for panel in own for p in panel.points})
        for r, panel in enumerate(own, 1):
            _fill_panel(fig, r, c, panel, rows[r - 1][0], look, shown)
            _mark_sizes(fig, r, c, xs, panel.trained, _apart(xs, columns))
    for r, (quantity, _) in enumerate(rows, 1):
        fig.update_yaxes(title=quantity, row=r, col=1)
    fig.update_xaxes(title={"text": x_title, "standoff": 6}, row=len(rows))
    fig.update_yaxes(gridcolor=GRID, zeroline=False, **({"range": [-0.03, 1.03]} if unit_range else {}))
    fig.update_xaxes(showgrid=False, zeroline=False, tickangle=0)
    if len(models) > MOST_LINES:
        for model in models[FEW:]:
            fig.update_traces({"visible": "legendonly"}, {"name": model})
    return _framed(fig, title, subtitle, height)


def _apart(xs: Sequence[float], columns: int) -> float:
    """Marks between two ticks, so that their numbers do not touch."""
    return 0.4 if columns <= 3 else 0.85 if max(xs, default=0) < 100 else 1.1


def place(x: float) -> float:
    """Where x stands on an axis that doubles from mark to mark: 0, 1, 2, 4 ... at 0, 1, 2, 3 ..."""
    return math.log2(x) + 1 if x >= 1 else x


def _mark_sizes(
    fig: go.Figure, row: int, column: int, xs: Sequence[float], trained: tuple[float, float] | None, apart: float
) -> None:
    """Ticks at the sizes that were measured, at least ``apart`` marks from each other, and the trained range shaded."""
    if not xs:
        return
    ticks = [xs[0]]
    for x in xs[1:-1]:
        if place(x) - place(ticks[-1]) >= apart and place(xs[-1]) - place(x) >= apart:
            ticks.append(x)
    ticks += xs[-1:] if len(xs) > 1 else []
    texts = {"tickmode": "array", "tickvals": [place(x) for x in ticks], "ticktext": [f"{x:g}" for x in ticks]}
    fig.update_xaxes(**texts, showticklabels=True, row=row, col=column)
    if trained is not None:
        low, high = max(place(trained[0]), place(xs[0])), min(place(trained[1]), place(xs[-1]))
        look = {"fillcolor": TRAINED, "line_width": 0, "layer": "below"}
        fig.add_vrect(low - 0.3, high + 0.3, **look, row=row, col=column)


def _fill_panel(
    fig: go.Figure, row: int, column: int, panel: Panel, quantity: str, look: dict, shown: set[str]
) -> None:
    for model, (color, dash) in look.items():
        for trace in _model_traces(panel.points, model, quantity, color, dash, model not in shown):
            fig.add_trace(trace, row, column)
            shown.add(model)
    for name, points in panel.guides.items():
        trace = go.Scatter(
            x=[place(x) for x, _ in points],
            y=[y for _, y in points],
            name=name,
            legendgroup=name,
            showlegend=name not in shown,
            legendrank=2000,
            mode="lines",
            line={"color": GUIDE, "width": 1.5, "dash": "dot" if name == "chance" else "dashdot"},
            hovertemplate=f"{name}: %{{y:.3f}}<extra></extra>",
        )
        fig.add_trace(trace, row, column)
        shown.add(name)


def _model_traces(
    points: Sequence[Point], model: str, quantity: str, color: str, dash: str, in_legend: bool
) -> list[go.Scatter]:
    """The interval, the line, and a mark for each seed where there are several."""
    line, seeds = pooled(points, model)
    if not line:
        return []
    line = sorted((p for p in line if p.mean == p.mean), key=lambda p: p.x)
    x, same = [place(p.x) for p in line], {"legendgroup": model, "name": model}
    bounded = [p for p in line if math.isfinite(p.low) and math.isfinite(p.high)]
    at = [place(p.x) for p in bounded]
    return [
        go.Scatter(
            x=[*at, *at[::-1]],
            y=[*(p.high for p in bounded), *(p.low for p in bounded[::-1])],
            fill="toself",
            fillcolor=f"rgba{(*hex_to_rgb(color), BAND)}",
            mode="none",
            hoverinfo="skip",
            showlegend=False,
            **same,
        ),
        go.Scatter(
            x=x,
            y=[p.mean for p in line],
            mode="lines+markers",
            line={"color": color, "dash": dash, "width": 2},
            marker={"size": 5},
            customdata=[(p.x, p.low, p.high) for p in line],
            hovertemplate=f"{model}<br>{quantity} at %{{customdata[0]:g}}: "
            "%{y:.3f} [%{customdata[1]:.3f}, %{customdata[2]:.3f}]<extra></extra>",
            showlegend=in_legend,
            **same,
        ),
        go.Scatter(
            x=[place(p.x) for p in seeds],
            y=[p.mean for p in seeds],
            mode="markers",
            marker={"color": color, "size": 4, "symbol": "x-thin", "line": {"color": color, "width": 1}},
            opacity=0.7,
            customdata=[(p.seed, p.x) for p in seeds],
            hovertemplate=f"{model}, seed %{{customdata[0]}}<br>{quantity} at %{{customdata[1]:g}}: "
            "%{y:.3f}<extra></extra>",
            showlegend=False,
            **same,
        ),
    ]


def pooled(points: Sequence[Point], model: str) -> tuple[list[Point], list[Point]]:
    """What stands for a model, and its seeds beside that: over seeds where there is such a number, else its one run."""
    own = [p for p in points if p.model == model]
    over, seeds = [p for p in own if p.seed is None], [p for p in own if p.seed is not None]
    return (over, seeds) if over else (seeds, [])


def bars(title: str, subtitle: str, panels: Sequence[Panel], unit: str, columns: int = 4) -> go.Figure:
    """A bar for each model in each panel, whiskers for its interval, a mark for each seed."""
    rows = -(-len(panels) // columns)
    columns = min(columns, len(panels))
    models = list(dict.fromkeys(p.model for panel in panels for p in panel.points))
    each = 60 + 22 * len(models)
    fig = make_subplots(
        rows, columns, subplot_titles=[panel.title for panel in panels], shared_yaxes="rows", horizontal_spacing=0.03,
        vertical_spacing=min(0.9 / max(1, rows - 1), 75 / (each * rows)) if rows > 1 else 0,
    )  # fmt: skip
    look = looks(models)
    for i, panel in enumerate(panels):
        row, column = i // columns + 1, i % columns + 1
        for model, (color, dash) in look.items():
            for trace in _bar_traces(panel.points, model, color, dash, unit):
                fig.add_trace(trace, row, column)
        for points in panel.guides.values():
            fig.add_vline(points[0][1], line={"color": GUIDE, "dash": "dot"}, row=row, col=column)
    fig.update_xaxes(gridcolor=GRID, zerolinecolor=GRID, title=unit, title_standoff=6)
    fig.update_yaxes(showgrid=False, autorange="reversed")
    fig.update_layout(barmode="overlay", bargap=0.3)
    frame(fig, title, subtitle, height=120 + each * rows)
    return fig.update_layout(showlegend=False, margin={"t": 110, "b": 60})


def _bar_traces(points: Sequence[Point], model: str, color: str, dash: str, unit: str) -> list[go.Bar | go.Scatter]:
    bar, seeds = pooled(points, model)
    if not bar:
        return []
    (p, *_) = bar
    known = math.isfinite(p.low) and math.isfinite(p.high)
    whiskers = {
        "type": "data",
        "symmetric": False,
        "array": [p.high - p.mean if known else 0],
        "arrayminus": [p.mean - p.low if known else 0],
        "thickness": 1.2,
        "width": 3,
        "color": GUIDE,
    }
    # A bar cannot be dashed: stripes say the same.
    pattern = {"shape": {"solid": "", "dash": "/", "dot": ".", "longdash": "-"}[dash], "size": 5, "solidity": 0.35}
    return [
        go.Bar(
            x=[p.mean],
            y=[model],
            orientation="h",
            marker={"color": color, "pattern": pattern, "opacity": 0.75},
            error_x=whiskers,
            hovertemplate=f"{model}: {p.mean:.3f} {unit} [{p.low:.3f}, {p.high:.3f}]<extra></extra>",
        ),
        go.Scatter(
            x=[s.mean for s in seeds],
            y=[model] * len(seeds),
            mode="markers",
            marker={"color": GUIDE, "size": 6, "symbol": "circle-open", "line": {"width": 1.5}},
            customdata=[s.seed for s in seeds],
            hovertemplate=f"{model}, seed %{{customdata}}: %{{x:.3f}} {unit}<extra></extra>",
        ),
    ]


def _framed(fig: go.Figure, title: str, subtitle: str, height: int) -> go.Figure:
    frame(fig, title, subtitle, height=height)
    below = {"orientation": "h", "yanchor": "bottom", "y": 0, "yref": "container", "xanchor": "left", "x": 0}
    return fig.update_layout(legend=below | {"itemwidth": 40}, margin={"t": 110, "b": 120})
