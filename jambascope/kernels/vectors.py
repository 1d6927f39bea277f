"""Vectors of 16 float32 for numba loops: what numba's own arrays cannot promise LLVM, said in so many words.

numba vectorises a loop over lanes only behind run-time checks that its arrays do not overlap, keeps nothing in
registers from one loop to the next, and tests every index for being negative. A value of type ``lanes`` is one LLVM
vector: on a machine with AVX-512 a register, elsewhere a pair or four of them. Operators take two vectors, or a
vector and a float32. ``load``, ``store`` and ``read`` do not check their index, which counts from a flat array's
beginning or from an address (``tensor.data_ptr()``, of float32).
"""

from __future__ import annotations

import operator

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

LANES = 16
FAST = {"contract"}
"""Fused multiply-adds are allowed; nothing else that would change a result."""

NORMAL = np.float32(126.0)
"""Powers of two that :func:`exp2` takes, up and down."""

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)


class LanesType(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float32x16")


lanes = LanesType()


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type) -> None:
        super().__init__(manager, fe_type, _FLOATS)


def _pointer(context, builder, array_type, array, index):
    if isinstance(array_type, types.Integer):
        return builder.gep(builder.inttoptr(array, ir.FloatType().as_pointer()), [index])
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def _splat(builder, value):
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    one = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, undefined, ir.Constant(_INTS, [0] * LANES))


def _without_sign(builder, v):
    bits = builder.and_(builder.bitcast(v, _INTS), ir.Constant(_INTS, [0x7FFFFFFF] * LANES))
    return builder.bitcast(bits, _FLOATS)


@intrinsic
def load(typingctx, array, index):
    """Elements ``index .. index + 15`` of a flat float32 array."""

    def codegen(context, builder, signature, args):
        pointer = _pointer(context, builder, signature.args[0], *args)
        value = builder.load(builder.bitcast(pointer, _FLOATS.as_pointer()))
        value.align = 4
        return value

    return lanes(array, types.intp), codegen


@intrinsic
def load_every(typingctx, array, index, step):
    """Elements ``index, index + step .. index + 15 * step`` of a flat float32 array."""

    def codegen(context, builder, signature, args):
        array, index, step = args
        value = ir.Constant(_FLOATS, ir.Undefined)
        for lane in range(LANES):
            element = builder.load(_pointer(context, builder, signature.args[0], array, index))
            value = builder.insert_element(value, element, ir.Constant(ir.IntType(32), lane))
            index = builder.add(index, step)
        return value

    return lanes(array, types.intp, types.intp), codegen


