"""Overview: the anatomy of the model, the prompt's tokens, what the model expects next, and where inside it arises."""

from __future__ import annotations

import numpy as np
import streamlit as st

from jambascope.dashboards import widgets
from jambascope.dashboards.results import overview as results
from jambascope.dashboards.session import View
from jambascope.errors import InputError
from jambascope.memory import readable_bytes, readable_count
from jambascope.studies.figures.anatomy import anatomy, memory_by_length, readable_length
from jambascope.studies.figures.parts import layer_map
from jambascope.studies.figures.predictions import contributions, expectation, logit_lens
from jambascope.studies.figures.theme import KIND_NAMES, label, named

LISTED_VOCABULARY = 20_000
"""Vocabularies up to this size are listed."""
LENS, ATTRIBUTION, MEMORY = "logit lens", "logit attribution", "memory"
QUANTITIES = {
    "next token": "target",
    "rank of it": "rank",
    "likeliest token": "top",
    "entropy": "entropy",
    "KL to the end": "kl",
}
"""What the lens's colours say."""


def page(view: View) -> None:
    st.title("Overview")
    _model(view)
    position, k = _controls(view)
    result = results.predict(view, position, k)
    left, right = st.columns([5, 7], gap="medium")
    with left:
        _next_token_table(view, result, position)
    with right:
        widgets.show(expectation(view.texts, result.surprisal, result.entropy, position), "expectation")
    part = widgets.choose("Look inside", (LENS, ATTRIBUTION, MEMORY), "inside")
    start, tokens = 0, None
    if part == LENS:
        start = _lens(view, position, result.likeliest)
    elif part == ATTRIBUTION:
        tokens = _attribution(view, position)
    else:
        _memory(view)
    _tokens(view, result)
    _vocabulary(view)
    widgets.code(view, results.code(position, k, part, start, tokens))


def _model(view: View) -> None:
    config, counts = view.model.config, results.parameters(view)
    facts = [
        ("Parameters", readable_count(counts.total), f"{counts.total:,}; tied ones are counted once"),
        (
            "Active per token",
            readable_count(counts.active),
            f"{counts.active:,}: of the experts only those a token is sent to",
        ),
        ("Layers", str(config.n_layers), None),
        ("Width (d_model)", f"{config.d_model:,}", None),
        ("Vocabulary", f"{config.d_vocab:,}", None),
        ("Prompt", f"{len(view.ids):,} tokens", None),
        ("Weights", f"{str(view.model.dtype).removeprefix('torch.')}, {view.model.device}", None),
    ]
    for column, (name, value, help) in zip(st.columns(len(facts)), facts, strict=True):
        column.metric(name, value, help=help)
    widgets.show(anatomy(config, counts.mixers, counts.feed_forwards), "anatomy")


def _controls(view: View) -> tuple[int, int]:
    left, right = st.columns([9, 3], gap="medium")
    with left:
        position = widgets.choose_position(view, "The model's prediction after this token is shown below.")
    with right:
        most = min(50, view.model.config.d_vocab)
        widgets.keep_within("top_k", 1, most)
        k = st.number_input("Candidates", 1, most, min(10, most), key="top_k", bind="query-params")
    return position, k


def _next_token_table(view: View, result: results.Predictions, position: int) -> None:
    after = widgets.plain(view.texts[position])
    st.markdown(f"##### Next token after “{after}” ({position})")
    follows = ""
    if result.next_rank is not None:
        came, surprisal = widgets.plain(view.texts[position + 1]), result.surprisal[position]
        follows = f" The prompt goes on with “{came}”: rank {result.next_rank}, surprisal {surprisal:.3f} nats."
    st.caption(f"Entropy {result.entropy[position]:.3f} nats.{follows}")
    rows = [
        {"rank": c.rank, "token": c.text, "id": c.token_id, "probability": c.probability, "logit": c.logit}
        for c in result.candidates
    ]
    highest = max(row["probability"] for row in rows)
    number = st.column_config.NumberColumn
    columns = {
        "rank": number("Rank", width=50, help="0 is the likeliest"),
        "token": st.column_config.TextColumn("Token", width="small"),
        "id": number("Id", width=60, format="%d"),
        "probability": st.column_config.ProgressColumn(
            "Probability", format="%.3g", min_value=0, max_value=highest, help="The bar is relative to the first"
        ),
        "logit": number("Logit", width="small", format="%.3f"),
    }
    widgets.table(rows, "next_tokens", columns, height="content")


def _lens(view: View, position: int, likeliest: int) -> int:
    """What each layer would predict; the first position that is shown."""
    left, right = st.columns(2, gap="medium")
    with left:
        quantity = QUANTITIES[widgets.choose("Colours", tuple(QUANTITIES), "lens_of")]
    latest, start, note = len(view.ids) - results.WINDOW, 0, ""
    if latest > 0:
        widgets.keep_within("lens_from", 0, latest)
        start = right.slider("First position", 0, latest, latest, key="lens_from", bind="query-params")
        note = f"{results.WINDOW} of {len(view.ids):,} positions; "
    lens = results.lens(view, start, likeliest)
    tokens = view.texts[start : start + results.WINDOW]
    fig = logit_lens(lens, tokens, quantity, position, note)
    widgets.show(fig, "logit_lens", on_select=_take_click, selection_mode="points")
    if start + len(tokens) == len(view.ids):
        own = widgets.plain(lens.targets[-1])
        st.caption(f"Nothing follows the last token: there the model's own choice is followed, “{own}”.")
    return start


