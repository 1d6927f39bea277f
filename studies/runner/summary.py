"""From rows to means with intervals: over prompts of one training, over trainings and prompts of a recipe.

As the zoo's evaluation counts (:mod:`jambascope.studies.zoo.summary`): the mean over prompts; its 95 % interval the
bootstrap's over prompts, and where a recipe has several trainings the hierarchical one over both. Hits and misses, and
differences of such, that all agree get Wilson's, since no resampling of hits alone finds a miss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float

from jambascope.errors import RunError
from jambascope.studies.zoo.summary import estimate, wilson

Key = tuple
"""Recipe, measure and labels."""


def samples_of(rows: pd.DataFrame, by: Sequence[str], pooled: str = "recipe") -> dict[Key, pd.DataFrame]:
    """For every recipe, measure and combination of labels its values: trainings down, (seed, sample) across.

    A label that no row has, since what it tells apart was not measured, is absent from all.

    Args:
        pooled: ``"recipe"``, or ``"model"`` for every training by itself.

    Raises:
        RunError: two rows that agree in all of it.
    """
    found, rows = {}, rows.reindex(columns=rows.columns.union([*by], sort=False))
    for key, part in rows.groupby([pooled, "measure", *by], sort=False, dropna=False):
        index = ["model", "seed", "sample"]
        if part.duplicated(index).any():
            raise RunError(f"the study gave {key} twice for the same sample; its rows need a further label")
        found[key] = part.pivot(index="model", columns=["seed", "sample"], values="value")
    return found


def as_tensor(values: pd.DataFrame) -> Float[torch.Tensor, "training sample 1 1"]:
    """As :func:`jambascope.studies.zoo.summary.estimate` takes them; NaN where a training has no such sample."""
    return torch.tensor(values.to_numpy(), dtype=torch.float64)[..., None, None]


def summarize(rows: pd.DataFrame, measures: Sequence[str], by: Sequence[str], pooled: str = "recipe") -> pd.DataFrame:
    """A line for every recipe, measure and combination of labels, in the order of ``measures``.

    Columns: ``pooled``, measure, labels, mean, low, high (infinite for a single sample), n (values), trainings.
    """
    lines = []
    for measure in measures:
        own = rows[rows.measure == measure]
        kind = own["kind"].iloc[0] if len(own) and "kind" in own else None
        for key, values in samples_of(own, by, pooled).items():
            mean, low, high, n = _estimate(as_tensor(values), kind)
            line = dict(zip((pooled, "measure", *by), key, strict=True))
            lines.append(line | {"mean": mean, "low": low, "high": high, "n": int(n), "trainings": len(values)})
    return pd.DataFrame(lines, columns=[pooled, "measure", *by, "mean", "low", "high", "n", "trainings"])


def _estimate(values: Float[torch.Tensor, "training sample 1 1"], kind: str | None) -> tuple[float, ...]:
    mean, low, high, n = (part.item() for part in estimate(values, hits=kind == "hit"))
    if kind == "change of hits":
        low, high = of_agreeing_hits(mean, low, high, values.shape[1])
    return mean, low, high, n


def of_agreeing_hits(mean: float, low: float, high: float, n: int) -> tuple[float, float]:
    """The interval of a difference of hits of n samples: where they all agree, as far as one that none shows can go."""
    if low != high:
        return low, high
    _, most = wilson(torch.tensor(0.0), torch.tensor(float(n)))
    return max(-1.0, mean - most.item()), min(1.0, mean + most.item())


def number(mean: float, low: float, high: float, digits: int = 2) -> str:
    """A mean with its interval, which is left out where there is none."""
    mean, low, high = (round(value, digits) + 0.0 for value in (mean, low, high))  # no "-0.00"
    ends = f" [{low:.{digits}f}, {high:.{digits}f}]" if math.isfinite(low) and math.isfinite(high) else ""
    return f"{mean:.{digits}f}{ends}"


def one(summary: pd.DataFrame, **where: object) -> pd.Series:
    """The one line of a summary that says ``where``."""
    for name, value in where.items():
        summary = summary[summary[name] == value]
    assert len(summary) == 1, where
    return summary.iloc[0]
