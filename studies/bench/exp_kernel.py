"""How many exponentials a GPU computes in a second when they never leave registers; needs triton, imported when called.

``torch.exp`` is bound by memory there (8 bytes to each), and so says nothing about a scan that keeps its states in
registers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

CHAIN = 64
BLOCK = 1024


@cache
def _kernel() -> Any:
    from jambascope.kernels import triton_runtime  # noqa: F401  sets what triton reads at its import
    from jambascope.studies.bench.triton_exp import chained_exp2

    return chained_exp2


def exponentials(x: torch.Tensor) -> torch.Tensor:
    """``exp2`` applied ``CHAIN`` times, negated each time so that it stays bounded: len(x) * CHAIN exponentials."""
    out = torch.empty_like(x)
    grid = (-(-x.numel() // BLOCK),)
    _kernel()[grid](x, out, x.numel(), CHAIN=CHAIN, BLOCK=BLOCK)
    return out
