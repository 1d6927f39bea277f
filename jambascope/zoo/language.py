"""The language of the packaged models: readable documents of several domains, packed into training rows.

Every domain rewards reading the context, since that is what there is to look at in a model. A *document* is a list
of words with the positions of its *answers*: the words that what stands before them determines. The held-out split
combines words that training never combines (:func:`jambascope.zoo.documents.is_held_out`): topic and adjective,
label words, the names of a story, key and value. Labels that training never uses, and more shots, entries and words
than it uses, are asked for by the generators' options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from jaxtyping import Bool, Int

from jambascope.errors import InputError
from jambascope.zoo.documents import Document, Split, copy, phones, recall, repeat, secret, story
from jambascope.zoo.reviews import review, verdict
from jambascope.zoo.words import BOS, EOS, PAD, VOCABULARY

DOMAINS: dict[str, Callable[..., Document]] = {
    "repeat": repeat,
    "review": review,
    "verdict": verdict,
    "story": story,
    "recall": recall,
    "phones": phones,
    "copy": copy,
    "secret": secret,
}
SHARES = {
    "repeat": 0.16,
    "review": 0.14,
    "verdict": 0.10,
    "story": 0.12,
    "recall": 0.20,
    "phones": 0.13,
    "copy": 0.06,
    "secret": 0.09,
}
"""How often the mixture draws each kind of document."""


@dataclass(frozen=True)
class Row:
    """A packed training row: ids [T] beginning with <bos>, documents each ended by <eos>, the last one cut."""

    ids: Int[np.ndarray, " pos"]
    answers: Bool[np.ndarray, " pos"]
    """The context determines the token at this position."""
    domains: Int[np.ndarray, " pos"]
    """Index into ``DOMAINS``; -1 at <bos>."""


def document(domain: str, rng: np.random.Generator, split: Split = "train", **options: Any) -> Document:
    """A document of one domain, ``options`` as its generator takes them.

    Raises:
        InputError: a domain or split that does not exist.
    """
    if domain not in DOMAINS:
        raise InputError(f"domain={domain!r} must be one of {', '.join(DOMAINS)}")
    if split not in get_args(Split):
        raise InputError(f"split={split!r} must be 'train' or 'held_out'")
    return DOMAINS[domain](rng, split, **options)


def ids_of(documents: list[Document]) -> Int[np.ndarray, "document pos"]:
    """<bos> and the words of each document, filled up on the right with <pad>: word i stands at position i + 1."""
    ids = np.full((len(documents), 1 + max(len(doc.words) for doc in documents)), PAD)
    ids[:, 0] = BOS
    for row, doc in zip(ids, documents, strict=True):
        row[1 : 1 + len(doc.words)] = [VOCABULARY[word] for word in doc.words]
    return ids


def mixture(
    rng: np.random.Generator,
    length: int,
    split: Split = "train",
    shares: Mapping[str, float] = SHARES,
    options: Mapping[str, Mapping[str, Any]] = {},
) -> Iterator[Row]:
    """Endless packed rows of ``length`` ids.

    Args:
        shares: how often each domain is drawn.
        options: domain -> what its generator is given besides.
    """
    if length < 2:
        raise InputError(f"length={length} must be at least 2: <bos> and a word")
    names, kinds = list(shares), list(DOMAINS)
    weights = np.array([shares[name] for name in names], dtype=float)
    while True:
        ids, answers, domains = [BOS], [False], [-1]
        while len(ids) < length:
            name = names[rng.choice(len(names), p=weights / weights.sum())]
            doc = document(name, rng, split, **options.get(name, {}))
            is_answer = np.zeros(len(doc.words) + 1, dtype=bool)
            is_answer[list(doc.answers)] = True
            ids += [*(VOCABULARY[word] for word in doc.words), EOS]
            answers += is_answer.tolist()
            domains += [kinds.index(name)] * len(is_answer)
        yield Row(np.array(ids[:length]), np.array(answers[:length]), np.array(domains[:length]))
