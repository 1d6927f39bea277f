"""Router: which experts each token took with what weight, and how evenly experts are used."""

from __future__ import annotations

import streamlit as st

from jambascope.dashboards import widgets
from jambascope.dashboards.results import router as results
from jambascope.dashboards.session import View
from jambascope.hooks import routing
from jambascope.studies.figures import routing as figures

CHOSEN, ALL = "chosen experts", "all probabilities"


def page(view: View) -> None:
    st.title("Router")
    config = view.model.config
    if not config.moe_layers:
        st.info(
            "This model has no mixture-of-experts layers, so nothing is routed: the Overview shows its layers.",
            icon=":material/info:",
        )
        return
    left, middle, third, right = st.columns([2, 3, 3, 5], gap="medium")
    with left:
        layer = widgets.choose_layer(config.moe_layers, "moe_layer", "Layer")
    with middle:
        shown = st.segmented_control(
            "Weights", (CHOSEN, ALL), default=CHOSEN, required=True, key="weights", bind="query-params"
        )
    with third:
        stretched = widgets.choose_scale("Of router weights. Stretched: it ends at the largest weight shown.")
    with right:
        position = widgets.choose_position(view, "The token whose way through the layers is shown below.")
    routes = results.route(view)
    summaries = {i: routing.summarize(route) for i, route in routes.items()}
    weights = {i: (routing.kept_weights(r) if shown == CHOSEN else r.probabilities).numpy() for i, r in routes.items()}
    widgets.show(figures.token_routes(weights[layer], view.texts, layer, position, stretched), "token_routes")
    left, right = st.columns(2, gap="medium")
    with left:
        choices = len(view.ids) * config.experts_per_token
        loads = {i: summary.load.numpy() for i, summary in summaries.items()}
        widgets.show(figures.expert_loads(loads, choices, layer), "expert_loads")
    with right:
        path = {i: w[position] for i, w in weights.items()}
        widgets.show(figures.token_path(path, view.texts[position], position, stretched), "token_path")
    chosen = routes[layer]
    retained = routing.retained_mass(chosen.probabilities, chosen.indices).numpy()
    margin = routing.margin(chosen.probabilities).numpy()
    widgets.show(figures.certainty(retained, margin, view.texts, layer, position), "certainty")
    _table(summaries)


def _table(summaries: dict[int, routing.RoutingSummary]) -> None:
    st.markdown("##### Balance and certainty per layer, over this prompt")
    number = st.column_config.NumberColumn
    rows = [
        {
            "layer": layer,
            "CV": s.variation,
            "MaxVio": s.max_violation,
            "load entropy": s.load_entropy,
            "dead": s.dead_experts,
            "token entropy": s.token_entropy,
            "margin": s.margin,
            "retained": s.retained_mass,
        }
        for layer, s in summaries.items()
    ]
    columns = {
        "layer": number("Layer", width="small"),
        "CV": number("Load CV", format="%.3f", help="Standard deviation over mean of the load; 0 is balanced"),
        "MaxVio": number("MaxVio", format="%.3f", help="By what factor the busiest expert exceeds its share"),
        "load entropy": number("Load entropy (0 to 1)", format="%.3f", help="Over ln of the experts; 1 is balanced"),
        "dead": number("Dead experts", help="Experts that no token of this prompt chose"),
        "token entropy": number("Token entropy (nats)", format="%.3f", help="Of the router's probabilities, mean"),
        "margin": number("Top-1 minus top-2", format="%.3f", help="Difference of probabilities, mean over tokens"),
        "retained": number("Retained mass", format="%.3f", help="Sum of the kept probabilities, mean over tokens"),
    }
    widgets.table(rows, "balance", columns)
