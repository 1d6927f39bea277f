"""The numba loops of the CPU convolution.

A work item owns LANES neighbouring channels of one batch row and walks through time, so that loads and stores are
contiguous. Bound: one read and one write of each input; the arithmetic (d_conv multiply-adds and one exp2) hides
behind them.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from jambascope.kernels.vector_math import FAST, sigmoid

LANES = 64


def blocks(channels: int) -> int:
    """How many lane blocks cover the channels; the last one may be narrower."""
    return -(-channels // LANES)


@njit(inline="always")
def _input(x, past, b, t, e):
    """The input at position t, which may lie before the first one."""
    return x[b, t, e] if t >= 0 else past[b, t + past.shape[1], e]


@njit(nogil=True, cache=True, fastmath=FAST)
def forward(start, stop, x, weight, bias, past, silu, out):
    """x [B T >=E]; out [B T E]; weight [K E]; bias [E]; past [B K-1 E]."""
    T, E = x.shape[1], weight.shape[1]
    K = weight.shape[0]
    n_blocks = (E + LANES - 1) // LANES
    for item in range(start, stop):
        b = item // n_blocks
        e0 = (item % n_blocks) * LANES
        e1 = min(e0 + LANES, E)
        for t in range(T):
            for e in range(e0, e1):
                out[b, t, e] = bias[e]
            for k in range(K):
                s = t - (K - 1) + k
                if s >= 0:
                    for e in range(e0, e1):
                        out[b, t, e] += weight[k, e] * x[b, s, e]
                else:
                    for e in range(e0, e1):
                        out[b, t, e] += weight[k, e] * past[b, s + K - 1, e]
            if silu:
                for e in range(e0, e1):
                    v = out[b, t, e]
                    out[b, t, e] = v * sigmoid(v)


@njit(nogil=True, cache=True, fastmath=FAST)
def backward(start, stop, x, weight, bias, past, silu, dout, through, grad_x, grad_past, grad_weight, grad_bias):
    """``through`` [B T E] takes the gradient before SiLU; grad_weight [B K E] and grad_bias [B E] are per row."""
    T, E = x.shape[1], weight.shape[1]
    K = weight.shape[0]
    n_blocks = (E + LANES - 1) // LANES
    one = np.float32(1.0)
    for item in range(start, stop):
        b = item // n_blocks
        e0 = (item % n_blocks) * LANES
        e1 = min(e0 + LANES, E)
        for e in range(e0, e1):
            grad_bias[b, e] = 0
            for k in range(K):
                grad_weight[b, k, e] = 0
        for t in range(T):
            if silu:
                for e in range(e0, e1):
                    through[b, t, e] = bias[e]
                for k in range(K):
                    s = t - (K - 1) + k
                    for e in range(e0, e1):
                        through[b, t, e] += weight[k, e] * _input(x, past, b, s, e)
                for e in range(e0, e1):
                    v = through[b, t, e]
                    sig = sigmoid(v)
                    through[b, t, e] = dout[b, t, e] * sig * (one + v * (one - sig))
            else:
                for e in range(e0, e1):
                    through[b, t, e] = dout[b, t, e]
            for e in range(e0, e1):
                grad_bias[b, e] += through[b, t, e]
            for k in range(K):
                s = t - (K - 1) + k
                for e in range(e0, e1):
                    grad_weight[b, k, e] += through[b, t, e] * _input(x, past, b, s, e)
        # An input at s reached the outputs at s .. s + K - 1, through weights K - 1 .. 0.
        for s in range(-(K - 1), T):
            for e in range(e0, e1):
                total = np.float32(0.0)
                for k in range(K):
                    t = s + (K - 1) - k
                    if 0 <= t < T:
                        total += weight[k, e] * through[b, t, e]
                if s >= 0:
                    grad_x[b, s, e] = total
                else:
                    grad_past[b, s + K - 1, e] = total
