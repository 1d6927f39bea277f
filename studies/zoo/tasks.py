"""What the zoo is asked: a grid of tasks, each of which draws the same documents for every model.

All documents are of the held-out split: words, pairs and names in combinations that training never uses. ``trained``
is the range of x that training draws; what lies outside asks for generalisation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal
from zlib import crc32

import numpy as np

from jambascope.zoo.documents import Document, pick
from jambascope.zoo.language import DOMAINS, Row, document, mixture
from jambascope.zoo.recipes import RECIPES
from jambascope.zoo.reviews import Episode
from jambascope.zoo.words import COLORS, PLACES, THINGS

SEED = 2
SHOTS = (0, 1, 2, 4, 8, 16, 32)
"""Shots after which labels are measured."""
TRAINED_SHOTS = (0, 8)
"""Training's episodes have up to nine reviews: the last is labelled after eight shots."""
TRAINED_LENGTH = max(stage.sequence_length for recipe in RECIPES.values() for stage in recipe.stages)
"""Ids of the longest row in training."""
WINDOWS = (1, 16, 64, 128, 256, 512, 1024)
"""Where the pieces begin, and the last one ends, over which the loss at a position is averaged."""
COPIED = 6
"""Words that ``copy`` hides in the noise."""
TEMPLATES = {"agreement of the verb": (7, 8), "the other person": (1, 2)}
"""Indices into ``documents.SENTENCES`` of what is looked at by itself."""

Measured = Literal["labels", "competitors", "verdicts", "answers", "rows", "positions"]

