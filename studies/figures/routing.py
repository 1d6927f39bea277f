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
    SIGNED,
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


def layer_load(
    load: Float[np.ndarray, " X"], choices: int, layer: int, chance: tuple[float, float] | None = None
) -> go.Figure:
    """Load of each expert of one layer beside the balanced line, and what an even choice gives by chance.

    Args:
        load: f_e, which sums to 1.
        choices: tokens x slots, k T.
        chance: the middle 95 % of one expert's load when every token chooses evenly.
    """
    experts = len(load)
    fig = go.Figure()
    if chance is not None:
        low, high = (100 * end for end in chance)
        fig.add_hrect(y0=low, y1=high, fillcolor=GUIDE, opacity=0.3, line_width=0, layer="below")
    counts = [f"expert {e}<br>{round(float(f) * choices)} of {choices} choices" for e, f in enumerate(load)]
    fig.add_bar(
        x=list(range(experts)), y=100 * load, marker={"color": FIRST, "line": {"width": 0}}, opacity=0.85, text=counts,
        textposition="none", hovertemplate="%{text}<br>load %{y:.1f} %<extra></extra>", name="load",
    )  # fmt: skip
    fig.add_hline(y=100 / experts, line={"color": SELECTED, "width": 2, "dash": "dash"})
    band = "" if chance is None else "; grey: 95 % of loads when tokens choose evenly by chance"
    frame(fig, f"Load of layer {layer}", f"dashed: balanced, {100 / experts:.3g} % each{band}", height=330)
    fig.update_xaxes(integer_axis(range(experts), "expert (index)"))
    return fig.update_yaxes(title="load (% of choices)", rangemode="tozero")


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
    return fig.update_layout(margin_t=98)


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
    fig = go.Figure(
        go.Heatmap(
            z=shares, text=text, colorscale=_around(chance), zmin=0, zmax=1, xgap=1, ygap=1, texttemplate="%{z:.2f}",
            hovertemplate="%{text}<br>%{z:.3f} of its tokens<extra></extra>",
            colorbar=color_bar("share of tokens", tickformat=".2f", **ticks),
        )
    )  # fmt: skip
    subtitle = f"share of each {kind}'s tokens that use an expert; white: {chance:.3g}, what an even choice gives"
    frame(fig, f"Who uses which expert, layer {layer}", subtitle, height=180 + max(110, 30 * len(names)))
    fig.update_xaxes(integer_axis(range(experts), "expert (index)"))
    fig.update_yaxes(integer_axis([label(name) for name in names], kind))
    return fig


def _around(chance: float) -> list[list]:
    """Red below and blue above the share of chance, which is white and stands at ``chance`` of the scale."""
    ends = [[0, "rgb(178,24,43)"], [chance, "rgb(247,247,247)"], [1, "rgb(33,102,172)"]]
    return ends[:2] if chance >= 1 else ends[1:] if chance <= 0 else ends


def coactivation(
    share: Float[np.ndarray, "X X"], chance: float, layer: int, expected: Float[np.ndarray, "X X"] | None = None
) -> go.Figure:
    """How often the tokens that chose the expert of a row chose that of a column, too.

    Args:
        share: N_ij / N_i; NaN, and blank, where there is no pair.
        chance: the share when all pairs are as frequent.
        expected: the shares of choices that have these loads and nothing else in common; given, differences from them
            are shown.
    """
    experts = len(share)
    text = [[f"of the tokens of expert {i}<br>use expert {j} too" for j in range(experts)] for i in range(experts)]
    if expected is None:
        z, unit = share, "share of the row's tokens"
        top = max(float(np.nanmax(share)) if np.isfinite(share).any() else 1.0, chance, 1e-9)
        scale = dict(zmin=0, zmax=top, colorscale=_around(min(chance / top, 1.0)))
        said = f"share of the row's tokens; white: {chance:.3g}, what an even choice gives"
    else:
        z, unit = share - expected, "share beyond independence"
        limit = float(np.nanmax(np.abs(z))) if np.isfinite(z).any() else 1.0
        scale = dict(zmin=-(limit or 1.0), zmax=limit or 1.0, colorscale=SIGNED)
        said = "share of the row's tokens, less that of independent choices with these loads"
    number = "%{z:.2f}" if expected is None else "%{z:+.2f}"
    fig = go.Figure(
        go.Heatmap(
            z=z, text=text, xgap=1, ygap=1, hoverongaps=False, texttemplate=number if experts <= 16 else None,
            hovertemplate=f"{number} %{{text}}<extra></extra>", colorbar=color_bar(unit), **scale,
        )
    )  # fmt: skip
    height = 200 + max(180, min(36, 640 // experts) * experts)
    frame(fig, f"Experts chosen together, layer {layer}", said, height=height, plot_bgcolor=BLANK)
    fig.update_xaxes(integer_axis(range(experts), "chosen as well: expert (index)"))
    return fig.update_yaxes(integer_axis(range(experts), "expert (index)"))


def route_changes(
    kept: dict[int, Float[np.ndarray, " T"]], tokens: Sequence[str], position: int | None = None
) -> go.Figure:
    """Which share of its experts each token lost to others in every MoE layer, between two runs.

    Args:
        kept: MoE layer -> share of each token's experts that both runs chose.
        position: a position to mark.
    """
    layers = list(kept)
    z = 1 - np.stack([kept[i] for i in layers])
    text = [[f"layer {i}, {t} {label(token)}" for t, token in enumerate(tokens)] for i in layers]
    fig = go.Figure(
        go.Heatmap(
            z=z, text=text, colorscale=SHARE, zmin=0, zmax=1, ygap=1, xgap=1 if len(tokens) <= 100 else 0,
            hovertemplate="%{text}<br>%{z:.2f} of its experts replaced<extra></extra>",
            colorbar=color_bar("share replaced", tickvals=[0, 0.5, 1]),
        )
    )  # fmt: skip
    if position is not None:
        fig.add_vline(x=position, line={"color": SELECTED, "width": 1.5, "dash": "dot"})
    subtitle = f"share of a token's experts that are others after the change; mean {z.mean():.3f}"
    frame(fig, "What happens to the routes", subtitle, height=_rows(len(layers)) + 40)
    fig.update_xaxes(token_axis(tokens))
    return fig.update_yaxes(integer_axis(layers, "layer (index)"))


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
