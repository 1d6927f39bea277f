"""Patching: two prompts that differ in a word, and which activations carry the difference."""

from __future__ import annotations

from functools import partial
from typing import Any

import streamlit as st

from jambascope.dashboards import session, widgets, work
from jambascope.dashboards.results import patching as results
from jambascope.dashboards.results import patching_code, prompt_pairs
from jambascope.dashboards.results import patching_maps as maps
from jambascope.dashboards.results import patching_run as saving
from jambascope.dashboards.results.patching import CHANGE, DIFFERENCE, EFFECT, KINDS, MASS, METRICS, VALUE, Asked, Cell
from jambascope.dashboards.session import View
from jambascope.errors import InputError
from jambascope.hooks.sweep import PatchSweep
from jambascope.hooks.sweep.result import LEAST_DIFFERENCE
from jambascope.studies.figures import patching as figures
from jambascope.studies.figures.theme import named, signed_limit

MEANING = {
    "denoise": "clean values into the corrupted run: is this enough?",
    "noise": "corrupted values into the clean run: is this needed?",
}


def page(view: View) -> None:
    st.title("Patching")
    other = _corrupted(view)
    st.html(prompt_pairs.aligned(view.texts, other.texts))
    differing = results.differing(view, other)
    asked = _asked(view, other, differing[0])
    shown, heads = _display(view, asked)
    cells = results.cells_of(view.model, asked, differing[0])
    found = work.result(
        "patch",
        results.key_of(view, other, asked),
        results.computing(view, other, asked),
        start="Patch every cell",
        draw=partial(_maps, view, other, asked, shown, heads, None),
        about=f"{cells:,} patches of {len(asked.kinds)} nodes",
        automatic=cells <= results.AT_ONCE,
    )
    if found is None:
        return
    _runs(view, asked, differing, found.value)
    top = maps.top_cells(found.value, asked)
    cell = _choose_cell(view, other, asked, [cell for cell, *_ in top])
    _maps(view, other, asked, shown, heads, cell, found.value)
    _next_tokens(view, other, asked, cell)
    _top(view, other, asked, top)
    _save(view, other, asked)
    widgets.code(view, patching_code.code(view, other, asked, shown, cell))


# -- what is asked -----------------------------------------------------------------------------------------------


def _corrupted(view: View) -> View:
    """The corrupted prompt; it follows the clean one until its reader changes it."""
    default = prompt_pairs.counterpart(view.model, view.prompt)
    if st.session_state.get("corrupted", default) == st.session_state.get("corrupted_default"):
        st.session_state.corrupted = default
    st.session_state.corrupted_default = default
    left, right = st.columns([8, 4], gap="medium")
    with left:
        help = "As many tokens as the prompt in the sidebar, which is the clean one. Ctrl+Enter runs it."
        text = st.text_area("Corrupted prompt", default, 80, key="corrupted", bind="query-params", help=help)
    with right:
        pairs = prompt_pairs.pairs_of(view.model, session.examples(view.model))
        st.selectbox(
            "Example pairs", pairs, index=None, key="example_pair", on_change=_use_pair, args=(pairs,),
            placeholder="take a clean and a corrupted prompt",
        )  # fmt: skip
    if not text.strip():
        raise InputError("the corrupted prompt is empty; type one that differs from the clean one in a word")
    return session.view(view.address, text)


def _use_pair(pairs: dict[str, tuple[str, str]]) -> None:
    if (name := st.session_state.example_pair) is not None:
        st.session_state.prompt, st.session_state.corrupted = pairs[name]
        st.session_state.corrupted_default = pairs[name][1]


def _asked(view: View, other: View, first: int) -> Asked:
    left, middle, right = st.columns([3, 6, 3], gap="medium", vertical_alignment="bottom")
    with left:
        metric = _select("Metric", list(METRICS), "patch_metric")
    with middle:
        correct, wrong, labels = _tokens(view, other, metric)
    with right:
        help = "; ".join(f"{name}: {meaning}" for name, meaning in MEANING.items())
        direction = widgets.choose("Direction", tuple(MEANING), "direction", help)
    left, middle, right = st.columns([6, 3, 3], gap="medium")
    with left:
        kinds = _kinds(results.kinds_of(view.model))
        window = _window(kinds)
    with middle:
        layers = _range("Layers", "patch_layers", view.model.config.n_layers - 1)
    with right:
        positions = _range("Positions", "patch_positions", len(view.ids) - 1, first)
    return Asked(metric, correct, wrong, labels, tuple(kinds), window, direction, layers, positions)


