"""From the values of documents to numbers with intervals: of one training over documents, of a recipe over seeds.

The rule for all: the number is the mean over documents (for the calibration error, the error of the pooled bins), its
95 % interval the bootstrap's over documents, or over seeds and documents within them (hierarchical). Where every
document is a hit or a miss, the interval is stretched to hold Wilson's, since no resampling of hits alone finds a miss.
The error of bins is biased by resampling, and its interval corrected for that. Two or three seeds are few: an interval
over them is too narrow, see :func:`hierarchical_draws`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float

from jambascope.hooks.intervals import (
    RESAMPLES,
    bootstrap_interval,
    corrected_interval,
    percentiles,
    resampled_means,
)
from jambascope.studies.zoo.evaluation import Run
from jambascope.studies.zoo.measures import Cell, Values, statistic

Z = 1.96


@dataclass(frozen=True)
class Row:
    """One number."""

    model: str
    seed: int | None
    """None: over the seeds of the model."""
    run: str | None
    """The directory of the weights; None over seeds."""
    task: str
    condition: str
    x_name: str | None
    x: float | None
    measure: str
    mean: float
    low: float
    high: float
    n: int
    """Documents that have a value, of all seeds."""
    seeds: int


SCHEMA = pa.schema(
    [("model", pa.string()), ("seed", pa.int32()), ("run", pa.string()), ("task", pa.string())]
    + [("condition", pa.string()), ("x_name", pa.string()), ("x", pa.float64()), ("measure", pa.string())]
    + [("mean", pa.float64()), ("low", pa.float64()), ("high", pa.float64()), ("n", pa.int32()), ("seeds", pa.int32())]
)


def rows_of(runs: Sequence[Run], values: Sequence[Values]) -> list[Row]:
    """A row for every run and cell, and for every cell over the seeds of each model that has several."""
    rows = []
    for model in dict.fromkeys(run.model for run in runs):
        own = [(run, found) for run, found in zip(runs, values, strict=True) if run.model == model]
        for run, found in own:
            rows += _rows(model, run, [found])
        if len(own) > 1:
            rows += _rows(model, None, [found for _, found in own])
    return rows


def table(rows: Sequence[Row]) -> pa.Table:
    return pa.Table.from_pylist([asdict(row) for row in rows], SCHEMA)


def _rows(model: str, run: Run | None, values: Sequence[Values]) -> list[Row]:
    """The cells of one run, or of several seeds together."""
    found: dict[Cell, Row] = {}
    who = (model, None, None) if run is None else (model, run.seed, str(run.directory))
    for cells, samples in stacked(values):
        means, low, high, counts = (t.tolist() for t in estimate(samples))
        for i, cell in enumerate(cells):
            found[cell] = Row(*who, *cell, means[i], low[i], high[i], int(counts[i]), len(values))
    return [found[cell] for cell in values[0]]


def stacked(
    values: Sequence[Values],
) -> Iterator[tuple[list[Cell], Float[torch.Tensor, "seed document cell part"]]]:
    """Cells of equal shape, and what several seeds have in them."""
    shapes: dict[tuple[int, ...], list[Cell]] = {}
    for cell, array in values[0].items():
        shapes.setdefault(array.shape, []).append(cell)
    for cells in shapes.values():
        arrays = np.stack([[found[cell] for cell in cells] for found in values])
        yield cells, torch.from_numpy(arrays).transpose(1, 2)


def estimate(
    samples: Float[torch.Tensor, "seed document cell part"], hits: bool = True
) -> tuple[Float[torch.Tensor, " cell"], ...]:
    """Mean, lower and upper end of the 95 % interval, and number of documents with a value, of every cell.

    Args:
        hits: whether values that are all 0 or 1 are hits and misses, so that the interval holds Wilson's.
    """
    one = len(samples) == 1
    means = torch.stack([statistic(seed.nanmean(0)) for seed in samples]).nanmean(0)
    known = ~samples.isnan().any(-1)
    counts = known.sum((0, 1))
    if one and samples.shape[-1] == 1:
        low, high = bootstrap_interval(samples[0, ..., 0])
    else:
        drawn = statistic(resampled_means(samples[0])) if one else hierarchical_draws(samples)
        if samples.shape[-1] > 1:
            low, high = corrected_interval(means, drawn, counts)
        else:
            low, high = percentiles(drawn)
    values = samples[..., 0].nan_to_num()
    # Seeds read the same documents: that many times over they say no more about those that were not drawn.
    low_wilson, high_wilson = wilson(values.sum((0, 1)) / len(samples), counts / len(samples))
    binary = ((values == 0) | (values == 1)).all(0).all(0) & (samples.shape[-1] == 1) & (counts > 0) & hits
    low = torch.where(binary, torch.minimum(low, low_wilson), low)
    high = torch.where(binary, torch.maximum(high, high_wilson), high)
    few = known.any(0).sum(0) < 2  # documents, however many seeds read them
    return means, low.masked_fill(few, -math.inf), high.masked_fill(few, math.inf), counts


def hierarchical_draws(
    samples: Float[torch.Tensor, "seed document cell part"],
    seed: int = 0,
    resamples: int = RESAMPLES,
    of_seeds: int = 1,
) -> Float[torch.Tensor, "resamples cell"]:
    """Statistics of draws, with replacement, of seeds and of documents within them; every seed weighs the same.

    All seeds read the same documents, so a draw of documents holds for all seeds of that draw (the pigeonhole
    bootstrap, Owen 2007, arXiv 0712.1111): were they drawn for each seed anew, what is hard about a document would
    average out, which over seeds it does not.

    Percentiles of the draws are an interval for the mean over all seeds and documents that could have been. With few
    seeds it is too narrow: S of them spread by sqrt((S - 1) / S) of what they should, and have short tails. Where seeds
    differ more than documents, of 1,000 simulated 95 % intervals 71 % held the truth with two seeds, 82 % with three,
    88 % with five, 93 % with ten.

    Args:
        seed: of the draws of documents. Equal, it pairs those of two models of equally many documents.
        of_seeds: added to ``seed`` for the draws of seeds; other for each of two models, whose seeds are no pairs.
    """
    seeds, cells = len(samples), samples.shape[2]
    found = statistic(resampled_means(samples.transpose(0, 1), seed, resamples))  # [R S C]
    generator = torch.Generator().manual_seed(seed + of_seeds)
    chosen = torch.randint(seeds, (resamples, seeds, 1), generator=generator).expand(-1, -1, cells)
    return found.gather(1, chosen).nanmean(1)


def wilson(
    hits: Float[torch.Tensor, "*rest"], n: Float[torch.Tensor, "*rest"]
) -> tuple[Float[torch.Tensor, "*rest"], Float[torch.Tensor, "*rest"]]:
    """Wilson's 95 % score interval of a share of hits (1927); [0, 1] of no documents."""
    n = n.double()
    share = torch.where(n > 0, hits / n.clamp_min(1), 0.5)
    n = n.clamp_min(1e-9)
    center = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * (share * (1 - share) / n + Z**2 / (4 * n**2)).sqrt()
    return (center - half).clamp_min(0), (center + half).clamp_max(1)
