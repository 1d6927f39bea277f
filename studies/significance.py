"""Tests of many numbers at once: random signs for one mean, Holm's correction for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float

FLIPS = 9999
EXACT = 13
"""Up to so many values every combination of signs is tried."""


def sign_flip_p(values: Float[torch.Tensor, " n"], seed: int = 0) -> float:
    """Two-sided p of a mean of differences: how often it is as far from zero when each has a random sign (Fisher's
    randomisation test). 1 of no values; n values give no less than 2 / 2^n."""
    values = values.double()
    n = len(values)
    if not n:
        return 1.0
    least = values.mean().abs() * (1 - 1e-9)
    if n <= EXACT:
        bits = (torch.arange(2**n)[:, None] >> torch.arange(n)) & 1
        return float((((1 - 2 * bits).double() @ values / n).abs() >= least).double().mean())
    signs = torch.randint(0, 2, (FLIPS, n), generator=torch.Generator().manual_seed(seed))
    return (1 + int((((1 - 2 * signs).double() @ values / n).abs() >= least).sum())) / (1 + FLIPS)


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected so that the chance of any false one stays below the level (Holm, 1979)."""
    order = sorted(range(len(p)), key=p.__getitem__)
    corrected, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected
