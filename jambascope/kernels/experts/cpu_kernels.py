"""The numba loops around the matrix products of the CPU experts: everything but the products, in one pass each.

Bound. The products take ``6 M S D F`` operations; the loops move ``M S (3 D + 5 F)`` numbers within L2 beside them,
and the SwiGLU costs one exp2 for each of ``M S F``.

A pair is one (token, slot): pair ``p`` belongs to token ``p // slots``. ``order`` lists pairs by expert, ``place``
is its inverse. numba has neither bfloat16 nor float16: arrays of them arrive as uint16 and int16, with their bits.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from jambascope.kernels.compiling import loop_task
from jambascope.kernels.native import address, next_items, numbers
from jambascope.kernels.vector_math import FAST, sigmoid

SUM = FAST | {"reassoc"}
"""For dot products: the compiler may keep one partial sum per vector lane (the same bits on every run)."""


@intrinsic
def widen(typingctx, v):
    """float32 of a stored number: float32, bfloat16 (as uint16), float16 (as int16) or int8."""

    def codegen(context, builder, signature, args):
        bits = args[0]
        if v == types.float32:
            return bits
        if v == types.uint16:
            shifted = builder.shl(builder.zext(bits, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(shifted, ir.FloatType())
        if v == types.int16:
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
        return builder.sitofp(bits, ir.FloatType())

    if v in (types.float32, types.uint16, types.int16, types.int8):
        return types.float32(v), codegen


@intrinsic
def narrow(typingctx, v, like):
    """A float32 rounded to nearest even, stored as ``like`` is; the inverse of :func:`widen`."""

    def codegen(context, builder, signature, args):
        value = args[0]
        if like == types.float32:
            return value
        if like == types.int16:
            return builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
        word = ir.IntType(32)
        bits = builder.bitcast(value, word)
        odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.add(builder.add(bits, ir.Constant(word, 0x7FFF)), odd)
        not_a_number = builder.fcmp_unordered("uno", value, value)
        rounded = builder.select(not_a_number, ir.Constant(word, 0x7FC00000), rounded)
        return builder.trunc(builder.lshr(rounded, ir.Constant(word, 16)), ir.IntType(16))

    if v == types.float32 and like in (types.float32, types.uint16, types.int16):
        return like(v, like), codegen


@njit(nogil=True, cache=True)
def sort_by_expert(indices, order, place, offsets):
    """A stable counting sort of pairs: indices, order, place [P]; offsets [X+1]. False if an index is out of range."""
    experts = len(offsets) - 1
    offsets[:] = 0
    for p in range(len(indices)):
        e = indices[p]
        if e < 0 or e >= experts:
            return False
        offsets[e + 1] += 1
    for e in range(experts):
        offsets[e + 1] += offsets[e]
    following = offsets[:-1].copy()
    for p in range(len(indices)):
        e = indices[p]
        order[following[e]] = p
        place[p] = following[e]
        following[e] += 1
    return True


@njit(nogil=True, cache=True, fastmath=FAST)
def gather(order, slots, x, rows):
    """rows [R D] = x [M D] at the tokens of the pairs ``order`` [R]."""
    for r in range(len(order)):
        m = order[r] // slots
        for d in range(x.shape[1]):
            rows[r, d] = narrow(widen(x[m, d]), rows[r, d])


@loop_task(6)
def combine(call):
    """out [M D] = the sum over slots of rows [P D]; with one slot, rows put in order. ``kind`` is that of out."""
    kind, slots, D, place, rows, out = numbers(call, 6)
    # Arrays of no length in particular: nothing checks an index.
    place_of, rows_of = carray(address(place), (1,), np.int64), carray(address(rows), (1, D), np.float32)
    start, stop = next_items(call)
    while start < stop:
        if kind == 0:
            _combine(start, stop, place_of, slots, rows_of, carray(address(out), (1, D), np.float32))
        elif kind == 1:
            _combine(start, stop, place_of, slots, rows_of, carray(address(out), (1, D), np.uint16))
        else:
            _combine(start, stop, place_of, slots, rows_of, carray(address(out), (1, D), np.int16))
        start, stop = next_items(call)


@njit(fastmath=FAST)
def _combine(start, stop, place, slots, rows, out):
    """Tokens ``start..stop``."""
    D = out.shape[1]
    total = np.empty(D, np.float32)
    for m in range(start, stop):
        first = place[m * slots]
        for d in range(D):
            total[d] = widen(rows[first, d])
        for s in range(1, slots):
            r = place[m * slots + s]
            for d in range(D):
                total[d] += widen(rows[r, d])
        for d in range(D):
            out[m, d] = narrow(total[d], out[m, d])


@njit(nogil=True, cache=True, fastmath=SUM)
def swiglu_backward(order, weights, hidden, dact, dhidden, act, dweights):
    """dhidden [R 2F], act [R F] = weight * SiLU(gate) * up and dweights [P], from dact [R F] = dy down.

    <dy, down a> = <down^T dy, a>: the gradient of a routing weight needs no expert output.
    """
    F = act.shape[1]
    one = np.float32(1.0)
    for r in range(len(order)):
        weight = weights[order[r]]
        total = np.float32(0.0)
        gate, up, dgate, dup = hidden[r, :F], hidden[r, F:], dhidden[r, :F], dhidden[r, F:]
        act_r, dact_r = act[r], dact[r]
        for f in range(F):
            g, u, d = widen(gate[f]), widen(up[f]), dact_r[f]
            s = sigmoid(g)
            silu = g * s
            total += d * silu * u
            act_r[f] = weight * silu * u
            dgate[f] = weight * d * u * s * (one + g * (one - s))
            dup[f] = weight * d * silu
        dweights[order[r]] = total
