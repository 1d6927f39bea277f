"""The Triton loops of the scan backwards.

With lambda_t the gradient of the loss with respect to the state h_t (after its edit),

    lambda_t = decay_{t+1} lambda_{t+1} + C_t dy_t + (gradient of the captured state t)

and the gradients of x, dt, A, B follow from lambda_t, h_{t-1} and the decay. States are computed again: from the
checkpoint before every CHUNK positions, those before every STEPS into ``scratch`` (small enough for the L2 cache),
and from there the STEPS states and decays of a block into registers, where the block is then walked backwards.
So a state is computed twice with two exponentials, and costs 8 / STEPS bytes of cache traffic.

Sums over channels (B, C) and over positions (A, D, dt_bias) leave as one partial per program, added in order by the
caller: no atomics. Shapes as in ``triton_kernels``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from jambascope.kernels.selective_scan.triton_kernels import (
    PADDING,
    RESET,
    edited,
    live_lanes,
    load_row,
    mark_at,
    step_size,
    tile,
)

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def halved(values, lane, bit, VALUES: tl.constexpr, LANES: tl.constexpr):
    """[VALUES LANES] -> [VALUES/2 LANES]: of its values a lane keeps the half that ``bit`` of its number chooses, and
    adds what its partner, the lane with the other bit, holds for that half. One shuffle for each value kept."""
    low, high = tl.split(tl.permute(tl.reshape(values, [2, VALUES // 2, LANES]), [1, 2, 0]))
    upper = ((lane & bit) != 0)[None, :]
    partner = tl.broadcast_to((lane ^ bit)[None, :], [VALUES // 2, LANES])
    return tl.where(upper, high, low) + tl.gather(tl.where(upper, low, high), partner, axis=1)


@triton.jit
def sums_over_lanes(B_values, C_values, lane, N: tl.constexpr, LANES: tl.constexpr):
    """The sums of both [N LANES] over the lanes, side by side: [2 N].

    Halving what a lane holds at every exchange takes 31 shuffles for 2 x 16 values over 32 lanes, and leaves sum i in
    lane i, to be stored as one line; a butterfly for each value (``tl.sum``) would take 160."""
    v = tl.reshape(tl.permute(tl.join(B_values, C_values), [2, 0, 1]), [2 * N, LANES])
    each: tl.constexpr = LANES // (2 * N)
    if N >= 16:
        v = halved(v, lane, each * 16, 32, LANES)
    if N >= 8:
        v = halved(v, lane, each * 8, 16, LANES)
    if N >= 4:
        v = halved(v, lane, each * 4, 8, LANES)
    if N >= 2:
        v = halved(v, lane, each * 2, 4, LANES)
    v = halved(v, lane, each, 2, LANES)
    return tl.sum(tl.reshape(v, [2 * N, each]), axis=1)


@triton.jit
def backward_kernel(
    x,
    dt,
    A,
    BC,
    D,
    gate,
    dt_bias,
    marks,
    edit_slot,
    edits,
    capture_slot,
    channel_slot,
    checkpoints,
    dy,
    lambdas,
    dcaptured,
    scratch,
    grad_x,
    grad_dt,
    grad_gate,
    grad_BC,
    sums,
    grad_edits,
    T,
    E,
    segment_length,
    n_edits,
    n_captured,
    n_channels,
    stride_xb,
    stride_xt,
    stride_dtb,
    stride_dtt,
    stride_gb,
    stride_gt,
    DT_SOFTPLUS: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """``lambdas`` [B segment N E]: the gradient that enters each segment from behind. dy [B T E] contiguous;
    dcaptured [B P N channel]; scratch [program CHUNK/STEPS N BLOCK_E]. Partials: grad_BC [block B T' 2 N] and sums
    [B segment 2 N + 2 E]: of A, the gradient that leaves the segment in front, of D, of dt_bias."""
    tl.static_assert(STEPS == 1 or (edit_slot is None and capture_slot is None))
    blocks = tl.cdiv(E, BLOCK_E)
    segments = tl.cdiv(T, segment_length)
    program = tl.program_id(0)
    segment = (program // blocks) % segments
    block = program % blocks
    b = (program // (blocks * segments)).to(tl.int64)
    lane = tl.arange(0, BLOCK_E)
    e = block * BLOCK_E + lane
    n = tl.arange(0, N)
    in_e = e < E
    in_ne = in_e[None, :]
    bs = b * segments + segment

    a = tl.load(A + tile(0, n, e, N, E), mask=in_ne, other=0.0)
    lam = tl.load(lambdas + tile(bs, n, e, N, E), mask=in_ne, other=0.0)
    sum_A = tl.zeros([N, BLOCK_E], tl.float32)
    if D is not None:
        skip = load_row(D, e, in_e)
        sum_D = tl.zeros([BLOCK_E], tl.float32)
    bias = None
    if dt_bias is not None:
        bias = load_row(dt_bias, e, in_e)
        sum_bias = tl.zeros([BLOCK_E], tl.float32)
    if dcaptured is not None:
        channel = e
        if channel_slot is not None:
            channel = tl.load(channel_slot + e, mask=in_e, other=-1)
        in_channel = (in_e & (channel >= 0))[None, :]

    # What every position adds to is moved to this program's part here: scalars kept through the loop are few on AMD.
    checkpoints += b * tl.cdiv(T, CHUNK) * (N * E)
    scratch += program.to(tl.int64) * (CHUNK // STEPS) * (N * BLOCK_E)
    if edit_slot is not None:
        edits += b * n_edits * (2 * N * E)
        grad_edits += b * n_edits * (2 * N * E)
    if dcaptured is not None:
        dcaptured += b * n_captured * (N * n_channels)
    rows = tl.cdiv(T, CHUNK) * CHUNK
    first = segment * segment_length
    stop = tl.minimum(first + segment_length, T)
    x += b * stride_xb
    dt += b * stride_dtb
    BC += b * rows * (2 * N)
    dy += b * T * E
    grad_x += b * T * E
    grad_dt += b * T * E
    grad_BC += (block * (tl.num_programs(0) // (blocks * segments)) + b) * rows * (2 * N)
    if gate is not None:
        gate += b * stride_gb
        grad_gate += b * T * E
    if marks is not None:
        marks += b * T
    for chunk_back in range(0, tl.cdiv(stop - first, CHUNK)):
        chunk = tl.cdiv(stop, CHUNK) - 1 - chunk_back
        parts = tl.cdiv(tl.minimum(CHUNK, stop - chunk * CHUNK), STEPS)
        h = tl.load(checkpoints + tile(tl.cast(chunk, tl.int64), n, e, N, E), mask=in_ne, other=0.0)
        for part in range(0, parts):
            at_part = tile(part, n, lane, N, BLOCK_E)
            tl.store(scratch + at_part, h)
            if part < parts - 1:
                for u in tl.static_range(STEPS):
                    t = (chunk * CHUNK + part * STEPS + u).to(tl.int64)
                    x_t = load_row(x + t * stride_xt, e, in_e)
                    dt_t = step_size(load_row(dt + t * stride_dtt, e, in_e), bias, in_e, DT_SOFTPLUS)
                    B_t = tl.load(BC + t * 2 * N + n)
                    if marks is not None:
                        mark = tl.load(marks + t)
                        padded = (mark & PADDING) != 0
                        x_t, dt_t = tl.where(padded, 0.0, x_t), tl.where(padded, 0.0, dt_t)
                        if (mark & RESET) != 0:
                            h = tl.zeros_like(h)
                    h = tl.exp2(dt_t[None, :] * a) * h + (dt_t * x_t)[None, :] * B_t[:, None]
                    if edit_slot is not None:
                        slot = tl.load(edit_slot + t)
                        if slot >= 0:
                            h = edited(h, edits, slot.to(tl.int64), n, e, in_ne, N, E)
        # What other threads of this program wrote is read next.
        tl.debug_barrier()
        for part_back in range(0, parts):
            part = parts - 1 - part_back
            t0 = (chunk * CHUNK + part * STEPS).to(tl.int64)
            at_part = tile(part, n, lane, N, BLOCK_E)
            h = tl.load(scratch + at_part)
            xs, raws, dts, dys, gates = (), (), (), (), ()
            for u in tl.static_range(STEPS):
                live = live_lanes(e, E, stop - t0, u, STEPS)
                xs = xs + (load_row(x + (t0 + u) * stride_xt, e, live),)
                raws = raws + (load_row(dt + (t0 + u) * stride_dtt, e, live),)
                dys = dys + (load_row(dy + (t0 + u) * E, e, live),)
                if gate is not None:
                    gates = gates + (load_row(gate + (t0 + u) * stride_gt, e, live),)
            befores, decays, states = (), (), ()
            for u in tl.static_range(STEPS):
                live = live_lanes(e, E, stop - t0, u, STEPS)
                x_t = xs[u]
                dt_t = step_size(raws[u], bias, live, DT_SOFTPLUS)
                B_t = tl.load(BC + (t0 + u) * 2 * N + n)
                if marks is not None:
                    mark = mark_at(marks, t0, stop - t0, u, STEPS)
                    padded = (mark & PADDING) != 0
                    x_t, dt_t = tl.where(padded, 0.0, x_t), tl.where(padded, 0.0, dt_t)
                    if (mark & RESET) != 0:
                        h = tl.zeros_like(h)
                befores = befores + (h,)
                dts = dts + (dt_t,)
                decay = tl.exp2(dt_t[None, :] * a)
                decays = decays + (decay,)
                h = decay * h + (dt_t * x_t)[None, :] * B_t[:, None]
                if edit_slot is not None:
                    slot = tl.load(edit_slot + t0)
                    if slot >= 0:
                        h = edited(h, edits, slot.to(tl.int64), n, e, in_ne, N, E)
                states = states + (h,)
            for u in tl.static_range(STEPS - 1, -1, -1):
                live = live_lanes(e, E, stop - t0, u, STEPS)
                at_t = (t0 + u) * E + e
                x_t, dt_t, dy_t = xs[u], dts[u], dys[u]
                before, decay = befores[u], decays[u]
                B_t = tl.load(BC + (t0 + u) * 2 * N + n)
                C_t = tl.load(BC + ((t0 + u) * 2 + 1) * N + n)
                if marks is not None:
                    mark = mark_at(marks, t0, stop - t0, u, STEPS)
                    padded = (mark & PADDING) != 0
                    x_t, dy_t = tl.where(padded, 0.0, x_t), tl.where(padded, 0.0, dy_t)
                if gate is not None:
                    g = gates[u]
                    sig = tl.sigmoid(g)
                    y_t = tl.sum(states[u] * C_t[:, None], axis=0)
                    if D is not None:
                        y_t += skip * x_t
                    dg = dy_t * y_t * sig * (1.0 + g * (1.0 - sig))
                    if marks is not None:
                        dg = tl.where(padded, 0.0, dg)
                    tl.store(grad_gate + at_t, dg.to(grad_gate.dtype.element_ty), mask=live)
                    dy_t *= g * sig
                    if marks is not None:
                        dy_t = tl.where(padded, 0.0, dy_t)
                lam += dy_t[None, :] * C_t[:, None]
                if dcaptured is not None:
                    slot = tl.load(capture_slot + t0)
                    if slot >= 0:
                        at = tile(slot.to(tl.int64), n, channel, N, n_channels)
                        lam += tl.load(dcaptured + at, mask=in_channel, other=0.0)
                if edit_slot is not None:
                    slot = tl.load(edit_slot + t0)
                    if slot >= 0:
                        row = 2 * slot.to(tl.int64)
                        unedited = decay * before + (dt_t * x_t)[None, :] * B_t[:, None]
                        tl.store(grad_edits + tile(row, n, e, N, E), lam * unedited, mask=in_ne)
                        tl.store(grad_edits + tile(row + 1, n, e, N, E), lam, mask=in_ne)
                        lam *= tl.load(edits + tile(row, n, e, N, E), mask=in_ne, other=0.0)
                du = tl.sum(lam * B_t[:, None], axis=0)
                to_B, to_C = lam * (dt_t * x_t)[None, :], dy_t[None, :] * states[u]
                sums_BC = sums_over_lanes(to_B, to_C, lane, N, BLOCK_E)
                tl.store(grad_BC + (t0 + u) * 2 * N + tl.arange(0, 2 * N), sums_BC)
                lam *= decay
                into_exponent = lam * before
                sum_A += into_exponent * dt_t[None, :]
                ddt = du * x_t + tl.sum(into_exponent * a, axis=0) * LN2
                dx = du * dt_t
                if D is not None:
                    dx += dy_t * skip
                    sum_D += dy_t * x_t
                if DT_SOFTPLUS:
                    raw = raws[u]
                    if dt_bias is not None:
                        raw += bias
                    ddt *= tl.sigmoid(raw)
                if marks is not None:
                    ddt = tl.where(padded, 0.0, ddt)
                    if (mark & RESET) != 0:
                        lam = tl.zeros_like(lam)
                if dt_bias is not None:
                    sum_bias += tl.where(live, ddt, 0.0)
                tl.store(grad_x + at_t, dx.to(grad_x.dtype.element_ty), mask=live)
                tl.store(grad_dt + at_t, ddt.to(grad_dt.dtype.element_ty), mask=live)
        # The next chunk overwrites the scratch.
        tl.debug_barrier()
    sums += bs * (2 * N + 2) * E
    tl.store(sums + tile(0, n, e, N, E), sum_A, mask=in_ne)
    tl.store(sums + N * E + tile(0, n, e, N, E), lam, mask=in_ne)
    if D is not None:
        tl.store(sums + 2 * N * E + e, sum_D, mask=in_e)
    if dt_bias is not None:
        tl.store(sums + (2 * N + 1) * E + e, sum_bias, mask=in_e)


@triton.jit
def adjoint_ends_kernel(
    dt,
    A,
    BC,
    gate,
    dt_bias,
    marks,
    edit_slot,
    edits,
    capture_slot,
    channel_slot,
    dy,
    dcaptured,
    ends,
    products,
    T,
    E,
    segment_length,
    n_edits,
    n_captured,
    n_channels,
    stride_dtb,
    stride_dtt,
    stride_gb,
    stride_gt,
    DT_SOFTPLUS: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A segment's affine map backwards: the gradient that leaves it is products * (what enters) + ends, both
    [B segment N E]. The states themselves are not needed."""
    blocks = tl.cdiv(E, BLOCK_E)
    segments = tl.cdiv(T, segment_length)
    program = tl.program_id(0)
    segment = (program // blocks) % segments
    b = (program // (blocks * segments)).to(tl.int64)
    e = (program % blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, N)
    in_e = e < E
    in_ne = in_e[None, :]
    a = tl.load(A + tile(0, n, e, N, E), mask=in_ne, other=0.0)
    lam = tl.zeros([N, BLOCK_E], tl.float32)
    product = tl.full([N, BLOCK_E], 1.0, tl.float32)
    bias = None
    if dt_bias is not None:
        bias = load_row(dt_bias, e, in_e)
    if dcaptured is not None:
        channel = e
        if channel_slot is not None:
            channel = tl.load(channel_slot + e, mask=in_e, other=-1)
        in_channel = (in_e & (channel >= 0))[None, :]

    first = segment * segment_length
    stop = tl.minimum(first + segment_length, T)
    for back in range(0, stop - first):
        t = (stop - 1 - back).to(tl.int64)
        dt_t = step_size(load_row(dt + b * stride_dtb + t * stride_dtt, e, in_e), bias, in_e, DT_SOFTPLUS)
        dy_t = load_row(dy + (b * T + t) * E, e, in_e)
        C_t = tl.load(BC + ((b * (tl.cdiv(T, CHUNK) * CHUNK) + t) * 2 + 1) * N + n)
        if gate is not None:
            g = load_row(gate + b * stride_gb + t * stride_gt, e, in_e)
            dy_t *= g * tl.sigmoid(g)
        if marks is not None:
            mark = tl.load(marks + b * T + t)
            padded = (mark & PADDING) != 0
            dt_t, dy_t = tl.where(padded, 0.0, dt_t), tl.where(padded, 0.0, dy_t)
        lam += dy_t[None, :] * C_t[:, None]
        if dcaptured is not None:
            slot = tl.load(capture_slot + t)
            if slot >= 0:
                at = tile(b * n_captured + slot, n, channel, N, n_channels)
                lam += tl.load(dcaptured + at, mask=in_channel, other=0.0)
        if edit_slot is not None:
            slot = tl.load(edit_slot + t)
            if slot >= 0:
                scale = tl.load(edits + tile(2 * (b * n_edits + slot), n, e, N, E), mask=in_ne, other=0.0)
                lam *= scale
                product *= scale
        decay = tl.exp2(dt_t[None, :] * a)
        lam *= decay
        product *= decay
        if marks is not None:
            if (mark & RESET) != 0:
                lam = tl.zeros_like(lam)
                product = tl.zeros_like(product)
    at_segment = tile(b * segments + segment, n, e, N, E)
    tl.store(ends + at_segment, lam, mask=in_ne)
    tl.store(products + at_segment, product, mask=in_ne)
