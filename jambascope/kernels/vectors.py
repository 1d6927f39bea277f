"""Sixteen float32 at a time in numba: values that are LLVM vectors.

A loop over lanes becomes vector code only where LLVM can prove that arrays do not overlap and that nothing branches;
with these the code is vector code as written, on whatever vectors the machine has. ``+ - * /`` work on them.
"""

from __future__ import annotations

import operator

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

from jambascope.kernels.vector_math import FAST

LANES = 16
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, numba_type) -> None:
        super().__init__(manager, numba_type, _FLOATS)


def _pointer(builder, address, index):
    bytes_in = builder.mul(index, ir.Constant(ir.IntType(64), 4))
    return builder.inttoptr(builder.add(address, bytes_in), _FLOATS.as_pointer())


@intrinsic
def load(typingctx, address, index):
    """LANES float32 from ``index`` on, of those at ``address`` (``tensor.data_ptr()``); unchecked."""

    def codegen(context, builder, signature, args):
        return builder.load(_pointer(builder, *args), align=4)

    return vector(types.int64, types.int64), codegen


@intrinsic
def load_every(typingctx, address, index, step):
    """LANES float32 from ``index`` on, ``step`` apart."""

    def codegen(context, builder, signature, args):
        address, index, step = args
        value = ir.Constant(_FLOATS, ir.Undefined)
        for lane in range(LANES):
            pointer = builder.bitcast(_pointer(builder, address, index), ir.FloatType().as_pointer())
            value = builder.insert_element(value, builder.load(pointer, align=4), ir.Constant(ir.IntType(32), lane))
            index = builder.add(index, step)
        return value

    return vector(types.int64, types.int64, types.int64), codegen


@intrinsic
def store(typingctx, address, index, value):
    """The opposite of :func:`load`."""

    def codegen(context, builder, signature, args):
        builder.store(args[2], _pointer(builder, *args[:2]), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, vector), codegen


@intrinsic
def splat(typingctx, value):
    """A scalar in every lane."""

    def codegen(context, builder, signature, args):
        lane = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), args[0], ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(lane, lane, ir.Constant(_INTS, [0] * LANES))

    return vector(types.float32), codegen


@intrinsic
def repeat(typingctx, value, like):
    """The vector as often as the tuple ``like`` is long: a tuple of that many, each kept in a register."""
    count = len(like)

    def codegen(context, builder, signature, args):
        return context.make_tuple(builder, signature.return_type, [args[0]] * count)

    return types.UniTuple(vector, count)(vector, like), codegen


def _define_operator(python_operator, instruction: str) -> None:
    @intrinsic
    def apply(typingctx, a, b):
        def codegen(context, builder, signature, args):
            return getattr(builder, instruction)(*args, flags=tuple(FAST))

        return vector(vector, vector), codegen

    @overload(python_operator)
    def _(a, b):
        if a is vector and b is vector:
            return lambda a, b: apply(a, b)


for _operator, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define_operator(_operator, _instruction)


@intrinsic
def _clamp(typingctx, v, low, high):
    def codegen(context, builder, signature, args):
        v, low, high = args
        v = builder.select(builder.fcmp_ordered(">", v, low), v, low)
        return builder.select(builder.fcmp_ordered("<", v, high), v, high)

    return vector(vector, vector, vector), codegen


@intrinsic
def _floor(typingctx, v):
    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(_FLOATS, [_FLOATS])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.floor.v{LANES}f32"), args)

    return vector(vector), codegen


@intrinsic
def _power_of_two(typingctx, whole):
    """2**whole for whole numbers in the normal range: the exponent's bits."""

    def codegen(context, builder, signature, args):
        def lanes(value):
            return ir.Constant(_INTS, [value] * LANES)

        exponent = builder.add(builder.fptosi(args[0], _INTS), lanes(127))
        return builder.bitcast(builder.shl(exponent, lanes(23)), _FLOATS)

    return vector(vector), codegen


@njit(inline="always", fastmath=FAST)
def _constant(value):
    return splat(np.float32(value))


@njit(inline="always", fastmath=FAST)
def exp2(v):
    """As :func:`jambascope.kernels.vector_math.exp2`, lane by lane."""
    v = _clamp(v, _constant(-126.0), _constant(126.0))
    whole = _floor(v + _constant(0.5))
    r = v - whole
    p = _constant(0.00015345811600619055)
    p = p * r + _constant(0.0013399931216376557)
    p = p * r + _constant(0.009618488958620415)
    p = p * r + _constant(0.05550328776974151)
    p = p * r + _constant(0.24022646890620056)
    p = p * r + _constant(0.6931472057372625)
    p = p * r + _constant(1.0)
    return p * _power_of_two(whole)


@njit(inline="always", fastmath=FAST)
def sigmoid(v):
    return _constant(1.0) / (_constant(1.0) + exp2(_constant(-1.4426950408889634) * v))
