"""The part of the Router page that reads text: which experts go together, and which tokens and domains use them."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from jambascope.dashboards import widgets, work
from jambascope.dashboards.results import router as results
from jambascope.dashboards.session import View
from jambascope.hooks.routing import Routing, expert_load
from jambascope.studies.corpus import speaks_zoo
from jambascope.studies.figures import routing as figures

PROMPT, PACKAGED, FILES = "this prompt", "packaged language", "text files"
SHARES, BEYOND = "share", "beyond independence"
MEGABYTES = 2
MOST_FILES = 8
SHOWN_TOKENS = 16


def show(view: View, layer: int) -> None:
    """Choose a text, and what its tokens do in one MoE layer."""
    left, middle, right = st.columns([4, 2, 2], gap="medium", vertical_alignment="bottom")
    with left:
        source = widgets.choose("Text", _sources(view), "router_text", "Of which the tokens are counted.")
    with middle:
        help = "A token counts that occurs so often; of a short text, as often as its most frequent one."
        least = st.number_input("Occurrences at least", 1, 1000, 10, key="least", bind="query-params", help=help)
    if source == PROMPT:
        key = (view.key, "prompt", layer)
        _together(key, results.route(view)[layer], layer)
        shown = _words(view, key, results.route(view)[layer], layer, least)
        widgets.code(view, results.text_code(layer, shown, 0, 0, None))
        return
    with right:
        help = f"Windows of {results.LENGTH} tokens, of each domain or file."
        windows = st.number_input("Windows of each", 1, 256, 16, key="windows", bind="query-params", help=help)
    files = _upload() if source == FILES else ()
    if files is not None:
        _of_text(view, layer, least, windows, files)


def _sources(view: View) -> tuple[str, ...]:
    if view.model.tokenizer is None:
        return (PROMPT,)
    return (PACKAGED, FILES, PROMPT) if speaks_zoo(view.model.tokenizer) else (FILES, PROMPT)


def _upload() -> tuple[results.Text, ...] | None:
    """The files given, each a domain; None while there are none. They are read as text and stay in memory."""
    given = st.file_uploader(
        f"Text files (UTF-8), up to {MOST_FILES} of at most {MEGABYTES} MB, each a domain; not part of the link",
        accept_multiple_files=True,
        max_upload_size=MEGABYTES,
        key="router_files",
    )
    if len(given) > MOST_FILES:
        st.warning(f"Only the first {MOST_FILES} of {len(given)} files are read.", icon=":material/warning:")
    return tuple(results.Text.of(file.name, file.getvalue()) for file in given[:MOST_FILES]) or None


def _of_text(view: View, layer: int, least: int, windows: int, files: tuple[results.Text, ...]) -> None:
    asked = (view.checkpoint, tuple(file.key for file in files), windows)
    found = work.result(
        "router_text",
        asked,
        results.reader(view, files, windows),
        start="Read the text",
        about=f"{windows} windows of {results.LENGTH} tokens of each {'file' if files else 'domain'}",
        automatic=True,
    )
    if found is None:
        return
    read = found.value
    key = (asked, len(read.domains), layer)
    _about(read, layer)
    left, right = st.columns(2, gap="medium")
    with left:
        _together(key, read.routes[layer], layer)
    with right:
        _domains((asked, len(read.domains)), read, layer)
    if len(read.names) > 1:
        _every_layer((asked, len(read.domains)), read)
    shown = _words(view, key, read.routes[layer], layer, least)
    length = min(results.LENGTH, view.model.config.n_ctx)
    lines = results.text_code(layer, shown, windows, length, [file.name for file in files])
    widgets.code(view, lines, prompt=False)


def _about(read: results.Read, layer: int) -> None:
    names = ", ".join(widgets.plain(name) for name in read.names)
    unknown = f" {read.unknown:.0%} of them are not in the model's vocabulary." if read.unknown > 0.005 else ""
    st.caption(
        f"{len(read.routes[layer]):,} tokens in {len(read.domains):,} windows of {len(read.names)} "
        f"{'domains' if len(read.names) > 1 else 'domain'}: {names}.{unknown}"
    )


def _domains(key: tuple, read: results.Read, layer: int) -> None:
    if len(read.names) == 1:
        st.caption("One file is one domain: give several to compare what they use.")
        return
    found = results.domains(key, layer, read)
    names = [read.names[i] for i in found.labels.tolist()]
    row, expert = divmod(int((found.share - found.overall).argmax()), found.share.shape[1])
    st.caption(
        f"Most beyond what all domains share: {found.share[row, expert]:.0%} of the tokens of "
        f"{widgets.plain(names[row])} use expert {expert} [{found.low[row, expert]:.0%}, "
        f"{found.high[row, expert]:.0%}: 95 % over windows]; of all tokens {found.overall[expert]:.0%} do."
    )
    widgets.show(figures.specialization(found.share.numpy(), names, found.chance, layer), "domain_layer")


def _every_layer(key: tuple, read: results.Read) -> None:
    of_layer = {i: results.domains(key, i, read) for i in read.routes}
    first = of_layer[min(of_layer)]
    names = [read.names[i] for i in first.labels.tolist()]
    shares = {i: found.share.numpy() for i, found in of_layer.items()}
    fig = figures.domain_shares("Domains and experts, every layer", shares, names, first.chance)
    widgets.show(fig, "domain_shares")


def _words(view: View, key: tuple, route: Routing, layer: int, least: int) -> int:
    """Tokens and the experts they use; returns how often a token had to occur."""
    shown = results.words((view.checkpoint, key), least, view, route)
    found = shown.found
    st.markdown(f"##### Which tokens use which expert of layer {layer}")
    loads = expert_load(route.indices, route.num_experts).tolist()
    rows = [{"expert": e, "load": 100 * loads[e], "tokens": _listed(shown, own, e)} for e, own in enumerate(shown.top)]
    number = st.column_config.NumberColumn
    columns = {
        "expert": number("Expert", width="small"),
        "load": number("Load (%)", width="small", format="%.1f", help="Share of all choices"),
        "tokens": st.column_config.TextColumn(
            "Its tokens: the share of them that uses it (how many there are)", width=900
        ),
    }
    widgets.table(rows, "expert_tokens", columns)
    st.caption(
        f"Of {len(found.labels):,} tokens that occur {shown.least} times or more, the favourite expert has "
        f"{found.top.value:.0%} on average (shuffled: {found.shuffled.mean:.0%}; an even choice: {found.chance:.0%})."
    )
    each = max(1, SHOWN_TOKENS // route.num_experts)
    picked = list(dict.fromkeys(row for own in shown.top for row in own[:each]))[: 2 * SHOWN_TOKENS]
    names = [shown.names[row] for row in picked]
    widgets.show(
        figures.specialization(found.share[picked].numpy(), names, found.chance, layer, "token"), "token_shares"
    )
    return shown.least


def _listed(shown: results.Words, rows: Sequence[int], expert: int) -> str:
    used = [row for row in rows if shown.found.share[row, expert] > 0]
    return "   ".join(
        f"{shown.names[row]} {shown.found.share[row, expert]:.2f} ({int(shown.found.tokens[row])})" for row in used
    )


def _together(key: tuple, route: Routing, layer: int) -> None:
    if route.experts_per_token == 1:
        st.caption("Tokens use one expert each, so none are chosen together.")
        return
    pairs = results.together(key, route)
    shown = widgets.choose(
        "Experts chosen together",
        (SHARES, BEYOND),
        "coactivation",
        "Beyond independence: less what choices with these loads, and nothing else in common, would give.",
    )
    expected = pairs.expected.numpy() if shown == BEYOND else None
    widgets.show(figures.coactivation(pairs.share.numpy(), pairs.chance, layer, expected), "coactivation_map")
