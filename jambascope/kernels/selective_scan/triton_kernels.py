"""The Triton loops of the scan forwards: states, read-outs, captures and checkpoints; the carry between segments.

One program owns one batch row, one segment of positions and BLOCK_E neighbouring channels, a channel to a thread, and
walks through time with its states in registers as [N BLOCK_E]. A thread holds all N states of its channel, so nothing
is exchanged between threads and the sum over N of the read-out stays within a thread. States in memory are [.. N E]:
neighbouring threads read neighbouring addresses. ``A`` arrives as [N E], multiplied by log2(e).

``tl.max_contiguous(offsets, 1)`` says nothing false, and keeps Triton from giving a thread four neighbouring channels
and a quarter of the states each, which would cost shuffles or barriers at every position.

STEPS positions are loaded at once, before the first of them is computed. Offsets of a batch row, a segment or a slot
are 64-bit, and positions are walked by pointer, so that no index overflows at any size.

Shapes: x, dt, gate, y [B T E] with the strides given (channels adjacent); BC [B T' 2 N] float32, B and C of a
position side by side, T' = T rounded up to CHUNK; D, dt_bias [E]; marks [B T] uint8; edit_slot, capture_slot [T] int32
(-1: none); edits [B P 2 N E], scale and shift; channel_slot [E] int32 (-1: not captured); captured [B P N channel].
An argument that is None is compiled
away. N is a power of two: the caller pads.
"""

from __future__ import annotations

import triton
import triton.language as tl

RESET = tl.constexpr(1)
PADDING = tl.constexpr(2)


@triton.jit
def softplus(v):
    """log(1 + exp(v)); v itself above 20, where float32 cannot tell them apart. Exact to rounding for very negative v:
    log(w) / (w - 1) cancels the rounding of w = 1 + exp(v)."""
    u = tl.exp(tl.minimum(v, 20.0, propagate_nan=tl.PropagateNan.ALL))
    w = 1.0 + u
    rounded = tl.where(w == 1.0, 1.0, w - 1.0)
    return tl.where(v > 20.0, v, tl.where(w == 1.0, u, tl.log(w) * (u / rounded)))


