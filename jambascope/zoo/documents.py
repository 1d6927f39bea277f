"""Documents of the packaged models' language, all but reviews: seeded generators of word lists with known answers.

    repeat   random words, the same words again            whale Clara near lamp whale Clara near lamp
    story    sentences whose names and things recur        Alice gave the book to Bob . Bob thanked Alice .
    recall   a table, then questions about it              map : stone river , leaf mud ; leaf -> mud
    phones   numbers of several digits by name             phones : Alice 3 7 1 , Bob 2 9 4 ; call Bob -> 2 9 4
    copy     words among noise, said again without it      copy : . stone . . leaf -> stone leaf
    secret   one word announced, asked for much later      wave sand secret moon moss tide leaf secret moon

``recall`` is multi-query associative recall (Zoology, arXiv 2312.04927), ``phones`` the phone book of Repeat After Me
(arXiv 2402.01032), on which attention and fixed-size states part; ``copy`` (selective copying) and ``secret``
(induction with a single query) are the controls that Mamba alone solves (Mamba, arXiv 2312.00752, section 4.1).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np

from jambascope.errors import InputError
from jambascope.zoo.words import (
    COLORS,
    DIGITS,
    KEYS,
    NAMES,
    OTHERS,
    PLACES,
    PLURALS,
    SIZES,
    THINGS,
    VALUES,
    WORDS,
)

Split = Literal["train", "held_out"]

# A word after "=" is an answer. A and B are the story's people; the rest is drawn for each sentence.
SENTENCES = [
    "{A} gave the {thing} to {B} . {B} thanked ={A} .",
    "{A} and {B} went to the {place} . {A} gave a {thing} to ={B} .",
    "{A} and {B} went to the {place} . {B} gave a {thing} to ={A} .",
    "{A} lost the {thing} . {B} found the ={thing} and returned it to ={A} .",
    "{A} met {B} at the {place} . {B} left the ={place} with ={A} .",
    "{A} has a {color} {thing} . {B} wants the ={color} ={thing} .",
    "{A} saw the {color} {thing} near the {place} . the ={color} ={thing} was {size} .",
    "the {thing} near the {plurals} =is {size} .",
    "the {plurals} near the {thing} =are {size} .",
]
NOISE = OTHERS[:64]
"""What stands between the words of ``copy`` and around those of ``secret``."""


@dataclass(frozen=True)
class Document:
    """One document: its words, and the positions of the words that the context before them determines."""

    domain: str
    words: tuple[str, ...]
    answers: tuple[int, ...]


D = TypeVar("D", bound=Document)


def generator(draw: Callable[..., D]) -> Callable[..., D]:
    """Makes a domain's generator refuse a split that does not exist."""

    @functools.wraps(draw)
    def checked(rng: np.random.Generator, split: Split = "train", *args: Any, **options: Any) -> D:
        if split not in get_args(Split):
            raise InputError(f"split={split!r} must be 'train' or 'held_out'")
        return draw(rng, split, *args, **options)

    return checked


def is_held_out(i: int, j: int) -> bool:
    """Whether the i-th word of one list and the j-th of another are combined in the held-out split only."""
    return (i + j) % 5 == 0


def pair(rng: np.random.Generator, first: Sequence[str], second: Sequence[str], split: Split) -> tuple[str, str]:
    """Two different words that this split may combine."""
    while True:
        i, j = int(rng.integers(len(first))), int(rng.integers(len(second)))
        if first[i] != second[j] and is_held_out(i, j) == (split == "held_out"):
            return first[i], second[j]


