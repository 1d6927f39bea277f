"""The numba loops of the CPU scan: forward with optional edits and captures, and its adjoint.

Layout. Inputs stay time-major ``[B T E]``; a work item owns LANES neighbouring channels of one batch row,
so that every load and store of a position is one contiguous vector, and the lane block's state ``[N LANES]``
stays in L1 while time runs. States leave the loop as ``[.. N E]`` for the same reason (the caller returns a
transposed view). ``A`` arrives multiplied by log2(e), so that the decay is one ``exp2``.

Bound. Each (b, t, e, n) costs one exp2 (a degree-6 polynomial: 6 fused multiply-adds, a rounding and a
bit shift) and 3 fused multiply-adds for write, decay and read-out; the forward reads and writes 4 E + 2 N
floats a position, so that it is bound by arithmetic from N of about 4 on. The backward recomputes each
chunk's states from a stored checkpoint rather than keeping the trajectory.

Every function takes a range of work items, so that threads can share them; nothing here allocates per position.
Sums over channels (the gradients of B and C) go into one partial per group of lane blocks, and the caller adds
the partials in order: no atomics, the same bits on every run and for every number of threads.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from jambascope.kernels.selective_scan.interface import PADDING, RESET
from jambascope.kernels.vector_math import FAST, exp2, sigmoid, softplus

LANES = 16


@njit(nogil=True, cache=True, fastmath=FAST)
def forward(
    start,
    stop,
    x,
    dt,
    A,
    B,
    C,
    D,
    gate,
    gate_at,
    dt_bias,
    dt_softplus,
    marks,
    h0,
    edit_slot,
    edit_scale,
    edit_shift,
    capture_slot,
    channel_slot,
    y,
    h_last,
    captured,
    checkpoints,
    chunk,
):
    """Scan work items ``start..stop``. Switched-off options are arrays of size zero.

    x, dt, y [B T E]; A [E N] times log2(e); B, C [B T N]; D, dt_bias [E]; h0, h_last [B E N];
    gate: flat, position (b, t) at gate_at = (offset, stride of b, stride of t); marks [B T] uint8 (RESET, PADDING);
    edit_slot, capture_slot [T] and channel_slot [E] int32 (-1: none); edit_scale, edit_shift [B slot N E];
    captured [B slot N channel slot]; checkpoints [B ceil(T/chunk) N E]: the state before each chunk.
    """
    T, E, N = x.shape[1], x.shape[2], A.shape[1]
    blocks = E // LANES
    has_gate, has_h0, has_checkpoints = gate.size > 0, h0.size > 0, checkpoints.size > 0
    has_edits, has_capture = edit_slot.size > 0, capture_slot.size > 0 and channel_slot.size > 0
    has_marks, has_bias = marks.size > 0, dt_bias.size > 0
    a_lane = np.empty((N, LANES), np.float32)
    h = np.empty((N, LANES), np.float32)
    step = np.empty(LANES, np.float32)
    bias = np.zeros(LANES, np.float32)
    dx = np.empty(LANES, np.float32)
    acc = np.empty(LANES, np.float32)
    for item in range(start, stop):
        b = item // blocks
        e0 = (item % blocks) * LANES
        for n in range(N):
            for i in range(LANES):
                a_lane[n, i] = A[e0 + i, n]
                h[n, i] = h0[b, e0 + i, n] if has_h0 else np.float32(0.0)
        if has_bias:
            bias[:] = dt_bias[e0 : e0 + LANES]
        first_slot, slots = _captured_lanes(channel_slot, e0) if has_capture else (0, 0)
        for t in range(T):
            if has_checkpoints and t % chunk == 0:
                for n in range(N):
                    for i in range(LANES):
                        checkpoints[b, t // chunk, n, e0 + i] = h[n, i]
            mark = marks[b, t] if has_marks else np.uint8(0)
            _step_sizes(dt, b, t, e0, bias, dt_softplus, mark, step)
            if mark & RESET:
                h[:] = np.float32(0.0)
            x_t = x[b, t, e0 : e0 + LANES]
            for i in range(LANES):
                dx[i] = step[i] * x_t[i]
                acc[i] = D[e0 + i] * x_t[i]
            if mark & PADDING:
                dx[:] = np.float32(0.0)  # whatever stands there, were it infinite
            edit = edit_slot[t] if has_edits else np.int32(-1)
            if edit < 0:
                for n in range(N):
                    B_tn, C_tn = B[b, t, n], C[b, t, n]
                    for i in range(LANES):
                        v = exp2(step[i] * a_lane[n, i]) * h[n, i] + dx[i] * B_tn
                        h[n, i] = v
                        acc[i] += v * C_tn
            else:
                for n in range(N):
                    B_tn, C_tn = B[b, t, n], C[b, t, n]
                    for i in range(LANES):
                        v = exp2(step[i] * a_lane[n, i]) * h[n, i] + dx[i] * B_tn
                        v = v * edit_scale[b, edit, n, e0 + i] + edit_shift[b, edit, n, e0 + i]
                        h[n, i] = v
                        acc[i] += v * C_tn
            if slots > 0 and capture_slot[t] >= 0:
                _capture(h, captured[b, capture_slot[t]], channel_slot, e0, first_slot, slots)
            if mark & PADDING:
                for i in range(LANES):
                    y[b, t, e0 + i] = np.float32(0.0)
            elif has_gate:
                row = gate_at[0] + b * gate_at[1] + t * gate_at[2] + e0
                for i in range(LANES):
                    g = gate[row + i]
                    y[b, t, e0 + i] = acc[i] * g * sigmoid(g)
            else:
                for i in range(LANES):
                    y[b, t, e0 + i] = acc[i]
        for n in range(N):
            for i in range(LANES):
                h_last[b, e0 + i, n] = h[n, i]


@njit(inline="always", fastmath=FAST)
def _step_sizes(dt, b, t, e0, bias, dt_softplus, mark, step):
    """The step sizes of a lane block at position t into ``step``; 0 at padding."""
    if mark & PADDING:
        for i in range(LANES):
            step[i] = np.float32(0.0)
    elif dt_softplus:
        for i in range(LANES):
            step[i] = softplus(dt[b, t, e0 + i] + bias[i])
    else:
        for i in range(LANES):
            step[i] = dt[b, t, e0 + i] + bias[i]


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
def _capture(h, into, channel_slot, e0, first_slot, slots):
    """Copy the captured lanes of h [N LANES] into their slots [N channel slot]."""
    for n in range(h.shape[0]):
        if slots == LANES:
            for i in range(LANES):
                into[n, first_slot + i] = h[n, i]
        else:
            for i in range(LANES):
                if channel_slot[e0 + i] >= 0:
                    into[n, channel_slot[e0 + i]] = h[n, i]


@njit(nogil=True, cache=True, fastmath=FAST)
def backward(
    start,
    stop,
    groups,
    x,
    dt,
    A,
    B,
    C,
    D,
    gate,
    gate_at,
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

    Per-row partials, summed by the caller: grad_A [B E N] (with respect to A, not A log2 e), grad_D [B E],
    grad_B, grad_C [B groups T N]. Lambda, the adjoint of the state, runs backwards in time:
    lambda_t = C_t dy_t + dcaptured_t + exp(dt_{t+1} A) lambda_{t+1}.
    """
    T, E, N = x.shape[1], x.shape[2], A.shape[1]
    blocks = E // LANES
    per_group = (blocks + groups - 1) // groups
    chunks = (T + chunk - 1) // chunk
    has_gate, has_edits = gate.size > 0, edit_slot.size > 0
    has_capture = capture_slot.size > 0 and channel_slot.size > 0
    has_h0, has_marks, has_bias = grad_h0.size > 0, marks.size > 0, dt_bias.size > 0
    ln2 = np.float32(0.6931471805599453)
    one, zero = np.float32(1.0), np.float32(0.0)
    a_lane = np.empty((N, LANES), np.float32)
    decay = np.empty((chunk, N, LANES), np.float32)
    h = np.empty((chunk + 1, N, LANES), np.float32)
    lanes_B = np.empty((chunk, N, LANES), np.float32)
    lanes_C = np.empty((chunk, N, LANES), np.float32)
    lam = np.empty((per_group, N, LANES), np.float32)
    acc_A = np.empty((per_group, N, LANES), np.float32)
    dy_t = np.empty(LANES, np.float32)
    acc = np.empty(LANES, np.float32)
    bias = np.zeros(LANES, np.float32)
    step = np.empty((chunk, LANES), np.float32)
    write = np.empty((chunk, LANES), np.float32)
    acc_u = np.empty(LANES, np.float32)
    acc_dt = np.empty(LANES, np.float32)
    for item in range(start, stop):
        b = item // groups
        group = item % groups
        first = group * per_group
        last = min(first + per_group, blocks)
        for k in range(last - first):
            e0 = (first + k) * LANES
            for n in range(N):
                for i in range(LANES):
                    lam[k, n, i] = dh_last[b, e0 + i, n]
                    acc_A[k, n, i] = zero
            for i in range(LANES):
                grad_D[b, e0 + i] = zero
        for c in range(chunks - 1, -1, -1):
            t0 = c * chunk
            steps = min(chunk, T - t0)
            lanes_B[:steps] = zero
            lanes_C[:steps] = zero
            for k in range(last - first):
                e0 = (first + k) * LANES
                for n in range(N):
                    for i in range(LANES):
                        a_lane[n, i] = A[e0 + i, n]
                        h[0, n, i] = checkpoints[b, c, n, e0 + i]
                if has_bias:
                    bias[:] = dt_bias[e0 : e0 + LANES]
                first_slot, slots = _captured_lanes(channel_slot, e0) if has_capture else (0, 0)
                # States of the chunk again, from its checkpoint; h[s + 1] is the state after position t0 + s.
                for s in range(steps):
                    t = t0 + s
                    edit = edit_slot[t] if has_edits else np.int32(-1)
                    mark = marks[b, t] if has_marks else np.uint8(0)
                    _step_sizes(dt, b, t, e0, bias, dt_softplus, mark, step[s])
                    for i in range(LANES):
                        write[s, i] = zero if mark & PADDING else step[s, i] * x[b, t, e0 + i]
                    for n in range(N):
                        B_tn = B[b, t, n]
                        for i in range(LANES):
                            d = exp2(step[s, i] * a_lane[n, i])
                            decay[s, n, i] = d
                            h[s + 1, n, i] = d * h[s, n, i] + write[s, i] * B_tn
                    if mark & RESET:
                        for n in range(N):
                            B_tn = B[b, t, n]
                            for i in range(LANES):
                                decay[s, n, i] = zero
                                h[s + 1, n, i] = write[s, i] * B_tn
                    if edit >= 0:
                        for n in range(N):
                            for i in range(LANES):
                                h[s + 1, n, i] = (
                                    h[s + 1, n, i] * edit_scale[b, edit, n, e0 + i] + edit_shift[b, edit, n, e0 + i]
                                )
                for s in range(steps - 1, -1, -1):
                    t = t0 + s
                    edit = edit_slot[t] if has_edits else np.int32(-1)
                    padding = has_marks and (marks[b, t] & PADDING) != 0
                    if padding:
                        for i in range(LANES):
                            dy_t[i] = zero
                            if has_gate:
                                grad_gate[b, t, e0 + i] = zero
                    elif has_gate:
                        row = gate_at[0] + b * gate_at[1] + t * gate_at[2] + e0
                        for i in range(LANES):
                            acc[i] = D[e0 + i] * x[b, t, e0 + i]
                        for n in range(N):
                            C_tn = C[b, t, n]
                            for i in range(LANES):
                                acc[i] += h[s + 1, n, i] * C_tn
                        for i in range(LANES):
                            g = gate[row + i]
                            sig = sigmoid(g)
                            dy_t[i] = dy[b, t, e0 + i] * g * sig
                            grad_gate[b, t, e0 + i] = dy[b, t, e0 + i] * acc[i] * sig * (one + g * (one - sig))
                    else:
                        for i in range(LANES):
                            dy_t[i] = dy[b, t, e0 + i]
                    for n in range(N):
                        C_tn = C[b, t, n]
                        for i in range(LANES):
                            lam[k, n, i] += dy_t[i] * C_tn
                            lanes_C[s, n, i] += dy_t[i] * h[s + 1, n, i]
                    if slots > 0 and capture_slot[t] >= 0:
                        _add_captured(lam[k], dcaptured[b, capture_slot[t]], channel_slot, e0, first_slot, slots)
                    if edit >= 0:
                        for n in range(N):
                            B_tn = B[b, t, n]
                            for i in range(LANES):
                                before = decay[s, n, i] * h[s, n, i] + write[s, i] * B_tn
                                grad_edit_scale[b, edit, n, e0 + i] = lam[k, n, i] * before
                                grad_edit_shift[b, edit, n, e0 + i] = lam[k, n, i]
                                lam[k, n, i] *= edit_scale[b, edit, n, e0 + i]
                    for i in range(LANES):
                        acc_u[i] = zero
                        acc_dt[i] = zero
                    for n in range(N):
                        B_tn = B[b, t, n]
                        for i in range(LANES):
                            adjoint = lam[k, n, i]
                            carried = adjoint * decay[s, n, i]
                            into_exponent = carried * h[s, n, i]
                            acc_A[k, n, i] += into_exponent * step[s, i]
                            acc_dt[i] += into_exponent * a_lane[n, i]
                            acc_u[i] += adjoint * B_tn
                            lanes_B[s, n, i] += adjoint * write[s, i]
                            lam[k, n, i] = carried
                    if padding:
                        for i in range(LANES):
                            grad_x[b, t, e0 + i] = zero
                            grad_dt[b, t, e0 + i] = zero
                        continue
                    for i in range(LANES):
                        grad_x[b, t, e0 + i] = acc_u[i] * step[s, i] + dy_t[i] * D[e0 + i]
                        grad_dt[b, t, e0 + i] = acc_u[i] * x[b, t, e0 + i] + acc_dt[i] * ln2
                        grad_D[b, e0 + i] += dy_t[i] * x[b, t, e0 + i]
                    if dt_softplus:
                        for i in range(LANES):
                            grad_dt[b, t, e0 + i] *= sigmoid(dt[b, t, e0 + i] + bias[i])
            for s in range(steps):
                for n in range(N):
                    sum_B, sum_C = zero, zero
                    for i in range(LANES):
                        sum_B += lanes_B[s, n, i]
                        sum_C += lanes_C[s, n, i]
                    grad_B[b, group, t0 + s, n] = sum_B
                    grad_C[b, group, t0 + s, n] = sum_C
        for k in range(last - first):
            e0 = (first + k) * LANES
            for n in range(N):
                for i in range(LANES):
                    grad_A[b, e0 + i, n] = acc_A[k, n, i]
                    if has_h0:
                        grad_h0[b, e0 + i, n] = lam[k, n, i]


@njit(inline="always")
def _add_captured(lam, gradient, channel_slot, e0, first_slot, slots):
    """Add the gradient of captured lanes [N channel slot] to the adjoint [N LANES]."""
    for n in range(lam.shape[0]):
        if slots == LANES:
            for i in range(LANES):
                lam[n, i] += gradient[n, first_slot + i]
        else:
            for i in range(LANES):
                if channel_slot[e0 + i] >= 0:
                    lam[n, i] += gradient[n, channel_slot[e0 + i]]