def _tokens(view: View, other: View, metric: str) -> tuple[int, int, tuple[int, ...]]:
    """The tokens that a metric asks about; by default what the two runs expect first."""
    first = results.first_tokens(view, other)
    if metric == "KL divergence":
        st.caption("KL(clean ‖ patched) of the next token: 0 where the patched run predicts what the clean one does.")
        return (*first, ())
    names = [results.text_of(view, token) for token in first]
    if metric == MASS:
        given = _text("Labels, parted by blanks", "patch_labels", " ".join(names))
        labels = [results.token_of(view.model, "labels", text) for text in given.split()] if given else first
        return (*first, tuple(dict.fromkeys(labels)))
    fields = [("Token", "correct", 0), ("less that of", "wrong", 1)][: 2 if metric == DIFFERENCE else 1]
    found = list(first)
    for column, (title, key, which) in zip(st.columns(len(fields)), fields, strict=True):
        with column:
            given = _text(title, f"patch_{key}", names[which])
        found[which] = results.token_of(view.model, key, given) if given else first[which]
    if metric == DIFFERENCE and found[0] == found[1]:
        raise InputError(
            f"correct and wrong are both {results.text_of(view, found[0])!r}; a difference needs two tokens"
        )
    return (*found, ())


def _text(title: str, key: str, default: str) -> str:
    help = f"When left empty what the runs expect: {widgets.plain(default)}."
    return st.text_input(title, "", key=key, bind="query-params", placeholder=default, help=help).strip()


def _kinds(there: list[str]) -> list[str]:
    if any(kind not in there for kind in st.session_state.get("patch_nodes", [])):
        st.session_state.patch_nodes = [kind for kind in st.session_state.patch_nodes if kind in there]
    kinds = st.multiselect(
        "Nodes",
        there,
        [kind for kind in results.FIRST_KINDS if kind in there],
        key="patch_nodes",
        bind="query-params",
        help="\n".join(f"- {widgets.plain(kind)}: {KINDS[kind]}" for kind in there),
    )
    if not kinds:
        raise InputError(f"no nodes are chosen; choose at least one, such as {there[0]}")
    return kinds


def _window(kinds: list[str]) -> int:
    if results.WINDOWED not in kinds:
        return 1
    help = "Read-outs that see the patched state; after them it is the unpatched one again."
    return st.number_input("Window (read-outs)", 1, 64, 4, key="patch_window", bind="query-params", help=help)


def _range(title: str, key: str, last: int, first: int = 0) -> tuple[int, int]:
    """First and last of a stretch; ``first`` to ``last`` to begin with, and again for other prompts or models."""
    if last == 0:
        return 0, 0
    if st.session_state.setdefault(f"{key} of", (first, last)) != (first, last):
        st.session_state[f"{key} of"] = st.session_state[key] = (first, last)
    return st.slider(title, 0, last, (first, last), key=key, bind="query-params")


def _select(title: str, options: list, key: str, default: Any = None, help: str | None = None) -> Any:
    """One of many in a list, kept in the URL; what is left over from another question becomes the default."""
    default = options[0] if default not in options else default
    if st.session_state.get(key, default) not in options:
        st.session_state[key] = default
    at = options.index(default)
    return st.selectbox(title, options, at, key=key, bind="query-params", format_func=str, help=help)


# -- what is shown -----------------------------------------------------------------------------------------------


def _display(view: View, asked: Asked) -> tuple[str, str | int]:
    left, right = st.columns([6, 6], gap="medium")
    with left:
        help = "Normalised: 0 does nothing, 1 does what the whole other run would. Change: in units of the metric."
        shown = widgets.choose("Shown", (EFFECT, CHANGE, VALUE), "patch_shown", help)
    units = max((t.units for kind in asked.kinds for t in results.targets_of(view.model, asked, kind)), default=1)
    if units == 1:
        return shown, maps.EACH
    with right:
        help = "Each in a row of its own; the largest effect at each place; or one by its number."
        heads = _select(
            "Heads and experts", [maps.EACH, maps.LARGEST, *map(str, range(units))], "patch_heads", help=help
        )
    return shown, int(heads) if heads.isdecimal() else heads


