"""The definition of the causal depthwise convolution: short, differentiable torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum

from jambascope.kernels.causal_conv.interface import Neighbours


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    past: torch.Tensor | None,
    silu: bool,
    tables: Neighbours | None,
) -> torch.Tensor:
    """See :func:`jambascope.kernels.causal_conv.causal_conv1d`. Arithmetic in float32, in float64 for float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    length, width = x.shape[1], weight.shape[1]
    if past is None:
        past = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    inputs, weight = torch.cat((past.to(x.dtype), x), dim=1).to(dtype), weight.to(dtype)
    if tables is None:
        # A sum of shifted products: each is one contiguous pass, where torch's grouped convolution would transpose.
        out = inputs[:, :length] * weight[:, 0]
        for k in range(1, width):
            out = torch.addcmul(out, inputs[:, k : k + length], weight[:, k])
    else:
        row = torch.arange(len(x), device=x.device)[:, None, None]
        met = inputs[row, tables.source.clamp_min(0)]  # [B T K E]
        out = einsum(torch.where((tables.source >= 0)[..., None], met, 0), weight, "b t k e, e k -> b t e")
    out = out if bias is None else out + bias.to(dtype)
    out = F.silu(out) if silu else out
    if tables is not None:
        out = torch.where((tables.source[..., -1] >= 0)[..., None], out, 0)
    return out.to(x.dtype)


def step(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, past: torch.Tensor, silu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`jambascope.kernels.causal_conv.causal_conv1d_step`."""
    out = causal_conv1d(x[:, None], weight, bias, past, silu, None)[:, 0]
    return out, torch.cat((past, x[:, None].to(past.dtype)), dim=1)[:, 1:]
