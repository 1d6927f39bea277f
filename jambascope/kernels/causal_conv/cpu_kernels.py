"""The numba loops of the CPU convolution, on vectors of LANES neighbouring channels.

A work item is CHUNK positions of one batch row. It takes its channels LANES at a time and walks through its positions
with the last inputs, the weights and the sums in registers; the chunk's rows meanwhile lie in cache. Arrays arrive as
addresses (float32; contiguous but for ``x``, whose positions are ``x_row`` apart), ``taps`` as ``(0, 1, .. K - 1)``, by
whose length, a part of its type, loops are unrolled.

Inputs are numbered as in ``cat(past, x)``: ``source`` [B T K] says which of them tap k of an output meets, ``target``
[B K-1+T K] which output met an input with tap k, -1 for none (``interface.neighbours``). Empty tables mean ``t + k``
and ``j - k``.

Bound, forward with SiLU: 8 bytes, and per vector K multiply-adds, one exp2 (13 instructions), a division and 3 more.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit
from numba.cpython.unsafe.tuple import tuple_setitem

from jambascope.kernels.compiling import NativeTask, loop_task
from jambascope.kernels.native import address, next_items, numbers
from jambascope.kernels.vectors import LANES, load, load_every, read, repeat, sigmoid, splat, store

CHUNK = 32


@njit(inline="always")
def _input(x, x_row, begin, past, b, j, e, E, K):
    """Input ``j`` of a row whose first position is ``begin`` of the flat ones, and whose past is ``b``; -1 is none."""
    if j < K - 1:
        if b < 0:
            return splat(np.float32(0.0))
        return load(past, (b * (K - 1) + j) * E + e)
    return load(x, (begin + j - (K - 1)) * x_row + e)


@njit(inline="always")
def _weights(address, e, taps):
    """The weights of a lane block, one vector per tap, out of [E K]."""
    K = len(taps)
    rows = repeat(splat(np.float32(0.0)), taps)
    for k in range(K):
        rows = tuple_setitem(rows, k, load_every(address, e * K + k, K))
    return rows


@njit(inline="always")
def _window_before(x, x_row, begin, past, b, first, e, E, source, taps):
    """The inputs that the next position shares with the one before; nothing where the table is asked instead."""
    K = len(taps)
    window = repeat(splat(np.float32(0.0)), taps)
    if source.size == 0:
        for k in range(1, K):
            window = tuple_setitem(window, k, _input(x, x_row, begin, past, b, first - 1 + k, e, E, K))
    return window


@njit(inline="always")
def _window_at(window, x, x_row, begin, past, b, before, t, e, E, source, taps):
    K = len(taps)
    if source.size == 0:
        return window[1:] + (load(x, (begin + t) * x_row + e),)
    for k in range(K):
        j = source[b, t, k]
        tap = _input(x, x_row, begin, past, before, j, e, E, K) if j >= 0 else splat(np.float32(0.0))
        window = tuple_setitem(window, k, tap)
    return window


@njit(inline="always")
def _dot(weights, window, sums):
    for k in range(len(weights)):
        sums = sums + weights[k] * window[k]
    return sums


@njit
def _forward(
    start, stop, rows, longest, chunks, E, x_row, silu, bounds, past_rows, x, past, weight, bias, table, out, taps
):
    """Work items ``start..stop``. weight [E K]; bias [E]; past [B K-1 E]; ``table`` is ``source``, or 0; out [B T E].
    E at least LANES: the last block overlaps its neighbour.

    Row b has the positions from bounds[b] to bounds[b + 1] (int64) of the flat ones. A row is that many ``chunks``,
    work items; with 1, whatever its length is. past_rows (int64), or 0: which past is that of row b, -1 for none.
    """
    bound, past_of = carray(address(bounds), (1,), np.int64), carray(address(past_rows), (1,), np.int64)
    source = carray(address(table), (rows if table else 0, longest, len(taps)), np.int32)
    K = len(taps)
    zero = splat(np.float32(0.0))
    for item in range(start, stop):
        b, chunk = item // chunks, item % chunks
        begin = read(bound, b)
        T = read(bound, b + 1) - begin
        before = read(past_of, b) if past_rows else b
        for first in range(chunk * CHUNK, T if chunks == 1 else min((chunk + 1) * CHUNK, T), CHUNK):
            for block in range(-(-E // LANES)):
                e = min(block * LANES, E - LANES)
                weights = _weights(weight, e, taps)
                offset = load(bias, e)
                window = _window_before(x, x_row, begin, past, before, first, e, E, source, taps)
                for t in range(first, min(first + CHUNK, T)):
                    if source.size and source[b, t, K - 1] < 0:
                        store(out, (begin + t) * E + e, zero)
                        continue
                    window = _window_at(window, x, x_row, begin, past, b, before, t, e, E, source, taps)
                    v = _dot(weights, window, offset)
                    if silu:
                        v = v * sigmoid(v)
                    store(out, (begin + t) * E + e, v)


def _forward_of(taps: tuple[int, ...]) -> NativeTask:
    @loop_task(14)
    def forward(call):
        given = numbers(call, 14)
        start, stop = next_items(call)
        while start < stop:
            _forward(start, stop, *given, taps)
            start, stop = next_items(call)

    return forward


FORWARD = {width: _forward_of(tuple(range(width))) for width in range(1, 9)}
"""By width, which each is compiled for."""


@njit(inline="always")
def _before_silu(g, weights, window, offset, silu):
    """The gradient g of an output, taken back through SiLU."""
    if silu:
        v = _dot(weights, window, offset)
        s = sigmoid(v)
        g = g * (s * (v * (np.float32(1.0) - s) + np.float32(1.0)))
    return g


@njit(nogil=True, cache=True)
def backward(
    start,
    stop,
    T,
    E,
    x,
    x_row,
    past,
    weight,
    bias,
    taps,
    silu,
    dout,
    grad_x,
    grad_past,
    grad_weight,
    grad_bias,
):
    """All gradients in one pass, where there are no tables; a work item is CHUNK of a row's K - 1 + T inputs.

    grad_x [B T E]; grad_past [B K-1 E]; grad_weight [items K E] and grad_bias [items E] are per item. An item computes
    the K - 1 positions before its first once more, whose inputs it does not own.
    """
    K = len(taps)
    P = K - 1
    zero = splat(np.float32(0.0))
    chunks = -(-(P + T) // CHUNK)
    for item in range(start, stop):
        b, first = item // chunks, item % chunks * CHUNK
        begin, reached = b * T, max(first - P, 0)
        for block in range(-(-E // LANES)):
            e = min(block * LANES, E - LANES)
            weights = _weights(weight, e, taps)
            offset = load(bias, e)
            window = repeat(zero, taps)
            for k in range(1, K):
                window = tuple_setitem(window, k, _input(x, x_row, begin, past, b, reached - 1 + k, e, E, K))
            sums, sum_bias = repeat(zero, taps), zero
            latest = repeat(zero, taps)
            for t in range(reached, min(first + CHUNK, P + T)):
                g = zero
                if t < T:
                    window = window[1:] + (load(x, (begin + t) * x_row + e),)
                    g = _before_silu(load(dout, (b * T + t) * E + e), weights, window, offset, silu)
                latest = (g,) + latest[:-1]
                if t < first:
                    continue
                sum_bias = sum_bias + g
                for k in range(K):
                    sums = tuple_setitem(sums, k, sums[k] + g * window[k])
                v = _dot(weights, latest, zero)
                if t < P:
                    store(grad_past, (b * P + t) * E + e, v)
                else:
                    store(grad_x, (b * T + t - P) * E + e, v)
            store(grad_bias, item * E + e, sum_bias)
            for k in range(K):
                store(grad_weight, (item * K + k) * E + e, sums[k])


@njit(nogil=True, cache=True)
def backward_weights(
    start, stop, T, E, x, x_row, past, weight, bias, taps, silu, dout, grad_weight, grad_bias, source, through
):
    """With tables, first: ``through`` [B T E], the gradient before SiLU, and its sums per work item, as in forward."""
    K = len(taps)
    zero = splat(np.float32(0.0))
    chunks = -(-T // CHUNK)
    for item in range(start, stop):
        b, first = item // chunks, item % chunks * CHUNK
        begin = b * T
        for block in range(-(-E // LANES)):
            e = min(block * LANES, E - LANES)
            weights = _weights(weight, e, taps)
            offset = load(bias, e)
            window = repeat(zero, taps)
            sums, sum_bias = repeat(zero, taps), zero
            for t in range(first, min(first + CHUNK, T)):
                if source[b, t, K - 1] < 0:
                    store(through, (b * T + t) * E + e, zero)
                    continue
                window = _window_at(window, x, x_row, begin, past, b, b, t, e, E, source, taps)
                g = _before_silu(load(dout, (b * T + t) * E + e), weights, window, offset, silu)
                store(through, (b * T + t) * E + e, g)
                sum_bias = sum_bias + g
                for k in range(K):
                    sums = tuple_setitem(sums, k, sums[k] + g * window[k])
            store(grad_bias, item * E + e, sum_bias)
            for k in range(K):
                store(grad_weight, (item * K + k) * E + e, sums[k])


@njit(nogil=True, cache=True)
def backward_inputs(start, stop, T, E, weight, target, taps, through, grad_x, grad_past):
    """With tables, then: the inputs' gradients; a work item is CHUNK of a row's K - 1 + T inputs."""
    K = len(taps)
    P = K - 1
    zero = splat(np.float32(0.0))
    chunks = -(-(P + T) // CHUNK)
    for item in range(start, stop):
        b, first = item // chunks, item % chunks * CHUNK
        for block in range(-(-E // LANES)):
            e = min(block * LANES, E - LANES)
            weights = _weights(weight, e, taps)
            for j in range(first, min(first + CHUNK, P + T)):
                v = zero
                for k in range(K):
                    t = target[b, j, k]
                    if t >= 0:
                        v = v + weights[k] * load(through, (b * T + t) * E + e)
                if j < P:
                    store(grad_past, (b * P + j) * E + e, v)
                else:
                    store(grad_x, (b * T + j - P) * E + e, v)


@njit(nogil=True, cache=True)
def step(B, E, x, x_batch, past, weight, bias, taps, silu, out, new_past):
    """One position: out [B E], and the past [B K-1 E] that the next one meets."""
    K = len(taps)
    P = K - 1
    for b in range(B):
        for block in range(-(-E // LANES)):
            e = min(block * LANES, E - LANES)
            v = load(bias, e)
            for k in range(K):
                tap = load(past, (b * P + k) * E + e) if k < P else load(x, b * x_batch + e)
                v = v + load_every(weight, e * K + k, K) * tap
                if k:
                    store(new_past, (b * P + k - 1) * E + e, tap)
            if silu:
                v = v * sigmoid(v)
            store(out, b * E + e, v)
