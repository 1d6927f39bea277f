"""Format following: a few-shot prompt, models side by side, and who looks at its labels; many episodes on request."""

from __future__ import annotations

from functools import partial
from urllib.parse import urlencode

import streamlit as st

from jambascope.dashboards import models, session, widgets, work
from jambascope.dashboards.results import formats as results
from jambascope.errors import InputError
from jambascope.studies import format_evaluation as evaluation
from jambascope.studies.episodes import by_hand
from jambascope.studies.figures import labels as figures
from jambascope.studies.figures.zoo import lines
from jambascope.zoo.reviews import Episode

ONE, MANY = "one prompt", "many episodes"
DRAWN, TYPED = "packaged language", "by hand"
KINDS = {
    "arbitrary": "things and animals, as in training",
    "unseen": "words that were never labels in training",
    "natural": "pairs such as Positive and Negative",
    "flipped": "such pairs the wrong way round",
    "new_natural": "such pairs that training never used",
    evaluation.SHUFFLED: "labels at random, the control: only the label set can be learned",
}
ABOUT_KINDS = "  \n".join(f"{widgets.plain(kind)}: {text}" for kind, text in KINDS.items())
CLASSES = (2, 3, 4, 8)
MOST_LIFT = 1_000
"""Beyond it the other words get nothing, and the number says nothing."""
MOST_SHOTS = (16, 4, 8, 32)


def page() -> None:
    st.title("Format following")
    left, right = st.columns([3, 9], gap="medium", vertical_alignment="bottom")
    with left:
        shown = widgets.choose("Look at", (ONE, MANY), "formats_of")
    with right:
        names = _choose_models()
    if not names:
        st.info("Choose one model or more: those listed read the packaged language.", icon=":material/info:")
    elif shown == ONE:
        _one(names)
    else:
        _many(names)


def _choose_models() -> list[str]:
    readers = results.readers(session.model_choices())
    if (kept := st.session_state.get("format_models")) is not None:
        st.session_state.format_models = [name for name in kept if name in readers]
    return st.multiselect(
        "Models",
        readers,
        results.defaults(readers),
        key="format_models",
        bind="query-params",
        help="Packaged, given at the start, or opened before; only those with the packaged models' vocabulary.",
    )


# -- one prompt ------------------------------------------------------------------------------------------------


def _one(names: list[str]) -> None:
    source = widgets.choose("Prompt from", (DRAWN, TYPED), "episode_from")
    asked, episode = _drawn() if source == DRAWN else _typed()
    most = len(episode.label_positions) - 1
    shots = most
    if most:
        widgets.keep_within("after_shots", 0, most)
        shots = st.slider(
            "Shots before the label that is looked at",
            0,
            most,
            most,
            key="after_shots",
            bind="query-params",
            help="One forward pass gives every number of shots: the reviews before a label are its shots.",
        )
    _prompt(episode, shots)
    titles = results.titles(names)
    checkpoints = {titles[name]: session.checkpoint_of(name) for name in names}
    readings = {name: results.read(checkpoint, episode) for name, checkpoint in checkpoints.items()}
    shares = {name: results.shares(reading, episode, shots) for name, reading in readings.items()}
    widgets.show(figures.next_mass(shares, shots), "next_mass")
    _table([results.row_of(name, reading, episode, shots) for name, reading in readings.items()])
    mass = {name: reading.scores.mass[0].numpy() for name, reading in readings.items()}
    outcomes = {name: reading.outcomes() for name, reading in readings.items()}
    widgets.show(figures.by_shots(mass, outcomes, shots), "by_shots")
    _heads(dict(zip(titles.values(), names, strict=True)), checkpoints, episode, shots)
    widgets.program(results.code(names, asked, shots))