@triton.jit
def load_row(pointer, at, live):
    return tl.load(pointer + at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def tile(row, n, e, N: tl.constexpr, E):
    """Offsets of states [N BLOCK_E] in the 64-bit ``row`` of a tensor [row N E]; ``max_contiguous``: see above.

    Computed from the row each time, since sixteen 64-bit offsets kept through the loop would cost 32 registers. With
    64 lanes (AMD) what the lanes share goes into one of about 100 scalar registers, so there they are kept."""
    if e.shape[0] > 32:
        return row * (N * E) + tl.max_contiguous(n[:, None] * E + e[None, :], (1, 1))
    return tl.max_contiguous((row * N + n[:, None]) * E + e[None, :], (1, 1))


@triton.jit
def live_lanes(e, E, left, u, STEPS: tl.constexpr):
    """Channels that exist, at position ``u`` of STEPS of which ``left`` are before the end (at least one)."""
    limit = E
    if STEPS > 1:
        limit = tl.where(left > u, E, 0)
    return e < limit


@triton.jit
def mark_at(marks, t, left, u, STEPS: tl.constexpr):
    if STEPS > 1:
        return tl.load(marks + t + u, mask=left > u, other=0)
    return tl.load(marks + t)


@triton.jit
def step_size(raw, bias, live, DT_SOFTPLUS: tl.constexpr):
    """The step size from what was loaded; 0 where nothing was, so that the state stays as it is."""
    dt = raw
    if bias is not None:
        dt += bias
    if DT_SOFTPLUS:
        dt = softplus(dt)
    if bias is not None or DT_SOFTPLUS:
        dt = tl.where(live, dt, 0.0)
    return dt


@triton.jit
def edited(h, edits, row, n, e, inside, N: tl.constexpr, E):
    scale = tl.load(edits + tile(2 * row, n, e, N, E), mask=inside, other=0.0)
    return scale * h + tl.load(edits + tile(2 * row + 1, n, e, N, E), mask=inside, other=0.0)


@triton.jit
def forward_kernel(
    x,
    dt,
    A,
    BC,
    D,
    gate,
    dt_bias,
    marks,
    starts,
    edit_slot,
    edits,
    capture_slot,
    channel_slot,
    y,
    last,
    captured,
    checkpoints,
    ends,
    products,
    T,
    E,
    segment_length,
    n_edits,
    n_captured,
    n_channels,
    n_checkpoints,
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
    """States from ``starts`` [B segment N E] (zeros when None) to the segment's end: into ``y``, ``captured``, the
    state before every CHUNK-th position into ``checkpoints`` [B ceil(T/CHUNK) N E], the row's final state into
    ``last`` [B N E]. Or, with y None, only the segment's affine map: ``ends`` and ``products`` [B segment N E], so
    that the state after it is products * (state before it) + ends."""
    tl.static_assert(STEPS == 1 or (edit_slot is None and capture_slot is None))
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
    h = tl.zeros([N, BLOCK_E], tl.float32)
    if starts is not None:
        h = tl.load(starts + tile(b * segments + segment, n, e, N, E), mask=in_ne, other=0.0)
    if products is not None:
        product = tl.full([N, BLOCK_E], 1.0, tl.float32)
    if D is not None:
        skip = load_row(D, e, in_e)
    bias = None
    if dt_bias is not None:
        bias = load_row(dt_bias, e, in_e)
    if captured is not None:
        channel = e
        if channel_slot is not None:
            channel = tl.load(channel_slot + e, mask=in_e, other=-1)
        in_channel = (in_e & (channel >= 0))[None, :]

    first = segment * segment_length
    stop = tl.minimum(first + segment_length, T)
    stride_xt, stride_dtt = tl.cast(stride_xt, tl.int64), tl.cast(stride_dtt, tl.int64)
    stride_gt = tl.cast(stride_gt, tl.int64)
    x += b * stride_xb + first * stride_xt
    dt += b * stride_dtb + first * stride_dtt
    BC += (b * (tl.cdiv(T, CHUNK) * CHUNK) + first) * (2 * N)
    if y is not None:
        y += (b * T + first) * E
    if gate is not None:
        gate += b * stride_gb + first * stride_gt
    if marks is not None:
        marks += b * T
    for t in range(first, stop, STEPS):
        if checkpoints is not None:
            if t % CHUNK == 0:
                tl.store(checkpoints + tile(b * n_checkpoints + t // CHUNK, n, e, N, E), h, mask=in_ne)
        xs, dts, gates = (), (), ()
        for u in tl.static_range(STEPS):
            live = live_lanes(e, E, stop - t, u, STEPS)
            xs = xs + (load_row(x + u * stride_xt, e, live),)
            dts = dts + (load_row(dt + u * stride_dtt, e, live),)
            if gate is not None:
                gates = gates + (load_row(gate + u * stride_gt, e, live),)
        for u in tl.static_range(STEPS):
            live = live_lanes(e, E, stop - t, u, STEPS)
            x_t = xs[u]
            dt_t = step_size(dts[u], bias, live, DT_SOFTPLUS)
            B_t = tl.load(BC + u * 2 * N + n)
            if marks is not None:
                mark = mark_at(marks, t, stop - t, u, STEPS)
                padded = (mark & PADDING) != 0
                x_t, dt_t = tl.where(padded, 0.0, x_t), tl.where(padded, 0.0, dt_t)
                if (mark & RESET) != 0:
                    h = tl.zeros_like(h)
            decay = tl.exp2(dt_t[None, :] * a)
            h = decay * h + (dt_t * x_t)[None, :] * B_t[:, None]
            if products is not None:
                product *= decay
                if marks is not None:
                    if (mark & RESET) != 0:
                        product = tl.zeros_like(product)
            if edit_slot is not None:
                slot = tl.load(edit_slot + t)
                if slot >= 0:
                    row = b * n_edits + slot
                    h = edited(h, edits, row, n, e, in_ne, N, E)
                    if products is not None:
                        product *= tl.load(edits + tile(2 * row, n, e, N, E), mask=in_ne, other=0.0)
            if captured is not None:
                slot = tl.load(capture_slot + t)
                if slot >= 0:
                    at = tile(b * n_captured + slot, n, channel, N, n_channels)
                    tl.store(captured + at, h, mask=in_channel)
            if y is not None:
                C_t = tl.load(BC + (u * 2 + 1) * N + n)
                y_t = tl.sum(h * C_t[:, None], axis=0)
                if D is not None:
                    y_t += skip * x_t
                if gate is not None:
                    y_t *= gates[u] * tl.sigmoid(gates[u])
                if marks is not None:
                    y_t = tl.where(padded, 0.0, y_t)
                tl.store(y + u * E + e, y_t.to(y.dtype.element_ty), mask=live)
        x += STEPS * stride_xt
        dt += STEPS * stride_dtt
        BC += STEPS * 2 * N
        if y is not None:
            y += STEPS * E
        if gate is not None:
            gate += STEPS * stride_gt
    if last is not None:
        if stop == T:
            tl.store(last + tile(b, n, e, N, E), h, mask=in_ne)
    if products is not None:
        at_segment = tile(b * segments + segment, n, e, N, E)
        tl.store(ends + at_segment, h, mask=in_ne)
        tl.store(products + at_segment, product, mask=in_ne)


@triton.jit
def carry_kernel(ends, products, given, starts, segments, NE, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """The value that enters every segment: ``given`` [B NE] (zeros when None) enters the first (the last with
    REVERSE); products * value + ends leaves it and enters the next. ends, products, starts: [B segment NE]."""
    blocks = tl.cdiv(NE, BLOCK)
    program = tl.program_id(0)
    b = (program // blocks).to(tl.int64)
    at = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = at < NE
    value = tl.zeros([BLOCK], tl.float32)
    if given is not None:
        value = tl.load(given + b * NE + at, mask=inside, other=0.0)
    for i in range(0, segments):
        segment = i
        if REVERSE:
            segment = segments - 1 - i
        at_segment = (b * segments + segment) * NE + at
        tl.store(starts + at_segment, value, mask=inside)
        product = tl.load(products + at_segment, mask=inside, other=0.0)
        value = product * value + tl.load(ends + at_segment, mask=inside, other=0.0)


@triton.jit
def state_update_kernel(
    state,
    x,
    dt,
    A,
    B,
    C,
    D,
    gate,
    dt_bias,
    y,
    new_state,
    E,
    stride_sb,
    stride_se,
    stride_sn,
    stride_Ae,
    stride_An,
    stride_xb,
    stride_dtb,
    stride_Bb,
    stride_Cb,
    stride_gb,
    DT_SOFTPLUS: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One position: x, dt, gate [B E], B, C [B N] with the batch strides given; state and new_state [B E N] alike in
    the strides given, A [E N] in its own; y [B E] contiguous. The state is read and written once."""
    blocks = tl.cdiv(E, BLOCK_E)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    e = (tl.program_id(0) % blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    in_e, in_n = e < E, n < N
    in_en = in_e[:, None] & in_n[None, :]
    at = b * stride_sb + e[:, None].to(tl.int64) * stride_se + n[None, :] * stride_sn
    h = tl.load(state + at, mask=in_en, other=0.0).to(tl.float32)
    a = tl.load(A + e[:, None].to(tl.int64) * stride_Ae + n[None, :] * stride_An, mask=in_en, other=0.0).to(tl.float32)
    x_t = load_row(x + b * stride_xb, e, in_e)
    bias = None
    if dt_bias is not None:
        bias = load_row(dt_bias, e, in_e)
    dt_t = step_size(load_row(dt + b * stride_dtb, e, in_e), bias, in_e, DT_SOFTPLUS)
    B_t = load_row(B + b * stride_Bb, n, in_n)
    C_t = load_row(C + b * stride_Cb, n, in_n)
    h = tl.exp(dt_t[:, None] * a) * h + (dt_t * x_t)[:, None] * B_t[None, :]
    tl.store(new_state + at, h.to(new_state.dtype.element_ty), mask=in_en)
    y_t = tl.sum(h * C_t[None, :], axis=1)
    if D is not None:
        y_t += load_row(D, e, in_e) * x_t
    if gate is not None:
        g = load_row(gate + b * stride_gb, e, in_e)
        y_t *= g * tl.sigmoid(g)
    tl.store(y + b * E + e, y_t.to(y.dtype.element_ty), mask=in_e)
