"""The scan of the ``mamba_ssm`` package (its CUDA kernel), for calls that it can serve."""

from __future__ import annotations

from collections.abc import Callable

import torch

from jambascope.errors import ConfigError
from jambascope.kernels.selective_scan.interface import Options, ScanResult


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    options: Options,
) -> ScanResult:
    """See :func:`jambascope.kernels.selective_scan.selective_scan`.

    ``selective_scan_fn`` of mamba_ssm 2.3 takes [B E T] and one dtype for x, dt, B, C and gate: they are transposed,
    and widened to the widest of them. It has no gradient through its last state, so ours refuses one.

    Raises:
        ConfigError: the package is not installed, tensors not on a CUDA device, or an option it does not have.
    """
    unserved = {
        "capture": options.capture,
        "edits": options.edits,
        "mask or resets": options.marks,
        "initial_state": options.initial_state,
    }
    for name, value in unserved.items():
        if value is not None:
            raise ConfigError(f"backend='mamba_ssm' has no {name}; use backend='triton' or 'auto'")
    scan = _kernel(x.device)
    optional = [v for v in (options.gate,) if v is not None]
    dtype = x.dtype
    for v in (dt, B, C, *optional):
        dtype = torch.promote_types(dtype, v.dtype)
    u, delta, B, C, *gate = (v.to(dtype).transpose(1, 2) for v in (x, dt, B, C, *optional))
    D, bias = (None if v is None else v.float() for v in (D, options.dt_bias))
    y, last = scan(
        u, delta, A.float(), B, C, D, z=gate[0] if gate else None, delta_bias=bias, delta_softplus=options.dt_softplus,
        return_last_state=True,
    )  # fmt: skip
    return ScanResult(y.transpose(1, 2).to(x.dtype), _LastState.apply(last), None)


def _kernel(device: torch.device) -> Callable:
    if device.type != "cuda":
        raise ConfigError(f"backend='mamba_ssm' runs on CUDA devices, not on {device}; use 'auto'")
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        message = f"backend='mamba_ssm' needs the mamba-ssm package ({error}); install it or use 'auto'"
        raise ConfigError(message) from error
    return selective_scan_fn


class _LastState(torch.autograd.Function):
    @staticmethod
    def forward(ctx, last):
        return last.view_as(last)

    @staticmethod
    def backward(ctx, grad):
        raise ConfigError("backend='mamba_ssm' has no gradient through final_state; use backend='triton' or 'auto'")
