"""The CPU backend: one pass over the inputs each way; autograd and shapes around the numba loops."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from jambascope.kernels.causal_conv.interface import Neighbours
from jambascope.kernels.compiling import announce_first_compile
from jambascope.kernels.packed import picked
from jambascope.kernels.threads import FLOAT32, run_items, run_loop

SERIAL_BELOW = 65_536
"""Inputs below which waking another thread costs more than it saves."""


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    past: torch.Tensor | None,
    silu: bool,
    tables: Neighbours | None,
    bounds: np.ndarray | None = None,
    past_rows: np.ndarray | None = None,
) -> torch.Tensor:
    """See :func:`jambascope.kernels.causal_conv.causal_conv1d`. Arithmetic in float32.

    Rows of different lengths (``bounds``) without gradients and tables.
    """
    from jambascope.kernels.vectors import LANES

    as_it_is = past is None or (past.dtype == torch.float32 and past.is_contiguous() and weight.shape[0] >= LANES)
    if past_rows is not None and not as_it_is:  # copy those of the rows, not all of them
        past, past_rows = picked(past, past_rows), None
    tensors = _prepared(x, weight, bias, past, None if bounds is None else len(bounds) - 1)
    if torch.is_grad_enabled() and any(v.requires_grad for v in tensors):
        out = _Conv.apply(*tensors, silu, tables)
    else:
        out = _forward(*tensors, silu, tables, bounds, past_rows)
    return out if out.shape == x.shape and out.dtype == x.dtype else out[..., : x.shape[2]].to(x.dtype)


def step(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, past: torch.Tensor, silu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`jambascope.kernels.causal_conv.causal_conv1d_step`; no gradients."""
    from jambascope.kernels.causal_conv import cpu_kernels as k

    rows, weight, bias, past_rows = _prepared(x, weight, bias, past)
    (batch, channels), width = rows.shape, weight.shape[1]
    out, new_past = torch.empty_strided((batch, channels), (channels, 1), **FLOAT32), torch.empty_like(past_rows)
    announce_first_compile(k.step)
    k.step(
        batch, channels, rows.data_ptr(), rows.stride(0), past_rows.data_ptr(), weight.data_ptr(), bias.data_ptr(),
        _taps(width), silu, out.data_ptr(), new_past.data_ptr(),
    )  # fmt: skip
    if channels != x.shape[1]:
        out, new_past = out[:, : x.shape[1]], new_past[..., : x.shape[1]]
    if (x.dtype, past.dtype) != (torch.float32, torch.float32):
        out, new_past = out.to(x.dtype), new_past.to(past.dtype)
    return out, new_past


@cache
def _taps(width: int) -> tuple[int, ...]:
    return tuple(range(width))


def _prepared(x, weight, bias, past, rows: int | None = None) -> tuple[torch.Tensor, ...]:
    """Float32 with at least LANES channels; contiguous, but for x, whose positions may be further apart."""
    from jambascope.kernels.vectors import LANES

    channels, width = weight.shape
    bias = weight.new_zeros(channels) if bias is None else bias
    past = x.new_zeros(rows or x.shape[0], width - 1, channels) if past is None else past
    x, weight, bias, past = x.float(), weight.float(), bias.float(), past.float()
    missing = LANES - channels
    if missing > 0:
        x, bias, past = (F.pad(v, (0, missing)) for v in (x, bias, past))
        weight = F.pad(weight, (0, 0, 0, missing))
    in_step = x.ndim == 2 or x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    if x.stride(-1) != 1 or not in_step:
        x = x.contiguous()
    return x, weight.contiguous(), bias.contiguous(), past.contiguous()


def _addresses(x, weight, bias, past) -> tuple[int, ...]:
    return x.data_ptr(), x.stride(1), past.data_ptr(), weight.data_ptr(), bias.data_ptr()


def _forward(
    x, weight, bias, past, silu: bool, tables: Neighbours | None, bounds: np.ndarray | None = None, past_rows=None
) -> torch.Tensor:
    from jambascope.kernels.causal_conv import cpu_kernels as k

    batch, length, channels = x.shape
    out = torch.empty(batch, length, channels, **FLOAT32)
    source = 0 if tables is None else tables.source.data_ptr()
    x_at, x_row, *rest = _addresses(x, weight, bias, past)
    chunks = 1
    if bounds is None:
        bounds, chunks = np.arange(batch + 1) * length, -(-length // k.CHUNK)
    rows = len(bounds) - 1
    of_rows = bounds.ctypes.data, 0 if past_rows is None else past_rows.ctypes.data
    run_loop(
        k.FORWARD[weight.shape[1]], rows * chunks,
        rows, length, chunks, channels, x_row, bool(silu), *of_rows, x_at, *rest, source, out.data_ptr(),
        serial=out.numel() < SERIAL_BELOW,
    )  # fmt: skip
    return out


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, past, silu, tables):
        ctx.save_for_backward(x, weight, bias, past)
        ctx.silu, ctx.tables = silu, tables
        return _forward(x, weight, bias, past, silu, tables)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        from jambascope.kernels.causal_conv import cpu_kernels as k

        x, weight, bias, past = ctx.saved_tensors
        (batch, length, channels), width = x.shape, weight.shape[1]
        dout = dout.contiguous()
        grad_x, grad_past = (
            torch.empty(batch, length, channels, **FLOAT32),
            torch.empty(batch, width - 1, channels, **FLOAT32),
        )
        own = batch * -(-length // k.CHUNK)  # work items that own positions, and that own inputs
        items = batch * -(-(width - 1 + length) // k.CHUNK)
        sums = items if ctx.tables is None else own
        grad_weight, grad_bias = torch.empty(sums, width, channels, **FLOAT32), torch.empty(sums, channels, **FLOAT32)
        inputs = (length, channels, *_addresses(x, weight, bias, past), _taps(width), ctx.silu, dout.data_ptr())
        by_input, by_sum = ([v.data_ptr() for v in pair] for pair in ((grad_x, grad_past), (grad_weight, grad_bias)))
        serial = x.numel() < SERIAL_BELOW
        if ctx.tables is None:
            announce_first_compile(k.backward)
            run_items(lambda start, stop: k.backward(start, stop, *inputs, *by_input, *by_sum), items, serial)
        else:
            source, target = (v.numpy() for v in ctx.tables)
            through = torch.empty(batch, length, channels, **FLOAT32)
            address = through.data_ptr()
            announce_first_compile(k.backward_weights)
            run_items(
                lambda start, stop: k.backward_weights(start, stop, *inputs, *by_sum, source, address), own, serial
            )
            scatter = (length, channels, weight.data_ptr(), target, _taps(width), address, *by_input)
            announce_first_compile(k.backward_inputs)
            run_items(lambda start, stop: k.backward_inputs(start, stop, *scatter), items, serial)
        return grad_x, grad_weight.sum(0).T, grad_bias.sum(0), grad_past, None, None