def _runs(view: View, asked: Asked, differing: list[int], found: PatchSweep) -> None:
    clean, corrupted = float(found.clean[0, 0]), float(found.corrupted[0, 0])
    facts = [("Clean run", clean), ("Corrupted run", corrupted), ("Difference", clean - corrupted)]
    columns = st.columns([2, 2, 2, 6], vertical_alignment="center")
    for column, (name, value) in zip(columns, facts, strict=False):
        column.metric(name, f"{value:.4g}")
    columns[3].caption(
        f"Metric after the last token: {widgets.plain(results.metric_words(view, asked))} ({METRICS[asked.metric]}). "
        f"Before position {differing[0]} the prompts are the same, so that a patch there changes nothing."
    )
    if abs(clean - corrupted) < LEAST_DIFFERENCE:
        st.warning(
            f"The two runs differ by less than {LEAST_DIFFERENCE:g}, so shares of the difference mean nothing and are "
            "left blank: choose another metric or other tokens, or look at changes and raw values.",
            icon=":material/warning:",
        )


def _maps(
    view: View, other: View, asked: Asked, shown: str, heads: str | int, cell: Cell | None, found: PatchSweep
) -> None:
    """A map for each node, two side by side, on one scale."""
    arrays = maps.shown_of(found, shown)
    limit = 1.0
    if shown != EFFECT:
        limit = max(signed_limit(a.values[~a.isnull().values]) if a.notnull().any() else 0.0 for a in arrays.values())
    there = [kind for kind in asked.kinds if asked.node(kind).name in arrays]
    columns = st.columns(min(2, len(there)), gap="medium")
    for i, kind in enumerate(there):
        layers = [target.layer for target in results.targets_of(view.model, asked, kind)]
        drawn = maps.map_of(arrays[asked.node(kind).name], layers, heads)
        fig = figures.cell_map(
            f"{asked.node(kind).name}: {KINDS[kind]}",
            maps.rule_of(asked, shown) + drawn.note,
            drawn.values,
            drawn.rows,
            None if cell is None else maps.cells_of_map(drawn, kind, asked),
            results.both_texts(view, other)[asked.positions[0] : asked.positions[1] + 1],
            asked.positions[0],
            maps.unit_of(asked, shown),
            drawn.axis,
            limit or 1.0,
            shown != VALUE or asked.metric not in results.NEVER_NEGATIVE,
            None if cell is None or cell.kind != kind else maps.place_of(drawn, cell, asked),
        )
        key = "map_" + kind.replace(" ", "_")
        with columns[i % len(columns)]:
            if cell is None:  # while the sweep goes on
                widgets.show(fig, key)
            else:
                widgets.show(fig, key, on_select=partial(_take_click, key), selection_mode="points")


def _take_click(key: str) -> None:
    points = st.session_state[key].selection.points
    if points:
        names = ("cell_node", "cell_layer", "cell_position", "cell_unit")
        for name, value in zip(names, points[0]["customdata"], strict=True):
            st.session_state[name] = value


def _choose_cell(view: View, other: View, asked: Asked, top: list[Cell]) -> Cell:
    """By a click in a map, or here; to begin with the largest of ``top`` that is not the whole stream."""
    parts = [cell for cell in top if cell.kind != "resid_pre"] or top
    first = parts[0] if parts else Cell(asked.kinds[0], 0, asked.positions[0])
    columns = st.columns([3, 2, 4, 3], gap="medium")
    with columns[0]:
        kinds = [kind for kind in asked.kinds if results.targets_of(view.model, asked, kind)]
        kind = _select("Cell: node", kinds, "cell_node", first.kind)
    targets = {target.layer: target for target in results.targets_of(view.model, asked, kind)}
    with columns[1]:
        layer = _select("Cell: layer", list(targets), "cell_layer", first.layer)
    texts = results.both_texts(view, other)
    with columns[2]:
        positions = list(range(asked.positions[0], asked.positions[1] + 1))
        at = st.session_state.get(
            "cell_position", widgets.number_of_link("cell_position", positions[-1], first.position)
        )
        token = widgets.plain(texts[at if at in positions else first.position])
        position = _select(f"Cell: position, token “{token}”", positions, "cell_position", first.position)
    if targets[layer].units == 1:
        return Cell(kind, layer, position)
    with columns[3]:
        title = f"Cell: {targets[layer].unit_name.replace('_', ' ')}"
        return Cell(kind, layer, position, _select(title, list(range(targets[layer].units)), "cell_unit", first.unit))


