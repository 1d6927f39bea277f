"""RMSNorm in one pass over each row, on a CPU in float32 (torch composes it of four)."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from jaxtyping import Float

from jambascope.kernels.compiling import announce_first_compile
from jambascope.kernels.threads import run_items

SERIAL_BELOW = 262_144
"""Elements below which waking another thread costs more than it saves."""


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether :func:`rms_norm` takes ``x``: float32 on the CPU, rows at one distance from each other, gradients off."""
    if torch.is_grad_enabled() or x.dtype != torch.float32 or x.device.type != "cpu" or x.ndim != 3:
        return False
    batch, row, one = x.stride()
    rows_in_step = x.shape[0] == 1 or batch == x.shape[1] * row
    return one == 1 and rows_in_step and weight.dtype == torch.float32 and weight.is_contiguous()


def rms_norm(
    x: Float[torch.Tensor, "batch pos width"], weight: Float[torch.Tensor, width], eps: float
) -> Float[torch.Tensor, "batch pos width"]:
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last axis (arXiv 1910.07467, equation 4).

    ``x`` may be a slice of wider rows; see :func:`fits`.
    """
    batch, length, width = x.shape
    out = torch.empty(batch, length, width)
    forward = _forward()
    stride = x.stride(1) if length > 1 else x.stride(0)
    arguments = width, eps, x.data_ptr(), stride, weight.data_ptr(), out.data_ptr()
    rows = batch * length
    if x.numel() < SERIAL_BELOW:
        forward(0, rows, *arguments)
    else:
        run_items(lambda start, stop: forward(start, stop, *arguments), rows)
    return out


@cache
def _forward() -> Any:
    from jambascope.kernels.rms_norm_cpu import forward

    announce_first_compile(forward)
    return forward
