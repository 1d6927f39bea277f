"""The numba loop of the elementwise functions. Bound: each number is read once and each result written once.

A work item is a row of ``width`` numbers: row r is position ``r % length`` of batch row ``r // length``. Tensors are
addresses with the strides of batch and position.
"""

from __future__ import annotations

from numba import njit

from jambascope.kernels.compiling import loop_task
from jambascope.kernels.native import next_items, numbers
from jambascope.kernels.vectors import FAST, LANES, aligned, load, read, silu, softplus, splat, store, write

SILU, GATED, STEP_SIZE = 0, 1, 2


@njit(inline="always")
def _apply(kind, x, other):
    if kind == SILU:
        return silu(x)
    if kind == GATED:
        return x * silu(other)
    return softplus(x + other)


@loop_task(10)
def apply(call):
    given = numbers(call, 10)
    start, stop = next_items(call)
    while start < stop:
        _rows(start, stop, *given)
        start, stop = next_items(call)


@njit(fastmath=FAST)
def _rows(start, stop, kind, length, width, x, x_batch, x_row, other, other_batch, other_row, out):
    """Rows ``start..stop`` of one of the functions above into out [rows width]."""
    whole = width - width % LANES
    last = aligned(LANES)
    for row in range(start, stop):
        b, t = row // length, row % length
        at, at_other, to = b * x_batch + t * x_row, b * other_batch + t * other_row, row * width
        for i in range(0, whole, LANES):
            store(out, to + i, _apply(kind, load(x, at + i), load(other, at_other + i)))
        for i in range(whole, width):  # one number in every lane
            store(last, 0, _apply(kind, splat(read(x, at + i)), splat(read(other, at_other + i))))
            write(out, to + i, last[0])
