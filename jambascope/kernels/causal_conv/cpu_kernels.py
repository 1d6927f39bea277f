"""The numba loops of the CPU convolution.

A work item owns LANES neighbouring channels of one batch row and walks through time, so that loads and stores are
contiguous. Bound: one read and one write of each input; the arithmetic (d_conv multiply-adds and one exp2) hides
behind them.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from jambascope.kernels.vector_math import FAST, sigmoid

LANES = 16


@njit(nogil=True, cache=True, fastmath=FAST)
def forward(start, stop, x, weight, bias, past, silu, out):
    """x [B T >=E]; out [B T E]; weight [K E]; bias [E]; past [B K-1 E]; E a multiple of LANES."""
    T, E, K = x.shape[1], weight.shape[1], weight.shape[0]
    blocks = E // LANES
    acc = np.empty(LANES, np.float32)
    for item in range(start, stop):
        b = item // blocks
        e0 = (item % blocks) * LANES
        for t in range(T):
            for i in range(LANES):
                acc[i] = bias[e0 + i]
            for k in range(K):
                s = t - (K - 1) + k
                if s >= 0:
                    for i in range(LANES):
                        acc[i] += weight[k, e0 + i] * x[b, s, e0 + i]
                else:
                    for i in range(LANES):
                        acc[i] += weight[k, e0 + i] * past[b, s + K - 1, e0 + i]
            if silu:
                for i in range(LANES):
                    out[b, t, e0 + i] = acc[i] * sigmoid(acc[i])
            else:
                for i in range(LANES):
                    out[b, t, e0 + i] = acc[i]


@njit(nogil=True, cache=True, fastmath=FAST)
def backward(start, stop, x, weight, bias, past, silu, dout, through, grad_x, grad_past, grad_weight, grad_bias):
    """``through`` [B T E] takes the gradient before SiLU; grad_weight [B K E] and grad_bias [B E] are per row."""
    T, E, K = x.shape[1], weight.shape[1], weight.shape[0]
    blocks = E // LANES
    one, zero = np.float32(1.0), np.float32(0.0)
    acc = np.empty(LANES, np.float32)
    sum_bias = np.empty(LANES, np.float32)
    sum_weight = np.empty((K, LANES), np.float32)
    window = np.empty((K, LANES), np.float32)
    for item in range(start, stop):
        b = item // blocks
        e0 = (item % blocks) * LANES
        sum_bias[:] = zero
        sum_weight[:] = zero
        for t in range(T):
            for k in range(K):
                s = t - (K - 1) + k
                if s >= 0:
                    for i in range(LANES):
                        window[k, i] = x[b, s, e0 + i]
                else:
                    for i in range(LANES):
                        window[k, i] = past[b, s + K - 1, e0 + i]
            for i in range(LANES):
                acc[i] = dout[b, t, e0 + i]
            if silu:
                for i in range(LANES):
                    v = bias[e0 + i]
                    for k in range(K):
                        v += weight[k, e0 + i] * window[k, i]
                    sig = sigmoid(v)
                    acc[i] *= sig * (one + v * (one - sig))
            for i in range(LANES):
                through[b, t, e0 + i] = acc[i]
                sum_bias[i] += acc[i]
            for k in range(K):
                for i in range(LANES):
                    sum_weight[k, i] += acc[i] * window[k, i]
        for i in range(LANES):
            grad_bias[b, e0 + i] = sum_bias[i]
            for k in range(K):
                grad_weight[b, k, e0 + i] = sum_weight[k, i]
        # An input at s reached the outputs at s .. s + K - 1, through weights K - 1 .. 0.
        for s in range(-(K - 1), T):
            acc[:] = zero
            for k in range(K):
                t = s + (K - 1) - k
                if 0 <= t < T:
                    for i in range(LANES):
                        acc[i] += weight[k, e0 + i] * through[b, t, e0 + i]
            for i in range(LANES):
                if s >= 0:
                    grad_x[b, s, e0 + i] = acc[i]
                else:
                    grad_past[b, s + K - 1, e0 + i] = acc[i]
