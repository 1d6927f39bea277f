"""The layers of a model at a glance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from jambascope.config import JambaConfig
from jambascope.memory import readable_bytes
from jambascope.studies.figures.theme import GUIDE, KIND_COLORS, KIND_NAMES, frame, integer_axis

MAX_WRITTEN_LAYERS = 16
"""Up to so many layers their kinds are written into the boxes."""
_SHORT = {"attention": "attention", "mamba": "Mamba", "mamba2": "Mamba-2", "moe": "MoE", "dense": "dense"}


def anatomy(config: JambaConfig, mixer_parameters: list[int], feed_forward_parameters: list[int]) -> go.Figure:
    """Two boxes per layer, mixer below feed-forward as the residual stream passes them.

    Args:
        mixer_parameters, feed_forward_parameters: number of parameters per layer; 0 for an absent feed-forward.
    """
    boxes: dict[str, list[tuple[int, int, str]]] = {}
    for layer, (mixer, feed_forward) in enumerate(zip(config.mixers, config.feed_forwards, strict=True)):
        for row, kind, count in (
            (0, mixer, mixer_parameters[layer]),
            (1, feed_forward, feed_forward_parameters[layer]),
        ):
            if kind != "none":
                boxes.setdefault(kind, []).append((layer, row, _describe(config, layer, kind, count)))
    fig = go.Figure()
    for kind in (k for k in KIND_COLORS if k in boxes):
        layers, rows, hover = zip(*boxes[kind], strict=True)
        fig.add_bar(
            x=layers,
            y=[0.9] * len(layers),
            base=[row + 0.05 for row in rows],
            width=0.92,
            marker={"color": KIND_COLORS[kind], "line": {"width": 0}},
            name=KIND_NAMES[kind],
            text=[_SHORT[kind] if config.n_layers <= MAX_WRITTEN_LAYERS else ""] * len(layers),
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            textfont={"color": "white" if kind == "mamba" else "black"},
            hovertext=hover,
            hovertemplate="%{hovertext}<extra></extra>",
        )
    frame(fig, "Layers", _summary(config), height=270, barmode="overlay", showlegend=True)
    fig.update_xaxes(integer_axis(range(config.n_layers), "layer (index, first to last)"))
    rows = {"tickmode": "array", "tickvals": [0.5, 1.5], "ticktext": ["mixer", "feed-forward"]}
    fig.update_yaxes(title="part of the layer", range=[0, 2], showgrid=False, zeroline=False, **rows)
    return fig


def _describe(config: JambaConfig, layer: int, kind: str, parameters: int) -> str:
    shape = {
        "attention": f"{config.n_heads} query heads, {config.n_key_value_heads} key-value heads of {config.d_head}",
        "mamba": f"{config.d_inner} channels x {config.d_state} states, convolution {config.d_conv}",
        "mamba2": f"{config.mamba_n_heads} heads of {config.mamba_d_head} channels x {config.d_state} states, "
        f"{config.mamba_n_groups} groups, convolution {config.d_conv}",
        "moe": f"{config.num_experts} experts of {config.d_mlp}, top-{config.experts_per_token}",
        "dense": f"hidden width {config.d_mlp}",
    }[kind]
    return f"layer {layer}: {KIND_NAMES[kind]}<br>{shape}<br>{parameters:,} parameters"


def _summary(config: JambaConfig) -> str:
    counts = [
        (len(config.mamba_layers), "Mamba"),
        (len(config.mamba2_layers), "Mamba-2"),
        (len(config.attention_layers), "attention"),
        (len(config.moe_layers), "with experts"),
    ]
    return ", ".join(f"{count} {name}" for count, name in counts if count) + f" of {config.n_layers} layers"


MEMORY_LOOKS = {
    "weights": ("#009E73", "solid"),
    "KV cache": (KIND_COLORS["attention"], "solid"),
    "SSM and convolution state": (KIND_COLORS["mamba"], "solid"),
    "KV cache if all layers were attention": (GUIDE, "dot"),
}


def memory_by_length(lengths: Sequence[int], parts: Mapping[str, Sequence[int]]) -> go.Figure:
    """What one sequence takes beside the weights, by its length; both axes are logarithmic.

    Args:
        parts: bytes of each of ``MEMORY_LOOKS`` at every length; parts that take nothing are left out.
    """
    fig = go.Figure()
    for name, (color, dash) in MEMORY_LOOKS.items():
        values = parts.get(name, [])
        if any(values):
            fig.add_scatter(
                x=list(lengths), y=list(values), name=name, mode="lines+markers",
                line={"color": color, "dash": dash, "width": 2}, customdata=[readable_bytes(v) for v in values],
                hovertemplate=f"{name} at %{{x:,}} tokens: %{{customdata}}<extra></extra>",
            )  # fmt: skip
    frame(fig, "Memory by length", "one sequence, in the type of the weights; states in float32", height=380)
    marks = {"tickmode": "array", "tickvals": list(lengths), "ticktext": [readable_length(n) for n in lengths]}
    fig.update_xaxes(title="length of the sequence (tokens)", type="log", showgrid=False, zeroline=False, **marks)
    highest = max([1, *(v for values in parts.values() for v in values)])
    ticks = [1024**i * step for i in range(6) for step in (1, 32) if 1024**i * step <= 4 * highest]
    names = [readable_bytes(tick) for tick in ticks]
    grid = {"gridcolor": "rgba(128,128,128,0.25)", "zeroline": False}
    fig.update_yaxes(title="memory (bytes)", type="log", tickmode="array", tickvals=ticks, ticktext=names, **grid)
    below = {"orientation": "h", "yanchor": "bottom", "y": 0, "yref": "container", "xanchor": "left", "x": 0}
    return fig.update_layout(legend=below, showlegend=True, margin={"b": 110})


def readable_length(length: int) -> str:
    """As in ``32K``: 32 times 1024 tokens."""
    return f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else f"{length:,}"
