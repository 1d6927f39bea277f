"""Calls of native loops with one block of int64: a counter, how much there is to do, and the loop's own numbers.

Numbers, addresses among them, are all that a loop gets, so that no thread needs Python to begin. A loop over work items
is a function of (start, stop, numbers ...) in a task that asks for items until there are none::

    @loop_task(5)
    def forward(call):
        given = numbers(call, 5)
        start, stop = next_items(call)
        while start < stop:
            _forward(start, stop, *given)
            start, stop = next_items(call)
"""

from __future__ import annotations

import struct
from functools import lru_cache

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from jambascope.kernels.threads import HEAD


@intrinsic
def address(typingctx, number):
    """A pointer from an int64: a call with arrays costs half a microsecond for each, with numbers almost nothing."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), codegen


@intrinsic
def take(typingctx, counter):
    """The int64 at ``counter``, which is raised by one at once for all threads."""

    def codegen(context, builder, signature, args):
        pointer = builder.bitcast(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.voidptr), codegen


@intrinsic(prefer_literal=True)
def numbers(typingctx, call, count):
    """A loop's own ``count`` numbers, as a tuple."""
    n = count.literal_value

    def codegen(context, builder, signature, args):
        pointer = builder.bitcast(args[0], ir.IntType(64).as_pointer())
        places = (builder.gep(pointer, [ir.Constant(ir.IntType(64), HEAD + i)]) for i in range(n))
        return context.make_tuple(builder, signature.return_type, [builder.load(place) for place in places])

    return types.UniTuple(types.int64, n)(call, count), codegen


@njit(inline="always")
def next_items(call):
    """The items from start to stop that no thread has taken yet; (0, 0) where none are left."""
    head = carray(call, (HEAD,), np.int64)
    part, items, parts = take(call), head[1], head[2]
    if part >= parts:
        return 0, 0
    return items * part // parts, items * (part + 1) // parts


@intrinsic
def as_float(typingctx, bits):
    """The float32 whose bits :func:`float_bits` gave."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.trunc(args[0], ir.IntType(32)), ir.FloatType())

    return types.float32(types.int64), codegen


@lru_cache
def float_bits(value: float) -> int:
    """A float32 among numbers that are int64."""
    return struct.unpack("i", struct.pack("f", value))[0]