def pick(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def log_uniform(rng: np.random.Generator, least: int, most: int) -> int:
    """A whole number from ``least`` to ``most``, its logarithm evenly spread."""
    return min(most, int(np.exp(rng.uniform(np.log(least), np.log(most + 1)))))


def within(field: str, value: int, least: int, most: int | None, what: str) -> None:
    """Raise InputError unless ``least <= value <= most``; None is no upper end."""
    if value < least or (most is not None and value > most):
        bounds = f"be at least {least}" if most is None else f"lie in {least}..{most}"
        raise InputError(f"{field}={value!r} must {bounds}: {what}")


@generator
def repeat(
    rng: np.random.Generator,
    split: Split = "train",
    length: int | None = None,
    times: int | None = None,
    longest: int = 48,
    pool: int = len(WORDS),
) -> Document:
    """``length`` different random words of the first ``pool`` ones, said ``times`` times.

    When not given, ``times`` is 2 to 4, and ``length`` 4 to ``longest``, log-uniformly. Fresh words are held out by
    chance alone: no sequence recurs.
    """
    length = log_uniform(rng, 4, longest) if length is None else length
    within("length", length, 1, pool, "the words are different")
    times = int(rng.integers(2, 5)) if times is None else times
    within("times", times, 1, None, "how often the words are said")
    once = [WORDS[i] for i in rng.choice(pool, length, replace=False)]
    # Where the words begin anew the document might end instead; everything else can be read off the context.
    answers = [i for i in range(length, length * times) if i % length]
    return Document("repeat", tuple(once * times), tuple(answers))


def sentence(rng: np.random.Generator, split: Split, people: tuple[str, str], index: int | None = None) -> str:
    """A sentence of ``SENTENCES``, answers marked by "="."""
    within("index", 0 if index is None else index, 0, len(SENTENCES) - 1, "a sentence of SENTENCES")
    thing, plurals = pair(rng, THINGS, PLURALS, split)
    place, color, size = (pick(rng, words) for words in (PLACES, COLORS, SIZES))
    template = SENTENCES[int(rng.integers(len(SENTENCES))) if index is None else index]
    A, B = people
    return template.format(A=A, B=B, thing=thing, plurals=plurals, place=place, color=color, size=size)


@generator
def story(rng: np.random.Generator, split: Split = "train", index: int | None = None) -> Document:
    """Two to four exchanges between the same two people, or the one that ``index`` numbers in ``SENTENCES``."""
    people = pair(rng, NAMES, NAMES, split)
    indices = [None] * int(rng.integers(2, 5)) if index is None else [index]
    words = " ".join(sentence(rng, split, people, i) for i in indices).split()
    answers = [i for i, word in enumerate(words) if word[0] == "="]
    return Document("story", tuple(word.removeprefix("=") for word in words), tuple(answers))


def _table(rng: np.random.Generator, split: Split, keys: list[str], values: list[str], entries: int) -> dict[str, str]:
    """Different keys, each with a value that this split combines it with."""
    within("entries", entries, 1, len(keys), "each key stands once")
    table = {}
    for i in rng.choice(len(keys), entries, replace=False).tolist():
        while True:
            j = int(rng.integers(len(values)))
            if is_held_out(i, j) == (split == "held_out"):
                table[keys[i]] = values[j]
                break
    return table


@generator
def recall(
    rng: np.random.Generator,
    split: Split = "train",
    entries: int | None = None,
    questions: int = 8,
    pool: int = len(KEYS),
) -> Document:
    """A table of ``entries`` keys with values (drawn when None: 2 to 16), then questions, each key at most once.

    Keys and values are of the first ``pool`` ones.

    The held-out split combines other keys and values; which keys it asks for is drawn in both.
    """
    within("pool", pool, 16, len(KEYS), "keys and values are of the first so many")
    entries = log_uniform(rng, 2, 16) if entries is None else entries
    table = _table(rng, split, KEYS[:pool], VALUES[:pool], entries)
    within("questions", questions, 0, None, "as many as there are entries at most are asked")
    words = ["map", ":"]
    for key, value in table.items():
        words += [key, value, ","]
    words.pop()
    for key in rng.permutation(list(table))[:questions]:
        words += [";", str(key), "->", table[key]]
    return Document("recall", tuple(words), tuple(i + 1 for i, word in enumerate(words) if word == "->"))


@generator
def phones(
    rng: np.random.Generator, split: Split = "train", entries: int | None = None, questions: int = 3
) -> Document:
    """A phone book of ``entries`` names (drawn when None: 2 to 8) with three digits each, then calls.

    The held-out split gives a name other first digits.
    """
    book = _table(rng, split, NAMES, DIGITS, log_uniform(rng, 2, 8) if entries is None else entries)
    numbers = {name: [first, pick(rng, DIGITS), pick(rng, DIGITS)] for name, first in book.items()}
    within("questions", questions, 0, None, "as many as there are entries at most are asked")
    words = ["phones", ":"]
    for name, number in numbers.items():
        words += [name, *number, ","]
    words.pop()
    answers = []
    for name in rng.permutation(list(numbers))[:questions]:
        words += [";", "call", str(name), "->", *numbers[name]]
        answers += [len(words) - 3, len(words) - 2, len(words) - 1]
    return Document("phones", tuple(words), tuple(answers))


@generator
def copy(
    rng: np.random.Generator, split: Split = "train", count: int | None = None, noise: int | None = None
) -> Document:
    """``count`` words (drawn when None: 2 to 8) scattered among ``noise`` dots (2 to 24), then the words alone.

    Held out by length alone.
    """
    count = int(rng.integers(2, 9)) if count is None else count
    noise = log_uniform(rng, 2, 24) if noise is None else noise
    within("count", count, 1, len(NOISE), "the words are different")
    within("noise", noise, 0, None, "dots among the words")
    said = [NOISE[i] for i in rng.choice(len(NOISE), count, replace=False)]
    scattered = ["."] * (count + noise)
    for place, word in zip(sorted(rng.choice(count + noise, count, replace=False).tolist()), said, strict=True):
        scattered[place] = word
    words = ("copy", ":", *scattered, "->", *said)
    return Document("copy", words, tuple(range(len(words) - count, len(words))))


@generator
def secret(rng: np.random.Generator, split: Split = "train", distance: int | None = None) -> Document:
    """A word announced by ``secret``, ``distance`` other words (drawn when None: 4 to 40), and ``secret`` again.

    The word is none of those around it, so that keeping one word is enough; ``repeat`` asks which word followed.

    Held out by length alone.
    """
    distance = log_uniform(rng, 4, 40) if distance is None else distance
    within("distance", distance, 0, None, "words in between")
    before = [pick(rng, NOISE) for _ in range(int(rng.integers(0, 6)))]
    between = [pick(rng, NOISE) for _ in range(distance)]
    word = pick(rng, KEYS[32:])
    words = (*before, "secret", word, *between, "secret", word)
    return Document("secret", words, (len(words) - 1,))
