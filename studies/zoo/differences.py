"""Each model less one that it is compared with, on the same documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import torch
from jaxtyping import Float

from jambascope.hooks.intervals import percentiles
from jambascope.studies.zoo.evaluation import Run
from jambascope.studies.zoo.measures import Values
from jambascope.studies.zoo.summary import SCHEMA, estimate, hierarchical_draws, stacked

REFERENCE = "jamba-micro"
DIFFERENCES = pa.schema(
    [
        SCHEMA.field(name)
        for name in ("model", "task", "condition", "x_name", "x", "measure", "mean", "low", "high", "n")
    ]
    + [pa.field("seeds", pa.int32()), pa.field("reference", pa.string()), pa.field("reference_seeds", pa.int32())]
)


@dataclass(frozen=True)
class Difference:
    """One number of a model less the same of the reference."""

    model: str
    task: str
    condition: str
    x_name: str | None
    x: float | None
    measure: str
    mean: float
    low: float
    high: float
    n: int
    """Documents on which both have a value."""
    seeds: int
    """Of the model; with one, the interval is for these weights and leaves out how trainings differ."""
    reference: str
    reference_seeds: int


def differences_of(runs: Sequence[Run], values: Sequence[Values]) -> list[Difference]:
    """Every cell of every model less that of ``REFERENCE``; nothing where that is not among the models."""
    own: dict[str, list[Values]] = {}
    for run, found in zip(runs, values, strict=True):
        own.setdefault(run.model, []).append(found)
    rows = []
    for model in own if REFERENCE in own else ():
        if model == REFERENCE:
            continue
        for (cells, a), (_, b) in zip(stacked(own[model]), stacked(own[REFERENCE]), strict=True):
            mean, low, high, n = (t.tolist() for t in difference(a, b))
            rows += [
                Difference(model, *cell, mean[i], low[i], high[i], int(n[i]), len(a), REFERENCE, len(b))
                for i, cell in enumerate(cells)
            ]
    return rows


def difference(
    a: Float[torch.Tensor, "seed document cell part"], b: Float[torch.Tensor, "seed document cell part"]
) -> tuple[Float[torch.Tensor, " cell"], ...]:
    """Mean of ``a`` less that of ``b``, its 95 % interval, and how many documents have both.

    Documents are drawn for both together, since both read the same; seeds of each by themselves. Where all of ``a`` and
    all of ``b`` are hits or misses and every draw has the same difference, the interval is Newcombe's (1998, method 10)
    from the two of Wilson.
    """
    (mean_a, low_a, high_a, _), (mean_b, low_b, high_b, _) = estimate(a), estimate(b)
    mean = mean_a - mean_b
    low, high = percentiles(hierarchical_draws(a, of_seeds=1) - hierarchical_draws(b, of_seeds=2))
    down = ((mean_a - low_a) ** 2 + (high_b - mean_b) ** 2).sqrt()
    up = ((high_a - mean_a) ** 2 + (mean_b - low_b) ** 2).sqrt()
    certain = low == high
    both = ~(a.isnan().any(-1).all(0) | b.isnan().any(-1).all(0))
    return mean, torch.where(certain, mean - down, low), torch.where(certain, mean + up, high), both.sum(0)


def table(rows: Sequence[Difference]) -> pa.Table:
    return pa.Table.from_pylist([asdict(row) for row in rows], DIFFERENCES)
