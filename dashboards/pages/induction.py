"""Induction: which heads match tokens and copy, by every score; and whether repetition depends on them."""

from __future__ import annotations

import math
from functools import partial

import plotly.graph_objects as go
import streamlit as st

from jambascope.dashboards import widgets, work
from jambascope.dashboards.results import induction as results
from jambascope.dashboards.results.induction import Drawn, Score
from jambascope.dashboards.session import View
from jambascope.hooks.label_ablation import Head, HeadAblation
from jambascope.studies.figures import attention as figures
from jambascope.studies.figures.estimates import Estimate, estimates
from jambascope.studies.figures.heads import Effect, effects, score_map
from jambascope.studies.figures.theme import MAX_NAMED_TOKENS

RANDOM, PROMPT = "random tokens", "this prompt"
HIGHEST = "highest score"
MOST_SHOWN = 12
COUNTS = (1, 2, 4, 8, 16)
DRAWS = 20
WHAT = {
    "clean": "the model as it is",
    "effect": "change without the heads",
    "random_effect": "change without random heads",
    "difference": "the heads less random ones",
}
MEANINGS = {
    "induction": "attention to what followed the current token before",
    "previous token": "attention to the token before",
    "duplicate": "attention to earlier places of the same token",
    results.OV: "whether its weights raise the token they read (eigenvalues)",
    results.LOGIT: "of the logits it raises, those of tokens attended to",
}

SHORT = {
    **{name: name for name in results.ALL},
    "previous token": "previous",
    results.OV: "weights",
    results.LOGIT: "logits",
}
"""For the heads of columns."""


def page(view: View) -> None:
    st.title("Induction")
    config = view.model.config
    if not config.attention_layers:
        st.info(
            "This model has no attention layers, so it has no heads to score. Where its Mamba layers look is on the "
            "Attention page (hidden attention), and what they remember on the SSM state page.",
            icon=":material/info:",
        )
        return
    name, source, drawn, chosen = _settings(view)
    found = work.result(
        "head scores",
        (view.checkpoint, drawn),
        partial(results.on_random_tokens, view.model, drawn),
        start="Score heads",
        automatic=True,
    )
    if found is None:
        return
    on_prompt = work.result(
        "head scores on the prompt",
        view.key,
        partial(results.on_prompt, view),
        start="Score heads on the prompt",
        automatic=True,
    )
    if on_prompt is None:
        return
    random, prompt = found.value, on_prompt.value
    score = prompt.get(name, None) if source == PROMPT and name != results.OV else random.get(name)
    if score is None:
        st.info(f"There is no {name} score: {_why_none(source)}", icon=":material/info:")
        return
    order = results.ranked(config.attention_layers, score)
    layer, head = _head_called(chosen, order)
    _maps(view, name, source, score, random, prompt, order, (layer, head))
    _table(view, order, random, prompt)
    _one_head(view, name, drawn, (layer, head), random, prompt)
    more = _ablation(view, name, drawn, order)
    shown = tuple(key for key in prompt if key in results.NAMES.values())
    widgets.code(view, results.code(drawn, layer, head, shown) + more)


def _why_none(source: str) -> str:
    if source == PROMPT:
        return "in this prompt no token has such a place to look at."
    return "the scoring was stopped before it."


def _settings(view: View) -> tuple[str, str, Drawn, str]:
    config = view.model.config
    left, right = st.columns([3, 2], gap="medium")
    with left:
        name = widgets.choose("Score", results.ALL, "induction_score", "Which heads are ranked by.")
    with right:
        source = widgets.choose(
            "Measured on", (RANDOM, PROMPT), "scored_on", "Copying (OV) is of the weights: the same on any tokens."
        )
    left, middle, right, last, _ = st.columns([2, 2, 2, 3, 6], gap="medium")
    with left:
        length = widgets.choose_layer(
            results.lengths(view.model), "random_length", "Random tokens", "So many different ones, said twice."
        )
    with middle:
        sequences = widgets.choose_layer((32, 8, 128), "random_sequences", "Sequences")
    with right:
        seed = widgets.choose_layer(tuple(range(10)), "random_seed", "Seed")
    with last:
        names = [_called((layer, head)) for layer in config.attention_layers for head in range(config.n_heads)]
        head = widgets.choose_layer(
            (HIGHEST, *names), "induction_head", "Head", "Which is shown large: L layer, H head."
        )
    return name, source, Drawn(sequences, length, seed), head


def _head_called(name: str, order: list[Head]) -> Head:
    return next((head for head in order if _called(head) == name), order[0])


def _called(head: Head) -> str:
    return f"L{head[0]} H{head[1]}"


