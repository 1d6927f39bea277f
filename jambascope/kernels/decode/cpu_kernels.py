"""A whole Mamba-1 layer for one token, as numba loops: what decoding costs is reading each weight once.

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
def _rms_norm(v, start, width, weight, eps, out):
    """RMSNorm of part of v into the same part of out; a copy where there is no weight."""
    scale = np.float32(1.0)
    if weight != 0:
        total = ZERO
        for i in range(start, start + width):
            total += read(v, i) * read(v, i)
        scale = np.float32(1.0 / np.sqrt(total / np.float32(width) + eps))
    for i in range(width):
        out[start + i] = read(v, start + i) * scale * (read(weight, i) if weight != 0 else np.float32(1.0))


@njit(inline="always", fastmath=FAST)
def _swiglu(x, width, d_mlp, gate, up, down, factor, scratch, other, product, out):
    """out += factor * down (SiLU(gate x) * up x)."""
    matvec(gate, 0, x, scratch, d_mlp, width)
    matvec(up, 0, x, other, d_mlp, width)
    for f in range(0, d_mlp, LANES):  # the last vector may run over into the spare lanes
        store(scratch, f, silu(load(scratch, f)) * load(other, f))
    matvec(down, 0, scratch, product, width, d_mlp)
    for i in range(width):
        out[i] += factor * product[i]


@njit(inline="always", fastmath=FAST)
def _moe(x, width, d_mlp, experts, slots, router, gate_up, down, scratch, other, product, weights, out):
    """out += the chosen experts' weighted outputs; of equal weights the first is chosen."""
    matvec(router, 0, x, weights, experts, width)
    largest = weights[0]
    for i in range(experts):
        largest = max(largest, weights[i])
    total = ZERO
    for i in range(experts):
        weights[i] = np.exp(weights[i] - largest)
        total += weights[i]
    for _ in range(slots):
        chosen = 0
        for i in range(experts):
            if weights[i] > weights[chosen]:
                chosen = i
        at, size = gate_up + 8 * chosen * d_mlp * width, 4 * d_mlp * width
        factor = weights[chosen] / total
        _swiglu(x, width, d_mlp, at, at + size, down + chosen * size, factor, scratch, other, product, out)
        weights[chosen] = -1.0


@njit(nogil=True, cache=True, fastmath=FAST)
def mamba_block_step(
    sizes,
    eps,
    hidden,
    past,
    state,
    out,
    new_past,
    new_state,
    norm,
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
    feed_forward_norm,
    router,
    gate,
    up,
    down,
):
    """hidden, out [rows width]; past, new_past [rows K-1 E]; state, new_state [rows N E]; weights as in the layers.

    sizes = (rows, width, E, N, R, K, d_mlp, experts, slots); E a multiple of LANES. With a ``router``, ``gate`` is
    gate_up of all experts and ``up`` is 0; without a feed-forward its weights are 0. Equations of the mixer as in
    ``selective_scan/reference.py``, with the convolution before it.
    """
    rows, width, E, N, R, K, d_mlp, experts, slots = sizes
    projected, u, dt = aligned(2 * E), aligned(E), aligned(E)
    dt_B_C = aligned(R + 2 * N)
    x, mixed, weights = aligned(width), aligned(width), aligned(experts)
    scratch, other, product = aligned(d_mlp + LANES), aligned(d_mlp + LANES), aligned(width)
    for row in range(rows):
        residual = hidden + 4 * row * width
        _rms_norm(residual, 0, width, norm, eps, x)
        matvec(in_proj, in_bias, x, projected, 2 * E, width)
        for e in range(0, E, LANES):
            at = row * (K - 1) * E + e
            v = load(projected, e)
            acc = v * load_every(conv, e * K + K - 1, K)
            if conv_bias != 0:
                acc = acc + load(conv_bias, e)
            for k in range(K - 1):
                before = load(past, at + k * E)
                acc = acc + before * load_every(conv, e * K + k, K)
                if k > 0:
                    store(new_past, at + (k - 1) * E, before)
            if K > 1:
                store(new_past, at + (K - 2) * E, v)
            store(u, e, silu(acc))
        matvec(x_proj, 0, u, dt_B_C, R + 2 * N, E)
        _rms_norm(dt_B_C, 0, R, dt_norm, eps, dt_B_C)
        _rms_norm(dt_B_C, R, N, b_norm, eps, dt_B_C)
        _rms_norm(dt_B_C, R + N, N, c_norm, eps, dt_B_C)
        matvec(dt_proj, dt_bias, dt_B_C, dt, E, R)
        for e in range(0, E, LANES):
            step, v = softplus(load(dt, e)), load(u, e)
            exponent, dx = step * (-LOG2_E), step * v
            y = v * load(D, e)
            for n in range(N):
                at = (row * N + n) * E + e
                decay = exp2(exponent * exp2(load_every(A_log, e * N + n, N) * LOG2_E))
                h = decay * load(state, at) + dx * read(dt_B_C, R + n)
                store(new_state, at, h)
                y = y + h * read(dt_B_C, R + N + n)
            store(u, e, y * silu(load(projected, E + e)))
        matvec(out_proj, out_bias, u, mixed, width, E)
        for i in range(width):
            mixed[i] += read(residual, i)
        if down != 0:
            _rms_norm(mixed, 0, width, feed_forward_norm, eps, x)
            if router != 0:
                _moe(x, width, d_mlp, experts, slots, router, gate, down, scratch, other, product, weights, mixed)
            else:
                _swiglu(x, width, d_mlp, gate, up, down, np.float32(1.0), scratch, other, product, mixed)
        for i in range(width):
            write(out, row * width + i, mixed[i])
