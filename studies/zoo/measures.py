"""What is measured on the documents of a task: for each document a value, or parts of one.

Axes: D document, P part. Most measures have one part, and their number is its mean over documents. Expected calibration
error has one for each bin of confidence, and their number of predictions: see :func:`statistic`.
A value that a document lacks is NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from jambascope.losses import token_losses
from jambascope.model import HookedJamba
from jambascope.studies.zoo.tasks import SHOTS, WINDOWS, Task
from jambascope.zoo import scoring
from jambascope.zoo.documents import Document
from jambascope.zoo.language import Row
from jambascope.zoo.reviews import Episode
from jambascope.zoo.words import FAMILIAR_LABELS, LABELS, UNSEEN_LABELS, VERDICTS

BINS = 10
"""Of equal width, for the calibration error."""
EARLY, LATE = (20, 31), (245, 256)
"""Positions of a row around 25 and 250, over which the two losses of the ICL score are averaged."""
CALIBRATION = "calibration error"


class Cell(NamedTuple):
    """The address of a number, but for the model."""

    task: str
    condition: str
    x_name: str | None
    x: float | None
    measure: str


Values = dict[Cell, Float[np.ndarray, "document part"]]


def measure(model: HookedJamba, task: Task, drawn: Sequence[Document] | Sequence[Row]) -> Values:
    """Every measure of a task on its documents."""
    found = MEASURED[task.measured](model, task, drawn)
    return {
        Cell(task.task, task.condition, task.x_name, task.x if x is None else x, name): _two_axes(values)
        for (name, x), values in found.items()
    }


def statistic(means: Float[torch.Tensor, "*rest part"]) -> Float[torch.Tensor, "*rest"]:
    """The number that means over documents come to: the one part, or the expected calibration error.

    The calibration error of bins b is ``sum_b |sum of (confidence - hit)| / predictions`` (Guo et al. 2017, arXiv
    1706.04599, equation 3); the last part counts predictions.
    """
    if means.shape[-1] == 1:
        return means[..., 0]
    return means[..., :-1].abs().sum(-1) / means[..., -1]


def _two_axes(values: torch.Tensor | np.ndarray) -> np.ndarray:
    found = np.asarray(values, dtype=np.float64)
    return found[:, None] if found.ndim == 1 else found


Found = dict[tuple[str, float | None], torch.Tensor | np.ndarray]
"""Measure and x (None: the task's own) -> values of documents."""


def _labels(model: HookedJamba, task: Task, episodes: Sequence[Episode]) -> Found:
    scores = scoring.label_scores(model, episodes)
    commonest = np.array([_commonest(episode) for episode in episodes])
    return label_values(scores, len(episodes[0].labels), {"accuracy of the commonest label": commonest})


def label_values(
    scores: scoring.LabelScores, classes: int, more: Mapping[str, Float[np.ndarray, "document shot"]] = {}
) -> Found:
    """What is told of labels, at the numbers of shots of ``SHOTS``; and their calibration error, over all of them.

    Args:
        more: further numbers by shots.
    """
    plain = {
        "label mass": scores.mass,
        "valid rate": scores.valid,
        "accuracy free": scores.acc_free,
        "accuracy restricted": scores.acc_restricted,
        "format gap": scores.format_gap,
        "chance": np.where(scores.acc_free.isnan(), np.nan, 1 / classes),
    } | dict(more)
    found = {(name, s): values[:, s] for name, values in plain.items() for s in SHOTS if s < values.shape[1]}
    # Before the first shot of a class nothing says its label: only mass and validity are defined there.
    found = {key: values for key, values in found.items() if not np.isnan(values).all()}
    return found | {(CALIBRATION, None): calibration_parts(scores.confidence, scores.acc_restricted)}


def _commonest(episode: Episode) -> list[float]:
    """For each review the accuracy of answering with the label shown most often so far, ties drawn; NaN where the
    right one was not shown."""
    shown = [episode.words[i] for i in episode.label_positions]
    found = []
    for s, (position, word) in enumerate(zip(episode.label_positions, shown, strict=True)):
        counts = {label: shown[:s].count(label) for label in set(shown[:s])}
        best = [label for label, count in counts.items() if count == max(counts.values())]
        found.append((word in best) / len(best) if best and position in episode.answers else np.nan)
    return found


def calibration_parts(
    confidence: Float[torch.Tensor, "document shot"], hits: Float[torch.Tensor, "document shot"]
) -> Float[np.ndarray, "document part"]:
    """Per document, in each bin of confidence the sum of ``confidence - hit``, then how many predictions there were."""
    known = ~confidence.isnan()
    bins = (confidence.nan_to_num() * BINS).long().clamp_max(BINS - 1)
    parts = torch.zeros(len(confidence), BINS + 1, dtype=torch.float64)
    parts.scatter_add_(1, bins, (confidence - hits).double().nan_to_num())
    parts[:, BINS] = known.sum(1)
    return parts.numpy()


def _competitors(model: HookedJamba, task: Task, episodes: Sequence[Episode]) -> Found:
    """Probability, where a label is due, of words that begin free verdicts, and of words that are labels elsewhere."""
    verdicts = {verdict.split()[0] for both in VERDICTS for verdict in both}
    elsewhere = {*FAMILIAR_LABELS, *UNSEEN_LABELS, *LABELS}
    found: Found = {}
    for name, words in (("verdict mass", verdicts), ("mass of other labels", elsewhere - verdicts)):
        # The mass of "labels" that the episode does not have.
        asked = [dataclasses.replace(e, labels=tuple(sorted(words - set(e.labels)))) for e in episodes]
        mass = scoring.label_scores(model, asked).mass
        found |= {(name, s): mass[:, s] for s in SHOTS if s < mass.shape[1]}
    return found


def _verdicts(model: HookedJamba, task: Task, documents: Sequence[Document]) -> Found:
    scores = scoring.verdict_scores(model, documents)
    return {
        ("verdict mass", None): scores["mass"],
        ("class known", None): scores["class_known"],
        ("chance", None): np.full(len(documents), task.chance),
    }


def _answers(model: HookedJamba, task: Task, documents: Sequence[Document]) -> Found:
    """Mean over the answers of each document. A phone number is right when all its digits are, which is when greedy
    decoding says it (Repeat After Me, arXiv 2402.01032): of later digits by themselves, the ones before tell the entry
    without its name."""
    scores = scoring.answer_scores(model, documents)
    found: Found = {("accuracy", None): scores.hits.nanmean(1), ("loss", None): scores.losses.nanmean(1)}
    if task.domain == "phones":
        digits = scores.hits.reshape(len(documents), -1, 3)
        found["accuracy", None] = digits.prod(2).nanmean(1)
        found["accuracy of digits", None] = scores.hits.nanmean(1)
    if task.chance is not None:
        found["chance", None] = np.full(len(documents), task.chance)
    return found


def _rows(model: HookedJamba, task: Task, rows: Sequence[Row]) -> Found:
    losses = row_losses(model, rows)
    answers = torch.from_numpy(np.stack([row.answers for row in rows]))
    of_answers = losses.masked_fill(~answers, torch.nan)
    return {
        ("loss", None): losses.nanmean(1),
        ("loss on answers", None): of_answers.nanmean(1),
        ("ICL score", None): losses[:, slice(*LATE)].mean(1) - losses[:, slice(*EARLY)].mean(1),
    }


def _positions(model: HookedJamba, task: Task, rows: Sequence[Row]) -> Found:
    losses = row_losses(model, rows)
    pieces = zip(WINDOWS, WINDOWS[1:], strict=False)
    return {("loss", (a + b) / 2): losses[:, a:b].mean(1) for a, b in pieces}


@torch.no_grad()
def row_losses(model: HookedJamba, rows: Sequence[Row]) -> Float[torch.Tensor, "document pos"]:
    """The loss (nats) on each token of packed rows; NaN at <bos>, which nothing predicts."""
    ids = torch.as_tensor(np.stack([row.ids for row in rows]), device=model.device)
    batches = ids.split(max(1, scoring.TOKENS // ids.shape[1]))
    losses = torch.cat([token_losses(model(batch), batch).double().cpu() for batch in batches])
    return torch.nn.functional.pad(losses, (1, 0), value=torch.nan)


MEASURED = {
    "labels": _labels,
    "competitors": _competitors,
    "verdicts": _verdicts,
    "answers": _answers,
    "rows": _rows,
    "positions": _positions,
}
