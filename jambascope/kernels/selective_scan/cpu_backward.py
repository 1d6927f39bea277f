"""The adjoint of the CPU scan, in numba; layout as in ``cpu_kernels``.

Each chunk's states are computed again from a stored checkpoint, rather than kept. Sums over channels (the gradients of
B and C) go into one partial per group of lane blocks, and the caller adds the partials in order: no atomics, the same
bits on every run and for every number of threads.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from jambascope.kernels.selective_scan.cpu_kernels import ZERO, captured_lanes, copy, step_sizes
from jambascope.kernels.selective_scan.interface import PADDING, RESET
from jambascope.kernels.vectors import FAST, LANES, aligned, exp2, lane_sum, load, read, sigmoid, splat, store

LN2 = np.float32(0.6931471805599453)


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
            copy(dh_last, b * N * E + (first + k) * LANES, E, lam, k * NL, LANES, N)
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
                first_slot, slots = captured_lanes(channel_slot, e0) if has_capture else (0, 0)
                copy(A, e0, E, a, 0, LANES, N)
                copy(checkpoints, (b * chunks + c) * N * E + e0, E, h, 0, LANES, N)
                # States of the chunk again, from its checkpoint; row s + 1 of h is the state after position t0 + s.
                for s in range(steps):
                    t = t0 + s
                    at, at_n = (b * T + t) * E + e0, (b * T + t) * N
                    mark = read(marks, b * T + t) if has_marks else np.uint8(0)
                    step, write = splat(ZERO), splat(ZERO)
                    if mark & PADDING == 0:
                        step = step_sizes(dt, at, bias, dt_softplus)
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
            copy(acc_A, k * NL, LANES, grad_A, at_row, E, N)
            if has_h0:
                copy(lam, k * NL, LANES, grad_h0, at_row, E, N)


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
