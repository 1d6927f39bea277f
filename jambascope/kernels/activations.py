"""Elementwise functions of a mixer, each in one pass: by numba on a CPU in float32 without gradients, else by torch."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from jaxtyping import Float

from jambascope.kernels.plain import is_plain
from jambascope.kernels.threads import FLOAT32, run_loop

SERIAL_BELOW = 65_536
"""Elements below which waking another thread costs more than it saves."""


def silu(x: Float[torch.Tensor, "batch pos d_inner"]) -> Float[torch.Tensor, "batch pos d_inner"]:
    """``x * sigmoid(x)``."""
    return _run("SILU", x, x) if _fits(x) else F.silu(x)


def gated(
    y: Float[torch.Tensor, "batch pos d_inner"], gate: Float[torch.Tensor, "batch pos d_inner"]
) -> Float[torch.Tensor, "batch pos d_inner"]:
    """``y * SiLU(gate)``."""
    if _fits(y, gate):
        return _run("GATED", y, gate)
    opened = F.silu(gate)
    in_place = not torch.is_grad_enabled() and y.dtype == gate.dtype and is_plain(y, gate)
    return opened.mul_(y) if in_place else y * opened


def step_size(
    dt: Float[torch.Tensor, "batch pos d_inner"], bias: Float[torch.Tensor, " d_inner"]
) -> Float[torch.Tensor, "batch pos d_inner"]:
    """``softplus(dt + bias)``, computed and returned in float32 (float64 for float64)."""
    if _fits(dt) and bias.dtype == torch.float32:
        return _run("STEP_SIZE", dt, bias.detach().expand(*dt.shape[:2], -1))
    dtype = torch.promote_types(dt.dtype, torch.float32)
    return F.softplus(dt.to(dtype) + bias.to(dtype))


def _fits(*tensors: torch.Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        and is_plain(*tensors)
        and all(
            v.dtype == torch.float32 and v.device.type == "cpu" and v.ndim == 3 and v.stride(2) == 1 and v.numel() > 0
            for v in tensors
        )
    )


def _run(kind: str, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    kernels = _kernels()
    out = torch.empty(x.shape, **FLOAT32)
    (batch, length, width), serial = x.shape, x.numel() < SERIAL_BELOW
    where = (v for t in (x, other) for v in (t.data_ptr(), t.stride(0), t.stride(1)))
    run_loop(
        kernels.apply, batch * length, getattr(kernels, kind), length, width, *where, out.data_ptr(), serial=serial
    )
    return out


@cache
def _kernels() -> ModuleType:
    from jambascope.kernels import activations_cpu

    return activations_cpu