# -- every head ------------------------------------------------------------------------------------------------


def _maps(
    view: View,
    name: str,
    source: str,
    score: Score,
    random: dict[str, Score],
    prompt: dict[str, Score],
    order: list[Head],
    chosen: Head,
) -> None:
    layers, signed = view.model.config.attention_layers, name in results.SIGNED
    where = "the weights" if name == results.OV else source
    left, right = st.columns([5, 6], gap="medium")
    with left:
        hover = [
            [_said(score, layer, row, head) for head in range(score.values.shape[1])]
            for row, layer in enumerate(layers)
        ]
        fig = score_map(
            f"{name[0].upper()}{name[1:]}, on {where}", MEANINGS[name], layers, score.values, hover,
            [chosen], f"{name} score", signed=signed, clickable=True,
        )  # fmt: skip
        widgets.show(fig, "score_map", on_select=_take_head, selection_mode="points")
        st.caption("Click a head to see its pattern below.")
    with right:
        widgets.show(_ranking(view, name, random.get(name), prompt.get(name), order), "ranking")


def _said(score: Score, layer: int, row: int, head: int) -> str:
    text = f"layer {layer}, head {head}: {score.values[row, head]:.3f}"
    if score.low is not None:
        text += f" [{score.low[row, head]:.3f}, {score.high[row, head]:.3f}], n = {score.n}"
    if score.control is not None:
        text += f"<br>control {score.control[row, head]:.3f}"
    return text


def _ranking(view: View, name: str, random: Score | None, prompt: Score | None, order: list[Head]) -> go.Figure:
    """The first heads with intervals, beside chance, the control and the prompt."""
    layers, points = list(view.model.config.attention_layers), []
    for layer, head in order[:MOST_SHOWN]:
        at, place = (layers.index(layer), head), _called((layer, head))
        if random is not None:
            low, high = (math.nan if end is None else float(end[at]) for end in (random.low, random.high))
            series = "weights" if name == results.OV else RANDOM
            points.append(Estimate(place, series, float(random.values[at]), low, high, random.chance))
            if random.control is not None:
                points.append(Estimate(place, "control", float(random.control[at])))
        if prompt is not None:
            points.append(Estimate(place, PROMPT, float(prompt.values[at]), chance=prompt.chance))
    n = "" if random is None or random.low is None else f"; means of {random.n} sequences, 95 % intervals"
    control = {
        results.LOGIT: "control: tokens of other positions",
        results.OV: "chance: the central 95 % of random heads",
    }.get(name, "control: the same tokens in random order")
    fig = estimates(f"Heads by {name}", control + n, points, "head", f"{name} score")
    return fig


def _take_head() -> None:
    points = st.session_state.score_map.selection.points
    if points:
        st.session_state.induction_head = _called(tuple(points[0]["customdata"]))


def _table(view: View, order: list[Head], random: dict[str, Score], prompt: dict[str, Score]) -> None:
    number = st.column_config.NumberColumn
    rows = results.rows(view.model.config.attention_layers, order, random, prompt)
    columns = {name: number(name.capitalize(), width="small") for name in ("rank", "layer", "head")}
    for name in random:
        columns[name] = number(SHORT[name].capitalize(), format="%.3f", help=f"{name}: {MEANINGS[name]}")
    for name in prompt:
        about = f"{name} on this prompt: {MEANINGS[name]}"
        columns[f"{name}, prompt"] = number(f"Prompt {SHORT[name]}", format="%.3f", help=about)
    widgets.table(rows, "head_scores", columns, height=318 if len(rows) > 8 else "auto")


# -- one head --------------------------------------------------------------------------------------------------


def _one_head(
    view: View, name: str, drawn: Drawn, head: Head, random: dict[str, Score], prompt: dict[str, Score]
) -> None:
    st.subheader("One head")
    pattern, beside = st.columns(2, gap="medium")
    found = results.example(view, drawn, *head)
    title = f"Layer {head[0]}, head {head[1]}, on the first of the random sequences"
    if len(found.ids) <= MAX_NAMED_TOKENS:
        fig = figures.token_pattern(found.pattern, figures.Shown(title), found.texts, found.texts)
    else:
        fig = figures.pooled(figures.pool(found.pattern, figures.LARGE_CELLS), figures.Shown(title), found.texts)
    if name in found.targets:
        figures.mark_targets(fig, *found.targets[name])
    with pattern:
        widgets.show(fig, "random_pattern")
    with beside:
        st.caption(
            "Every score of this head. The control is, by the score, the same tokens in random order, or others."
        )
        _scores_of(results.rows_of(view.model.config.attention_layers, head, random, prompt))
        if name in found.targets:
            st.caption(f"Circles in the pattern: where a head of the kind “{name}” would look, and nowhere else.")
        if len(found.ids) > MAX_NAMED_TOKENS:
            st.caption("With fewer random tokens (chosen above) the pattern names them.")


