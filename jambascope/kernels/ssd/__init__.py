"""SSD, the recurrence of Mamba-2: one function, interchangeable backends, both plain torch for any device.

``reference``  position by position: the definition
``chunked``    matrix products within and between chunks of positions
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float

from jambascope.errors import ConfigError, InputError
from jambascope.kernels.packed import checked_bounds, refuse_packed, side_by_side
from jambascope.kernels.selective_scan.interface import StateEdits, checked_indices
from jambascope.kernels.ssd import chunked, reference
from jambascope.kernels.ssd.interface import SSDResult

__all__ = ["SSDResult", "StateEdits", "ssd", "step_size"]

Backend = Literal["auto", "reference", "chunked"]


def ssd(
    x: Float[torch.Tensor, "batch pos head d_head"],
    dt: Float[torch.Tensor, "batch pos head"],
    A: Float[torch.Tensor, " head"],
    B: Float[torch.Tensor, "batch pos group d_state"],
    C: Float[torch.Tensor, "batch pos group d_state"],
    D: Float[torch.Tensor, " head"] | None = None,
    *,
    dt_bias: Float[torch.Tensor, " head"] | None = None,
    dt_softplus: bool = False,
    initial_state: Float[torch.Tensor, "batch head d_head d_state"] | None = None,
    mask: Bool[torch.Tensor, "batch pos"] | None = None,
    resets: Bool[torch.Tensor, "batch pos"] | None = None,
    capture: Sequence[int] | Literal["all"] | None = None,
    edits: StateEdits | None = None,
    cu_seqlens: Sequence[int] | None = None,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> SSDResult:
    """``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T``;  ``y_t = h_t C_t + D x_t``, a state [P N] per head.

    Mamba-2, arXiv 2405.21060, sections 2.1 and 6. A position with ``dt = 0`` leaves the state as it was. Head h reads
    and writes through group ``h // (H / G)`` of B and C.

    Args:
        x: [B T H P].  dt: [B T H].  A: [H], negative.  B, C: [B T G N].  D, dt_bias: [H].
        dt_bias, dt_softplus: the step size is ``softplus(dt + dt_bias)``, computed in float32; without them ``dt``
            is the step size itself.
        initial_state: [B H P N], the state before the first position; zeros when absent.
        mask: [B T], true at tokens. Padding, wherever it stands, leaves the state as it was, and ``y`` is 0 there.
        resets: [B T], true at the first token of each document packed into a row: it remembers nothing before it.
        capture: positions (ascending, distinct) whose states to return, after their edits, or ``"all"``.
        edits: affine edits of the state, scale and shift [B H P edit N]; what they set flows on into later positions.
        cu_seqlens: ascending from 0 to T: where rows of different lengths, packed one behind the other into x
            [1 T H P], begin and end. States are then one per row; without mask, resets, captures and edits.
        chunk_size: positions per chunk of ``chunked``; ``chunked.CHUNK`` when None. Speed and memory, not results.
        backend: ``"auto"`` takes ``reference`` for a single position (a step of decoding), else ``chunked``.

    Returns:
        ``SSDResult(y [B T H P], final_state [B H P N], captured [B H P capture N] or None)``; all differentiable,
        also with respect to ``initial_state`` and the edits. States are float32 (float64 for float64 input).

    Raises:
        ConfigError: an unknown backend, or a chunk size below 1.
        InputError: shapes that do not fit, or positions out of range, unsorted or repeated.
    """
    length, bounds = x.shape[1], None if cu_seqlens is None else checked_bounds(cu_seqlens, x)
    _check_shapes(x, dt, A, B, C, D, dt_bias, initial_state, mask, resets, bounds)
    if bounds is not None:
        refuse_packed(mask=mask, resets=resets, capture=capture, edits=edits)
    if capture is not None:
        capture = checked_indices(capture, length, "capture", "positions").tolist()
    if edits is not None:
        edits = _checked_edits(edits, x, B.shape[-1])
    if chunk_size is not None and (not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1):
        raise ConfigError(
            f"chunk_size={chunk_size!r} must be a whole number of at least 1; None takes the measured one"
        )
    if backend not in ("auto", "reference", "chunked"):
        raise ConfigError(f"backend={backend!r} is not one of ['chunked', 'reference']; use 'auto' to have one chosen")
    dt = step_size(dt, dt_bias) if dt_softplus else dt if dt_bias is None else _add_bias(dt, dt_bias)
    if mask is not None:
        dt = dt.masked_fill(~mask[..., None], 0.0)
    if backend == "reference" or (backend == "auto" and length == 1):
        scan = reference.ssd
    else:
        scan = partial(chunked.ssd, chunk_size=chunk_size or chunked.CHUNK)
    if bounds is not None:  # what follows a row has a step of 0, and leaves its state as it was

        def run(over_time, of_rows) -> tuple[torch.Tensor, torch.Tensor]:
            x, dt, B, C = over_time
            return scan(x, dt, A, B, C, D, of_rows[0], None, None, None)[:2]

        return SSDResult(*side_by_side(run, [x, dt, B, C], [initial_state], bounds), None)
    result = scan(x, dt, A, B, C, D, initial_state, resets, capture, edits)
    return result if mask is None else result._replace(y=result.y.masked_fill(~mask[..., None, None], 0.0))


def step_size(
    dt: Float[torch.Tensor, "batch pos head"], bias: Float[torch.Tensor, " head"] | None
) -> Float[torch.Tensor, "batch pos head"]:
    """``softplus(dt + bias)`` in at least float32, whatever the type of ``dt``."""
    return F.softplus(_add_bias(dt, bias))


def _add_bias(dt: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    dtype = torch.promote_types(dt.dtype, torch.float32)
    return dt.to(dtype) if bias is None else dt.to(dtype) + bias.to(dtype)


def _check_shapes(x, dt, A, B, C, D, dt_bias, initial_state, mask, resets, bounds) -> None:
    if x.ndim != 4 or B.ndim != 4:
        raise InputError(f"x and B have shapes {tuple(x.shape)} and {tuple(B.shape)}; give [B T H P] and [B T G N]")
    batch, length, heads, d_head = x.shape
    groups, d_state = B.shape[2:]
    if length == 0:
        raise InputError("x has no positions (shape [B 0 H P]); a scan needs at least one")
    if groups == 0 or heads % groups:
        raise InputError(f"B has {groups} groups, which must divide the {heads} heads of x")
    expected = {
        "dt": (dt, (batch, length, heads)),
        "A": (A, (heads,)),
        "B": (B, (batch, length, groups, d_state)),
        "C": (C, (batch, length, groups, d_state)),
        "D": (D, (heads,)),
        "dt_bias": (dt_bias, (heads,)),
        "initial_state": (initial_state, (batch if bounds is None else len(bounds) - 1, heads, d_head, d_state)),
        "mask": (mask, (batch, length)),
        "resets": (resets, (batch, length)),
    }
    for name, (value, shape) in expected.items():
        if value is not None and tuple(value.shape) != shape:
            raise InputError(f"{name} has shape {tuple(value.shape)}; with x {tuple(x.shape)} it must be {shape}")
    for name, value in (("mask", mask), ("resets", resets)):
        if value is not None and value.dtype != torch.bool:
            raise InputError(f"{name} is {value.dtype}; give booleans ({name}.bool())")


def _checked_edits(edits: StateEdits, x: torch.Tensor, d_state: int) -> StateEdits:
    positions = checked_indices(edits.positions, x.shape[1], "edits.positions", "positions").tolist()
    expected = (x.shape[0], *x.shape[2:], len(positions), d_state)
    for name in ("scale", "shift"):
        if tuple(getattr(edits, name).shape) != expected:
            raise InputError(f"edits.{name} has shape {tuple(getattr(edits, name).shape)}; give {expected} [B H P E N]")
    dtype = torch.promote_types(x.dtype, torch.float32)
    return StateEdits(positions, edits.scale.to(dtype), edits.shift.to(dtype))
