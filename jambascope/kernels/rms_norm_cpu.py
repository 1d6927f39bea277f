"""The numba loop of RMSNorm. Bound: a row is read once from memory (then from L1) and written once."""

from __future__ import annotations

import numpy as np
from numba import njit

from jambascope.kernels.vectors import FAST, LANES, lane_sum, load, read, splat, store, write

ZERO = np.float32(0.0)


@njit(nogil=True, cache=True, fastmath=FAST)
def forward(start, stop, width, eps, x, stride, weight, out):
    """Rows ``start..stop``; x (rows ``stride`` apart), weight [width] and out [rows width] are addresses."""
    whole = width - width % LANES
    for row in range(start, stop):
        at, to = row * stride, row * width
        squares = splat(ZERO)
        for i in range(0, whole, LANES):
            v = load(x, at + i)
            squares = squares + v * v
        total = lane_sum(squares)
        for i in range(whole, width):
            total += read(x, at + i) * read(x, at + i)
        scale = np.float32(1.0 / np.sqrt(total / np.float32(width) + eps))
        for i in range(0, whole, LANES):
            store(out, to + i, load(x, at + i) * scale * load(weight, i))
        for i in range(whole, width):
            write(out, to + i, read(x, at + i) * scale * read(weight, i))
