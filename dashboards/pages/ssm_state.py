"""SSM state: how much each Mamba layer holds, for how long, and what stands in one layer's state."""

from __future__ import annotations

import numpy as np
import streamlit as st

from jambascope.dashboards import widgets
from jambascope.dashboards.results import ssm_state as results
from jambascope.dashboards.session import View
from jambascope.studies.figures import ssm as figures
from jambascope.studies.figures.theme import named


def page(view: View) -> None:
    st.title("SSM state")
    config = view.model.config
    if not config.ssm_layers:
        st.info(
            "This model has no Mamba layers, so it keeps no SSM state: see the Attention page.", icon=":material/info:"
        )
        return
    left, right = st.columns([2, 10], gap="medium")
    with left:
        layer = widgets.choose_layer(config.ssm_layers, "mamba_layer", "Layer")
    with right:
        position = widgets.choose_position(view, "The state after this token is shown below.")
    widgets.show(figures.layer_norms(results.norms(view), view.texts, layer, position), "layer_norms")
    memory = results.remember(view, layer)
    st.caption(
        f"Channel groups: the {config.d_inner:,} channels of layer {layer}, sorted by their half-life (the median over "
        f"their {config.d_state} states) and split into {len(memory.groups)} groups of equal size. Half-life of an "
        "entry: ln 2 / (|A| · mean Δ) tokens, at the mean step size Δ over this prompt. "
        "Sizes are root mean squares: the Euclidean norm over the square root of the number of entries."
    )
    _over_time(view, memory, layer, position)
    order = np.concatenate(memory.groups)
    edges = np.cumsum([len(members) for members in memory.groups])[:-1].tolist()
    widgets.show(figures.half_lives(memory.half_lives, order, edges), "half_lives")
    widgets.show(figures.state_matrices(memory.states, order, view.texts, position), "state_matrices")


def _over_time(view: View, memory: results.Memory, layer: int, position: int) -> None:
    fig = figures.group_lines(
        memory.norms,
        memory.bounds,
        view.texts,
        title=f"State size over time, layer {layer}",
        subtitle="one line per group of channels",
        unit="state RMS",
        position=position,
    )
    widgets.show(fig, "group_norms")
    fig = figures.group_lines(
        results.retained(memory, position),
        memory.bounds,
        view.texts,
        title=f"What is left of earlier states after {named(view.texts[position], position)}",
        subtitle="mean over the group of exp(A · sum of Δ from each token to here)",
        unit="retention (share of 1)",
        position=position,
    )
    widgets.show(fig, "retention")
