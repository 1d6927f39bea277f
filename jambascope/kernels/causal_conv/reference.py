"""The definition of the causal depthwise convolution: short, differentiable torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def causal_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, past: torch.Tensor, silu: bool
) -> torch.Tensor:
    """See :func:`jambascope.kernels.causal_conv.causal_conv1d`.

    A sum of shifted products: each is one contiguous pass, where torch's grouped convolution would transpose.
    """
    inputs = torch.cat((past, x), dim=1)
    length = x.shape[1]
    out = inputs[:, :length] * weight[:, 0]
    for k in range(1, weight.shape[1]):
        out = torch.addcmul(out, inputs[:, k : k + length], weight[:, k])
    out = out if bias is None else out + bias
    return F.silu(out) if silu else out
