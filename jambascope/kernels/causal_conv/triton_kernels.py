"""The Triton kernels of the causal convolution.

A program owns BLOCK_T positions by BLOCK_E channels of one batch row; time is the second-slowest part of the program's
number, so that neighbouring programs read neighbouring channels. Inputs are numbered as in ``cat(past, x)``; with
TABLES, ``source`` and ``target`` (``interface.neighbours``) say which of them an output meets, and the other way round.

Bound: memory. Forward: x read and out written once (the other K - 1 reads of x hit the cache); backward: x, dout and
through read, through and the inputs' gradients written, once each.

Offsets are in 64 bits. Sums over time are stored per program and added by the caller in order: no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sigmoid(v):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * v))


@triton.jit
def _place(T, E, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """Batch row, positions [BLOCK_T] and channels [BLOCK_E] of this program, in 64 bits; and its block of time."""
    blocks_E, blocks_T = tl.cdiv(E, BLOCK_E), tl.cdiv(T, BLOCK_T)
    program = tl.program_id(0)
    e = (program % blocks_E).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    block = program // blocks_E
    t = (block % blocks_T).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    return (block // blocks_T).to(tl.int64), t, e, block


@triton.jit
def _tap(x, x_batch, x_row, past, source, b, t, e, k, T, E, K: tl.constexpr, HAS_PAST: tl.constexpr,
         TABLES: tl.constexpr):  # fmt: skip
    """The inputs that tap k of the outputs at t meets, [BLOCK_T BLOCK_E] float32, 0 where there are none."""
    if TABLES:
        j = tl.load(source + (b * T + t) * K + k, mask=t < T, other=-1).to(tl.int64)
    else:
        j = tl.where(t < T, t + k, -1)
    row = j - (K - 1)
    inside = (e < E)[None, :]
    met = tl.load(x + b * x_batch + row[:, None] * x_row + e[None, :], mask=(row >= 0)[:, None] & inside, other=0.0)
    met = met.to(tl.float32)
    if HAS_PAST:
        before = (j >= 0) & (row < 0)
        met += tl.load(past + (b * (K - 1) + j[:, None]) * E + e[None, :], mask=before[:, None] & inside, other=0.0).to(
            tl.float32
        )
    return met


@triton.jit
def forward_kernel(
    x, x_batch, x_row, weight, bias, past, source, out, T, E,
    K: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAST: tl.constexpr, TABLES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """x [B T E], its channels neighbours; weight [E K]; bias [E]; past [B K-1 E]; source [B T K]; out [B T E]."""
    b, t, e, _ = _place(T, E, BLOCK_T, BLOCK_E)
    v = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if HAS_BIAS:
        v += tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(K):
        w = tl.load(weight + e * K + k, mask=e < E, other=0.0).to(tl.float32)
        v += w[None, :] * _tap(x, x_batch, x_row, past, source, b, t, e, k, T, E, K, HAS_PAST, TABLES)
    if SILU:
        v *= _sigmoid(v)
    if TABLES:
        own = tl.load(source + (b * T + t) * K + (K - 1), mask=t < T, other=-1)
        v = tl.where((own >= 0)[:, None], v, 0.0)
    inside = (t < T)[:, None] & (e < E)[None, :]
    tl.store(out + (b * T + t[:, None]) * E + e[None, :], v.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_weights_kernel(
    x, x_batch, x_row, weight, bias, past, source, dout, through, grad_weight, grad_bias, T, E,
    K: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAST: tl.constexpr, TABLES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """through [B T E] float32, the gradient before SiLU; grad_weight [blocks K E] and grad_bias [blocks E], its sums
    over each program's positions."""
    b, t, e, block = _place(T, E, BLOCK_T, BLOCK_E)
    inside = (t < T)[:, None] & (e < E)[None, :]
    at = (b * T + t[:, None]) * E + e[None, :]
    g = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
    if TABLES:
        own = tl.load(source + (b * T + t) * K + (K - 1), mask=t < T, other=-1)
        g = tl.where((own >= 0)[:, None], g, 0.0)
    if SILU:
        v = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        if HAS_BIAS:
            v += tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
        for k in tl.static_range(K):
            w = tl.load(weight + e * K + k, mask=e < E, other=0.0).to(tl.float32)
            v += w[None, :] * _tap(x, x_batch, x_row, past, source, b, t, e, k, T, E, K, HAS_PAST, TABLES)
        s = _sigmoid(v)
        g *= s * (1.0 + v * (1.0 - s))
    tl.store(through + at, g, mask=inside)
    block = block.to(tl.int64)
    tl.store(grad_bias + block * E + e, tl.sum(g, axis=0), mask=e < E)
    for k in tl.static_range(K):
        met = _tap(x, x_batch, x_row, past, source, b, t, e, k, T, E, K, HAS_PAST, TABLES)
        tl.store(grad_weight + (block * K + k) * E + e, tl.sum(g * met, axis=0), mask=e < E)


@triton.jit
def backward_inputs_kernel(
    weight, target, through, grad_x, grad_past, T, E,
    K: tl.constexpr, TABLES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """grad_x [B T E] and grad_past [B K-1 E] out of ``through``; programs own inputs, of which a row has K - 1 + T."""
    inputs = T + (K - 1)
    b, j, e, _ = _place(inputs, E, BLOCK_T, BLOCK_E)
    g = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for k in tl.static_range(K):
        if TABLES:
            t = tl.load(target + (b * inputs + j) * K + k, mask=j < inputs, other=-1).to(tl.int64)
        else:
            t = j - k
        met = ((t >= 0) & (t < T))[:, None] & (e < E)[None, :]
        w = tl.load(weight + e * K + k, mask=e < E, other=0.0).to(tl.float32)
        g += w[None, :] * tl.load(through + (b * T + t[:, None]) * E + e[None, :], mask=met, other=0.0)
    row = j - (K - 1)
    inside = (e < E)[None, :]
    tl.store(
        grad_x + (b * T + row[:, None]) * E + e[None, :],
        g.to(grad_x.dtype.element_ty),
        mask=((row >= 0) & (row < T))[:, None] & inside,
    )
    tl.store(
        grad_past + (b * (K - 1) + j[:, None]) * E + e[None, :],
        g.to(grad_past.dtype.element_ty),
        mask=(row < 0)[:, None] & inside,
    )


@triton.jit
def step_kernel(
    x, x_batch, weight, bias, past, out, new_past, E,
    K: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One position: x [B E]; past and new_past [B K-1 E]; out [B E]."""
    blocks = tl.cdiv(E, BLOCK_E)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    e = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = e < E
    v = tl.zeros((BLOCK_E,), tl.float32)
    if HAS_BIAS:
        v += tl.load(bias + e, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        if k < K - 1:
            met = tl.load(past + (b * (K - 1) + k) * E + e, mask=inside, other=0.0).to(tl.float32)
        else:
            met = tl.load(x + b * x_batch + e, mask=inside, other=0.0).to(tl.float32)
        if k > 0:
            tl.store(new_past + (b * (K - 1) + k - 1) * E + e, met.to(new_past.dtype.element_ty), mask=inside)
        v += tl.load(weight + e * K + k, mask=inside, other=0.0).to(tl.float32) * met
    if SILU:
        v *= _sigmoid(v)
    tl.store(out + b * E + e, v.to(out.dtype.element_ty), mask=inside)
