"""The products of the CPU experts as one native call: gather, product, SwiGLU and product, tile by tile.

A library's product of some tens of rows packs the weights before it multiplies, and with few rows to an expert that is
much of its time. Here they are read in place and once. A tile is WIDE vectors of tokens, side by side; ROWS rows of the
weights are held against it, one number of each broadcast to all tokens at a step, sums in registers, while the rows
that follow are fetched.

Bound: ``6 D F`` operations a pair, at the rate of the multiply-adds.
"""

from __future__ import annotations

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from jambascope.kernels.compiling import NativeTask
from jambascope.kernels.experts.cpu_kernels import widen
from jambascope.kernels.native import address, take
from jambascope.kernels.vector_math import FAST, sigmoid


def _vectors() -> tuple[int, int]:
    """Numbers to a vector, and rows of weights such that sums, inputs and a weight fit the registers."""
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 8  # 32 registers
    return (8, 4) if features.get("avx") else (4, 4)


LANES, ROWS = _vectors()
HALF = ROWS // 2
WIDE = 2
TILE = WIDE * LANES
"""Tokens to a tile."""
UNROLL = 8
GATHER = 64

FIELDS = (
    "next_task", "next_thread", "tasks", "tokens", "slots", "d_model", "d_mlp", "kind", "pitch", "up",
    "block", "task_rows", "order", "x", "weights", "gate_up", "gate_up_scale", "down", "down_scale", "out", "scratch",
)  # fmt: skip
"""The call's int64: counts, then addresses.

``task_rows`` [tasks 3]: expert, first sorted row, end. ``kind``: the type of the expert weights, see ``cpu_vectors``.
``up``: how many bytes after a gate row of float32 its up row stands. ``block``: of this block. ``scratch``: ``pitch``
floats to a thread. All but the expert weights is float32 or int64.
"""
(
    NEXT_TASK, NEXT_THREAD, TASKS, TOKENS, SLOTS, D_MODEL, D_MLP, KIND, PITCH, UP,
    BLOCK, TASK_ROWS, ORDER, X, WEIGHTS, GATE_UP, GATE_UP_SCALE, DOWN, DOWN_SCALE, OUT, SCRATCH,
) = range(len(FIELDS))  # fmt: skip


def scratch_floats(rows: int, d_model: int, d_mlp: int) -> int:
    """What one thread needs for tasks of at most ``rows`` pairs."""
    tiles = -(-rows // TILE)
    return tiles * TILE * (d_model + d_mlp + 1) + ROWS * (max(d_model, d_mlp) + TILE) + 64


# -- the product in registers --------------------------------------------------------------------------------


def _make_micro(lanes: int, wide: int):
    """``micro(a, b, pitch, inputs, K, sums)``: ROWS rows of weights times the first ``wide`` vectors of a tile.

    Half of the rows begin at a and half at b, ``pitch`` floats apart; inputs [K TILE]; sums [ROWS TILE].
    """
    f32, i32, i64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
    vector = ir.VectorType(f32, lanes)
    byte_pointer = ir.IntType(8).as_pointer()

    def function(builder, name, result, arguments):
        known = builder.module.globals.get(name)
        return known or ir.Function(builder.module, ir.FunctionType(result, arguments), name)

    def codegen(context, builder, signature, args):
        a, b, inputs, sums = (builder.bitcast(args[i], f32.as_pointer()) for i in (0, 1, 3, 5))
        pitch, K = args[2], args[4]
        fma = function(builder, f"llvm.fma.v{lanes}f32", vector, [vector] * 3)
        prefetch = function(builder, "llvm.prefetch.p0", ir.VoidType(), [byte_pointer, i32, i32, i32])
        rows = [builder.gep(base, [builder.mul(pitch, i64(r))]) for base in (a, b) for r in range(HALF)]
        ahead = builder.mul(pitch, i64(HALF))

        def at(pointer, index):
            return builder.bitcast(builder.gep(pointer, [index]), vector.as_pointer())

        def step(k, acc):
            start = builder.mul(k, i64(TILE))
            x = [builder.load(at(inputs, builder.add(start, i64(v * lanes))), align=4) for v in range(wide)]
            after = []
            for r in range(ROWS):
                number = builder.load(builder.gep(rows[r], [k]))
                first = builder.insert_element(ir.Constant(vector, ir.Undefined), number, i32(0))
                everywhere = ir.Constant(ir.VectorType(i32, lanes), [0] * lanes)
                weight = builder.shuffle_vector(first, first, everywhere)
                after += [builder.call(fma, [weight, x[v], acc[r * wide + v]]) for v in range(wide)]
            return after

        def loop(start, stop, acc, unroll):
            head, body, done = (builder.append_basic_block(n) for n in ("head", "body", "done"))
            before = builder.block
            builder.branch(head)
            builder.position_at_end(head)
            k, now = builder.phi(i64), [builder.phi(vector) for _ in acc]
            for phi, value in zip([k, *now], [start, *acc], strict=True):
                phi.add_incoming(value, before)
            builder.cbranch(builder.icmp_signed("<", k, stop), body, done)
            builder.position_at_end(body)
            if unroll > 1:
                for row in rows:
                    line = builder.bitcast(builder.gep(row, [builder.add(k, ahead)]), byte_pointer)
                    builder.call(prefetch, [line, i32(0), i32(2), i32(1)])
            after = now
            for j in range(unroll):
                after = step(builder.add(k, i64(j)), after)
            for phi, value in zip([k, *now], [builder.add(k, i64(unroll)), *after], strict=True):
                phi.add_incoming(value, body)
            builder.branch(head)
            builder.position_at_end(done)
            return k, now

        zeros = [ir.Constant(vector, [0.0] * lanes)] * (ROWS * wide)
        k, acc = loop(i64(0), builder.and_(K, i64(-UNROLL)), zeros, UNROLL)
        _, acc = loop(k, K, acc, 1)
        for r in range(ROWS):
            for v in range(wide):
                builder.store(acc[r * wide + v], at(sums, i64(r * TILE + v * lanes)), align=4)
        return context.get_dummy_value()

    def micro(typingctx, a, b, pitch, inputs, K, sums):
        return types.void(types.int64, types.int64, types.int64, types.int64, types.int64, types.int64), (
            lambda context, builder, signature, args: codegen(
                context,
                builder,
                signature,
                [builder.inttoptr(v, byte_pointer) if i in (0, 1, 3, 5) else v for i, v in enumerate(args)],
            )
        )

    return intrinsic(micro)


_micro_half, _micro_one, _micro_wide = _make_micro(LANES // 2, 1), _make_micro(LANES, 1), _make_micro(LANES, WIDE)
FLOAT = 4


# -- a task --------------------------------------------------------------------------------------------------


@njit(fastmath=FAST)
def _gather(x, order, slots, weights, tiles, tile_weights, first, last):
    """tiles [. D TILE] and tile_weights [. TILE] of sorted rows ``first..last``, tokens side by side, then zeros."""
    zero = np.float32(0.0)
    for i in range(tiles.shape[0]):
        tile, row_of = tiles[i], order[first + i * TILE : last]
        n = min(TILE, len(row_of))
        for t in range(TILE):
            tile_weights[i, t] = weights[row_of[t]] if t < n else zero
        for start in range(0, tile.shape[0], GATHER):  # so much of the tile stays in L1 while its tokens fill it
            part = tile[start : start + GATHER]
            for t in range(n):
                row = x[row_of[t] // slots, start : start + GATHER]
                for d in range(len(row)):
                    part[d, t] = row[d]
            for d in range(len(part)):
                part[d, n:] = zero


@njit(fastmath=FAST)
def _copy(weight, a, a_rows, b, b_rows, panel):
    """panel [ROWS K]: a_rows <= HALF rows of weight [n K] from a on, then b_rows from b on, as float32; else zeros."""
    for j in range(ROWS):
        row = a + j if j < HALF else b + j - HALF
        into = panel[j]
        if j < a_rows or HALF <= j < HALF + b_rows:
            source = weight[row]
            for k in range(len(into)):
                into[k] = widen(source[k])
        else:
            into[:] = np.float32(0.0)


@njit
def _fill(kind, at, rows, a, a_rows, b, b_rows, panel):
    """:func:`_copy` from an expert's weight [rows K] at an address, of any kind."""
    shape = (rows, panel.shape[1])
    if kind == 0:
        _copy(carray(address(at), shape, np.float32), a, a_rows, b, b_rows, panel)
    elif kind == 1:
        _copy(carray(address(at), shape, np.uint16), a, a_rows, b, b_rows, panel)
    elif kind == 2:
        _copy(carray(address(at), shape, np.int16), a, a_rows, b, b_rows, panel)
    else:
        _copy(carray(address(at), shape, np.int8), a, a_rows, b, b_rows, panel)


@njit
def _bytes(kind):
    return 4 if kind == 0 else 1 if kind == 3 else 2


@njit
def _multiply(a, b, pitch, tile, K, sums, tokens):
    """Sums of a tile's first tokens, in steps of half a vector."""
    if tokens > LANES + LANES // 2:
        _micro_wide(a, b, pitch, tile, K, sums)
        return
    if tokens > LANES // 2:
        _micro_one(a, b, pitch, tile, K, sums)
        tile, sums, tokens = tile + LANES * FLOAT, sums + LANES * FLOAT, tokens - LANES
    if tokens > 0:
        _micro_half(a, b, pitch, tile, K, sums)


@njit(fastmath=FAST)
def _gate_up(a, expert, rows, x_at, act, act_weights, sums_at, panel_at):
    """act [tiles F TILE] = weight * SiLU(gate) * up, from input tiles at ``x_at``."""
    D, F, kind = a[D_MODEL], a[D_MLP], a[KIND]
    at = a[GATE_UP] + expert * 2 * F * D * _bytes(kind)
    scale = carray(address(a[GATE_UP_SCALE]), (expert + 1, 2 * F), np.float32)
    sums = carray(address(sums_at), (ROWS, TILE), np.float32)
    panel = carray(address(panel_at), (ROWS, D), np.float32)
    in_place = kind == 0 and F >= HALF
    for start in range(0, F, HALF):
        f = min(start, F - HALF) if in_place else start  # the last rows again, rather than rows that are not there
        used = min(HALF, F - f)
        gate_at = at + f * D * FLOAT
        up_at = gate_at + a[UP]
        if not in_place:
            _fill(kind, at, 2 * F, f, used, F + f, used, panel)
            gate_at, up_at = panel_at, panel_at + HALF * D * FLOAT
        for i in range(act.shape[0]):
            _multiply(gate_at, up_at, D, x_at + i * D * TILE * FLOAT, D, sums_at, rows - i * TILE)
            by = act_weights[i]
            for j in range(used):
                gate, up, into = sums[j], sums[HALF + j], act[i, f + j]
                gate_scale, up_scale = np.float32(1.0), np.float32(1.0)
                if kind == 3:
                    gate_scale, up_scale = scale[expert, f + j], scale[expert, F + f + j]
                for t in range(TILE):
                    g = gate_scale * gate[t]
                    into[t] = by[t] * g * sigmoid(g) * (up_scale * up[t])


@njit(fastmath=FAST)
def _down(a, expert, rows, act_at, out, sums_at, panel_at):
    """out [rows D] from act tiles at ``act_at``."""
    D, F, kind = a[D_MODEL], a[D_MLP], a[KIND]
    at = a[DOWN] + expert * D * F * _bytes(kind)
    scale = carray(address(a[DOWN_SCALE]), (expert + 1, D), np.float32)
    sums = carray(address(sums_at), (ROWS, TILE), np.float32)
    panel = carray(address(panel_at), (ROWS, F), np.float32)
    in_place = kind == 0 and D >= ROWS
    for start in range(0, D, ROWS):
        d = min(start, D - ROWS) if in_place else start
        used = min(ROWS, D - d)
        first_at = at + d * F * FLOAT
        if not in_place:
            _fill(kind, at, D, d, min(HALF, used), d + HALF, used - HALF, panel)
            first_at = panel_at
        for i in range((rows + TILE - 1) // TILE):
            left = rows - i * TILE
            tile_at, half_at = act_at + i * F * TILE * FLOAT, first_at + HALF * F * FLOAT
            _multiply(first_at, half_at, F, tile_at, F, sums_at, left)
            if kind == 3:
                for j in range(used):
                    sums[j] *= scale[expert, d + j]
            for t in range(min(left, TILE)):
                into = out[i * TILE + t, d : d + used]
                for j in range(used):
                    into[j] = sums[j, t]


@NativeTask
def run_tasks(block):
    """Take tasks until there are none, each within this thread's part of the scratch memory."""
    a = carray(block, (len(FIELDS),), np.int64)
    D, F, slots = a[D_MODEL], a[D_MLP], a[SLOTS]
    pairs = a[TOKENS] * slots
    mine = a[SCRATCH] + take(address(a[BLOCK] + 8 * NEXT_THREAD)) * a[PITCH] * FLOAT
    task_rows = carray(address(a[TASK_ROWS]), (a[TASKS], 3), np.int64)
    order = carray(address(a[ORDER]), (pairs,), np.int64)
    weights = carray(address(a[WEIGHTS]), (pairs,), np.float32)
    x = carray(address(a[X]), (a[TOKENS], D), np.float32)
    out = carray(address(a[OUT]), (pairs, D), np.float32)
    while True:
        task = take(block)
        if task >= a[TASKS]:
            return
        expert, first, last = task_rows[task, 0], task_rows[task, 1], task_rows[task, 2]
        rows = last - first
        tiles = (rows + TILE - 1) // TILE
        act_at = mine + tiles * D * TILE * FLOAT
        weights_at = act_at + tiles * F * TILE * FLOAT
        sums_at = weights_at + tiles * TILE * FLOAT
        panel_at = sums_at + ROWS * TILE * FLOAT
        inputs = carray(address(mine), (tiles, D, TILE), np.float32)
        act = carray(address(act_at), (tiles, F, TILE), np.float32)
        act_weights = carray(address(weights_at), (tiles, TILE), np.float32)
        _gather(x, order, slots, weights, inputs, act_weights, first, last)
        _gate_up(a, expert, rows, mine, act, act_weights, sums_at, panel_at)
        _down(a, expert, rows, act_at, out[first:last], sums_at, panel_at)