def _drawn() -> tuple[results.Asked, Episode]:
    """A prompt of the packaged language."""
    columns = st.columns([4, 2, 2, 2, 2], gap="medium")
    with columns[1]:
        classes = widgets.choose_layer(CLASSES, "classes", "Classes", "Two are sentiments; more are moods.")
    with columns[0]:
        kinds = [kind for kind in evaluation.kinds_of(classes) if kind != evaluation.SHUFFLED]
        kinds.sort(key=list(KINDS).index)
        if st.session_state.get("label_kind") not in (None, *kinds):
            st.session_state.label_kind = kinds[0]
        kind = st.selectbox("Label words", kinds, key="label_kind", bind="query-params", help=ABOUT_KINDS)
    shots = columns[2].number_input("Shots", 0, 64, 8, key="shots", bind="query-params")
    filler = columns[3].number_input(
        "Filler sentences", 0, 32, 0, key="filler", bind="query-params", help="Of no sentiment, in each review."
    )
    seed = columns[4].number_input("Seed", 0, 99_999, 0, key="episode_seed", bind="query-params")
    asked = results.Asked(kind, classes, shots, filler, seed)
    return asked, asked.draw()


def _typed() -> tuple[tuple[str, tuple[str, ...], str], Episode]:
    """A prompt typed by hand, with its labels."""
    left, middle, right = st.columns([8, 3, 2], gap="medium")
    text = left.text_area(
        "Text that ends where a label is wanted",
        session.TEXT_EXAMPLES[0],
        key="episode_text",
        bind="query-params",
        help="In the packaged models' words. A label counts as a shot where it follows the word that the text ends "
        "with, such as the colon.",
    )
    given = middle.text_input("Labels", "Positive Negative", key="episode_labels", bind="query-params")
    labels = tuple(dict.fromkeys(given.replace(",", " ").split()))
    if not labels:
        raise InputError("Labels are empty; give the words of the label set, such as Positive Negative")
    if st.session_state.get("episode_answer") not in (None, *labels):
        st.session_state.episode_answer = labels[0]
    answer = right.selectbox("The right one", labels, key="episode_answer", bind="query-params")
    return (text, labels, answer), results.within(by_hand(text, labels, answer))


def _prompt(episode: Episode, shots: int) -> None:
    """The words up to the label that is wanted, labels marked."""
    end = episode.label_positions[shots]
    places = set(episode.label_positions)
    words = [f":blue-background[{widgets.plain(w)}]" if i in places else widgets.plain(w) for i, w in _words(episode)]
    right = widgets.plain(episode.words[end])
    known = "" if end in episode.answers else ", which was not shown before"
    with st.expander(f"The prompt: {end + 1:,} tokens with its beginning", expanded=end <= 200):
        st.markdown(f"{' '.join(words[:end])} :gray-background[?]")
        labels = widgets.plain(", ".join(episode.labels))
        st.caption(f"Labels: {labels}. The right one where it ends is “{right}”{known}.")


def _words(episode: Episode) -> list[tuple[int, str]]:
    return list(enumerate(episode.words))


def _table(rows: list[dict]) -> None:
    number, text = st.column_config.NumberColumn, st.column_config.TextColumn
    columns = {
        "model": text("Model"),
        "right": text("Right label", width="small"),
        "p right": number("p(right)", format="%.4f", width="small"),
        "chosen": text("Chosen label", width="small", help="The likeliest of the label set"),
        "share": number("Its share", format="%.3f", width="small", help="p over the label mass: the confidence"),
        "mass": number("Label mass", format="%.4f", width="small"),
        "word": text("Likeliest word"),
        "p word": number("p(word)", format="%.4f", width="small"),
        "outcome": text("Outcome", width="large"),
    }
    widgets.table(rows, "label_choices", columns, height="content")


def _heads(addresses: dict[str, str], checkpoints: dict, episode: Episode, shots: int) -> None:
    """Rows of the heads and Mamba layers that look at labels, and a link to each head."""
    if not shots:
        st.info("Without a shot there is no label to look at.", icon=":material/info:")
        return
    found = {name: results.label_looks(checkpoint, name, episode, shots) for name, checkpoint in checkpoints.items()}
    tokens = ["<bos>", *episode.words[: episode.label_positions[shots]]]
    labels = [position + 1 for position in episode.label_positions[:shots]]
    every = [look for looks in found.values() for look in looks]
    widgets.show(figures.label_rows(every, tokens, labels), "label_rows")
    st.caption(
        f"Of each model the {results.HEADS} heads and the {results.LAYERS} Mamba layers that look at labels most "
        f"(without heads {results.HEADS} layers). Mamba layers: hidden attention, magnitudes averaged over channels. "
        "Lift: over the attention to the four nearest other words. Links open the head on the Attention page."
    )
    prompt = results.prompt_of(episode, shots)
    for name, looks in found.items():
        heads = [look for look in looks if look.head is not None]
        written = [_link(addresses[name], prompt, look) for look in heads]
        st.markdown(f"**{widgets.plain(name)}**: " + (" · ".join(written) or "no attention heads"))


