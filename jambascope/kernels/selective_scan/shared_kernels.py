"""The numba loop behind ``shared``: a group of rows of one sequence, a lane block at a time.

At each position the decays and writes of a lane block go into N vectors each; every row that has begun then takes two
multiply-adds for each of its N states. Bound: those, of the one a Zen 4 core issues a cycle, against the 11 of a scan.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from jambascope.kernels.compiling import loop_task
from jambascope.kernels.native import address, next_items, numbers
from jambascope.kernels.vectors import FAST, LANES, aligned, exp2, load, read, silu, store


@loop_task(15)
def scan_on(call):
    given = numbers(call, 15)
    start, stop = next_items(call)
    while start < stop:
        _scan_on(start, stop, *given)
        start, stop = next_items(call)


@njit(fastmath=FAST)
def _scan_on(start, stop, T, E, N, gate_row, cuts, table, states, x, dt, A, B, C, D, gate, y):
    """Items ``start..stop``, each a lane block of a group: its rows are cuts[g] to cuts[g + 1] of ``table`` [row 4]
    (sequence, first position, first token of y, number of the state), ascending by first position. Addresses of int64
    and float32: states [R N E]; x, dt [A T E]; A [N E] times log2(e); B, C [A T N]; D [E]; gate, gate_row apart; y.
    """
    blocks = E // LANES
    cut = carray(address(cuts), (1,), np.int64)
    longest = 0
    for item in range(start, stop):
        longest = max(longest, read(cut, item // blocks + 1) - read(cut, item // blocks))
    h, decay, drive = aligned(longest * N * LANES), aligned(N * LANES), aligned(N * LANES)
    for item in range(start, stop):
        first_row, e0 = read(cut, item // blocks), item % blocks * LANES
        rows = read(cut, item // blocks + 1) - first_row
        row = carray(address(table + first_row * 32), (rows, 4), np.int64)
        for r in range(rows):
            for n in range(N):
                store(h, (r * N + n) * LANES, load(states, (row[r, 3] * N + n) * E + e0))
        skip, begun = load(D, e0), 0
        for t in range(row[0, 1], T):
            while begun < rows and row[begun, 1] <= t:
                begun += 1
            i = row[0, 0] * T + t
            step, here = load(dt, i * E + e0), load(x, i * E + e0)
            write, opened = step * here, silu(load(gate, i * gate_row + e0))
            for n in range(N):
                store(decay, n * LANES, exp2(step * load(A, n * E + e0)))
                store(drive, n * LANES, write * read(B, i * N + n))
            for r in range(begun):
                acc = skip * here
                for n in range(N):
                    at = (r * N + n) * LANES
                    v = load(decay, n * LANES) * load(h, at) + load(drive, n * LANES)
                    store(h, at, v)
                    acc = acc + v * read(C, i * N + n)
                store(y, (row[r, 2] + t - row[r, 1]) * E + e0, acc * opened)
