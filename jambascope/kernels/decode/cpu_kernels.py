"""Whole sub-layers for one token, as numba loops: what decoding costs is reading each weight once.

Tensors arrive as addresses of contiguous float32; an absent one is 0. Batch rows are done one after another, so that
the second finds the weights in cache. One thread: a core reads its caches faster than a second one can be woken.

Bound: 4 bytes a weight over the bandwidth of the cache (or memory) that holds them; products of one row reuse nothing.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from jambascope.kernels.vectors import (
    FAST,
    LANES,
    aligned,
    exp2,
    lane_sum,
    load,
    load_every,
    read,
    silu,
    softplus,
    splat,
    store,
    write,
)

ZERO = np.float32(0.0)
LOG2_E = np.float32(1.4426950408889634)


@njit(inline="always", fastmath=FAST)
def matvec(weight, bias, v, out, rows, width):
    """out[r] = weight[r] . v + bias[r] for a weight [rows width]; four rows at a time share a load of v."""
    whole = width - width % LANES
    r = 0
    if width <= 2 * LANES:  # too short to sum along: sixteen rows at a time instead
        while r + LANES <= rows:
            acc = load(bias, r) if bias != 0 else splat(ZERO)
            for k in range(width):
                acc = acc + load_every(weight, r * width + k, width) * read(v, k)
            store(out, r, acc)
            r += LANES
    while r + 4 <= rows:
        at = r * width
        a = b = c = d = splat(ZERO)
        for k in range(0, whole, LANES):
            x = load(v, k)
            a = a + x * load(weight, at + k)
            b = b + x * load(weight, at + width + k)
            c = c + x * load(weight, at + 2 * width + k)
            d = d + x * load(weight, at + 3 * width + k)
        out[r], out[r + 1], out[r + 2], out[r + 3] = lane_sum(a), lane_sum(b), lane_sum(c), lane_sum(d)
        for k in range(whole, width):
            for i in range(4):
                out[r + i] += read(v, k) * read(weight, at + i * width + k)
        r += 4
    while r < rows:
        a = splat(ZERO)
        for k in range(0, whole, LANES):
            a = a + load(v, k) * load(weight, r * width + k)
        out[r] = lane_sum(a)
        for k in range(whole, width):
            out[r] += read(v, k) * read(weight, r * width + k)
        r += 1
    if bias != 0:
        for r in range(rows - rows % LANES if width <= 2 * LANES else 0, rows):
            out[r] += read(bias, r)


@njit(inline="always", fastmath=FAST)
def _normalise(v, start, width, weight, eps):
    """RMSNorm of part of v, in place; nothing where there is no weight."""
    if weight != 0:
        total = ZERO
        for i in range(start, start + width):
            total += v[i] * v[i]
        scale = np.float32(1.0) / np.sqrt(total / np.float32(width) + eps)
        for i in range(width):
            v[start + i] = v[start + i] * scale * read(weight, i)


@njit(nogil=True, cache=True, fastmath=FAST)
def mamba_step(
    rows,
    D_model,
    E,
    N,
    R,
    K,
    eps,
    hidden,
    in_proj,
    in_bias,
    conv,
    conv_bias,
    x_proj,
    dt_norm,
    b_norm,
    c_norm,
    dt_proj,
    dt_bias,
    A_log,
    D,
    out_proj,
    out_bias,
    past,
    state,
    out,
    new_past,
    new_state,
):
    """hidden, out [rows D_model]; past, new_past [rows K-1 E]; state, new_state [rows N E]; weights as in MambaMixer.

    E a multiple of LANES. Equations as in ``selective_scan/reference.py``, with the convolution before it.
    """
    projected, u, dt = aligned(2 * E), aligned(E), aligned(E)
    dt_B_C = aligned(R + 2 * N)
    mixed = aligned(D_model)
    for row in range(rows):
        matvec(in_proj, in_bias, hidden + 4 * row * D_model, projected, 2 * E, D_model)
        for e in range(0, E, LANES):
            at = row * (K - 1) * E + e
            x = load(projected, e)
            acc = x * load_every(conv, e * K + K - 1, K)
            if conv_bias != 0:
                acc = acc + load(conv_bias, e)
            for k in range(K - 1):
                before = load(past, at + k * E)
                acc = acc + before * load_every(conv, e * K + k, K)
                if k > 0:
                    store(new_past, at + (k - 1) * E, before)
            if K > 1:
                store(new_past, at + (K - 2) * E, x)
            store(u, e, silu(acc))
        matvec(x_proj, 0, u, dt_B_C, R + 2 * N, E)
        _normalise(dt_B_C, 0, R, dt_norm, eps)
        _normalise(dt_B_C, R, N, b_norm, eps)
        _normalise(dt_B_C, R + N, N, c_norm, eps)
        matvec(dt_proj, dt_bias, dt_B_C, dt, E, R)
        for e in range(0, E, LANES):
            step, x = softplus(load(dt, e)), load(u, e)
            exponent, dx = step * (-LOG2_E), step * x
            y = x * load(D, e)
            for n in range(N):
                at = (row * N + n) * E + e
                decay = exp2(exponent * exp2(load_every(A_log, e * N + n, N) * LOG2_E))
                h = decay * load(state, at) + dx * read(dt_B_C, R + n)
                store(new_state, at, h)
                y = y + h * read(dt_B_C, R + N + n)
            store(u, e, y * silu(load(projected, E + e)))
        matvec(out_proj, out_bias, u, mixed, D_model, E)
        _write(mixed, out + 4 * row * D_model, D_model)


@njit(nogil=True, cache=True, fastmath=FAST)
def swiglu_step(rows, width, hidden_width, x, gate, up, down, out):
    """out = down (SiLU(gate x) * up x); x, out [rows width], gate and up [hidden_width width]."""
    a, b, mixed = aligned(hidden_width + LANES), aligned(hidden_width + LANES), aligned(width)
    for row in range(rows):
        at = x + 4 * row * width
        matvec(gate, 0, at, a, hidden_width, width)
        matvec(up, 0, at, b, hidden_width, width)
        for f in range(0, hidden_width, LANES):  # the last vector may run over into the spare lanes
            store(a, f, silu(load(a, f)) * load(b, f))
        matvec(down, 0, a, mixed, width, hidden_width)
        _write(mixed, out + 4 * row * width, width)


@njit(inline="always")
def _write(values, address, size):
    """Copy an array to an address."""
    whole = size - size % LANES
    for i in range(0, whole, LANES):
        store(address, i, load(values, i))
    for i in range(whole, size):
        write(address, i, values[i])