Asked = Literal["shown", "drawn", "meant"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Documents of one kind, and which function of :mod:`jambascope.studies.zoo.measures` looks at them."""

    task: str
    condition: str
    measured: Measured
    domain: str | None
    """Of the documents; None is the mixture."""
    options: tuple[tuple[str, Any], ...] = ()
    """What the domain's generator is given."""
    x_name: str | None = None
    x: float | None = None
    """What ``condition`` is varied by; with ``x_name`` alone, the measurement gives several x of one document."""
    trained: tuple[float, float] | None = None
    """The range of x in training."""
    chance: float | None = None
    """Accuracy without reading what decides the answer."""
    share: float = 1.0
    """Of the number of documents: less where they are long."""
    asked: Asked = "shown"
    """Which labels of an episode count for accuracy: those of classes that were shown; in a shuffled one those after
    all words were shown, as they were drawn, so that accuracy must be chance (of labels that were shown, the only one
    so far would be right); or the last one, by what its word means."""
    length: int = TRAINED_LENGTH
    """Ids of a row, for ``rows`` and ``positions``."""

    def count(self, episodes: int) -> int:
        """Documents to draw when the whole is sized by ``episodes``."""
        return max(2, round(self.share * episodes))

    def rng(self, seed: int = SEED) -> np.random.Generator:
        """Seeded by ``seed`` and what the documents are, so that a task added or dropped changes no other; by three
        numbers, since training batches are seeded by two (seed and step)."""
        key = repr((self.domain, self.options, self.length if self.measured in ("rows", "positions") else None))
        return np.random.default_rng([seed, crc32(key.encode()), 1])


def draw(task: Task, episodes: int, seed: int = SEED) -> list[Document] | list[Row]:
    """The documents of a task, or packed rows for ``rows`` and ``positions``."""
    rng, count, options = task.rng(seed), task.count(episodes), dict(task.options)
    if task.measured in ("rows", "positions"):
        shares = {} if task.domain is None else {"shares": {task.domain: 1.0}}
        return list(islice(mixture(rng, task.length, "held_out", **shares), count))
    if "index" in options:
        indices = options.pop("index")
        return [document(task.domain, rng, "held_out", index=indices[i % len(indices)]) for i in range(count)]
    drawn = [document(task.domain, rng, "held_out", **options) for _ in range(count)]
    if options.get("filler"):
        drawn = [_labels_only_as_labels(episode, rng) for episode in drawn]
    change = {"drawn": _labels_as_drawn, "meant": _label_as_meant}.get(task.asked, lambda doc: doc)
    return [change(doc) for doc in drawn]


def _labels_only_as_labels(episode: Episode, rng: np.random.Generator) -> Episode:
    """Another word of the same list wherever a filler sentence says a label. Filler is full of places and colours, the
    unseen labels, and less so of things and animals, the familiar ones: conditions would differ in more than length."""
    lists = {label: words for words in (PLACES, COLORS, THINGS) for label in words if label in episode.labels}
    other = {label: pick(rng, [w for w in words if w not in episode.labels]) for label, words in lists.items()}
    words = [word if i in episode.label_positions else other.get(word, word) for i, word in enumerate(episode.words)]
    return dataclasses.replace(episode, words=tuple(words))


def _labels_as_drawn(episode: Episode) -> Episode:
    def before(position: int) -> set[str]:
        return {episode.words[i] for i in episode.label_positions if i < position}

    shown = [i for i in episode.label_positions if before(i) == set(episode.labels)]
    return dataclasses.replace(episode, answers=tuple(shown))


def _label_as_meant(episode: Episode) -> Episode:
    last = episode.label_positions[-1]
    words = (*episode.words[:last], episode.labels[episode.classes[-1]], *episode.words[last + 1 :])
    return dataclasses.replace(episode, words=words, answers=(last,))


def grid() -> tuple[Task, ...]:
    """Every task."""
    return tuple([*_labels(), *_verdicts(), *_lookups(), *_stories(), *_rows()])


def _labels() -> Iterator[Task]:
    """Few-shot episodes: label kinds, more classes, longer reviews, the control, and what competes with the labels."""
    words_of = {
        "natural": "familiar natural",
        "flipped": "familiar flipped",
        "arbitrary": "familiar arbitrary",
        "new_natural": "unseen natural",
        "unseen": "unseen arbitrary",
    }
    for kind, text in words_of.items():
        yield _episodes(f"{text} labels", kind=kind)
    for kind in ("arbitrary", "unseen"):
        for classes in (4, 8):
            yield _episodes(f"{words_of[kind]} labels, {classes} classes", kind=kind, classes=classes)
        yield _episodes(f"{words_of[kind]} labels, 4 filler sentences", 0.75, 16, kind=kind, filler=4)
        yield _episodes(f"{words_of[kind]} labels, 16 filler sentences", 0.5, 8, kind=kind, filler=16)
    yield _episodes("shuffled labels", asked="drawn", kind="arbitrary", shuffled=True)
    for kind in ("natural", "new_natural"):
        yield _episodes(f"{words_of[kind]} labels by meaning", most=0, asked="meant", kind=kind)
    yield _episodes("shuffled natural labels by meaning", most=8, asked="meant", kind="natural", shuffled=True)
    for kind in ("natural", "arbitrary", "unseen"):
        yield _episodes(f"{words_of[kind]} labels", 0.5, 16, "competitors", kind=kind)


def _episodes(
    condition: str,
    share: float = 1.0,
    most: int = 32,
    measured: Measured = "labels",
    asked: Asked = "shown",
    **options: Any,
) -> Task:
    """Reviews enough for ``most`` shots and the one to label; short ones of two classes unless ``options`` differ."""
    options = {"shots": most + 1, "classes": 2, "filler": 0} | options
    return Task(
        task="few-shot",
        condition=condition,
        measured=measured,
        asked=asked,
        domain="review",
        options=tuple(options.items()),
        x_name="shots",
        trained=TRAINED_SHOTS,
        share=share,
    )


def _verdicts() -> Iterator[Task]:
    for before in (0, 1, 4, 8):
        yield Task(
            task="verdicts",
            condition="free verdicts",
            measured="verdicts",
            domain="verdict",
            options=(("reviews", before + 1),),
            x_name="reviews before",
            x=before,
            trained=(0, 4),
            chance=0.5,
        )


def _answers(
    domain: str, condition: str, x_name: str, option: str, trained: tuple[int, int], sizes: Sequence[int], **more: Any
) -> Iterator[Task]:
    """A task for every size; long documents are fewer."""
    for size in sizes:
        yield Task(
            task=domain,
            condition=condition,
            measured="answers",
            domain=domain,
            options=((option, size), *more.items()),
            x_name=x_name,
            x=size,
            trained=trained,
            share=0.5 if size > 150 else 1.0,
            chance=_chance(domain, size),
        )


def _chance(domain: str, size: int) -> float | None:
    """A random entry of the phone book or the table, a random word of those that were said."""
    return {"phones": 1 / size, "recall": 1 / size, "repeat": 1 / size, "copy": 1 / COPIED}.get(domain)


def _lookups() -> Iterator[Task]:
    """What the context determines, at sizes in training and beyond."""
    yield from _answers("repeat", "said twice", "words", "length", (4, 48), (4, 8, 16, 32, 48, 96, 192, 384), times=2)
    yield from _answers("recall", "up to 8 questions", "pairs", "entries", (2, 16), (2, 4, 8, 16, 32, 64))
    yield from _answers("phones", "up to 3 calls", "entries", "entries", (2, 8), (2, 4, 8, 16, 24, 32))
    noise, distances = (2, 8, 24, 64, 128, 256), (4, 10, 20, 40, 80, 160, 320, 640)
    yield from _answers("copy", f"{COPIED} words", "noise words", "noise", (2, 24), noise, count=COPIED)
    yield from _answers("secret", "one word", "words between", "distance", (4, 40), distances)


def _stories() -> Iterator[Task]:
    for condition, index in ({"two to four sentences": None} | TEMPLATES).items():
        options = () if index is None else (("index", index),)
        chance = None if index is None else 0.5  # is or are, one or the other
        yield Task(
            task="story", condition=condition, measured="answers", domain="story", options=options, chance=chance
        )


def _rows() -> Iterator[Task]:
    """Loss on packed rows, of the mixture and of each domain."""
    for domain in (None, *DOMAINS):
        name = domain or "mixture"
        yield Task(task="held-out rows", condition=name, measured="rows", domain=domain, share=0.5)
    yield Task(
        task="loss by position",
        condition="mixture",
        measured="positions",
        domain=None,
        x_name="position",
        trained=(0, TRAINED_LENGTH),
        share=0.5,
        length=WINDOWS[-1],
    )
