"""Overview: the anatomy of the model, the prompt's tokens, and what the model expects next."""

from __future__ import annotations

import streamlit as st

from jambascope.dashboards import widgets
from jambascope.dashboards.results import overview as results
from jambascope.dashboards.session import View
from jambascope.memory import readable_count
from jambascope.studies.figures.anatomy import anatomy
from jambascope.studies.figures.predictions import expectation

LISTED_VOCABULARY = 20_000
"""Vocabularies up to this size are listed."""


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
    _tokens(view, result)
    _vocabulary(view)


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
