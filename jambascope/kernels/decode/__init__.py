"""One token through a whole sub-layer in one call, on a CPU in float32: what decoding takes when nobody listens.

A token's work is so little that calling torch operation by operation costs more than the operations do. These
functions compute what the layers compute; the layers take them when :func:`fits` says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float

from jambascope.kernels.compiling import announce_first_compile

MOST_ROWS = 4
"""Batch rows from which on torch's products, which read a weight once for all rows, are faster."""


class MambaWeights(NamedTuple):
    """The parameters of a Mamba-1 mixer; those of the convolution as [E K]."""

    in_proj: torch.Tensor
    in_bias: torch.Tensor | None
    conv: torch.Tensor
    conv_bias: torch.Tensor | None
    x_proj: torch.Tensor
    dt_norm: torch.Tensor | None
    b_norm: torch.Tensor | None
    c_norm: torch.Tensor | None
    dt_proj: torch.Tensor
    dt_bias: torch.Tensor
    A_log: torch.Tensor
    D: torch.Tensor
    out_proj: torch.Tensor
    out_bias: torch.Tensor | None


def fits(x: torch.Tensor, weights: Iterable[torch.Tensor | None]) -> bool:
    """Whether ``x`` [B 1 D] is one token of few rows, and everything is float32 on the CPU, without gradients."""
    if x.shape[1] != 1 or x.shape[0] > MOST_ROWS or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    grad = torch.is_grad_enabled()
    if grad and x.requires_grad:
        return False
    return all(
        w is None or (w.dtype == torch.float32 and w.is_contiguous() and not (grad and w.requires_grad))
        for w in weights
    )


def mamba_step(
    hidden: Float[torch.Tensor, "batch d_model"],
    past: Float[torch.Tensor, "batch d_conv-1 d_inner"],
    state: Float[torch.Tensor, "batch d_inner d_state"],
    weights: MambaWeights,
    eps: float,
) -> tuple[
    Float[torch.Tensor, "batch d_model"],
    Float[torch.Tensor, "batch d_conv-1 d_inner"],
    Float[torch.Tensor, "batch d_inner d_state"],
]:
    """A Mamba-1 mixer (arXiv 2312.00752; inner norms of 2403.19887) for one token: output, new past, new state.

    ``d_inner`` a multiple of 16; the new past and state are other tensors than the old.
    """
    from jambascope.kernels.decode import cpu_kernels as k

    rows, d_model = hidden.shape
    d_inner, d_state = weights.A_log.shape
    hidden, past, state = hidden.contiguous(), past.contiguous(), state.mT.contiguous()
    out, new_past, new_state = torch.empty_like(hidden), torch.empty_like(past), torch.empty_like(state)
    announce_first_compile(k.mamba_step)
    k.mamba_step(
        rows,
        d_model,
        d_inner,
        d_state,
        weights.dt_proj.shape[1],
        weights.conv.shape[1],
        eps,
        hidden.data_ptr(),
        *(0 if w is None else w.data_ptr() for w in weights),
        past.data_ptr(),
        state.data_ptr(),
        out.data_ptr(),
        new_past.data_ptr(),
        new_state.data_ptr(),
    )
    return out, new_past, new_state.mT


def swiglu_step(
    x: Float[torch.Tensor, "batch d_model"],
    gate: Float[torch.Tensor, "d_mlp d_model"],
    up: Float[torch.Tensor, "d_mlp d_model"],
    down: Float[torch.Tensor, "d_model d_mlp"],
) -> Float[torch.Tensor, "batch d_model"]:
    """``down(SiLU(gate x) * up x)`` for one token."""
    from jambascope.kernels.decode import cpu_kernels as k

    x = x.contiguous()
    out = torch.empty_like(x)
    announce_first_compile(k.swiglu_step)
    addresses = (v.data_ptr() for v in (x, gate, up, down, out))
    k.swiglu_step(*x.shape, gate.shape[0], *addresses)
    return out