def _next_tokens(view: View, other: View, asked: Asked, cell: Cell) -> None:
    """What the model expects before the patch, after it, and in the run that the values are from."""
    found = results.patch(view, other, asked, cell)
    rows, at = results.table_of(view, found), cell.position
    runs = dict(zip(("before", "patched", "source"), results.run_names(asked), strict=True))
    values = ", ".join(f"{name} {value:.4g}" for name, value in zip(runs.values(), found.values, strict=True))
    left, right = st.columns([7, 5], gap="medium")
    with left:
        fig = figures.next_tokens(
            [row["token"] for row in rows],
            [(name, [row[key] for row in rows]) for key, name in runs.items()],
            f"Next tokens with {results.cell_words(view, asked, cell)} patched at {named(view.texts[at], at)}",
            f"{asked.metric}: {values}",
        )
        widgets.show(fig, "patched_tokens")
    with right:
        number = st.column_config.NumberColumn
        columns = {
            "token": st.column_config.TextColumn("Token", width="small"),
            **{key: number(f"{name.partition(' ')[0]}", format="%.3g", width=80) for key, name in runs.items()},
            "change": number("Δ logit", format="%.3f", width=70, help="Patched less before"),
        }
        widgets.table(rows, "patched_table", columns, height="content")
        st.caption("Probabilities of the next token in the three runs; Δ logit: patched less before.")


def _top(view: View, other: View, asked: Asked, top: list[tuple[Cell, float, float]]) -> None:
    st.markdown("##### Largest changes of the metric, up to four of each node")
    if not top:
        st.caption("No cell was reached yet.")
        return
    texts = results.both_texts(view, other)
    rows = [
        {
            "cell": results.cell_words(view, asked, cell), "position": cell.position, "token": texts[cell.position],
            "effect": effect, "value": value,
        }
        for cell, effect, value in top
    ]  # fmt: skip
    number = st.column_config.NumberColumn
    columns = {
        "cell": "Cell",
        "position": number("Position", width="small", format="%d"),
        "token": "Token (clean/corrupted)",
        "effect": number("Normalised effect", format="%.3f"),
        "value": number("Metric, patched", format="%.4f"),
    }
    widgets.table(rows, "top_cells", columns)
    st.caption("The stream that enters layer 0 is the input itself and is left out.")


# -- kept as a run -----------------------------------------------------------------------------------------------


def _save(view: View, other: View, asked: Asked) -> None:
    with st.expander("Save as a study run", icon=":material/save:"):
        taken = saving.taken(asked.kinds)
        left_out = [kind for kind in asked.kinds if kind not in taken]
        st.caption(
            "The study activation_patching asks the same of these two prompts, in every layer and at every position, "
            "by logit difference, probability and rank, with its controls. The run is listed on the Runs page."
        )
        if left_out:
            st.caption(f"It does not patch {widgets.plain(', '.join(left_out))}: left out of the run.")
        spec = saving.spec_of(view, other, asked)
        st.code(saving.command_of(spec), language="bash", wrap_lines=True)
        found = work.result("save", saving.key_of(view, spec), saving.computing(spec), start="Save as a study run")
        if found is not None and found.value is not None:
            name = found.value.name
            st.success(
                f"Saved as {widgets.plain(name)}: [open it on the Runs page](/runs?run={name})", icon=":material/check:"
            )
        elif found is not None:
            st.caption("Stopped before it was finished: what was measured is kept, and pressing again goes on with it.")
