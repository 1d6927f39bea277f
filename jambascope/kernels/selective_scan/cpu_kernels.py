"""The numba loop of the CPU scan: forward with optional edits and captures (``cpu_backward`` is its adjoint).

Layout. Inputs stay time-major ``[B T E]``, handed over flat; a work item owns LANES neighbouring channels of one batch
row, so that every load and store of a position is one vector, and the lane block's state ``[N LANES]`` stays in L1
while time runs. States leave the loop as ``[.. N E]`` for the same reason (the caller returns a transposed view).
``A`` arrives as [N E] times log2(e), so that the decay is one ``exp2``.

Bound. Each (b, t, e, n) costs one exp2 (a degree-6 polynomial: 6 fused multiply-adds, 5 additions, comparisons and
shifts) and 4 multiplications or fused multiply-adds for exponent, decay, write and read-out; the forward reads and
writes 4 E + 2 N floats a position, so that it is bound by arithmetic from N of about 2 on: 11 of the one vector
multiply-add that a Zen 4 core issues a cycle. Steps, decays and gates of some positions are computed in loops of their
own, whose constants stay in registers; where no exponent can leave the range, without the two comparisons.

Every function takes a range of work items, so that threads can share them; nothing here allocates per position.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from jambascope.kernels.compiling import loop_task
from jambascope.kernels.native import address, next_items, numbers
from jambascope.kernels.selective_scan.interface import PADDING, RESET
from jambascope.kernels.vectors import (
    FAST,
    LANES,
    NORMAL,
    absolute,
    aligned,
    exp2,
    exp2_within,
    larger,
    load,
    read,
    silu,
    softplus,
    splat,
    store,
    within,
    write,
)

ZERO = np.float32(0.0)
FLOAT = 4
AHEAD = 8
"""Positions, at most, whose step sizes, decays and gates are computed in one go: none waits for another's chain of
operations."""


@loop_task(32)
def forward(call):
    given = numbers(call, 32)
    start, stop = next_items(call)
    while start < stop:
        _forward(start, stop, *given)
        start, stop = next_items(call)


@loop_task(6)
def step_sizes_of_low_rank(call):
    """softplus(dt dt_weight + dt_bias), the step sizes of :func:`forward` to the last bit; an item is a position.

    Numbers: E, ranks; addresses: dt [. ranks], dt_weight [ranks E], dt_bias [E], out [. E].
    """
    E, ranks, dt, dt_weight, dt_bias, out = numbers(call, 6)
    start, stop = next_items(call)
    while start < stop:
        for e0 in range(0, E, LANES):
            into = out + (start * E + e0) * FLOAT
            _low_rank_steps(stop - start, dt, start, ranks, dt_weight, E, dt_bias, e0, True, into, E)
        start, stop = next_items(call)


@njit(fastmath=FAST)
def _forward(
    start,
    stop,
    T,
    E,
    N,
    edits,
    slots_in_time,
    slots_in_channels,
    chunk,
    dt_softplus,
    ranks,
    dt_weight,
    gate_row,
    bounds,
    h0_rows,
    x,
    dt,
    A,
    B,
    C,
    D,
    gate,
    dt_bias,
    marks,
    edit_slot,
    edit_scale,
    edit_shift,
    capture_slot,
    channel_slot,
    h0,
    y,
    h_last,
    captured,
    checkpoints,
):
    """Scan work items ``start..stop``, an item a lane block of a row.

    Addresses, 0 for an option that is off: x, dt, y [B T E]; with dt_weight [ranks E] dt is [B T ranks]; A [N E] times
    log2(e); B, C [B T N]; D, dt_bias [E]; h0, h_last [B N E]; gate, whose positions are gate_row apart; edit_scale,
    edit_shift [B edit N E]; captured [B slot N channel slot]; checkpoints [B ceil(T/chunk) N E]: the state before each
    chunk; marks [B T] uint8 (RESET, PADDING); edit_slot, capture_slot [T] and channel_slot [E] int32 (-1: none). Row b
    has the positions from bounds[b] to bounds[b + 1] of the flat ones (int64); where rows differ in length there are no
    marks, edits, captures or checkpoints. h0_rows (int64), or 0: which of h0 is that of row b, -1 for zeros.
    """
    bound, mark_of = carray(address(bounds), (1,), np.int64), carray(address(marks), (1,), np.uint8)
    edit_at, capture_at = carray(address(edit_slot), (1,), np.int32), carray(address(capture_slot), (1,), np.int32)
    channel_at = carray(address(channel_slot), (E,), np.int32)
    h0_of = carray(address(h0_rows), (1,), np.int64)
    blocks, chunks = E // LANES, (T + chunk - 1) // chunk
    a = aligned(N * LANES)
    h = aligned(N * LANES)
    ahead = max(1, min(AHEAD, 128 // N))
    steps, opened, decay = aligned(ahead * LANES), aligned(ahead * LANES), aligned(ahead * N * LANES)
    for item in range(start, stop):
        b = item // blocks
        e0 = (item % blocks) * LANES
        copy(A, e0, E, a, 0, LANES, N)
        steepest = _steepest(a, N)
        before = read(h0_of, b) if h0_rows else b
        if h0 and before >= 0:
            copy(h0, before * N * E + e0, E, h, 0, LANES, N)
        else:
            h[:] = ZERO
        skip = load(D, e0)
        first_slot, slots = captured_lanes(channel_at, e0) if capture_slot and channel_slot else (0, 0)
        first, last = read(bound, b), read(bound, b + 1)
        s = ahead
        for i in range(first, last):
            t = i - first
            s = s + 1 if s + 1 < ahead else 0
            if s == 0:
                count = min(ahead, last - i)
                if ranks:
                    _low_rank_steps(count, dt, i, ranks, dt_weight, E, dt_bias, e0, dt_softplus, steps, LANES)
                else:
                    _steps(count, dt, i * E + e0, E, dt_bias, e0, dt_softplus, steps)
                _decays(count, steps, a, steepest, N, decay)
                if gate:
                    _gates(count, gate, i * gate_row + e0, gate_row, opened)
            step = load(steps, s * LANES)
            if checkpoints and t % chunk == 0:
                copy(h, 0, LANES, checkpoints, (b * chunks + t // chunk) * N * E + e0, E, N)
            at, at_n = i * E + e0, i * N
            mark = read(mark_of, i) if marks else np.uint8(0)
            padding = mark & PADDING != 0
            if mark & RESET:
                h[:] = ZERO
            acc = skip * load(x, at)
            if not padding:
                write = step * load(x, at)
                for n in range(N):
                    v = load(decay, (s * N + n) * LANES) * load(h, n * LANES) + write * read(B, at_n + n)
                    store(h, n * LANES, v)
                    acc = acc + v * read(C, at_n + n)
            edit = read(edit_at, t) if edit_slot else np.int32(-1)
            if edit >= 0:
                at_edit = (b * edits + edit) * N * E + e0
                acc = skip * load(x, at)
                for n in range(N):
                    v = load(h, n * LANES) * load(edit_scale, at_edit + n * E) + load(edit_shift, at_edit + n * E)
                    store(h, n * LANES, v)
                    acc = acc + v * read(C, at_n + n)
            if slots > 0 and read(capture_at, t) >= 0:
                to = (b * slots_in_time + read(capture_at, t)) * N * slots_in_channels
                _capture(h, N, captured + to * FLOAT, slots_in_channels, channel_at, e0, first_slot, slots)
            if padding:
                acc = splat(ZERO)
            elif gate:
                acc = acc * load(opened, s * LANES)
            store(y, at, acc)
        if h_last:
            copy(h, 0, LANES, h_last, b * N * E + e0, E, N)


@njit(inline="always")
def step_sizes(dt, at, bias, dt_softplus):
    """The step sizes of a position's lanes."""
    step = load(dt, at) + bias
    return softplus(step) if dt_softplus else step


