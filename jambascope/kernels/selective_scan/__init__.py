"""The selective scan of Mamba-1: one function, interchangeable backends.

``reference``  short torch, any device and dtype: the definition every other backend is tested against
``cpu``        numba loops, float32, forward and backward
``triton``     CUDA and ROCm, and Triton's interpreter
``mamba_ssm``  its CUDA kernel, where that package is installed: for calls without states in or out of the middle
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float

from jambascope.errors import ConfigError, InputError
from jambascope.kernels import activations, triton_runtime
from jambascope.kernels.packed import checked_bounds, checked_rows, picked, refuse_packed, side_by_side
from jambascope.kernels.plain import is_plain, wants_gradient
from jambascope.kernels.selective_scan import cpu
from jambascope.kernels.selective_scan.interface import (
    Options,
    ScanResult,
    StateEdits,
    checked_indices,
    make_marks,
    step_size_of,
)

__all__ = ["ScanResult", "StateEdits", "selective_scan", "step_size"]

Backend = Literal["auto", "reference", "cpu", "triton", "mamba_ssm"]
BACKENDS = ("reference", "cpu", "triton", "mamba_ssm")
MOST_RANKS = 16
"""Of ``dt_weight``, up to which the CPU loop multiplies by it: of more a library makes a product."""


def selective_scan(
    x: Float[torch.Tensor, "batch pos d_inner"],
    dt: Float[torch.Tensor, "batch pos d_inner"] | Float[torch.Tensor, "batch pos dt_rank"],
    A: Float[torch.Tensor, "d_inner d_state"],
    B: Float[torch.Tensor, "batch pos d_state"],
    C: Float[torch.Tensor, "batch pos d_state"],
    D: Float[torch.Tensor, " d_inner"] | None = None,
    *,
    gate: Float[torch.Tensor, "batch pos d_inner"] | None = None,
    dt_bias: Float[torch.Tensor, " d_inner"] | None = None,
    dt_softplus: bool = False,
    dt_weight: Float[torch.Tensor, "d_inner dt_rank"] | None = None,
    initial_state: Float[torch.Tensor, "batch d_inner d_state"] | None = None,
    mask: Bool[torch.Tensor, "batch pos"] | None = None,
    resets: Bool[torch.Tensor, "batch pos"] | None = None,
    capture: Sequence[int] | Literal["all"] | None = None,
    capture_channels: Sequence[int] | None = None,
    edits: StateEdits | None = None,
    cu_seqlens: Sequence[int] | None = None,
    initial_rows: Sequence[int] | None = None,
    return_last_state: bool = True,
    backend: Backend = "auto",
) -> ScanResult:
    """``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t``;  ``y_t = C_t h_t + D x_t``, times ``SiLU(gate_t)`` if given.

    Mamba, arXiv 2312.00752, equations 2 and 4. A position with ``dt = 0`` leaves the state as it was.

    Args:
        x, dt, gate: [B T E].  A: [E N], negative.  B, C: [B T N].  D, dt_bias: [E].
        dt_bias, dt_softplus: the step size is ``softplus(dt + dt_bias)``, computed in float32; without them ``dt``
            is the step size itself.
        dt_weight: [E R], where dt is [B T R] and this times it what is meant; of few ranks no backend writes that out.
        initial_state: [B E N], the state before the first position; zeros when absent.
        mask: [B T], true at tokens. Padding, wherever it stands, leaves the state as it was, and ``y`` is 0 there.
        resets: [B T], true at the first token of each document packed into a row: it remembers nothing before it.
        capture: positions (ascending, distinct) whose states to return, after their edits, or ``"all"``.
        capture_channels: the channels (ascending, distinct) whose states to return; all when absent.
        edits: affine edits of the state; what they set flows on into later positions.
        cu_seqlens: ascending from 0 to T: where rows of different lengths, packed one behind the other into x [1 T E],
            begin and end. The initial and final states are then [row E N]; without mask, resets, captures and edits.
        initial_rows: of packed rows, which of any number of initial states each begins with; -1 for zeros.
        return_last_state: False where nobody wants ``final_state``, which is then None where it can be spared.
        backend: ``"auto"`` takes ``triton`` on a GPU where it is installed, ``cpu`` for float32, bfloat16 and float16
            on a CPU, else ``reference``.

    Returns:
        ``ScanResult(y [B T E], final_state [B E N], captured [B channel capture N] or None)``; all differentiable,
        also with respect to ``initial_state`` and the edits. States are float32 (float64 for float64 input).

    Raises:
        ConfigError: an unknown backend, or one that cannot take these tensors.
        InputError: shapes that do not fit, or positions or channels out of range, unsorted or repeated.
    """
    bounds = None if cu_seqlens is None else checked_bounds(cu_seqlens, x)
    initial_rows = checked_rows("initial_rows", initial_rows, initial_state, bounds)
    _check_shapes(x, dt, A, B, C, D, gate, dt_bias, initial_state, mask, resets, bounds, initial_rows, dt_weight)
    length, d_inner = x.shape[1:]
    if capture is not None:
        capture = checked_indices(capture, length, "capture", "positions")
    if capture_channels is not None:
        if capture is None:
            raise InputError("capture_channels says which channels to capture; give capture (positions) too")
        capture_channels = checked_indices(capture_channels, d_inner, "capture_channels", "channels")
    if edits is not None:
        edits = _checked_edits(edits, x, A)
    scan = _backend(backend, x)
    if dt_weight is not None:
        others = (x, A, B, C, D, gate, initial_state, *(edits[1:] if edits else ()))
        if not (_is_cpu(scan) and _in_loop(dt, dt_weight, dt_bias)) or wants_gradient(*others):
            dt, dt_weight = F.linear(dt, dt_weight), None
    options = Options(
        gate,
        dt_bias,
        dt_softplus,
        dt_weight,
        initial_state,
        make_marks(mask, resets),
        capture,
        capture_channels,
        edits,
        return_last_state,
    )
    if bounds is None:
        return scan(x, dt, A, B, C, D, options)
    refuse_packed(mask=mask, resets=resets, capture=capture, edits=edits)
    return _packed_scan(scan, x, dt, A, B, C, D, options, bounds, initial_rows)


def step_size(
    dt: Float[torch.Tensor, "batch pos dt_rank"],
    weight: Float[torch.Tensor, "d_inner dt_rank"],
    bias: Float[torch.Tensor, " d_inner"],
) -> Float[torch.Tensor, "batch pos d_inner"]:
    """``softplus(dt weight^T + bias)``, in float32 at least: what :func:`selective_scan` makes of ``dt_weight``,
    ``dt_bias`` and ``dt_softplus``, without gradients to the last bit, so that a hook that looks changes nothing.

    Raises:
        InputError: shapes that do not fit.
    """
    if dt.ndim != 3 or weight.ndim != 2 or weight.shape[1] != dt.shape[2] or bias.shape != weight.shape[:1]:
        shapes = ", ".join(str(tuple(v.shape)) for v in (dt, weight, bias))
        raise InputError(f"dt, weight and bias have shapes {shapes}; give [B T R], [E R] and [E]")
    if dt.device.type == "cpu" and is_plain(dt) and _in_loop(dt, weight, bias):
        return cpu.step_sizes(dt, weight, bias)
    return activations.step_size(F.linear(dt, weight), bias)


def _in_loop(dt: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the CPU loop multiplies by the weight."""
    few = dt.dtype == weight.dtype == torch.float32 and 0 < weight.shape[1] <= MOST_RANKS
    here = dt.device == weight.device and not torch.is_autocast_enabled("cpu")
    return few and here and not wants_gradient(dt, weight, bias)


