"""The experts of one token (or a few), in numba: two matrix-vector products that read each chosen expert once.

Bound: the bytes of the chosen experts. What else there is must not be felt beside some ten microseconds, so nothing
here is called with arrays: a call takes one block of int64, addresses among them, and any number of threads may be in
it at once, each taking parts until there are none.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from jambascope.kernels.compiling import NativeTask
from jambascope.kernels.experts.cpu_kernels import SUM, widen
from jambascope.kernels.native import address, take
from jambascope.kernels.vector_math import sigmoid

FIELDS = (
    "next_part", "out_of_range", "parts", "tokens", "slots", "experts", "d_model", "d_mlp", "addends", "kind",
    "x", "indices", "weights", "gate_up", "gate_up_scale", "down", "down_scale", "act", "out",
)  # fmt: skip
"""The block's int64: counts, then addresses. Activations, weights and scales are float32, indices int64.

``kind``: the type of the expert weights, 0 float32, 1 bfloat16, 2 float16, 3 int8 with scales.
"""
(
    NEXT_PART, OUT_OF_RANGE, PARTS, TOKENS, SLOTS, EXPERTS, D_MODEL, D_MLP, ADDENDS, KIND,
    X, INDICES, WEIGHTS, GATE_UP, GATE_UP_SCALE, DOWN, DOWN_SCALE, ACT, OUT,
) = range(len(FIELDS))  # fmt: skip


@njit(fastmath=SUM)
def _dot(row, x):
    total = np.float32(0.0)
    for k in range(len(x)):
        total += widen(row[k]) * x[k]
    return total


@njit(fastmath=SUM)
def _gate_up(block, a, gate_up):
    """act [P F] = SiLU(gate) * up; a part is a range of the P F rows of gate and up."""
    slots, D, F = a[SLOTS], a[D_MODEL], a[D_MLP]
    pairs = a[TOKENS] * slots
    x = carray(address(a[X]), (a[TOKENS], D), np.float32)
    indices = carray(address(a[INDICES]), (pairs,), np.int64)
    act = carray(address(a[ACT]), (pairs, F), np.float32)
    scale = carray(address(a[GATE_UP_SCALE]), (a[EXPERTS], 2 * F), np.float32)
    while True:
        part = take(block)
        if part >= a[PARTS]:
            return
        for unit in range(pairs * F * part // a[PARTS], pairs * F * (part + 1) // a[PARTS]):
            p, f = unit // F, unit % F
            e = indices[p]
            if e < 0 or e >= a[EXPERTS]:
                a[OUT_OF_RANGE] = 1
                return
            x_p = x[p // slots]
            gate, up = _dot(gate_up[e, f], x_p), _dot(gate_up[e, F + f], x_p)
            if a[GATE_UP_SCALE] != 0:
                gate *= scale[e, f]
                up *= scale[e, F + f]
            act[p, f] = gate * sigmoid(gate) * up


@njit(fastmath=SUM)
def _down(block, a, down):
    """out [M D], or addends [P D]; a part is a range of the M D (token, row)."""
    slots, D, F = a[SLOTS], a[D_MODEL], a[D_MLP]
    pairs = a[TOKENS] * slots
    indices = carray(address(a[INDICES]), (pairs,), np.int64)
    weights = carray(address(a[WEIGHTS]), (pairs,), np.float32)
    act = carray(address(a[ACT]), (pairs, F), np.float32)
    scale = carray(address(a[DOWN_SCALE]), (a[EXPERTS], D), np.float32)
    out = carray(address(a[OUT]), (pairs if a[ADDENDS] else a[TOKENS], D), np.float32)
    while True:
        part = take(block)
        if part >= a[PARTS]:
            return
        for unit in range(a[TOKENS] * D * part // a[PARTS], a[TOKENS] * D * (part + 1) // a[PARTS]):
            m, d = unit // D, unit % D
            total = np.float32(0.0)
            for p in range(m * slots, (m + 1) * slots):
                e = indices[p]
                value = _dot(down[e, d], act[p]) * weights[p]
                if a[DOWN_SCALE] != 0:
                    value *= scale[e, d]
                if a[ADDENDS]:
                    out[p, d] = value
                total += value
            if not a[ADDENDS]:
                out[m, d] = total


@NativeTask
def gate_up_vectors(block):
    a = carray(block, (len(FIELDS),), np.int64)
    shape = (a[EXPERTS], 2 * a[D_MLP], a[D_MODEL])
    if a[KIND] == 0:
        _gate_up(block, a, carray(address(a[GATE_UP]), shape, np.float32))
    elif a[KIND] == 1:
        _gate_up(block, a, carray(address(a[GATE_UP]), shape, np.uint16))
    elif a[KIND] == 2:
        _gate_up(block, a, carray(address(a[GATE_UP]), shape, np.int16))
    else:
        _gate_up(block, a, carray(address(a[GATE_UP]), shape, np.int8))


@NativeTask
def down_vectors(block):
    a = carray(block, (len(FIELDS),), np.int64)
    shape = (a[EXPERTS], a[D_MODEL], a[D_MLP])
    if a[KIND] == 0:
        _down(block, a, carray(address(a[DOWN]), shape, np.float32))
    elif a[KIND] == 1:
        _down(block, a, carray(address(a[DOWN]), shape, np.uint16))
    elif a[KIND] == 2:
        _down(block, a, carray(address(a[DOWN]), shape, np.int16))
    else:
        _down(block, a, carray(address(a[DOWN]), shape, np.int8))
