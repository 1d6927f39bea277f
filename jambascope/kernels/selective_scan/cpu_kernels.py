"""The numba loops of the CPU scan: forward with optional edits and captures, and its adjoint.

Layout. Inputs stay time-major ``[B T E]``, handed over flat; a work item owns LANES neighbouring channels of one batch
row, so that every load and store of a position is one vector, and the lane block's state ``[N LANES]`` stays in L1
while time runs. States leave the loop as ``[.. N E]`` for the same reason (the caller returns a transposed view).
``A`` arrives as [N E] times log2(e), so that the decay is one ``exp2``.

Bound. Each (b, t, e, n) costs one exp2 (a degree-6 polynomial: 6 fused multiply-adds, 5 additions, comparisons and
shifts) and 4 multiplications or fused multiply-adds for exponent, decay, write and read-out; the forward reads and
writes 4 E + 2 N floats a position, so that it is bound by arithmetic from N of about 2 on: 11 of the one vector
multiply-add that a Zen 4 core issues a cycle. The backward recomputes each chunk's states from a stored checkpoint
rather than keeping the trajectory.

Every function takes a range of work items, so that threads can share them; nothing here allocates per position.
Sums over channels (the gradients of B and C) go into one partial per group of lane blocks, and the caller adds
the partials in order: no atomics, the same bits on every run and for every number of threads.
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
    lane_sum,
    larger,
    load,
    read,
    sigmoid,
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
"""Positions, at most, whose step sizes, decays and gates are computed in one go: in loops of their own constants stay
in registers, and none waits for another's chain of operations."""
LN2 = np.float32(0.6931471805599453)


