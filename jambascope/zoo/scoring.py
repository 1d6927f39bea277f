"""How well a model reads documents of the language: answers, label words and classes, per document.

Axes: D document, A answer, S review of an episode (each predicted after as many shots as stand before it). What a
document lacks is NaN, so that means and resampling leave it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from jambascope.errors import InputError
from jambascope.model import HookedJamba
from jambascope.zoo.documents import Document
from jambascope.zoo.language import ids_of
from jambascope.zoo.reviews import Episode
from jambascope.zoo.words import VERDICTS, VOCABULARY

TOKENS = 16_384
"""Most tokens of a forward pass."""


@dataclass(frozen=True, eq=False)
class AnswerScores:
    """The words that the context determines."""

    hits: Float[torch.Tensor, "document answer"]
    """1 where the likeliest word of the whole vocabulary is the right one."""
    losses: Float[torch.Tensor, "document answer"]
    """Nats."""


@dataclass(frozen=True, eq=False)
class LabelScores:
    """The labels of few-shot episodes, at every number of shots."""

    mass: Float[torch.Tensor, "document shot"]
    """M: probability of all label words of the episode together."""
    valid: Float[torch.Tensor, "document shot"]
    """1 where the likeliest word is one of the label words."""
    acc_free: Float[torch.Tensor, "document shot"]
    """1 where the likeliest word is the right label; NaN where no shot showed it."""
    acc_restricted: Float[torch.Tensor, "document shot"]
    """1 where the right label is the likeliest of the label words; NaN where no shot showed it."""
    confidence: Float[torch.Tensor, "document shot"]
    """The likeliest label's share p / M; NaN where no shot showed the right one."""

    @property
    def format_gap(self) -> Float[torch.Tensor, "document shot"]:
        """``acc_restricted - acc_free``: what is lost although the class was told apart."""
        return self.acc_restricted - self.acc_free


@torch.no_grad()
def answer_scores(model: HookedJamba, documents: Sequence[Document]) -> AnswerScores:
    """Hits and losses of every answer, in the order of the answers.

    Raises:
        InputError: no documents.
    """
    most = max((len(doc.answers) for doc in _some(documents)), default=0)
    hits = torch.full((len(documents), most), torch.nan)
    losses = hits.clone()
    for index, logits in _logits(model, documents):
        doc = documents[index]
        # Word i stands at position i + 1, behind <bos>: the position that predicts it is i.
        at = logits[list(doc.answers)].float()
        right = torch.tensor([VOCABULARY[doc.words[i]] for i in doc.answers], dtype=torch.long)
        hits[index, : len(right)] = (at.argmax(-1) == right).float()
        losses[index, : len(right)] = torch.nn.functional.cross_entropy(at, right, reduction="none")
    return AnswerScores(hits, losses)


@torch.no_grad()
def label_scores(model: HookedJamba, episodes: Sequence[Episode]) -> LabelScores:
    """All labels of all episodes, which must have equally many reviews.

    Raises:
        InputError: no episodes, or of different lengths.
    """
    shots = {len(episode.label_positions) for episode in _some(episodes)}
    if len(shots) > 1:
        raise InputError(f"episodes have {sorted(shots)} reviews; give episodes of one length")
    rows: list[dict[str, torch.Tensor]] = [{}] * len(episodes)
    for index, logits in _logits(model, episodes):
        episode = episodes[index]
        labels = torch.tensor([VOCABULARY[word] for word in episode.labels])
        right = torch.tensor([VOCABULARY[episode.words[i]] for i in episode.label_positions])
        known = torch.tensor([i in episode.answers for i in episode.label_positions])
        rows[index] = scored_labels(logits[list(episode.label_positions)], labels, right, known)
    return stacked_labels(rows)


def scored_labels(
    logits: Float[torch.Tensor, "shot vocab"],
    labels: Int[torch.Tensor, " labels"],
    right: Int[torch.Tensor, " shot"],
    known: Bool[torch.Tensor, " shot"],
) -> dict[str, Float[torch.Tensor, " shot"]]:
    """The scores of one episode, by the fields of :class:`LabelScores`.

    Args:
        labels: ids of the label set.
        right: the label of each review.
        known: whether an earlier review showed it.
    """
    probability = logits.double().softmax(-1)
    among, unknown = probability[:, labels], torch.tensor(torch.nan)
    free, best = probability.argmax(-1), among.argmax(-1)
    return {
        "mass": among.sum(-1).float(),
        "valid": torch.isin(free, labels).float(),
        "acc_free": torch.where(known, (free == right).float(), unknown),
        "acc_restricted": torch.where(known, (labels[best] == right).float(), unknown),
        "confidence": torch.where(known, (among.amax(-1) / among.sum(-1)).float(), unknown),
    }


def stacked_labels(rows: Sequence[dict[str, Float[torch.Tensor, " shot"]]]) -> LabelScores:
    """Those of several episodes."""
    return LabelScores(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]})


@torch.no_grad()
def verdict_scores(model: HookedJamba, documents: Sequence[Document]) -> dict[str, Float[torch.Tensor, " document"]]:
    """What the model says after the last ``Sentiment :`` of each document, of the words that begin verdicts.

    Returns:
        ``mass`` [D]: probability of all of them together. ``class_known`` [D]: 1 where, of those that only one class
        begins with, the ones of the right class are likelier.

    Raises:
        InputError: no documents, or one that does not end in a verdict.
    """
    judged = [_last_verdict(number, doc) for number, doc in enumerate(_some(documents))]
    first = [{verdict.split()[0] for verdict in verdicts} for verdicts in VERDICTS]
    sides = [torch.tensor([VOCABULARY[w] for w in sorted(first[c] - first[1 - c])]) for c in (0, 1)]
    every = torch.tensor(sorted(VOCABULARY[word] for word in first[0] | first[1]))
    found = {name: torch.full((len(documents),), torch.nan) for name in ("mass", "class_known")}
    for index, logits in _logits(model, documents):
        at, class_ = judged[index]
        probability = logits[at].double().softmax(-1)
        found["mass"][index] = probability[every].sum()
        found["class_known"][index] = float(probability[sides[class_]].sum() > probability[sides[1 - class_]].sum())
    return found


def _last_verdict(number: int, document: Document) -> tuple[int, int]:
    """Where the last verdict begins, and its class."""
    headers = [i for i, word in enumerate(document.words) if word == "Sentiment"]
    at = headers[-1] + 2 if headers else len(document.words)
    said = " ".join(document.words[at:])
    for class_ in (0, 1):
        if said in VERDICTS[class_]:
            return at, class_
    raise InputError(f"documents[{number}] does not end in a verdict, but in {said!r}; draw it with reviews.verdict")


def _some(documents: Sequence[Document]) -> Sequence[Document]:
    if not documents:
        raise InputError("documents=[]: give at least one document")
    return documents


def _logits(
    model: HookedJamba, documents: Sequence[Document]
) -> Iterator[tuple[int, Float[torch.Tensor, "pos vocab"]]]:
    """Index of a document and its logits [T V] on the CPU, documents of like length together, padded on the right
    (which a causal model does not see)."""
    order = sorted(range(len(documents)), key=lambda i: len(documents[i].words))
    while order:
        longest = len(documents[order[-1]].words) + 1
        group, order = order[-max(1, TOKENS // longest) :], order[: -max(1, TOKENS // longest)]
        ids: Int[np.ndarray, "document pos"] = ids_of([documents[i] for i in group])
        logits = model(torch.as_tensor(ids, device=model.device)).cpu()
        yield from zip(group, logits, strict=True)