def _take_click() -> None:
    points = st.session_state.logit_lens.selection.points
    if points:
        st.session_state.position = points[0]["customdata"]


def _attribution(view: View, position: int) -> tuple[int, int] | None:
    """Which parts speak for one token against another; the ids of the two."""
    ranked = results.predict(view, position, 3).candidates
    if len(ranked) < 2:
        st.info("A vocabulary of one token has nothing to compare.", icon=":material/info:")
        return None
    left, right = st.columns(2, gap="medium")
    given = left.text_input(
        "Token", key="target", bind="query-params", placeholder=f"the likeliest: {ranked[0].text}"
    ).strip()
    target = results.token_id(view, given, "Token") if given else ranked[0].token_id
    rival = next(candidate for candidate in ranked if candidate.token_id != target)
    given = right.text_input(
        "Against", key="against", bind="query-params", placeholder=f"the likeliest other: {rival.text}"
    ).strip()
    other = results.token_id(view, given, "Against") if given else rival.token_id
    if target == other:
        raise InputError(f"Token and Against are both {given!r}; give two different tokens")
    found = results.attribute(view, position, target, other)
    names = [view.model.to_string([i]) for i in (target, other)]
    total, parts = float(found.logits), results.contributions(view, found)
    left, right = st.columns([7, 5], gap="medium")
    with left:
        widgets.show(contributions(parts, *names, total, view.texts[position], position), "contributions")
    with right:
        _layer_map(view, found, names, position)
    return target, other


def _layer_map(view: View, found: results.LogitAttribution, names: list[str], position: int) -> None:
    config = view.model.config
    values = found.by_layer(config.n_layers)[..., 0, 0].numpy()
    kinds = list(zip(config.mixers, config.feed_forwards, strict=True))
    values[[(pair[1] == "none") for pair in kinds], 1] = np.nan
    hover = [
        [f"layer {i}, {KIND_NAMES.get(kind, 'none')}<br>{value:+.4f}" for kind, value in zip(pair, row, strict=True)]
        for i, (pair, row) in enumerate(zip(kinds, values, strict=True))
    ]
    subtitle = f"“{label(names[0])}” less “{label(names[1])}”, after {named(view.texts[position], position)}"
    unit, columns = "added to the difference of logits", ("mixer", "feed-forward")
    fig = layer_map("By layer", subtitle, config.mixers, columns, values, hover, unit)
    widgets.show(fig.update_xaxes(title="part of the layer"), "attribution_map")


def _memory(view: View) -> None:
    """Bytes of weights and of what a sequence adds."""
    memory = results.memory(view)
    left, right = st.columns([6, 6], gap="medium")
    with left:
        widgets.show(memory_by_length(results.LENGTHS, memory.parts()), "memory_by_length")
    rows = [
        {
            "length": readable_length(length),
            "kv": readable_bytes(memory.kv(length)),
            "state": readable_bytes(memory.state),
            "weights": readable_bytes(memory.weights),
            "all": readable_bytes(memory.kv(length) + memory.state + memory.weights),
        }
        for length in results.LENGTHS
    ]
    titles = {"length": "Tokens", "kv": "KV cache", "state": "SSM state", "weights": "Weights", "all": "Together"}
    with right:
        st.markdown("##### What one sequence takes")
        st.caption(
            f"Keys and values: {readable_bytes(memory.kv_per_token)} for each token. SSM states and the last inputs of "
            f"convolutions: {readable_bytes(memory.state)} at any length."
        )
        widgets.table(rows, "memory", titles, height="content")


def _tokens(view: View, result: results.Predictions) -> None:
    with st.expander(f"The prompt as {len(view.ids):,} tokens", expanded=len(view.ids) <= 64):
        unexpected = [None, *result.surprisal.tolist()]
        rows = [
            {"position": i, "token": text, "id": token, "surprisal": s, "entropy": e}
            for i, (text, token, s, e) in enumerate(
                zip(view.texts, view.ids, unexpected, result.entropy.tolist(), strict=True)
            )
        ]
        number = st.column_config.NumberColumn
        columns = {
            "position": number("Position", width="small"),
            "token": st.column_config.TextColumn("Token"),
            "id": number("Id", width="small", format="%d"),
            "surprisal": number("Surprisal (nats)", format="%.3f"),
            "entropy": number("Entropy after it (nats)", format="%.3f"),
        }
        widgets.table(rows, "tokens", columns)


def _vocabulary(view: View) -> None:
    size = view.model.config.d_vocab
    if view.model.tokenizer is None or size > LISTED_VOCABULARY:
        return
    with st.expander(f"The vocabulary: {size:,} tokens"):
        entries = sorted(view.model.tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        columns = {"id": st.column_config.NumberColumn("Id", width="small"), "token": "Token"}
        widgets.table([{"id": i, "token": t} for t, i in entries], "vocabulary", columns, height=330)
