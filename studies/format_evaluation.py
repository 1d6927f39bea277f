"""Format following of many episodes: what each model makes of them, by shots, with intervals over episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, get_args

import numpy as np
import torch

from jambascope.hooks.intervals import bootstrap_interval, percentiles, resampled_means
from jambascope.model import HookedJamba
from jambascope.studies.figures.zoo import Panel, Point
from jambascope.studies.zoo.measures import CALIBRATION, Found, label_values, statistic
from jambascope.studies.zoo.tasks import TRAINED_SHOTS, Task, draw
from jambascope.zoo.reviews import TWO_CLASSES, LabelKind
from jambascope.zoo.scoring import label_scores

SHUFFLED = "shuffled"
"""The control: labels drawn anew for every review, so that only the label set can be learned."""
KINDS = (*get_args(LabelKind), SHUFFLED)
MEASURES = ("label mass", "valid rate", "accuracy restricted", "accuracy free", "format gap")
CHANCE = "accuracy restricted"
"""The measure that has one: 1 / classes."""
CHUNK = 4
"""Episodes between two reports."""


class Row(NamedTuple):
    """A mean over episodes with its 95 % bootstrap interval."""

    model: str
    kind: str
    """Of the label words."""
    measure: str
    shots: int | None
    """None: over all of them."""
    mean: float
    low: float
    high: float
    n: int
    """Episodes that have a value: without a shot of the class there is no accuracy."""


def kinds_of(classes: int) -> tuple[str, ...]:
    """The kinds of label words that there are for so many classes."""
    return tuple(kind for kind in KINDS if classes == 2 or kind not in TWO_CLASSES)


def task_of(kind: str, classes: int, shots: int, filler: int) -> Task:
    """Episodes of one kind, as the evaluation of the packaged models asks them."""
    words = {"kind": "arbitrary", "shuffled": True} if kind == SHUFFLED else {"kind": kind}
    options = {"shots": shots + 1, "classes": classes, "filler": filler} | words
    return Task(
        task="few-shot", condition=kind, measured="labels", domain="review", x_name="shots",
        asked="drawn" if kind == SHUFFLED else "shown", options=tuple(options.items()),
    )  # fmt: skip


def evaluate(
    models: Sequence[tuple[str, Callable[[], HookedJamba]]],
    kinds: Sequence[str],
    episodes: int = 64,
    classes: int = 2,
    shots: int = 16,
    filler: int = 0,
    seed: int = 0,
    report: Callable[..., bool] = lambda share, text, value: True,
) -> list[Row]:
    """Every model on the same episodes of every kind.

    Args:
        models: what each is called, and a function that gives it, so that one at a time need be open.
        report: told the share done, what is at work and the rows so far; ends it by returning False.
    """
    rows: list[Row] = []
    done, total = 0, len(kinds) * len(models) * episodes
    for kind in kinds:
        drawn = draw(task_of(kind, classes, shots, filler), episodes, seed)
        for name, opened in models:
            text = f"{name}, {kind} labels"
            if not report(done / total, text, None):
                return rows
            model, found = opened(), []
            for start in range(0, len(drawn), CHUNK):
                found.append(label_values(label_scores(model, drawn[start : start + CHUNK]), classes))
                done += len(drawn[start : start + CHUNK])
                last = start + CHUNK >= len(drawn)
                so_far = [*rows, *summarized(name, kind, found)] if last or start // CHUNK % 4 == 3 else None
                if not report(done / total, text, so_far):
                    return [*rows, *summarized(name, kind, found)]
            rows += summarized(name, kind, found)
    return rows


def summarized(model: str, kind: str, found: Sequence[Found]) -> list[Row]:
    """Means and intervals of what ``label_values`` found in pieces."""
    # A piece without any value of a measure leaves it out.
    names = dict.fromkeys(key for piece in found for key in piece if key[0] in MEASURES)
    empty = [np.full(len(piece[CALIBRATION, None]), np.nan) for piece in found]
    values = [
        np.concatenate(
            [np.asarray(piece.get(key, none), dtype=float) for piece, none in zip(found, empty, strict=True)]
        )
        for key in names
    ]
    samples = torch.from_numpy(np.stack(values, 1))
    low, high = bootstrap_interval(samples)
    counts = (~samples.isnan()).sum(0).tolist()
    numbers = zip(samples.nanmean(0).tolist(), low.tolist(), high.tolist(), counts, strict=True)
    rows = [Row(model, kind, name, shots, *own) for (name, shots), own in zip(names, numbers, strict=True)]
    parts = torch.from_numpy(np.concatenate([piece[CALIBRATION, None] for piece in found]))
    ends = (float(end) for end in percentiles(statistic(resampled_means(parts))))
    return [*rows, Row(model, kind, CALIBRATION, None, float(statistic(parts.mean(0))), *ends, len(parts))]


def panels(rows: Sequence[Row], classes: int) -> list[tuple[str, list[Panel]]]:
    """A row of panels for each measure, a column for each kind, as ``figures.zoo.lines`` draws them."""
    kinds = list(dict.fromkeys(row.kind for row in rows))
    return [(measure, [_panel(rows, measure, kind, classes) for kind in kinds]) for measure in MEASURES]


def _panel(rows: Sequence[Row], measure: str, kind: str, classes: int) -> Panel:
    own = [row for row in rows if row.measure == measure and row.kind == kind]
    points = [Point(row.model, None, float(row.shots), row.mean, row.low, row.high) for row in own]
    shots = sorted({point.x for point in points})
    guides = {"chance": [(x, 1 / classes) for x in shots]} if measure == CHANCE and shots else {}
    return Panel(f"{kind} labels", points, tuple(map(float, TRAINED_SHOTS)), guides)
