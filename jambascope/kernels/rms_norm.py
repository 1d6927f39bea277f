"""RMSNorm in one pass over each row, on a CPU in float32 (torch composes it of four)."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from jaxtyping import Float

from jambascope.kernels.compiling import NativeTask
from jambascope.kernels.plain import is_plain
from jambascope.kernels.threads import FLOAT32, run_loop

SERIAL_BELOW = 262_144
"""Elements below which waking another thread costs more than it saves."""


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether :func:`rms_norm` takes ``x``: float32 on the CPU, rows at one distance from each other, gradients off."""
    if torch.is_grad_enabled() or x.dtype != torch.float32 or x.device.type != "cpu" or x.ndim != 3 or not is_plain(x):
        return False
    batch, row, one = x.stride()
    rows_in_step = x.shape[0] == 1 or batch == x.shape[1] * row
    return one == 1 and rows_in_step and weight.dtype == torch.float32 and weight.is_contiguous()


def rms_norm(
    x: Float[torch.Tensor, "batch pos width"], weight: Float[torch.Tensor, " width"], eps: float
) -> Float[torch.Tensor, "batch pos width"]:
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last axis (arXiv 1910.07467, equation 4).

    ``x`` may be a slice of wider rows; see :func:`fits`.
    """
    out = torch.empty(x.shape, **FLOAT32)
    _over_rows(_kernels().forward, x, eps, weight.data_ptr(), out.data_ptr())
    return out


def root_mean_square(x: Float[torch.Tensor, "batch pos width"], eps: float) -> Float[torch.Tensor, "batch pos 1"]:
    """``sqrt(mean(x**2) + eps)`` over the last axis; see :func:`fits`."""
    out = torch.empty(*x.shape[:2], 1, **FLOAT32)
    _over_rows(_kernels().root_mean_square, x, eps, out.data_ptr())
    return out


def _over_rows(loop: NativeTask, x: torch.Tensor, eps: float, *addresses: int) -> None:
    from jambascope.kernels.native import float_bits

    (batch, length, width), apart = x.shape, x.stride(1) if x.shape[1] > 1 else x.stride(0)
    serial = x.numel() < SERIAL_BELOW
    run_loop(loop, batch * length, width, float_bits(eps), x.data_ptr(), apart, *addresses, serial=serial)


@cache
def _kernels() -> ModuleType:
    from jambascope.kernels import rms_norm_cpu

    return rms_norm_cpu
