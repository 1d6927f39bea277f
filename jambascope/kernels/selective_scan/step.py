"""The selective scan of one position, for decoding: read the state once, write it once."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float

from jambascope.errors import ConfigError, InputError
from jambascope.kernels import triton_runtime
from jambascope.kernels.selective_scan.interface import step_size_of

Backend = Literal["auto", "reference", "cpu", "triton"]
BACKENDS = ("reference", "cpu", "triton")


def selective_state_update(
    state: Float[torch.Tensor, "batch d_inner d_state"],
    x: Float[torch.Tensor, "batch d_inner"],
    dt: Float[torch.Tensor, "batch d_inner"],
    A: Float[torch.Tensor, "d_inner d_state"],
    B: Float[torch.Tensor, "batch d_state"],
    C: Float[torch.Tensor, "batch d_state"],
    D: Float[torch.Tensor, " d_inner"] | None = None,
    *,
    gate: Float[torch.Tensor, "batch d_inner"] | None = None,
    dt_bias: Float[torch.Tensor, " d_inner"] | None = None,
    dt_softplus: bool = False,
    backend: Backend = "auto",
) -> tuple[Float[torch.Tensor, "batch d_inner"], Float[torch.Tensor, "batch d_inner d_state"]]:
    """``h = exp(dt A) state + dt x B``;  ``y = C h + D x``, times ``SiLU(gate)`` if given: (y, h).

    Mamba, arXiv 2312.00752, equations 2 and 4; the function of this name in mamba_ssm, but the new state is returned
    and ``state`` left as it was. The new state has the state's type and strides.

    Args:
        state: [B E N].  x, dt, gate: [B E].  A: [E N], negative.  B, C: [B N].  D, dt_bias: [E].
        dt_bias, dt_softplus: the step size is ``softplus(dt + dt_bias)``, in float32; without them ``dt`` itself.
        backend: ``"auto"`` takes ``triton`` on a GPU where it is installed, else ``cpu`` or ``reference``. Where a
            gradient is asked for, ``triton`` is a scan of one position.

    Raises:
        ConfigError: an unknown backend, or one that cannot take these tensors.
        InputError: shapes that do not fit.
    """
    _check_shapes(state, x, dt, A, B, C, D, gate, dt_bias)
    name = _backend(backend, x)
    if name != "triton":
        return _update(state, x, dt, A, B, C, D, gate, dt_bias, dt_softplus)
    tensors = (state, x, dt, A, B, C, D, gate, dt_bias)
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors):
        from jambascope.kernels.selective_scan import selective_scan

        row = [v[:, None] for v in (x, dt)], [v[:, None] for v in (B, C)]
        result = selective_scan(
            *row[0], A, *row[1], D, gate=None if gate is None else gate[:, None], dt_bias=dt_bias,
            dt_softplus=dt_softplus, initial_state=state, backend="triton",
        )  # fmt: skip
        return result.y[:, 0], result.final_state.to(state.dtype)
    from jambascope.kernels.selective_scan.triton_launch import state_update

    x, dt, B, C, gate = (v if v is None or v.stride(1) == 1 else v.contiguous() for v in (x, dt, B, C, gate))
    D, dt_bias = (None if v is None else v.contiguous() for v in (D, dt_bias))
    return state_update(state, x, dt, A, B, C, D, gate, dt_bias, dt_softplus)


def _update(state, x, dt, A, B, C, D, gate, dt_bias, dt_softplus):
    """In torch: any device and dtype, differentiable."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y_dtype, x, dt, A, B, C = x.dtype, x.to(dtype), dt.to(dtype), A.to(dtype), B.to(dtype), C.to(dtype)
    dt = step_size_of(dt, dt_bias, dt_softplus)
    h = torch.exp(dt[..., None] * A) * state.to(dtype) + (dt * x)[..., None] * B[:, None]
    y = einsum(h, C, "b e n, b n -> b e")
    if D is not None:
        y = y + D.to(dtype) * x
    if gate is not None:
        y = y * F.silu(gate.to(dtype))
    return y.to(y_dtype), h.to(state.dtype)


def _backend(name: str, x: torch.Tensor) -> str:
    can_launch = triton_runtime.can_launch(x)
    if name == "auto":
        on_gpu = x.device.type != "cpu" and can_launch and x.dtype != torch.float64
        return "triton" if on_gpu else "reference"
    if name not in BACKENDS:
        raise ConfigError(f"backend={name!r} is not one of {list(BACKENDS)}; use 'auto' to have one chosen")
    if name == "triton" and x.dtype == torch.float64:
        raise ConfigError("backend='triton' computes in float32, not torch.float64; use 'auto' or 'reference'")
    if name == "triton" and not can_launch:
        raise ConfigError(
            f"backend='triton' cannot run on {x.device}: it needs a GPU and the triton package, or TRITON_INTERPRET=1 "
            "set before the first scan; use 'auto'"
        )
    if name == "cpu" and x.device.type != "cpu":
        raise ConfigError(f"backend='cpu' cannot read a tensor on {x.device}; use 'auto' or move it to the CPU")
    return name


def _check_shapes(state, x, dt, A, B, C, D, gate, dt_bias) -> None:
    batch, d_inner = x.shape
    d_state = A.shape[-1]
    expected = {
        "state": (state, (batch, d_inner, d_state)),
        "dt": (dt, (batch, d_inner)),
        "A": (A, (d_inner, d_state)),
        "B": (B, (batch, d_state)),
        "C": (C, (batch, d_state)),
        "D": (D, (d_inner,)),
        "gate": (gate, (batch, d_inner)),
        "dt_bias": (dt_bias, (d_inner,)),
    }
    for name, (value, shape) in expected.items():
        if value is not None and tuple(value.shape) != shape:
            raise InputError(f"{name} has shape {tuple(value.shape)}; with x {tuple(x.shape)} it must be {shape}")
