"""Whether paired differences are more than chance, when many are asked about."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int

from jambascope.studies.runner.summary import summarize

FLIPS = 9_999
EXACT = 16
"""Up to so many pairs every assignment of signs is looked at."""
PROMPTS = "fingerprint of the prompts"


def sign_flip_p(differences: Float[torch.Tensor, " n"], seed: int = 0) -> float:
    """Two-sided p of a mean of 0, by flipping signs (Fisher's test of paired samples): the share of assignments whose
    mean is as far from 0 as the one that was seen. Exact for up to ``EXACT`` pairs, and of hits and misses then
    McNemar's exact test; of more, over ``FLIPS`` random assignments and the one that was seen."""
    values = differences.double()
    if not len(values):
        return 1.0
    if len(values) <= EXACT:
        every = 1 - 2 * (torch.arange(2 ** len(values))[:, None] >> torch.arange(len(values)) & 1).double()
        return float(((every @ values).abs() >= values.sum().abs() * (1 - 1e-9)).double().mean())
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (FLIPS, len(values)), generator=generator).double() * 2 - 1
    # Sums of the same terms in another order differ by rounding.
    least = values.sum().abs() * (1 - 1e-9)
    return (1 + int(((signs @ values).abs() >= least).sum())) / (1 + FLIPS)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979), in the given order: below 0.05 in all but one in twenty
    families in which nothing is there."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def least_p(pairs: int) -> float:
    """The smallest p that so many pairs can give, whatever they show."""
    return 2.0 ** (1 - pairs) if pairs <= EXACT else 1 / (1 + FLIPS)


def interval(values: Float[torch.Tensor, " n"], kind: str | None = None) -> tuple[float, float, float]:
    """Mean and 95 % interval, as :mod:`jambascope.studies.runner.summary` has them.

    Args:
        kind: as of rows.
    """
    rows = pd.DataFrame({"recipe": "", "model": "", "measure": "", "seed": 0, "kind": kind, "value": values.tolist()})
    (line,) = summarize(rows.assign(sample=range(len(rows))), [""], ()).itertuples()
    return line.mean, line.low, line.high


def fingerprint(tokens: Int[torch.Tensor, "prompts pos"]) -> dict[str, Any]:
    """A row that tells whether two models read the same prompts, which they are compared on."""
    return {"measure": PROMPTS, "sample": 0, "value": float(zlib.crc32(tokens.cpu().long().numpy().tobytes()))}


def same_prompts(sides: Sequence[pd.DataFrame]) -> bool:
    """Whether the rows of two models are of the same prompts, by their fingerprints."""
    first, second = (set(own[own.measure == PROMPTS].groupby(["seed", "value"]).groups) for own in sides)
    return first == second and bool(first)


def by_sample(rows: pd.DataFrame) -> pd.Series:
    """Mean over trainings of every (seed, sample): what is resampled when trainings read the same prompts."""
    return rows.groupby(["seed", "sample"])["value"].mean()