def _packed_scan(scan, x, dt, A, B, C, D, options: Options, bounds: np.ndarray, initial_rows) -> ScanResult:
    """Rows of different lengths: by the loops themselves, or side by side, where what follows a row has a step of 0 and
    leaves its state as it was."""
    tensors = (x, dt, A, B, C, D, options.gate, options.dt_bias, options.initial_state)
    if _is_cpu(scan) and not wants_gradient(*tensors):
        return scan(x, dt, A, B, C, D, options, bounds, initial_rows)
    initial_state = options.initial_state if initial_rows is None else picked(options.initial_state, initial_rows)
    if options.dt_softplus or options.dt_bias is not None:
        dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
        dt = step_size_of(dt, options.dt_bias, options.dt_softplus)
    options = options._replace(dt_bias=None, dt_softplus=False)

    def run(over_time, of_rows) -> tuple[torch.Tensor, torch.Tensor]:
        x, dt, B, C, *gate = over_time
        own = dict(gate=gate[0] if gate else None, initial_state=of_rows[0])
        return scan(x, dt, A, B, C, D, options._replace(**own))[:2]

    over_time = [x, dt, B, C] if options.gate is None else [x, dt, B, C, options.gate]
    return ScanResult(*side_by_side(run, over_time, [initial_state], bounds), None)