@njit(inline="always")
def _steepest(a, N):
    """The largest size in each lane of a [N LANES]."""
    found = splat(ZERO)
    for n in range(N):
        found = larger(absolute(load(a, n * LANES)), found)
    return found


@njit(fastmath=FAST)
def _steps(count, dt, at, row, dt_bias, e0, dt_softplus, into):
    """The step sizes of some positions."""
    bias = load(dt_bias, e0) if dt_bias else splat(ZERO)
    for s in range(count):
        store(into, s * LANES, step_sizes(dt, at + s * row, bias, dt_softplus))


@njit(fastmath=FAST)
def _low_rank_steps(count, dt, first, ranks, dt_weight, E, dt_bias, e0, dt_softplus, into, apart):
    """The same, of dt [. ranks] times dt_weight [ranks E]; positions stand ``apart``."""
    bias = load(dt_bias, e0) if dt_bias else splat(ZERO)
    for s in range(count):
        step = bias
        for r in range(ranks):
            step = step + load(dt_weight, r * E + e0) * read(dt, (first + s) * ranks + r)
        store(into, s * apart, softplus(step) if dt_softplus else step)


@njit(fastmath=FAST)
def _gates(count, gate, at, row, into):
    """SiLU of the gates of some positions."""
    for s in range(count):
        store(into, s * LANES, silu(load(gate, at + s * row)))


@njit(fastmath=FAST)
def _decays(count, steps, a, steepest, N, into):
    """exp2 of the steps of some positions times a [N LANES]."""
    for s in range(count):
        step = load(steps, s * LANES)
        if within(step * steepest, NORMAL):
            for n in range(N):
                store(into, (s * N + n) * LANES, exp2_within(step * load(a, n * LANES)))
        else:
            for n in range(N):
                store(into, (s * N + n) * LANES, exp2(step * load(a, n * LANES)))


@njit(inline="always")
def copy(source, at, stride, target, at_target, stride_target, rows):
    """Copy one vector per row between flat arrays."""
    for n in range(rows):
        store(target, at_target + n * stride_target, load(source, at + n * stride))


@njit(inline="always")
def captured_lanes(channel_slot, e0):
    """Slot of the first captured channel of a lane block, and how many it has; slots are consecutive."""
    first, count = 0, 0
    for i in range(LANES):
        if channel_slot[e0 + i] >= 0:
            if count == 0:
                first = channel_slot[e0 + i]
            count += 1
    return first, count


@njit(inline="always")
def _capture(h, N, into, channels, channel_slot, e0, first_slot, slots):
    """Copy the captured lanes of h [N LANES] into their slots [N channels] at the address ``into``."""
    for n in range(N):
        if slots == LANES:
            store(into, n * channels + first_slot, load(h, n * LANES))
        else:
            for i in range(LANES):
                if channel_slot[e0 + i] >= 0:
                    write(into, n * channels + channel_slot[e0 + i], h[n * LANES + i])