@intrinsic
def store(typingctx, array, index, value):
    """Write a vector to elements ``index .. index + 15`` of a flat float32 array."""

    def codegen(context, builder, signature, args):
        pointer = _pointer(context, builder, signature.args[0], *args[:2])
        builder.store(args[2], builder.bitcast(pointer, _FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes), codegen


@intrinsic
def read(typingctx, array, index):
    """One element of a flat array."""

    def codegen(context, builder, signature, args):
        return builder.load(_pointer(context, builder, signature.args[0], *args))

    return (types.float32 if isinstance(array, types.Integer) else array.dtype)(array, types.intp), codegen


@intrinsic
def write(typingctx, array, index, value):
    """Set one element."""

    def codegen(context, builder, signature, args):
        builder.store(args[2], _pointer(context, builder, signature.args[0], *args[:2]))
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


@intrinsic
def splat(typingctx, value):
    """A float32 in every lane."""

    def codegen(context, builder, signature, args):
        return _splat(builder, args[0])

    return lanes(types.float32), codegen


@intrinsic
def repeat(typingctx, value, like):
    """A tuple that holds a vector as often as the tuple ``like`` is long."""
    count = len(like)

    def codegen(context, builder, signature, args):
        return context.make_tuple(builder, signature.return_type, [args[0]] * count)

    return types.UniTuple(lanes, count)(lanes, like), codegen


def _define_operator(symbol, instruction: str) -> None:
    @intrinsic
    def compute(typingctx, a, b):
        def codegen(context, builder, signature, args):
            vectors = [
                v if isinstance(t, LanesType) else _splat(builder, v) for t, v in zip(signature.args, args, strict=True)
            ]
            return getattr(builder, instruction)(*vectors, flags=tuple(FAST))

        return lanes(a, b), codegen

    @overload(symbol, inline="always")
    def choose(a, b):
        kinds = {isinstance(t, LanesType) or (t == types.float32 and "number") for t in (a, b)}
        if True in kinds and False not in kinds:
            return lambda a, b: compute(a, b)


for _symbol, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define_operator(_symbol, _instruction)


def _define_bound(comparison: str):
    @intrinsic
    def bound(typingctx, v, limit):
        def codegen(context, builder, signature, args):
            other = _splat(builder, args[1])
            return builder.select(builder.fcmp_unordered(comparison, args[0], other), args[0], other)

        return lanes(lanes, types.float32), codegen

    return bound


maximum = _define_bound(">")
"""The larger of each lane and a float32; what is not a number stays so."""
minimum = _define_bound("<")
"""The smaller of each lane and a float32; what is not a number stays so."""


@intrinsic
def larger(typingctx, v, other):
    """The larger of two in each lane."""

    def codegen(context, builder, signature, args):
        return builder.select(builder.fcmp_unordered(">", *args), *args)

    return lanes(lanes, lanes), codegen


@intrinsic
def absolute(typingctx, v):
    def codegen(context, builder, signature, args):
        return _without_sign(builder, args[0])

    return lanes(lanes), codegen


@intrinsic
def _times_power_of_two(typingctx, p, shifted):
    """p * 2**k, where ``shifted`` is k + 1.5 * 2**23, so that its low bits hold k."""

    def codegen(context, builder, signature, args):
        p, k = (builder.bitcast(v, _INTS) for v in args)
        return builder.bitcast(builder.add(p, builder.shl(k, ir.Constant(_INTS, [23] * LANES))), _FLOATS)

    return lanes(lanes, lanes), codegen


@intrinsic
def within(typingctx, v, limit):
    """Whether no lane is further from zero than a float32, and all are numbers."""

    def codegen(context, builder, signature, args):
        outside = builder.fcmp_unordered(">", _without_sign(builder, args[0]), _splat(builder, args[1]))
        mask = ir.IntType(LANES)
        return builder.icmp_unsigned("==", builder.bitcast(outside, mask), ir.Constant(mask, 0))

    return types.boolean(lanes, types.float32), codegen


@intrinsic
def lane_sum(typingctx, v):
    """The sum over lanes, always in the same order."""

    def codegen(context, builder, signature, args):
        total, width = args[0], LANES
        while width > 1:
            width //= 2
            order = ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(width)))
            upper = ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(width, 2 * width)))
            low = builder.shuffle_vector(total, total, order)
            total = builder.fadd(low, builder.shuffle_vector(total, total, upper))
        return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

    return types.float32(lanes), codegen


@njit(inline="always")
def aligned(size):
    """An uninitialised float32 array that starts on a cache line, so that no vector straddles two."""
    raw = np.empty(size + LANES, np.float32)
    skip = (-(raw.ctypes.data // 4)) % LANES
    return raw[skip : skip + size]


@njit(inline="always")
def exp2(v):
    """2**v to 1e-7 relative, clamped to the normal range of float32 [2**-126, 2**126]."""
    return exp2_within(minimum(maximum(v, -NORMAL), NORMAL))


@njit(inline="always")
def exp2_within(v):
    """2**v where that is known to lie in the range of :func:`exp2`."""
    shifted = v + np.float32(12582912.0)  # 1.5 * 2**23: the sum's last bit is worth one
    r = v - (shifted - np.float32(12582912.0))
    p = r * np.float32(0.00015345811600619055) + np.float32(0.0013399931216376557)
    p = p * r + np.float32(0.009618488958620415)
    p = p * r + np.float32(0.05550328776974151)
    p = p * r + np.float32(0.24022646890620056)
    p = p * r + np.float32(0.6931472057372625)
    p = p * r + np.float32(1.0)
    return _times_power_of_two(p, shifted)


@njit(inline="always")
def sigmoid(v):
    """1 / (1 + e**-v)."""
    return np.float32(1.0) / (exp2(v * np.float32(-1.4426950408889634)) + np.float32(1.0))


@njit(inline="always")
def silu(v):
    """v * sigmoid(v)."""
    return v * sigmoid(v)


@njit(inline="always")
def softplus(v):
    """log(1 + e**v) to 2e-7 relative: max(v, 0) + log1p(e**-|v|), the logarithm by the series of artanh."""
    u = exp2(absolute(v) * np.float32(-1.4426950408889634))
    s = u / (u + np.float32(2.0))
    z = s * s
    p = z * np.float32(1.0 / 11.0) + np.float32(1.0 / 9.0)
    p = p * z + np.float32(1.0 / 7.0)
    p = p * z + np.float32(1.0 / 5.0)
    p = p * z + np.float32(1.0 / 3.0)
    p = p * z + np.float32(1.0)
    return maximum(v, np.float32(0.0)) + s * p * np.float32(2.0)
