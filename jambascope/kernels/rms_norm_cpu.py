"""The numba loop of RMSNorm. Bound: a row is read once from memory (then from L1) and written once."""

from __future__ import annotations

import numpy as np
from numba import njit

from jambascope.kernels.compiling import loop_task
from jambascope.kernels.native import as_float, next_items, numbers
from jambascope.kernels.vectors import FAST, LANES, lane_sum, load, read, splat, store, write

ZERO = np.float32(0.0)


@njit(inline="always", fastmath=FAST)
def _mean_square(x, at, width, eps):
    whole = width - width % LANES
    squares = splat(ZERO)
    for i in range(at, at + whole, LANES):
        v = load(x, i)
        squares = squares + v * v
    total = lane_sum(squares)
    for i in range(at + whole, at + width):
        total += read(x, i) * read(x, i)
    return total / np.float32(width) + eps


@loop_task(6)
def forward(call):
    given = numbers(call, 6)
    start, stop = next_items(call)
    while start < stop:
        _forward(start, stop, *given)
        start, stop = next_items(call)


@njit(fastmath=FAST)
def _forward(start, stop, width, eps_bits, x, stride, weight, out):
    """Rows ``start..stop``; x (rows ``stride`` apart), weight [width] and out [rows width] are addresses."""
    whole, eps = width - width % LANES, as_float(eps_bits)
    for row in range(start, stop):
        at, to = row * stride, row * width
        scale = np.float32(1.0 / np.sqrt(_mean_square(x, at, width, eps)))
        for i in range(0, whole, LANES):
            store(out, to + i, load(x, at + i) * scale * load(weight, i))
        for i in range(whole, width):
            write(out, to + i, read(x, at + i) * scale * read(weight, i))


@loop_task(5)
def root_mean_square(call):
    given = numbers(call, 5)
    start, stop = next_items(call)
    while start < stop:
        _root_mean_square(start, stop, *given)
        start, stop = next_items(call)


@njit(fastmath=FAST)
def _root_mean_square(start, stop, width, eps_bits, x, stride, out):
    """Rows ``start..stop``; x (rows ``stride`` apart) and out [rows] are addresses."""
    eps = as_float(eps_bits)
    for row in range(start, stop):
        write(out, row, np.float32(np.sqrt(_mean_square(x, row * stride, width, eps))))
