"""Spearman's rank correlation of many rows at once, also with a third ranking held fixed."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float


def spearman(a: Float[np.ndarray, "rows values"], b: Float[np.ndarray, "rows values"]) -> Float[np.ndarray, " rows"]:
    """Of each row; ties share their mean rank. NaN where a row of either is constant."""
    ranks = [pd.DataFrame(values).rank(axis=1).to_numpy() for values in (a, b)]
    centred = [r - r.mean(1, keepdims=True) for r in ranks]
    scale = np.sqrt((centred[0] ** 2).sum(1) * (centred[1] ** 2).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 0, (centred[0] * centred[1]).sum(1) / scale, np.nan)


def partial_spearman(
    a: Float[np.ndarray, "rows values"], b: Float[np.ndarray, "rows values"], given: Float[np.ndarray, "rows values"]
) -> Float[np.ndarray, " rows"]:
    """Of what ``given`` does not explain of each: the partial correlation of ranks (Kendall, 1942). NaN where it
    explains one of them wholly."""
    ab, ac, bc = spearman(a, b), spearman(a, given), spearman(b, given)
    scale = (1 - ac**2) * (1 - bc**2)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 1e-9, (ab - ac * bc) / np.sqrt(scale), np.nan)
