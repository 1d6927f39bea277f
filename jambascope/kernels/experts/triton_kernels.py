"""The Triton kernels of the experts: grouped products over tokens sorted by expert, and matrix-vector products.

A pair is one (token, slot), ``p = token * slots + slot``. ``order`` [P] lists pairs by expert and ``offsets`` [X+1]
says where each expert's begin; row ``r`` of a sorted matrix belongs to pair ``order[r]``. A tile is up to BLOCK_R rows
of one expert. There are at most ``ceil(P / BLOCK_R) + X`` tiles, which the host knows without knowing the choice, so
that it never waits: tiles beyond the last find nothing to do.

================  ===========================  ==================================================================
kernel            operations                   bytes, each matrix once (w, a: bytes of a weight and an activation)
================  ===========================  ==================================================================
gate_up           4 P D F + 6 P F              2 U D F w + P D a + P F a  (kept for the backward: + 2 P F a)
product (down)    2 P D F + P D                U D F w + P F a + P D a
combine           P D                          P D a + M D a
gate_up_vector    4 P D F                      2 P D F w + M D a
down_vector       2 P D F                      P D F w + M D a
dact              2 P D F + 14 P F             U D F w + P D a + 5 P F a
product (dx)      4 P D F                      2 U D F w + 2 P F a + P D a
weight_gradient   4 P D F (gate_up), 2 (down)  2 X D F w + 2 P F a + P D a  (gate_up); half the weights (down)
================  ===========================  ==================================================================

P = M S pairs, U experts used, X all experts, D d_model, F d_mlp. Bound: the products' operations once an expert has
more rows than the device does operations per byte (H100 in bfloat16: about 300), the reading of weights below that.
A decoded token is all reading: the vector kernels read each chosen expert once, and have no sort in front of them.

DOT is the type of a product's operands, PRECISION what becomes of float32 ones. Sums are float32; nothing is added atomically: terms of one token are stored and added in the order of its slots, and
a block of a weight's gradient is summed by one program.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(offsets, experts, BLOCK_R: tl.constexpr, BLOCK_X: tl.constexpr):
    """The expert of this program's tile, its first row and the end of the expert's rows; no rows past the last tile."""
    tile = tl.program_id(0)
    e = tl.arange(0, BLOCK_X)
    start = tl.load(offsets + e, mask=e < experts, other=0)
    stop = tl.load(offsets + e + 1, mask=e < experts, other=0)
    tiles = (stop - start + BLOCK_R - 1) // BLOCK_R
    ends = tl.cumsum(tiles, 0)
    mine = (tile < ends) & (tile >= ends - tiles)
    expert = tl.sum(tl.where(mine, e, 0), 0)
    first = tl.sum(tl.where(mine, start + (tile - ends + tiles) * BLOCK_R, 0), 0)
    return expert.to(tl.int64), first, tl.sum(tl.where(mine, stop, 0), 0)


@triton.jit
def gate_up_kernel(
    x,
    order,
    offsets,
    gate_up,
    scale,
    act,
    hidden,
    slots,
    D,
    F,
    experts,
    QUANTIZED: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_X: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """act [P F] = SiLU(gate) * up, sorted; with KEEP hidden [P 2F] = (gate, up).

    x [M D]; gate_up [X 2F D]; scale [X 2F] if QUANTIZED.
    """
    expert, first, last = _tile(offsets, experts, BLOCK_R, BLOCK_X)
    if first < last:
        r = first + tl.arange(0, BLOCK_R)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        row_ok, n_ok = r < last, n < F
        token = tl.load(order + r, mask=row_ok, other=0) // slots
        x_at = x + token[:, None] * D + k[None, :]
        gate_at = gate_up + expert * 2 * F * D + n[None, :].to(tl.int64) * D + k[:, None]
        up_at = gate_up + expert * 2 * F * D + (F + n)[None, :].to(tl.int64) * D + k[:, None]
        gate = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for k0 in range(0, D, BLOCK_K):
            k_ok = k < D - k0
            x_k = tl.load(x_at + k0, mask=row_ok[:, None] & k_ok[None, :], other=0.0).to(DOT)
            w_ok = k_ok[:, None] & n_ok[None, :]
            gate_k = tl.load(gate_at + k0, mask=w_ok, other=0.0).to(DOT)
            gate = tl.dot(x_k, gate_k, gate, input_precision=PRECISION)
            up_k = tl.load(up_at + k0, mask=w_ok, other=0.0).to(DOT)
            up = tl.dot(x_k, up_k, up, input_precision=PRECISION)
        if QUANTIZED:
            scale_at = scale + expert * 2 * F + n
            gate *= tl.load(scale_at, mask=n_ok, other=0.0)[None, :]
            up *= tl.load(scale_at + F, mask=n_ok, other=0.0)[None, :]
        ok = row_ok[:, None] & n_ok[None, :]
        kind = act.dtype.element_ty
        if KEEP:
            hidden_at = hidden + r[:, None].to(tl.int64) * 2 * F + n[None, :]
            tl.store(hidden_at, gate.to(kind), mask=ok)
            tl.store(hidden_at + F, up.to(kind), mask=ok)
        value = gate * tl.sigmoid(gate) * up
        tl.store(act + r[:, None].to(tl.int64) * F + n[None, :], value.to(kind), mask=ok)


@triton.jit
def product_kernel(
    rows,
    weight,
    scale,
    pair_weights,
    order,
    offsets,
    out,
    K,
    N,
    experts,
    TRANSPOSED: tl.constexpr,
    QUANTIZED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_X: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out [P N], by pair, = rows [P K], sorted, times weight [X N K] transposed, or with TRANSPOSED weight [X K N].

    The scale belongs to the weight's rows: N, applied to the sum, or with TRANSPOSED K, applied to the inputs.
    """
    expert, first, last = _tile(offsets, experts, BLOCK_R, BLOCK_X)
    if first < last:
        r = first + tl.arange(0, BLOCK_R)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        row_ok, n_ok = r < last, n < N
        rows_at = rows + r[:, None].to(tl.int64) * K + k[None, :]
        weight += expert * N * K
        if TRANSPOSED:
            weight_at = weight + k[:, None].to(tl.int64) * N + n[None, :]
        else:
            weight_at = weight + n[None, :].to(tl.int64) * K + k[:, None]
        acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k_ok = k < K - k0
            rows_k = tl.load(rows_at + k0, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
            if QUANTIZED and TRANSPOSED:
                scale_k = tl.load(scale + expert * K + k0 + k, mask=k_ok, other=0.0)
                rows_k = rows_k * scale_k[None, :]
            weight_k = tl.load(weight_at, mask=k_ok[:, None] & n_ok[None, :], other=0.0).to(DOT)
            acc = tl.dot(rows_k.to(DOT), weight_k, acc, input_precision=PRECISION)
            if TRANSPOSED:
                weight_at += N * BLOCK_K
            else:
                weight_at += BLOCK_K
        if QUANTIZED and not TRANSPOSED:
            acc *= tl.load(scale + expert * N + n, mask=n_ok, other=0.0)[None, :]
        pair = tl.load(order + r, mask=row_ok, other=0)
        if WEIGHTED:
            acc *= tl.load(pair_weights + pair, mask=row_ok, other=0.0).to(tl.float32)[:, None]
        ok = row_ok[:, None] & n_ok[None, :]
        tl.store(out + pair[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=ok)


@triton.jit
def combine_kernel(addends, out, size, slots, D, BLOCK: tl.constexpr):
    """out [M D] = the sum over slots of addends [M S D]; ``size`` is M D."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = i < size
    first = addends + (i // D) * slots * D + i % D
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(slots):
        acc += tl.load(first, mask=ok, other=0.0).to(tl.float32)
        first += D
    tl.store(out + i, acc.to(out.dtype.element_ty), mask=ok)


@triton.jit
def gate_up_vector_kernel(
    x,
    indices,
    gate_up,
    scale,
    act,
    slots,
    D,
    F,
    QUANTIZED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """act [P F] float32 = SiLU(gate) * up of one pair to a program; indices [P]."""
    pair = tl.program_id(0)
    expert = tl.load(indices + pair).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    n_ok = n < F
    x += (pair // slots).to(tl.int64) * D
    gate_at = gate_up + expert * 2 * F * D + n[:, None].to(tl.int64) * D + k[None, :]
    up_at = gate_up + expert * 2 * F * D + (F + n)[:, None].to(tl.int64) * D + k[None, :]
    gate = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k0 in range(0, D, BLOCK_K):
        k_ok = k < D - k0
        x_k = tl.load(x + k0 + k, mask=k_ok, other=0.0).to(tl.float32)[None, :]
        ok = n_ok[:, None] & k_ok[None, :]
        gate += tl.load(gate_at + k0, mask=ok, other=0.0).to(tl.float32) * x_k
        up += tl.load(up_at + k0, mask=ok, other=0.0).to(tl.float32) * x_k
    gate_n, up_n = tl.sum(gate, 1), tl.sum(up, 1)
    if QUANTIZED:
        scale_at = scale + expert * 2 * F + n
        gate_n *= tl.load(scale_at, mask=n_ok, other=0.0)
        up_n *= tl.load(scale_at + F, mask=n_ok, other=0.0)
    tl.store(act + pair.to(tl.int64) * F + n, gate_n * tl.sigmoid(gate_n) * up_n, mask=n_ok)


@triton.jit
def down_vector_kernel(
    act,
    indices,
    pair_weights,
    down,
    scale,
    out,
    slots,
    D,
    F,
    QUANTIZED: tl.constexpr,
    ADDENDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out [M D], or with ADDENDS [M S D], from act [P F] float32; one token to a program."""
    token = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    n_ok = n < D
    total = tl.zeros((BLOCK_N,), tl.float32)
    for s in range(slots):
        pair = token * slots + s
        expert = tl.load(indices + pair).to(tl.int64)
        act_at = act + pair.to(tl.int64) * F + k
        down_at = down + expert * D * F + n[:, None].to(tl.int64) * F + k[None, :]
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for k0 in range(0, F, BLOCK_K):
            k_ok = k < F - k0
            act_k = tl.load(act_at + k0, mask=k_ok, other=0.0)[None, :]
            acc += tl.load(down_at + k0, mask=n_ok[:, None] & k_ok[None, :], other=0.0).to(tl.float32) * act_k
        value = tl.sum(acc, 1)
        if QUANTIZED:
            value *= tl.load(scale + expert * D + n, mask=n_ok, other=0.0)
        value *= tl.load(pair_weights + pair).to(tl.float32)
        if ADDENDS:
            tl.store(out + pair.to(tl.int64) * D + n, value.to(out.dtype.element_ty), mask=n_ok)
        total += value
    if not ADDENDS:
        tl.store(out + token.to(tl.int64) * D + n, total.to(out.dtype.element_ty), mask=n_ok)


@triton.jit
def dact_kernel(
    dy,
    order,
    offsets,
    down,
    scale,
    pair_weights,
    hidden,
    dhidden,
    act,
    dweights,
    pairs,
    dy_slots,
    D,
    F,
    experts,
    QUANTIZED: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_X: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The SwiGLU's adjoint: dhidden [P 2F] from dy, with ACT also act [P F] = weight * SiLU(gate) * up, sorted.

    dy [M D] with ``dy_slots`` the slots, or [P D] with 1. dweights [F blocks, P]: partial sums of the gradient of the
    routing weights, <dy, down a> = <down^T dy, a>.
    """
    expert, first, last = _tile(offsets, experts, BLOCK_R, BLOCK_X)
    if first < last:
        r = first + tl.arange(0, BLOCK_R)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        row_ok, n_ok = r < last, n < F
        pair = tl.load(order + r, mask=row_ok, other=0)
        dy_at = dy + (pair // dy_slots)[:, None] * D + k[None, :]
        down_at = down + expert * D * F + k[:, None].to(tl.int64) * F + n[None, :]
        da = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for k0 in range(0, D, BLOCK_K):
            k_ok = k < D - k0
            dy_k = tl.load(dy_at + k0, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
            if QUANTIZED:
                scale_k = tl.load(scale + expert * D + k0 + k, mask=k_ok, other=0.0)
                dy_k = dy_k * scale_k[None, :]
            down_k = tl.load(down_at, mask=k_ok[:, None] & n_ok[None, :], other=0.0).to(DOT)
            da = tl.dot(dy_k.to(DOT), down_k, da, input_precision=PRECISION)
            down_at += F * BLOCK_K
        ok = row_ok[:, None] & n_ok[None, :]
        kind = dhidden.dtype.element_ty
        hidden_at = r[:, None].to(tl.int64) * 2 * F + n[None, :]
        gate = tl.load(hidden + hidden_at, mask=ok, other=0.0).to(tl.float32)
        up = tl.load(hidden + hidden_at + F, mask=ok, other=0.0).to(tl.float32)
        s = tl.sigmoid(gate)
        silu = gate * s
        tl.store(dweights + tl.program_id(1).to(tl.int64) * pairs + pair, tl.sum(da * silu * up, 1), mask=row_ok)
        weight = tl.load(pair_weights + pair, mask=row_ok, other=0.0).to(tl.float32)[:, None]
        da *= weight
        tl.store(dhidden + hidden_at, (da * up * s * (1 + gate * (1 - s))).to(kind), mask=ok)
        tl.store(dhidden + hidden_at + F, (da * silu).to(kind), mask=ok)
        if ACT:
            tl.store(act + r[:, None].to(tl.int64) * F + n[None, :], (weight * silu * up).to(kind), mask=ok)


@triton.jit
def weight_gradient_kernel(
    left,
    right,
    order,
    offsets,
    out,
    left_slots,
    right_slots,
    left_columns,
    right_columns,
    GATHER_LEFT: tl.constexpr,
    GATHER_RIGHT: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out [X I J] = the sum over an expert's rows of left [. I] outer right [. J]; zeros where it has none.

    A gathered side holds one row to a token (or pair, with slots 1), the other sorted rows.
    """
    expert = tl.program_id(1)
    blocks = tl.cdiv(right_columns, BLOCK_J)
    i = tl.program_id(0) // blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    j = tl.program_id(0) % blocks * BLOCK_J + tl.arange(0, BLOCK_J)
    i_ok, j_ok = i < left_columns, j < right_columns
    first, last = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    acc = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    for r0 in range(first, last, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        ok = r < last
        pair = tl.load(order + r, mask=ok, other=0)
        left_row = pair // left_slots if GATHER_LEFT else r.to(tl.int64)
        right_row = pair // right_slots if GATHER_RIGHT else r.to(tl.int64)
        left_at = left + left_row[None, :] * left_columns + i[:, None]
        right_at = right + right_row[:, None] * right_columns + j[None, :]
        left_r = tl.load(left_at, mask=i_ok[:, None] & ok[None, :], other=0.0)
        right_r = tl.load(right_at, mask=ok[:, None] & j_ok[None, :], other=0.0)
        acc = tl.dot(left_r.to(DOT), right_r.to(DOT), acc, input_precision=PRECISION)
    at = out + expert.to(tl.int64) * left_columns * right_columns + i[:, None].to(tl.int64) * right_columns + j[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=i_ok[:, None] & j_ok[None, :])