def _scores_of(rows: list[dict]) -> None:
    titles = {
        "score": "Score",
        "random": "Random tokens",
        "interval": "95 % interval",
        "chance": "Chance",
        "control": "Control",
        "prompt": "This prompt",
    }
    widgets.table(rows, "scores_of_head", {key: st.column_config.TextColumn(title) for key, title in titles.items()})


# -- confirmation ----------------------------------------------------------------------------------------------


def _ablation(view: View, name: str, drawn: Drawn, order: list[Head]) -> str:
    """Take the first heads away on request; the lines of code that do the same."""
    st.subheader("Does repetition depend on them?")
    most = len(order) // 2
    if most < 1:
        st.info("This model has one head, so that there is no other to compare with.", icon=":material/info:")
        return ""
    left, middle, right = st.columns([2, 3, 7], gap="medium", vertical_alignment="bottom")
    with left:
        k = widgets.choose_layer([n for n in COUNTS if n <= most], "ablate_count", "Heads taken away")
    with middle:
        ablation = widgets.choose(
            "Replaced by", ("mean", "zero"), "ablate_with", "What stands in for what a head reads."
        )
    heads = tuple(order[:k])
    with right:
        names = ", ".join(f"layer {layer} head {head}" for layer, head in heads)
        st.caption(f"First by {name}: {names}. Tested on fresh sequences, against as many random heads.")
    found = work.result(
        "induction ablation",
        (view.checkpoint, drawn, heads, ablation),
        partial(results.ablate, view.model, drawn, heads, ablation, DRAWS),
        start="Take them away",
        draw=_effects,
        about=f"The loss of repeated tokens without them, and without up to {DRAWS} sets of other heads.",
    )
    if found is None:
        return ""
    if found.value is not None:
        _effects(found.value)
    return results.code_of_ablation(drawn, heads, ablation, DRAWS)


def _effects(found: dict[str, HeadAblation]) -> None:
    losses = [p for field in ("loss", "loss_before") for p in _points(field, found[field])]
    left, right = st.columns([3, 2], gap="medium")
    with left:
        widgets.show(effects("Change of loss without the heads", losses, "nats per token"), "ablation_loss")
    with right:
        fig = effects("Change of accuracy", _points("accuracy", found["accuracy"]), "share of repeated tokens")
        widgets.show(fig, "ablation_accuracy")
    st.markdown(f"{_sentence('loss', found['loss'], 'nats')} {_sentence('loss_before', found['loss_before'], 'nats')}")
    number = st.column_config.NumberColumn
    rows = [
        {"measure": results.FIELDS[field]} | row | {"what": WHAT[row["what"]]}
        for field, one in found.items()
        for row in one.rows()
    ]
    columns = {"measure": st.column_config.TextColumn("Measure"), "what": st.column_config.TextColumn("What")}
    titles = {"mean": "Mean", "low": "Low", "high": "High", "p_value": "p"}
    columns |= {key: number(title, format="%.3f") for key, title in titles.items()}
    columns["n"] = number("Sequences")
    widgets.table(rows, "ablation_rows", columns, height="content")


def _points(field: str, found: HeadAblation) -> list[Effect]:
    rows = {row["what"]: row for row in found.rows()}
    sets = tuple((found.random - found.clean).mean(1).tolist())
    k = len(found.heads)
    return [
        Effect(results.FIELDS[field], heads, k, *(rows[what][end] for end in ("mean", "low", "high")), own)
        for heads, what, own in (("found", "effect", ()), ("random", "random_effect", sets))
    ]


def _sentence(field: str, found: HeadAblation, unit: str) -> str:
    rows = {row["what"]: row for row in found.rows()}
    own, random = (_number(rows[what]) for what in ("effect", "random_effect"))
    sets = len(found.random)
    return (
        f"Loss {results.FIELDS[field]}: {_number(rows['clean'], sign='')} {unit} as the model is, {own} without the "
        f"heads, {random} without random ones; p = {found.p_value:.2g} against {sets} random "
        f"{'set' if sets == 1 else 'sets'}."
    )


def _number(row: dict, sign: str = "+") -> str:
    return f"{row['mean']:{sign}.3f} \\[{row['low']:{sign}.3f}, {row['high']:{sign}.3f}\\]"
