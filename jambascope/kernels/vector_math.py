"""Elementary functions for numba loops that LLVM can turn into vector code (its libm calls it cannot)."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

FAST = {"contract"}
"""Fused multiply-adds are allowed; nothing else that would change a result."""


@intrinsic
def _float_from_bits(typingctx, bits):
    """Reinterpret an int32 as the float32 with the same bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def _divide(typingctx, a, b):
    """a / b. numba's own division may raise ZeroDivisionError, a branch that keeps the loop around it scalar."""

    def codegen(context, builder, signature, args):
        return builder.fdiv(*args)

    return types.float32(types.float32, types.float32), codegen


@njit(inline="always", fastmath=FAST)
def exp2(v):
    """2**v to 1e-7 relative, clamped to the normal range of float32 [2**-126, 2**126]."""
    v = min(max(v, np.float32(-126.0)), np.float32(126.0))
    whole = np.floor(v + np.float32(0.5))
    r = v - whole
    p = np.float32(0.00015345811600619055)
    p = p * r + np.float32(0.0013399931216376557)
    p = p * r + np.float32(0.009618488958620415)
    p = p * r + np.float32(0.05550328776974151)
    p = p * r + np.float32(0.24022646890620056)
    p = p * r + np.float32(0.6931472057372625)
    p = p * r + np.float32(1.0)
    return p * _float_from_bits((np.int32(whole) + np.int32(127)) << np.int32(23))


@njit(inline="always", fastmath=FAST)
def sigmoid(v):
    return _divide(np.float32(1.0), np.float32(1.0) + exp2(np.float32(-1.4426950408889634) * v))
