"""Which experts tokens took, with what weight, and how evenly experts are used."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from jambascope.studies.figures.theme import (
    AMOUNT,
    BLANK,
    FIRST,
    GUIDE,
    SECOND,
    SELECTED,
    SHARE,
    color_bar,
    frame,
    integer_axis,
    label,
    named,
    ordered_colors,
    token_axis,
)


def token_routes(
    weights: Float[np.ndarray, "T X"],
    tokens: Sequence[str],
    layer: int,
    position: int | None = None,
    stretched: bool = False,
) -> go.Figure:
    """The weight that each token gave to each expert of one layer; experts it did not choose are left blank.

    Args:
        weights: router probability where chosen, 0 elsewhere (or all probabilities, to be shown whole).
        position: a position to mark.
        stretched: colours end at the largest weight shown instead of 1.
    """
    experts = weights.shape[1]
    z = np.where(weights.T > 0, weights.T, np.nan)
    text = [[f"{t} {label(token)}<br>expert {e}" for t, token in enumerate(tokens)] for e in range(experts)]
    fig = go.Figure(
        go.Heatmap(
            z=z,
            text=text,
            colorscale=AMOUNT,
            zmin=0,
            zmax=float(weights.max()) if stretched else 1,
            xgap=1 if len(tokens) <= 100 else 0,
            ygap=1,
            hoverongaps=False,
            hovertemplate="%{text}<br>weight %{z:.4f}<extra></extra>",
            colorbar=color_bar("router weight (share of 1)"),
        )
    )
    if position is not None:
        box = {"x0": position - 0.5, "x1": position + 0.5, "y0": -0.5, "y1": experts - 0.5}
        fig.add_shape(type="rect", line={"color": GUIDE, "width": 1.5}, **box)
    subtitle = "softmax probability of the experts a token uses (Jamba does not renormalise it)"
    height = 200 + max(150, min(20, 640 // experts) * experts)
    frame(fig, f"Experts by token, layer {layer}", subtitle, height=height, plot_bgcolor=BLANK)
    fig.update_xaxes(token_axis(tokens))
    fig.update_yaxes(integer_axis(range(experts), "expert (index)"))
    return fig


def token_path(
    weights: dict[int, Float[np.ndarray, " X"]], token: str, position: int, stretched: bool = False
) -> go.Figure:
    """The way of one token through all MoE layers.

    Args:
        weights: MoE layer -> weight given to each expert, 0 where not chosen.
        stretched: colours end at the largest weight shown instead of 1.
    """
    layers = list(weights)
    z = np.stack([weights[i] for i in layers])
    text = [[f"layer {i}, expert {e}" for e in range(z.shape[1])] for i in layers]
    fig = go.Figure(
        go.Heatmap(
            z=np.where(z > 0, z, np.nan),
            text=text,
            colorscale=AMOUNT,
            zmin=0,
            zmax=float(z.max()) if stretched else 1,
            xgap=1,
            ygap=1,
            hoverongaps=False,
            hovertemplate="%{text}<br>weight %{z:.4f}<extra></extra>",
            colorbar=color_bar("router weight (share of 1)"),
        )
    )
    subtitle = "weight it gave to the experts of every MoE layer"
    frame(fig, f"Route of {named(token, position)}", subtitle, height=_rows(len(layers)), plot_bgcolor=BLANK)
    fig.update_xaxes(integer_axis(range(z.shape[1]), "expert (index)"))
    fig.update_yaxes(integer_axis(layers, "layer (index)"))
    return fig


def expert_loads(loads: dict[int, Float[np.ndarray, " X"]], choices: int, layer: int | None = None) -> go.Figure:
    """Share of all choices that went to each expert, layer by layer.

    Args:
        loads: MoE layer -> load f_e, which sums to 1.
        choices: tokens x slots in each layer, k T.
        layer: a layer to frame.
    """
    layers = list(loads)
    z = np.stack([loads[i] for i in layers])
    experts = z.shape[1]
    text = [
        [f"layer {i}, expert {e}<br>{round(loads[i][e] * choices)} of {choices} choices" for e in range(experts)]
        for i in layers
    ]
    fig = go.Figure(
        go.Heatmap(
            z=100 * z,
            text=text,
            colorscale=SHARE,
            zmin=0,
            zmax=100 * float(z.max()),
            xgap=1,
            ygap=1,
            hovertemplate="%{text}<br>load %{z:.1f} %<extra></extra>",
            colorbar=color_bar("load (% of choices)"),
        )
    )
    if layer in loads:
        row = layers.index(layer)
        box = {"x0": -0.5, "x1": experts - 0.5, "y0": row - 0.5, "y1": row + 0.5}
        fig.add_shape(type="rect", line={"color": SELECTED, "width": 3}, **box)
    frame(fig, "Load per expert and layer", f"balanced is {100 / experts:.3g} % each", height=_rows(len(layers)))
    fig.update_xaxes(integer_axis(range(experts), "expert (index)"))
    fig.update_yaxes(integer_axis(layers, "layer (index)"))
    return fig


def certainty(
    retained: Float[np.ndarray, " T"], margin: Float[np.ndarray, " T"], tokens: Sequence[str], layer: int, position: int
) -> go.Figure:
    """How sure one router was of each token: the mass of the kept experts, and the lead of the first one."""
    fig = go.Figure()
    at = list(range(len(tokens)))
    hover = [f"{t} {label(token)}" for t, token in enumerate(tokens)]
    for name, values, color in (
        ("retained mass", retained, FIRST),
        ("top-1 minus top-2", margin, SECOND),
    ):
        fig.add_scatter(
            x=at,
            y=values,
            name=name,
            mode="lines+markers" if len(tokens) <= 200 else "lines",
            line={"color": color, "width": 2},
            marker={"symbol": "circle" if color == FIRST else "diamond"},
            customdata=hover,
            hovertemplate=f"%{{customdata}}<br>{name} %{{y:.4f}}<extra></extra>",
        )
    fig.add_vline(x=position, line={"color": GUIDE, "width": 1.5, "dash": "dot"})
    subtitle = "retained mass: sum of the kept probabilities; top-1 minus top-2: lead of the first expert"
    frame(fig, f"Certainty of the router, layer {layer}", subtitle, height=340)
    fig.update_xaxes(token_axis(tokens))
    fig.update_yaxes(title="probability (share of 1)", range=[0, 1.02])
    return fig


def specialization(
    shares: Float[np.ndarray, "labels X"], names: Sequence[str], chance: float, layer: int, kind: str = "domain"
) -> go.Figure:
    """Which share of each domain's tokens chose each expert of one layer; what chance gives is white.

    Args:
        shares: rows sum to k.
        chance: k / X.
        kind: what ``names`` are names of.
    """
    experts = shares.shape[1]
    text = [[f"{label(name)}, expert {e}" for e in range(experts)] for name in names]
    ticks = {"tickvals": [0, chance / 2, chance, (1 + chance) / 2, 1]}
    middle = [[0, "rgb(178,24,43)"], [chance, "rgb(247,247,247)"], [1, "rgb(33,102,172)"]]
    fig = go.Figure(
        go.Heatmap(
            z=shares, text=text, colorscale=middle, zmin=0, zmax=1, xgap=1, ygap=1, texttemplate="%{z:.2f}",
            hovertemplate="%{text}<br>%{z:.3f} of its tokens<extra></extra>",
            colorbar=color_bar("share of tokens", tickformat=".2f", **ticks),
        )
    )  # fmt: skip
    subtitle = f"share of each {kind}'s tokens that use an expert; white: {chance:.3g}, what an even choice gives"
    frame(fig, f"Who uses which expert, layer {layer}", subtitle, height=180 + max(110, 30 * len(names)))
    fig.update_xaxes(integer_axis(range(experts), "expert (index)"))
    fig.update_yaxes(integer_axis([label(name) for name in names], kind))
    return fig


def use_and_need(
    use: dict[int, Float[np.ndarray, "labels X"]], need: dict[int, Float[np.ndarray, "labels X"]], names: Sequence[str]
) -> go.Figure:
    """How much each domain uses an expert against what it loses without it: a point for each domain and expert.

    Args:
        use: MoE layer -> share of the domain's tokens that chose the expert.
        need: MoE layer -> change of the domain's loss (nats) when the expert is taken away.
    """
    fig = go.Figure()
    for color, symbol, layer in zip(ordered_colors(len(use)), _marks(len(use)), use, strict=True):
        labels, experts = use[layer].shape
        text = [f"layer {layer}, expert {e}<br>{label(names[d])}" for d in range(labels) for e in range(experts)]
        fig.add_scatter(
            x=use[layer].flatten(), y=need[layer].flatten(), mode="markers", name=f"layer {layer}", text=text,
            marker={"color": color, "symbol": symbol, "size": 8, "opacity": 0.85},
            hovertemplate="%{text}<br>used by %{x:.2f} of tokens, %{y:+.3f} nats without it<extra></extra>",
        )  # fmt: skip
    subtitle = "a point for each domain and expert; on the line nothing is lost"
    frame(fig, "Use of an expert, and need of it", subtitle, height=430)
    fig.update_xaxes(title="share of the domain's tokens that use the expert", range=[-0.03, 1.03], zeroline=False)
    fig.update_yaxes(title="change of loss without it (nats)", zeroline=True, zerolinecolor=GUIDE)
    return fig.update_xaxes(gridcolor="rgba(128,128,128,0.25)").update_yaxes(gridcolor="rgba(128,128,128,0.25)")


def _marks(count: int) -> list[str]:
    return [("circle", "diamond", "square", "triangle-up")[i % 4] for i in range(count)]


def _rows(layers: int) -> int:
    return 170 + max(110, min(26, 600 // layers) * layers)


def domain_shares(
    title: str, shares: dict[int, Float[np.ndarray, "domains X"]], domains: Sequence[str], chance: float
) -> go.Figure:
    """Which share of each domain's tokens chose each expert: a panel for each layer, domains down, experts across.

    Args:
        shares: MoE layer -> share; 1 when every token of the domain chose the expert.
        chance: the share of an even choice, k / X.
    """
    layers = list(shares)
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    each = 60 + 22 * len(domains)
    fig = make_subplots(
        rows, columns, subplot_titles=[f"layer {layer}" for layer in layers], shared_yaxes=True,
        horizontal_spacing=0.02, vertical_spacing=min(0.9 / max(1, rows - 1), 70 / (each * rows)) if rows > 1 else 0,
    )  # fmt: skip
    for i, layer in enumerate(layers):
        heat = go.Heatmap(
            z=100 * shares[layer], y=[label(name) for name in domains], coloraxis="coloraxis", xgap=1, ygap=1,
            hovertemplate=f"layer {layer}, expert %{{x}}<br>%{{z:.0f}} % of the tokens of %{{y}}<extra></extra>",
        )  # fmt: skip
        fig.add_trace(heat, i // columns + 1, i % columns + 1)
    subtitle = f"an even choice is {100 * chance:.3g} %; what all domains share says nothing of domains"
    frame(fig, title, subtitle, height=130 + each * rows)
    fig.update_layout(
        coloraxis={"colorscale": SHARE, "cmin": 0, "colorbar": color_bar("share of the domain's tokens (%)")},
        margin={"t": 105},
    )
    fig.update_xaxes(title={"text": "expert (index)", "standoff": 4}, showgrid=False, zeroline=False, row=rows)
    return fig.update_yaxes(autorange="reversed", showgrid=False, zeroline=False)