def _link(address: str, prompt: str, look: figures.Look) -> str:
    query = {"model": address, "prompt": prompt, "attention_layer": look.layer, "head": look.head}
    lift = f"lift {look.lift:.1f}" if look.lift <= MOST_LIFT else f"lift over {MOST_LIFT:,}"
    name = f"layer {look.layer}, head {look.head}"
    return f"[{name}](attention?{urlencode(query)}) {look.attention:.3f} to labels, {lift}"


# -- many episodes ---------------------------------------------------------------------------------------------


def _many(names: list[str]) -> None:
    columns = st.columns([6, 2, 2, 2, 2, 2], gap="medium")
    with columns[1]:
        classes = widgets.choose_layer(CLASSES, "classes", "Classes", "Two are sentiments; more are moods.")
    kinds = sorted(evaluation.kinds_of(classes), key=list(KINDS).index)
    if (kept := st.session_state.get("label_kinds")) is not None:
        st.session_state.label_kinds = [kind for kind in kept if kind in kinds]
    asked = columns[0].multiselect(
        "Label words", kinds, kinds[:2], key="label_kinds", bind="query-params", help=ABOUT_KINDS
    )
    with columns[2]:
        most = widgets.choose_layer(MOST_SHOTS, "most_shots", "Most shots")
    filler = columns[3].number_input("Filler sentences", 0, 32, 0, key="filler", bind="query-params")
    episodes = columns[4].number_input("Episodes", 4, 1024, 64, 4, key="episodes", bind="query-params")
    seed = columns[5].number_input("Seed", 0, 99_999, 0, key="episode_seed", bind="query-params")
    if not asked:
        st.info("Choose one kind of label words or more.", icon=":material/info:")
        return
    options = dict(episodes=episodes, classes=classes, shots=most, filler=filler, seed=seed)
    titles = results.titles(names)
    checkpoints = {titles[name]: session.checkpoint_of(name) for name in names}
    key = (tuple(checkpoints.items()), tuple(asked), tuple(options.items()))
    shelf = models.shelf(session.start().model_memory)
    opened = [(name, partial(shelf.get, checkpoint)) for name, checkpoint in checkpoints.items()]

    def compute(report: work.Report) -> list[evaluation.Row]:
        return evaluation.evaluate(opened, asked, **options, report=report)

    found = work.result(
        "formats",
        key,
        compute,
        "Run the batch evaluation",
        draw=partial(_results, classes=classes, live=True),
        about=f"{len(names) * len(asked) * episodes:,} episodes of {most + 1} reviews, one forward pass for each.",
    )
    if found is not None:
        _results(found.value, classes)
    widgets.program(results.batch_code(names, asked, options))


def _results(rows: list[evaluation.Row], classes: int, live: bool = False) -> None:
    if not rows:
        return
    counts = sorted({row.n for row in rows if row.measure == "label mass"})
    of = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    subtitle = f"means over {of} episodes; bands: 95 % bootstrap intervals; shaded: shots in training"
    fig = lines("Format following", subtitle, evaluation.panels(rows, classes), "shots")
    if live:
        st.plotly_chart(fig, key="format_curves_so_far", width="stretch")
        return
    widgets.show(fig, "format_curves")
    number, text = st.column_config.NumberColumn, st.column_config.TextColumn
    columns = {"model": text("Model"), "kind": text("Labels"), "measure": text("Measure"), "n": number("Episodes")}
    columns |= {"shots": number("Shots", help="None: over all of them")}
    columns |= {end: number(title, format="%.3f") for end, title in _ENDS.items()}
    with st.expander("All numbers, with the calibration error"):
        widgets.table([row._asdict() for row in rows], "format_numbers", columns)


_ENDS = {"mean": "Mean", "low": "95 % from", "high": "95 % to"}