@loop_task(30)
def forward(call):
    given = numbers(call, 30)
    start, stop = next_items(call)
    while start < stop:
        _forward(start, stop, *given)
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

    Addresses, 0 for an option that is off: x, dt, y [B T E]; A [N E] times log2(e); B, C [B T N]; D, dt_bias [E]; h0,
    h_last [B N E]; gate, whose positions are gate_row apart; edit_scale, edit_shift [B edit N E]; captured [B slot N
    channel slot]; checkpoints [B ceil(T/chunk) N E]: the state before each chunk; marks [B T] uint8 (RESET, PADDING);
    edit_slot, capture_slot [T] and channel_slot [E] int32 (-1: none). Row b has the positions from bounds[b] to
    bounds[b + 1] of the flat ones (int64); where rows differ in length there are no marks, edits, captures or
    checkpoints. h0_rows (int64), or 0: which of h0 is that of row b, -1 for zeros.
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
        _copy(A, e0, E, a, 0, LANES, N)
        steepest = _steepest(a, N)
        before = read(h0_of, b) if h0_rows else b
        if h0 and before >= 0:
            _copy(h0, before * N * E + e0, E, h, 0, LANES, N)
        else:
            h[:] = ZERO
        skip = load(D, e0)
        first_slot, slots = _captured_lanes(channel_at, e0) if capture_slot and channel_slot else (0, 0)
        first, last = read(bound, b), read(bound, b + 1)
        s = ahead
        for i in range(first, last):
            t = i - first
            s = s + 1 if s + 1 < ahead else 0
            if s == 0:
                count = min(ahead, last - i)
                _steps(count, dt, i * E + e0, E, dt_bias, e0, dt_softplus, steps)
                _decays(count, steps, a, steepest, N, decay)
                if gate:
                    _gates(count, gate, i * gate_row + e0, gate_row, opened)
            step = load(steps, s * LANES)
            if checkpoints and t % chunk == 0:
                _copy(h, 0, LANES, checkpoints, (b * chunks + t // chunk) * N * E + e0, E, N)
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
            _copy(h, 0, LANES, h_last, b * N * E + e0, E, N)


@njit(inline="always")
def _step(dt, at, bias, dt_softplus):
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
        store(into, s * LANES, _step(dt, at + s * row, bias, dt_softplus))


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
def _copy(source, at, stride, target, at_target, stride_target, rows):
    """Copy one vector per row between flat arrays."""
    for n in range(rows):
        store(target, at_target + n * stride_target, load(source, at + n * stride))


@njit(inline="always")
def _captured_lanes(channel_slot, e0):
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


@njit(nogil=True, cache=True, fastmath=FAST)
def backward(
    start,
    stop,
    groups,
    sizes,
    x,
    dt,
    A,
    B,
    C,
    D,
    gate,
    gate_row,
    dt_bias,
    dt_softplus,
    marks,
    edit_slot,
    edit_scale,
    edit_shift,
    capture_slot,
    channel_slot,
    checkpoints,
    chunk,
    dy,
    dh_last,
    dcaptured,
    grad_x,
    grad_dt,
    grad_A,
    grad_B,
    grad_C,
    grad_D,
    grad_gate,
    grad_h0,
    grad_edit_scale,
    grad_edit_shift,
):
    """The adjoint of :func:`forward` for work items ``start..stop``; an item is (batch row, group of lane blocks).

    Flat, like what they belong to; dh_last and grad_h0 [B N E]. Per-row partials, summed by the caller:
    grad_A [B N E] (with respect to A, not A log2 e), grad_D [B E], grad_B, grad_C [B groups T N]. Lambda, the adjoint
    of the state, runs backwards in time: lambda_t = C_t dy_t + dcaptured_t + exp(dt_{t+1} A) lambda_{t+1}.
    """
    T, E, N, edits = sizes
    blocks, chunks = E // LANES, (T + chunk - 1) // chunk
    per_group = (blocks + groups - 1) // groups
    has_gate, has_edits, has_h0 = gate.size > 0, edit_slot.size > 0, grad_h0.size > 0
    has_capture = capture_slot.size > 0 and channel_slot.size > 0
    has_marks, has_bias = marks.size > 0, dt_bias.size > 0
    NL = N * LANES
    a, decay, h = aligned(NL), aligned(chunk * NL), aligned((chunk + 1) * NL)
    lanes_B, lanes_C = aligned(chunk * NL), aligned(chunk * NL)
    lam, acc_A = aligned(per_group * NL), aligned(per_group * NL)
    steps_, writes = aligned(chunk * LANES), aligned(chunk * LANES)
    for item in range(start, stop):
        b = item // groups
        group = item % groups
        first = group * per_group
        own = min(first + per_group, blocks) - first
        acc_A[:] = ZERO
        for k in range(own):
            _copy(dh_last, b * N * E + (first + k) * LANES, E, lam, k * NL, LANES, N)
            store(grad_D, b * E + (first + k) * LANES, splat(ZERO))
        for c in range(chunks - 1, -1, -1):
            t0 = c * chunk
            steps = min(chunk, T - t0)
            lanes_B[: steps * NL] = ZERO
            lanes_C[: steps * NL] = ZERO
            for k in range(own):
                e0 = (first + k) * LANES
                bias = load(dt_bias, e0) if has_bias else splat(ZERO)
                skip = load(D, e0)
                sum_D = load(grad_D, b * E + e0)
                first_slot, slots = _captured_lanes(channel_slot, e0) if has_capture else (0, 0)
                _copy(A, e0, E, a, 0, LANES, N)
                _copy(checkpoints, (b * chunks + c) * N * E + e0, E, h, 0, LANES, N)
                # States of the chunk again, from its checkpoint; row s + 1 of h is the state after position t0 + s.
                for s in range(steps):
                    t = t0 + s
                    at, at_n = (b * T + t) * E + e0, (b * T + t) * N
                    mark = read(marks, b * T + t) if has_marks else np.uint8(0)
                    step, write = splat(ZERO), splat(ZERO)
                    if mark & PADDING == 0:
                        step = _step(dt, at, bias, dt_softplus)
                        write = step * load(x, at)
                    store(steps_, s * LANES, step)
                    store(writes, s * LANES, write)
                    remembered = ZERO if mark & RESET else np.float32(1.0)
                    row = s * NL
                    for n in range(0, NL, LANES):
                        d = exp2(step * load(a, n)) * remembered
                        store(decay, row + n, d)
                        store(h, row + NL + n, d * load(h, row + n) + write * read(B, at_n + n // LANES))
                    edit = read(edit_slot, t) if has_edits else np.int32(-1)
                    if edit >= 0:
                        at_edit = (b * edits + edit) * N * E + e0
                        for n in range(N):
                            v = load(h, row + NL + n * LANES) * load(edit_scale, at_edit + n * E)
                            store(h, row + NL + n * LANES, v + load(edit_shift, at_edit + n * E))
                for s in range(steps - 1, -1, -1):
                    t = t0 + s
                    at, at_n, row = (b * T + t) * E + e0, (b * T + t) * N, s * NL
                    padding = has_marks and read(marks, b * T + t) & PADDING != 0
                    dy_t = splat(ZERO) if padding else load(dy, at)
                    if has_gate:
                        grad_g = splat(ZERO)
                        if not padding:
                            acc = skip * load(x, at)
                            for n in range(N):
                                acc = acc + load(h, row + NL + n * LANES) * read(C, at_n + n)
                            g = load(gate, (b * T + t) * gate_row + e0)
                            sig = sigmoid(g)
                            grad_g = dy_t * acc * sig * (g * (np.float32(1.0) - sig) + np.float32(1.0))
                            dy_t = dy_t * g * sig
                        store(grad_gate, at, grad_g)
                    for n in range(N):
                        i = k * NL + n * LANES
                        store(lam, i, load(lam, i) + dy_t * read(C, at_n + n))
                        i = row + n * LANES
                        store(lanes_C, i, load(lanes_C, i) + dy_t * load(h, i + NL))
                    if slots > 0 and capture_slot[t] >= 0:
                        _add_captured(lam, k * NL, dcaptured[b, capture_slot[t]], channel_slot, e0, first_slot, slots)
                    step, write = load(steps_, s * LANES), load(writes, s * LANES)
                    edit = read(edit_slot, t) if has_edits else np.int32(-1)
                    if edit >= 0:
                        for n in range(N):
                            i, j = row + n * LANES, k * NL + n * LANES
                            at_edit = (b * edits + edit) * N * E + e0 + n * E
                            before = load(decay, i) * load(h, i) + write * read(B, at_n + n)
                            store(grad_edit_scale, at_edit, load(lam, j) * before)
                            store(grad_edit_shift, at_edit, load(lam, j))
                            store(lam, j, load(lam, j) * load(edit_scale, at_edit))
                    acc_u, acc_dt = splat(ZERO), splat(ZERO)
                    for n in range(N):
                        i, j = row + n * LANES, k * NL + n * LANES
                        adjoint = load(lam, j)
                        carried = adjoint * load(decay, i)
                        into_exponent = carried * load(h, i)
                        store(acc_A, j, load(acc_A, j) + into_exponent * step)
                        acc_dt = acc_dt + into_exponent * load(a, n * LANES)
                        acc_u = acc_u + adjoint * read(B, at_n + n)
                        store(lanes_B, i, load(lanes_B, i) + adjoint * write)
                        store(lam, j, carried)
                    if padding:
                        store(grad_x, at, splat(ZERO))
                        store(grad_dt, at, splat(ZERO))
                        continue
                    store(grad_x, at, acc_u * step + dy_t * skip)
                    grad_step = acc_u * load(x, at) + acc_dt * LN2
                    if dt_softplus:
                        grad_step = grad_step * sigmoid(load(dt, at) + bias)
                    store(grad_dt, at, grad_step)
                    sum_D = sum_D + dy_t * load(x, at)
                store(grad_D, b * E + e0, sum_D)
            for s in range(steps):
                for n in range(N):
                    i = ((b * groups + group) * T + t0 + s) * N + n
                    grad_B[i] = lane_sum(load(lanes_B, s * NL + n * LANES))
                    grad_C[i] = lane_sum(load(lanes_C, s * NL + n * LANES))
        for k in range(own):
            at_row = b * N * E + (first + k) * LANES
            _copy(acc_A, k * NL, LANES, grad_A, at_row, E, N)
            if has_h0:
                _copy(lam, k * NL, LANES, grad_h0, at_row, E, N)


@njit(inline="always")
def _add_captured(lam, at, gradient, channel_slot, e0, first_slot, slots):
    """Add the gradient of captured lanes [N channel slot] to the adjoint of a lane block, flat from ``at``."""
    for n in range(gradient.shape[0]):
        if slots == LANES:
            for i in range(LANES):
                lam[at + n * LANES + i] += gradient[n, first_slot + i]
        else:
            for i in range(LANES):
                if channel_slot[e0 + i] >= 0:
                    lam[at + n * LANES + i] += gradient[n, channel_slot[e0 + i]]
