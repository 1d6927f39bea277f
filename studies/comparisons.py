"""Whether paired differences are more than chance, when many are asked about."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float

FLIPS = 9_999


def sign_flip_p(differences: Float[torch.Tensor, " n"], seed: int = 0) -> float:
    """Two-sided p of a mean of 0, by flipping signs at random (Fisher's test of paired samples): the share of
    ``FLIPS`` random assignments, and the one that was seen, whose mean is as far from 0."""
    values = differences.double()
    if not len(values):
        return 1.0
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


def by_sample(rows: pd.DataFrame) -> pd.Series:
    """Mean over trainings of every (seed, sample): what is resampled when trainings read the same prompts."""
    return rows.groupby(["seed", "sample"])["value"].mean()
