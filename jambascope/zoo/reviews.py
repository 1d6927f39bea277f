"""Reviews: few-shot episodes with label words of their own, and the same sentiments judged in free words.

    review    Review : the plot was gripping . Sentiment : whale Review : the cast was dull . Sentiment : lamp
    verdict   Review : the plot was gripping . Sentiment : Very Good Review : the cast was dull . Sentiment : 2 / 9

Knowing the class and following the episode's format come apart: after ``Sentiment :`` many words fit the class, and
only the examples tell which two (or more) an episode uses. Episodes of more than two classes ask for the ``Mood``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from jambascope.errors import InputError
from jambascope.zoo.documents import Document, Split, is_held_out, pair, pick, sentence, within
from jambascope.zoo.words import (
    FAMILIAR_LABELS,
    HELD_OUT_PAIRS,
    LABEL_PAIRS,
    MOODS,
    NAMES,
    SENTIMENTS,
    TOPICS,
    UNSEEN_LABELS,
    VERDICTS,
)

LabelKind = Literal["natural", "flipped", "arbitrary", "new_natural", "unseen"]
"""Where an episode's label words come from.

natural: a pair such as Positive and Negative that training uses too. flipped: such a pair the wrong way round.
arbitrary: things and animals, in combinations of the split. new_natural: a pair that training never uses.
unseen: words that training never uses as labels. Training draws from the first three.
"""
TRAINED_KINDS: tuple[LabelKind, ...] = (*("natural",) * 3, "flipped", *("arbitrary",) * 4)
"""Drawn evenly: a natural pair stands three times the right way round for each time that it is flipped."""
HELD_OUT_KINDS: tuple[LabelKind, ...] = ("arbitrary", "new_natural", "unseen")
TWO_CLASSES: tuple[LabelKind, ...] = ("natural", "flipped", "new_natural")
CLASSES = (2, 2, 2, 2, 3, 4)
"""How many classes a training episode has, drawn evenly."""
TEXTS = ["the {topic} was {word}", "the {topic} was very {word}", "I found the {topic} {word}"]


@dataclass(frozen=True)
class Episode(Document):
    """A few-shot document. ``answers`` are the labels whose class was shown before."""

    labels: tuple[str, ...]
    """The label word of each class."""
    label_positions: tuple[int, ...]
    """Where the label of each review stands; the position before it, a colon, predicts it."""
    classes: tuple[int, ...]
    """The class of each review: an index into ``labels``."""


def label_words(rng: np.random.Generator, kind: LabelKind, classes: int, split: Split) -> tuple[str, ...]:
    """The label words of one episode, one for each class.

    Raises:
        InputError: an unknown kind, or more classes than it has words for.
    """
    if kind not in get_args(LabelKind):
        raise InputError(f"kind={kind!r} must be one of {', '.join(get_args(LabelKind))}")
    if kind in TWO_CLASSES:
        if classes != 2:
            raise InputError(f"kind={kind!r} has two classes, not classes={classes}; give 'arbitrary' or 'unseen'")
        pairs = LABEL_PAIRS[-HELD_OUT_PAIRS:] if kind == "new_natural" else LABEL_PAIRS[:-HELD_OUT_PAIRS]
        praise, blame = pairs[int(rng.integers(len(pairs)))]
        return (blame, praise) if kind == "flipped" else (praise, blame)
    pool = UNSEEN_LABELS if kind == "unseen" else FAMILIAR_LABELS
    words = list(pair(rng, pool, pool, split))
    while len(words) < classes:
        # Two labels held out stay apart in training, however many classes stand beside them.
        free = [word for word in pool if word not in words and (split == "held_out" or _may_meet(pool, word, words))]
        words.append(pick(rng, free))
    return tuple(words)


def _may_meet(pool: list[str], word: str, others: list[str]) -> bool:
    """Whether training may combine a label with each of the others."""
    return not any(is_held_out(pool.index(word), pool.index(other)) for other in others)


def _class_words(rng: np.random.Generator, classes: int) -> list[list[str]]:
    """The adjectives of each class: praise and blame, or as many moods."""
    if not 2 <= classes <= len(MOODS):
        raise InputError(f"classes={classes!r} must lie in 2..{len(MOODS)}: two sentiments, or as many moods")
    if classes == 2:
        return list(SENTIMENTS)
    moods = list(MOODS.values())
    return [moods[i] for i in rng.choice(len(moods), classes, replace=False)]


def _review(rng: np.random.Generator, split: Split, adjectives: list[str], filler: int, header: str) -> str:
    """A review up to the colon after ``header``; ``filler`` sentences of no sentiment stand around its verdict."""
    topic, word = pair(rng, TOPICS, adjectives, split)
    text = pick(rng, TEXTS).format(topic=topic, word=word) + " ."
    if filler:
        sentences = [sentence(rng, split, pair(rng, NAMES, NAMES, split)).replace("=", "") for _ in range(filler)]
        sentences.insert(int(rng.integers(filler + 1)), text)
        text = " ".join(sentences)
    return f"Review : {text} {header} :"


def _filler(rng: np.random.Generator) -> int:
    """Training reviews are short; two of five hold a sentence or two besides."""
    return int(rng.choice((0, 0, 0, 1, 2)))


def review(
    rng: np.random.Generator,
    split: Split = "train",
    shots: int | None = None,
    classes: int | None = None,
    kind: LabelKind | None = None,
    filler: int | None = None,
    shuffled: bool = False,
) -> Episode:
    """A few-shot episode of ``shots`` labelled reviews.

    Args:
        shots: drawn when None: 4 to 9, and at least twice the classes.
        classes: when None, 2 for the kinds that are pairs, else drawn from ``CLASSES``; 2 means sentiment, more means
            mood.
        kind: of the label words; drawn from the split's kinds when None.
        filler: sentences without sentiment in each review; 0 to 2 drawn for each review when None.
        shuffled: labels are drawn anew for every review, whatever its class: the control in which only the label
            set can be learned. It has no answers.

    Raises:
        InputError: counts or kinds that do not exist.
    """
    if classes is None:
        classes = 2 if kind in TWO_CLASSES else int(rng.choice(CLASSES))
    adjectives = _class_words(rng, classes)
    if kind is None:
        kinds = HELD_OUT_KINDS if split == "held_out" else TRAINED_KINDS
        kind = kinds[int(rng.integers(len(kinds)))]
        kind = "arbitrary" if classes > 2 and kind != "unseen" else kind
    shots = max(int(rng.integers(4, 10)), 2 * classes) if shots is None else shots
    within("shots", shots, 1, None, "labelled reviews")
    within("filler", 0 if filler is None else filler, 0, None, "sentences in each review")
    labels = label_words(rng, kind, classes, split)
    words: list[str] = []
    positions, answers, drawn, shown = [], [], [], set()
    for _ in range(shots):
        class_ = int(rng.integers(classes))
        few = _filler(rng) if filler is None else filler
        words += _review(rng, split, adjectives[class_], few, "Sentiment" if classes == 2 else "Mood").split()
        positions.append(len(words))
        if class_ in shown and not shuffled:
            answers.append(len(words))
        words.append(labels[int(rng.integers(classes)) if shuffled else class_])
        drawn.append(class_)
        shown.add(class_)
    return Episode("review", tuple(words), tuple(answers), labels, tuple(positions), tuple(drawn))


def verdict(rng: np.random.Generator, split: Split = "train", reviews: int | None = None) -> Document:
    """One to five reviews (drawn when None), each judged by one of many synonyms of its sentiment.

    Its answers are the later words of verdicts of several words: the first is a free choice.
    """
    words: list[str] = []
    answers = []
    reviews = int(rng.integers(1, 6)) if reviews is None else reviews
    within("reviews", reviews, 1, None, "judged one by one")
    for _ in range(reviews):
        class_ = int(rng.integers(2))
        words += _review(rng, split, SENTIMENTS[class_], _filler(rng), "Sentiment").split()
        judged = pick(rng, VERDICTS[class_]).split()
        answers += range(len(words) + 1, len(words) + len(judged))
        words += judged
    return Document("verdict", tuple(words), tuple(answers))
