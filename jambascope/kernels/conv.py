"""Causal depthwise convolution over time, time-major."""

from __future__ import annotations

import torch
from jaxtyping import Float


def causal_conv1d(
    x: Float[torch.Tensor, "batch pos d_inner"],
    weight: Float[torch.Tensor, "d_inner d_conv"],
    bias: Float[torch.Tensor, d_inner] | None,
    past: Float[torch.Tensor, "batch d_conv-1 d_inner"] | None = None,
) -> tuple[Float[torch.Tensor, "batch pos d_inner"], Float[torch.Tensor, "batch d_conv-1+pos d_inner"]]:
    """``out_t = bias + sum_k weight[:, k] * in_{t - (d_conv - 1) + k}``, with ``past`` (or zeros) before position 0.

    Returns the output and the inputs with the past in front of them (the next call's ``past`` is cut from it).
    A sum of shifted products: each is one contiguous pass, where torch's grouped convolution would transpose.
    """
    width = weight.shape[1]
    if past is None:
        past = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    inputs = torch.cat((past, x), dim=1)
    length = x.shape[1]
    if length == 1:
        out = (inputs * weight.T).sum(1, keepdim=True)
        return (out if bias is None else out + bias), inputs
    out = inputs[:, :length] * weight[:, 0]
    for k in range(1, width):
        out = torch.addcmul(out, inputs[:, k : k + length], weight[:, k])
    return (out if bias is None else out + bias), inputs
