"""The selective scan of Mamba-1: one function, interchangeable backends.

``reference``  short torch, any device and dtype: the definition every other backend is tested against
``cpu``        numba loops, float32, forward and backward
``triton``     CUDA and ROCm: the next backend; until it lands GPU tensors take ``reference``
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int

from jambascope.errors import ConfigError, InputError
from jambascope.kernels.selective_scan import cpu, reference
from jambascope.kernels.selective_scan.interface import ScanResult, StateEdits

__all__ = ["ScanResult", "StateEdits", "selective_scan"]

Backend = Literal["auto", "reference", "cpu"]
_BACKENDS = {"reference": reference.selective_scan, "cpu": cpu.selective_scan}


def selective_scan(
    x: Float[torch.Tensor, "batch pos d_inner"],
    dt: Float[torch.Tensor, "batch pos d_inner"],
    A: Float[torch.Tensor, "d_inner d_state"],
    B: Float[torch.Tensor, "batch pos d_state"],
    C: Float[torch.Tensor, "batch pos d_state"],
    D: Float[torch.Tensor, d_inner] | None = None,
    *,
    gate: Float[torch.Tensor, "batch pos d_inner"] | None = None,
    initial_state: Float[torch.Tensor, "batch d_inner d_state"] | None = None,
    capture: Int[torch.Tensor, capture] | Sequence[int] | Literal["all"] | None = None,
    edits: StateEdits | None = None,
    backend: Backend = "auto",
) -> ScanResult:
    """``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t``;  ``y_t = C_t h_t + D x_t``, times ``SiLU(gate_t)`` if given.

    Mamba, arXiv 2312.00752, equations 2 and 4. ``dt`` is the step size after softplus; a position with
    ``dt = 0`` leaves the state as it was (padding).

    Args:
        x, dt, gate: [B T E].  A: [E N], negative.  B, C: [B T N].  D: [E].
        initial_state: [B E N], the state before the first position; zeros when absent.
        capture: positions (ascending, distinct) whose states to return, or ``"all"``.
        edits: affine edits of the state; what they set flows on into later positions.
        backend: ``"auto"`` takes ``cpu`` for float32, bfloat16 and float16 on a CPU, else ``reference``.

    Returns:
        ``ScanResult(y [B T E], final_state [B E N], captured [B E capture N] or None)``; all differentiable,
        also with respect to ``initial_state`` and the edits. States are float32 (float64 for float64 input).

    Raises:
        ConfigError: an unknown backend, or one that cannot take these tensors.
        InputError: shapes that do not fit, or positions outside ``0..T-1``, unsorted or repeated.
    """
    length = x.shape[1]
    _check_shapes(x, dt, A, B, C, D, gate, initial_state)
    if isinstance(capture, str):
        capture = torch.arange(length)
    elif capture is not None:
        capture = _checked_positions(torch.as_tensor(capture, dtype=torch.long), length, "capture")
    if edits is not None:
        expected = (x.shape[0], x.shape[2], len(edits.positions), A.shape[1])
        for name in ("scale", "shift"):
            if tuple(getattr(edits, name).shape) != expected:
                raise InputError(
                    f"edits.{name} has shape {tuple(getattr(edits, name).shape)}; give {expected} [B E P N]"
                )
        edits = edits._replace(positions=_checked_positions(edits.positions, length, "edits.positions"))
    if backend == "auto":
        backend = "cpu" if x.device.type == "cpu" and x.dtype != torch.float64 else "reference"
    if backend not in _BACKENDS:
        raise ConfigError(f"backend={backend!r} is not one of {sorted(_BACKENDS)}; use 'auto' to have one chosen")
    if backend == "cpu" and (x.device.type != "cpu" or x.dtype == torch.float64):
        raise ConfigError(
            f"backend='cpu' computes in float32 on the CPU, not {x.dtype} on {x.device}; use 'auto' or 'reference'"
        )
    return _BACKENDS[backend](x, dt, A, B, C, D, gate, initial_state, capture, edits)


def _check_shapes(x, dt, A, B, C, D, gate, initial_state) -> None:
    batch, length, d_inner = x.shape
    d_state = A.shape[-1]
    if length == 0:
        raise InputError("x has no positions (shape [B 0 E]); a scan needs at least one")
    expected = {
        "dt": (dt, (batch, length, d_inner)),
        "A": (A, (d_inner, d_state)),
        "B": (B, (batch, length, d_state)),
        "C": (C, (batch, length, d_state)),
        "D": (D, (d_inner,)),
        "gate": (gate, (batch, length, d_inner)),
        "initial_state": (initial_state, (batch, d_inner, d_state)),
    }
    for name, (value, shape) in expected.items():
        if value is not None and tuple(value.shape) != shape:
            raise InputError(f"{name} has shape {tuple(value.shape)}; with x {tuple(x.shape)} it must be {shape}")


def _checked_positions(positions: torch.Tensor, length: int, name: str) -> torch.Tensor:
    values = positions.tolist()
    if any(not 0 <= p < length for p in values) or any(b <= a for a, b in zip(values, values[1:], strict=False)):
        raise InputError(f"{name}={values[:8]} must be ascending, distinct positions within 0..{length - 1}")
    return positions
