"""The Triton kernel of ``exp_kernel``; importing this imports triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chained_exp2(x_ptr, out_ptr, n, CHAIN: tl.constexpr, BLOCK: tl.constexpr):
    """out = f(f(...f(x))) with f(v) = exp2(-v), ``CHAIN`` times, one block of values to a program."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x_ptr + at, mask=at < n, other=0.0)
    for _ in range(CHAIN):
        v = tl.exp2(-v)
    tl.store(out_ptr + at, v, mask=at < n)
