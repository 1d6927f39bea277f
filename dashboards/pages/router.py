"""Router: which experts tokens take, how evenly and with whom they are used, by what, and what if they were not."""

from __future__ import annotations

import streamlit as st

from jambascope.dashboards import what_if, widgets
from jambascope.dashboards.pages import router_text
from jambascope.dashboards.results import router as results
from jambascope.dashboards.session import View
from jambascope.errors import InputError
from jambascope.hooks import routing
from jambascope.studies.figures import routing as figures

PROMPT, TEXT, WHAT_IF = "this prompt", "over a text", "what if"
CHOSEN, ALL = "chosen experts", "all probabilities"
MASKED, ZEROED, FORCED = "off, routed again", "off, output zero", "forced route"
KINDS = {MASKED: "masked", ZEROED: "zeroed", FORCED: "forced"}
ONE, EVERY = "this layer", "all MoE layers"
EVERYWHERE, HERE = "all positions", "the selected one"


def page(view: View) -> None:
    st.title("Router")
    config = view.model.config
    if not config.moe_layers:
        st.info(
            "This model has no mixture-of-experts layers, so nothing is routed: the Overview shows its layers.",
            icon=":material/info:",
        )
        return
    left, middle, right = st.columns([2, 4, 7], gap="medium")
    with left:
        layer = widgets.choose_layer(config.moe_layers, "moe_layer", "Layer")
    with middle:
        part = widgets.choose("Show", (PROMPT, TEXT, WHAT_IF), "router_part")
    if part == TEXT:
        router_text.show(view, layer)
        return
    with right:
        position = widgets.choose_position(view, "The token whose way through the layers is shown, or changed.")
    {PROMPT: _prompt, WHAT_IF: _what_if}[part](view, layer, position)


def _prompt(view: View, layer: int, position: int) -> None:
    left, right, _ = st.columns([3, 3, 7], gap="medium")
    with left:
        shown = widgets.choose("Weights", (CHOSEN, ALL), "weights")
    with right:
        stretched = widgets.choose_scale("Of router weights. Stretched: it ends at the largest weight shown.")
    routes = results.route(view)
    summaries = {i: routing.summarize(route) for i, route in routes.items()}
    weights = {i: (routing.kept_weights(r) if shown == CHOSEN else r.probabilities).numpy() for i, r in routes.items()}
    widgets.show(figures.token_routes(weights[layer], view.texts, layer, position, stretched), "token_routes")
    _loads(view, summaries, layer)
    left, right = st.columns([5, 7], gap="medium")
    with left:
        path = {i: w[position] for i, w in weights.items()}
        widgets.show(figures.token_path(path, view.texts[position], position, stretched), "token_path")
    with right:
        chosen = routes[layer]
        retained = routing.retained_mass(chosen.probabilities, chosen.indices).numpy()
        margin = routing.margin(chosen.probabilities).numpy()
        widgets.show(figures.certainty(retained, margin, view.texts, layer, position), "certainty")
    _table(view, summaries)
    widgets.code(view, results.prompt_code(layer))


def _loads(view: View, summaries: dict[int, routing.RoutingSummary], layer: int) -> None:
    config = view.model.config
    choices = len(view.ids) * config.experts_per_token
    loads = {i: summary.load.numpy() for i, summary in summaries.items()}
    left, right = st.columns(2, gap="medium")
    with left:
        widgets.show(figures.expert_loads(loads, choices, layer), "expert_loads")
    with right:
        chance = results.load_range(len(view.ids), config.experts_per_token, config.num_experts)
        widgets.show(figures.layer_load(loads[layer], choices, layer, chance), "layer_load")


def _table(view: View, summaries: dict[int, routing.RoutingSummary]) -> None:
    config = view.model.config
    st.markdown("##### Balance and certainty per layer, over this prompt")
    low, high = results.variation_range(len(view.ids), config.experts_per_token, config.num_experts)
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
    beyond = [str(layer) for layer, s in summaries.items() if s.variation > high]
    said = f"more uneven than that: layer {', '.join(beyond)}" if beyond else "no layer is more uneven than that"
    st.caption(
        f"When {len(view.ids):,} tokens choose evenly by chance, 95 % of load CVs lie between {low:.3f} and "
        f"{high:.3f}; {said}."
    )


# -- what if --------------------------------------------------------------------------------------------------


def _what_if(view: View, layer: int, position: int) -> None:
    edit = _choose_edit(view, layer, position)
    read = what_if.choose_read(view)
    if edit is None:
        return
    found = results.change(view, edit, read)
    what_if.show(view, found.predictions, read, edit.position)
    widgets.show(figures.route_changes(found.kept, view.texts, edit.position), "route_changes")
    widgets.code(view, results.what_if_code(edit, read))


def _choose_edit(view: View, layer: int, position: int) -> results.Edit | None:
    config = view.model.config
    first, second, third, fourth = st.columns([10, 6, 6, 6], gap="small", vertical_alignment="bottom")
    with first:
        help = (
            "Off, routed again: the router acts as if the experts did not exist. Off, output zero: routes stay, what "
            "the experts add is zero. Forced route: tokens go to the experts given, with the router's own weights."
        )
        kind = KINDS[widgets.choose("Experts are", (MASKED, ZEROED, FORCED), "expert_edit", help)]
    with second:
        experts = _choose_experts(config.num_experts, config.experts_per_token, kind)
    with third:
        where = widgets.choose("In", (ONE, EVERY), "expert_layers")
    with fourth:
        at = widgets.choose("At", (EVERYWHERE, HERE), "expert_positions")
    if not experts:
        st.info("Choose at least one expert.", icon=":material/info:")
        return None
    if kind == "forced" and len(experts) != config.experts_per_token:
        raise InputError(f"experts={list(experts)}: a route has {config.experts_per_token} experts; choose as many")
    layers = (layer,) if where == ONE else config.moe_layers
    return results.Edit(kind, experts, layers, None if at == EVERYWHERE else position)


def _choose_experts(count: int, slots: int, kind: str) -> tuple[int, ...]:
    """Experts, kept in the URL: any number to be turned off, as many as there are slots to be forced."""
    forced = kind == "forced"
    key = "experts_forced" if forced else "experts_off"
    if any(expert >= count for expert in st.session_state.get(key, ())):  # left over from another model
        st.session_state[key] = [expert for expert in st.session_state[key] if expert < count]
    most = slots if forced else count
    chosen = st.multiselect(
        "Expert of each slot" if forced else "Which experts",
        range(count),
        default=list(range(slots)) if forced else [0],
        max_selections=most,
        key=key,
        bind="query-params",
        format_func=str,
    )
    return tuple(chosen)
