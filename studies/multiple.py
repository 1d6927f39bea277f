"""Many things tested at once: p-values of paired differences, and their correction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float

FLIPS = 9999


def sign_flip_p(differences: Float[torch.Tensor, " samples"], seed: int = 0, flips: int = FLIPS) -> float:
    """Two-sided p of a mean of zero: how often random signs of the differences give a mean as far from it, or further
    (Fisher's randomisation test; Good, Permutation Tests, 2005, 3.7.2). (1 + such draws) / (1 + draws), so never 0.

    Few samples can't give a small p: of n the least is about 2 ** (1 - n).
    """
    values = torch.as_tensor(differences, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (flips, len(values)), generator=generator).double() * 2 - 1
    drawn = (signs @ values).abs()
    as_far = int((drawn >= values.sum().abs() * (1 - 1e-12)).sum())
    return (1 + as_far) / (1 + flips)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the given order (Holm, Scandinavian Journal of Statistics 6, 1979): those below 0.05 hold
    together with an error of at most 5 %, whatever their dependence."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
