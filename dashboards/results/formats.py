"""What the Format following page shows: a few-shot episode, what models make of it, and of many others.

S review of the episode, read after as many shots as stand before it; V vocabulary, K key position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import streamlit as st
import torch

from jambascope import HookedJamba
from jambascope.checkpoint import load_tokenizer
from jambascope.dashboards import models, session
from jambascope.dashboards.models import Checkpoint
from jambascope.errors import InputError, JambascopeError
from jambascope.hooks.labels import label_attention
from jambascope.hooks.looks import looks
from jambascope.studies.episodes import few_shot
from jambascope.studies.figures import labels as figures
from jambascope.studies.figures.labels import Look, Share
from jambascope.zoo.language import ids_of
from jambascope.zoo.reviews import Episode, review
from jambascope.zoo.scoring import LabelScores, scored_labels, stacked_labels
from jambascope.zoo.words import VOCABULARY

PREFERRED = ("jamba-micro", "mamba-micro", "attention-micro", "jamba-micro-1to3")
"""Of the packaged models, those that stand side by side to begin with."""
LIKELY = 4
"""Words outside the label set that are named."""
HEADS, LAYERS = 4, 2
"""Heads and Mamba layers of a model that are shown, those that look at the labels most."""
WORDS = list(VOCABULARY)


# -- models ----------------------------------------------------------------------------------------------------


@st.cache_data(max_entries=64, show_spinner=False)
def _reads_language(checkpoint: Checkpoint) -> bool:
    try:
        tokenizer = load_tokenizer(Path(checkpoint.directory))
    except JambascopeError:
        return False
    return tokenizer is not None and tokenizer.get_vocab() == VOCABULARY


def readers(names: Sequence[str]) -> list[str]:
    """Those of the models that have the packaged language's vocabulary; no weights are read."""
    found = []
    for name in names:
        try:
            checkpoint = session.checkpoint_of(name)
        except JambascopeError:
            continue
        if _reads_language(checkpoint):
            found.append(name)
    return found


def defaults(names: Sequence[str]) -> list[str]:
    """The models that are chosen to begin with."""
    return [name for name in PREFERRED if name in names] or list(names[:1])


def titles(names: Sequence[str]) -> dict[str, str]:
    """What models are called in figures: the last part of a path, unless two have the same."""
    short = {name: Path(name).name or name for name in names}
    return {name: s if list(short.values()).count(s) == 1 else name for name, s in short.items()}


def opened(checkpoint: Checkpoint) -> HookedJamba:
    """From the shelf of all sessions, within its bound."""
    return models.shelf(session.start().model_memory).get(checkpoint)


# -- one episode -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A few-shot prompt of the packaged language, as the page asks for it."""

    kind: str
    classes: int
    shots: int
    filler: int
    seed: int

    def draw(self) -> Episode:
        """More shots of one seed go on where fewer end.

        Raises:
            InputError: one that is too long for the pages.
        """
        return within(
            review(np.random.default_rng(self.seed), "held_out", self.shots + 1, self.classes, self.kind, self.filler)
        )


def within(episode: Episode) -> Episode:
    """Raise InputError where the episode is longer than a prompt may be."""
    if len(episode.words) > session.MAX_TOKENS:
        raise InputError(
            f"the episode has {len(episode.words):,} words; the pages take at most {session.MAX_TOKENS:,}, so take "
            "fewer shots or filler sentences"
        )
    return episode


def prompt_of(episode: Episode, shots: int) -> str:
    """The text up to where a label is wanted after so many shots."""
    return " ".join(episode.words[: episode.label_positions[shots]])


@dataclass(frozen=True)
class Reading:
    """What one model expects wherever a label of the episode is due."""

    probabilities: np.ndarray
    """[S V]"""
    scores: LabelScores
    """Of one document."""

    def outcomes(self) -> list[str]:
        """How each review was labelled."""
        scores = (self.scores.valid[0], self.scores.acc_free[0], self.scores.acc_restricted[0])
        return [figures.outcome(*one) for one in zip(*(s.tolist() for s in scores), strict=True)]


@st.cache_data(max_entries=64, show_spinner="Reading the episode")
def read(checkpoint: Checkpoint, episode: Episode) -> Reading:
    """One forward pass, which gives every number of shots."""
    model, at = opened(checkpoint), list(episode.label_positions)
    with torch.no_grad():
        logits = model(torch.as_tensor(ids_of([episode]), device=model.device))[0, at].cpu()
    right = torch.tensor([VOCABULARY[episode.words[i]] for i in at])
    known = torch.tensor([i in episode.answers for i in at])
    labels = torch.tensor([VOCABULARY[word] for word in episode.labels])
    scores = stacked_labels([scored_labels(logits, labels, right, known)])
    return Reading(logits.float().softmax(-1).numpy(), scores)


def shares(reading: Reading, episode: Episode, shots: int) -> list[Share]:
    """The next word's probability after so many shots: labels, the likeliest words besides, and the rest."""
    p, right = reading.probabilities[shots], episode.words[episode.label_positions[shots]]
    found = [Share(right, float(p[VOCABULARY[right]]), figures.RIGHT)]
    others = [Share(word, float(p[VOCABULARY[word]]), figures.OTHER) for word in episode.labels if word != right]
    found += sorted(others, key=lambda share: -share.probability)
    outside = [i for i in np.argsort(-p, kind="stable") if WORDS[i] not in episode.labels][:LIKELY]
    found += [Share(WORDS[i], float(p[i]), figures.OUTSIDE) for i in outside]
    rest = max(0.0, 1 - sum(share.probability for share in found))
    return [*found, Share(f"{len(p) - len(found):,} other words", rest, figures.REST)]


def row_of(model: str, reading: Reading, episode: Episode, shots: int) -> dict:
    """What the table says of one model after so many shots."""
    p, right = reading.probabilities[shots], episode.words[episode.label_positions[shots]]
    chosen = max(episode.labels, key=lambda word: p[VOCABULARY[word]])
    mass = float(reading.scores.mass[0, shots])
    return {
        "model": model,
        "right": right,
        "p right": float(p[VOCABULARY[right]]),
        "chosen": chosen,
        "share": float(p[VOCABULARY[chosen]]) / mass if mass else None,
        "mass": mass,
        "word": WORDS[int(p.argmax())],
        "p word": float(p.max()),
        "outcome": reading.outcomes()[shots],
    }


@st.cache_data(max_entries=64, show_spinner="Looking at heads")
def label_looks(checkpoint: Checkpoint, name: str, episode: Episode, shots: int) -> list[Look]:
    """The heads of a model that look at the labels most, then its Mamba layers."""
    model, prompt = opened(checkpoint), few_shot(episode, shots)
    config, labels = model.config, list(prompt.label_positions)
    rows = looks(model, torch.tensor([prompt.tokens]), prompt.query_position)
    found = []
    if config.attention_layers:
        for top in label_attention(model, [prompt]).top(HEADS):
            layer, head = top["layer"], top["head"]
            row = rows[layer][head].numpy()
            found.append(Look(name, "attention", layer, head, row, top["attention"], top["lift"]))
    layers = [
        Look(name, config.mixers[layer], layer, None, rows[layer][0].numpy(), float(rows[layer][0, labels].sum()))
        for layer in config.ssm_layers
    ]
    return found + sorted(layers, key=lambda look: -look.attention)[: LAYERS if found else HEADS]


# -- code ------------------------------------------------------------------------------------------------------


def code(names: Sequence[str], asked: Asked | tuple[str, tuple[str, ...], str], shots: int) -> str:
    """The program that computes what the page shows of one episode.

    Args:
        asked: how it was drawn; or text, labels and answer of one typed by hand.
        shots: those before the label that is looked at.
    """
    if isinstance(asked, Asked):
        head = ["import numpy as np", "import torch", ""]
        made = (
            f'episode = review(np.random.default_rng({asked.seed}), "held_out", shots={asked.shots + 1}, '
            f"classes={asked.classes}, kind={asked.kind!r}, filler={asked.filler})"
        )
        imports = ["from jambascope.studies.episodes import few_shot", "from jambascope.zoo.reviews import review"]
    else:
        head, imports = ["import torch", ""], ["from jambascope.studies.episodes import by_hand, few_shot"]
        made = "episode = by_hand({!r}, labels={!r}, answer={!r})".format(*asked)
    return "\n".join(
        [
            *head,
            "from jambascope import HookedJamba",
            "from jambascope.hooks.labels import label_attention",
            "from jambascope.hooks.looks import looks",
            *imports,
            "from jambascope.zoo.scoring import label_scores",
            "",
            made,
            *([f"prompt = few_shot(episode, shots={shots})"] if shots else []),
            "scores, heads, rows = {}, {}, {}",
            f"for name in {list(names)!r}:",
            f"    model = HookedJamba.from_pretrained(name{_where()})",
            "    scores[name] = label_scores(model, [episode])  # .mass, .valid, .acc_free, .format_gap: [1, shots]",
            *(
                [
                    "    rows[name] = looks(model, torch.tensor([prompt.tokens]), prompt.query_position)",
                    "    if model.config.attention_layers:",
                    "        heads[name] = label_attention(model, [prompt]).top(4)",
                ]
                if shots
                else []
            ),
            "",
        ]
    )


def _where() -> str:
    """The server's device and type of weights, as arguments."""
    asked = {"device": session.start().device, "dtype": session.start().dtype}
    return "".join(f", {name}={value!r}" for name, value in asked.items() if value)


def batch_code(names: Sequence[str], kinds: Sequence[str], options: dict[str, int]) -> str:
    """The program that computes the batch evaluation."""
    given = "".join(f", {name}={value!r}" for name, value in options.items())
    return "\n".join(
        [
            "from functools import partial",
            "",
            "from jambascope import HookedJamba",
            "from jambascope.studies.figures.zoo import lines",
            "from jambascope.studies.format_evaluation import evaluate, panels",
            "",
            f"models = [(name, partial(HookedJamba.from_pretrained, name{_where()})) for name in {list(names)!r}]",
            f"rows = evaluate(models, {list(kinds)!r}{given})",
            f'figure = lines("Format following", "", panels(rows, {options["classes"]}), "shots")',
            "",
        ]
    )