def _is_cpu(scan: Callable) -> bool:
    return scan.__module__ == f"{__name__}.cpu"


def _backend(name: str, x: torch.Tensor) -> Callable[..., ScanResult]:
    if name == "auto":
        if x.device.type == "cpu":
            name = "cpu" if x.dtype != torch.float64 and is_plain(x) else "reference"
        else:
            name = "triton" if triton_runtime.can_launch(x) and x.dtype != torch.float64 else "reference"
    if name not in BACKENDS:
        raise ConfigError(f"backend={name!r} is not one of {list(BACKENDS)}; use 'auto' to have one chosen")
    if name != "reference" and x.dtype == torch.float64:
        raise ConfigError(f"backend={name!r} computes in float32, not {x.dtype}; use 'auto' or 'reference'")
    if name == "cpu" and x.device.type != "cpu":
        raise ConfigError(f"backend='cpu' cannot read a tensor on {x.device}; use 'auto' or move it to the CPU")
    if name == "triton" and not triton_runtime.can_launch(x):
        raise ConfigError(
            f"backend='triton' cannot run on {x.device}: it needs a GPU and the triton package, or TRITON_INTERPRET=1 "
            "set before the first scan; use 'auto'"
        )
    return import_module(f"jambascope.kernels.selective_scan.{name}").selective_scan


def _check_shapes(
    x, dt, A, B, C, D, gate, dt_bias, initial_state, mask, resets, bounds, initial_rows, dt_weight
) -> None:
    if x.ndim != 3 or A.ndim != 2 or not x.is_floating_point():
        raise InputError(
            f"x and A are {x.dtype} {tuple(x.shape)} and {tuple(A.shape)}; give floating-point [B T E] and [E N]"
        )
    (batch, length, d_inner), d_state = x.shape, A.shape[1]
    rows = batch if bounds is None else len(bounds) - 1
    if initial_rows is not None and initial_state is not None:
        rows = len(initial_state)
    if length == 0:
        raise InputError("x has no positions (shape [B 0 E]); a scan needs at least one")
    if 0 in (batch, d_inner, d_state):
        raise InputError(f"x {tuple(x.shape)} and A {tuple(A.shape)} have an axis of size 0; a scan needs at least one")
    ranks = d_inner if dt_weight is None else dt_weight.shape[-1]
    expected = {
        "dt": (dt, (batch, length, ranks)),
        "dt_weight": (dt_weight, (d_inner, ranks)),
        "A": (A, (d_inner, d_state)),
        "B": (B, (batch, length, d_state)),
        "C": (C, (batch, length, d_state)),
        "D": (D, (d_inner,)),
        "gate": (gate, (batch, length, d_inner)),
        "dt_bias": (dt_bias, (d_inner,)),
        "initial_state": (initial_state, (rows, d_inner, d_state)),
        "mask": (mask, (batch, length)),
        "resets": (resets, (batch, length)),
    }
    for name, (value, shape) in expected.items():
        if value is not None and tuple(value.shape) != shape:
            raise InputError(f"{name} has shape {tuple(value.shape)}; with x {tuple(x.shape)} it must be {shape}")
        if value is not None and value.device != x.device:
            raise InputError(f"{name} is on {value.device} and x on {x.device}; move one of them")
    for name, value in (("mask", mask), ("resets", resets)):
        if value is not None and value.dtype != torch.bool:
            raise InputError(f"{name} is {value.dtype}; give booleans ({name}.bool())")


def _checked_edits(edits: StateEdits, x: torch.Tensor, A: torch.Tensor) -> StateEdits:
    if not isinstance(edits, StateEdits) or not all(isinstance(v, torch.Tensor) for v in edits[1:]):
        raise InputError("edits must be a StateEdits(positions, scale, shift) with tensors [B E P N]")
    positions = checked_indices(edits.positions, x.shape[1], "edits.positions", "positions")
    expected = (x.shape[0], x.shape[2], len(positions), A.shape[1])
    for name in ("scale", "shift"):
        if tuple(getattr(edits, name).shape) != expected:
            raise InputError(f"edits.{name} has shape {tuple(getattr(edits, name).shape)}; give {expected} [B E P N]")
    return edits._replace(positions=positions)
