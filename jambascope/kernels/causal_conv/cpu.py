"""The CPU backend: one pass over the inputs forward, two backward; autograd around the numba loops."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from jambascope.kernels.compiling import announce_first_compile
from jambascope.kernels.threads import run_items

SERIAL_BELOW = 65_536
"""Inputs below which waking another thread costs more than it saves."""


def causal_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, past: torch.Tensor, silu: bool
) -> torch.Tensor:
    """See :func:`jambascope.kernels.causal_conv.causal_conv1d`; float32."""
    from jambascope.kernels.causal_conv.cpu_kernels import LANES

    channels = x.shape[2]
    pad = -channels % LANES
    if pad:
        x, past = F.pad(x, (0, pad)), F.pad(past, (0, pad))
        weight, bias = F.pad(weight, (0, 0, 0, pad)), None if bias is None else F.pad(bias, (0, pad))
    inputs = (x, weight, bias, past)
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in inputs):
        out = _Conv.apply(*inputs, silu)
    else:
        out = _forward(*_arrays(*inputs), silu)
    return out[..., :channels] if pad else out


def _arrays(x, weight, bias, past) -> tuple[np.ndarray, ...]:
    """weight as [d_conv E], and x at least as wide as the convolution: [B T >=E]."""
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return (
        _wide(x.detach()).numpy(),
        weight.detach().T.contiguous().numpy(),
        bias.detach().numpy(),
        past.detach().numpy(),
    )


def _wide(x: torch.Tensor) -> torch.Tensor:
    """A contiguous [B T >=E] that begins with x: the wider projection that x is the first part of, or a copy."""
    if x.is_contiguous():
        return x
    batch, length, _ = x.shape
    pitch = x.stride(1)
    wide = torch.Size((batch, length, pitch))
    fits = x.storage_offset() + wide.numel() <= x.untyped_storage().nbytes() // x.element_size()
    if x.stride() == (length * pitch, pitch, 1) and pitch >= x.shape[2] and fits:
        return x.as_strided(wide, x.stride())
    return x.contiguous()


def _forward(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, past: np.ndarray, silu: bool) -> torch.Tensor:
    from jambascope.kernels.causal_conv import cpu_kernels as k

    batch, length, channels = x.shape[0], x.shape[1], weight.shape[1]
    out = torch.empty(batch, length, channels)
    into = out.numpy()
    announce_first_compile(k.forward)
    run_items(
        lambda start, stop: k.forward(start, stop, x, weight, bias, past, silu, into),
        batch * channels // k.LANES,
        serial=batch * length * channels < SERIAL_BELOW,
    )
    return out


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, past, silu):
        ctx.save_for_backward(x, weight, bias, past)
        ctx.silu = silu
        return _forward(*_arrays(x, weight, bias, past), silu)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        from jambascope.kernels.causal_conv import cpu_kernels as k

        inputs = ctx.saved_tensors
        x, weight, bias, past = inputs
        arrays = _arrays(*inputs)
        batch, width = x.shape[0], weight.shape[1]
        grad_x, through = torch.empty(2, *x.shape)
        grad_past = torch.empty(past.shape)
        grad_weight = torch.empty(batch, width, x.shape[2])
        grad_bias = torch.empty(batch, x.shape[2])
        into = [v.numpy() for v in (through, grad_x, grad_past, grad_weight, grad_bias)]
        dout = dout.contiguous().numpy()
        announce_first_compile(k.backward)
        run_items(
            lambda start, stop: k.backward(start, stop, *arrays, ctx.silu, dout, *into),
            batch * x.shape[2] // k.LANES,
            serial=x.numel() < SERIAL_BELOW,
        )
        return grad_x, grad_weight.sum(0).T, None if bias is None else grad_bias.sum(0), grad_past, None
