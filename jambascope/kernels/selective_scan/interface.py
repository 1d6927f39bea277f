"""What goes into a selective scan beside its tensors, and what comes out: shared by every backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float

from jambascope.errors import InputError

RESET, PADDING = 1, 2
"""Bits of a position's mark: nothing before it is remembered; it neither writes, decays nor reads."""


class StateEdits(NamedTuple):
    """An affine edit of the state at chosen positions: ``h_t <- scale * h_t + shift``.

    The edited state flows on into every later position, and gradients flow through both fields.
    """

    positions: Sequence[int]
    """Positions within this call, ascending and distinct (numbers, not a tensor on a device: nothing waits for it)."""
    scale: Float[torch.Tensor, "batch d_inner edit d_state"]
    shift: Float[torch.Tensor, "batch d_inner edit d_state"]

    @classmethod
    def set_to(cls, positions: Sequence[int], value: torch.Tensor) -> StateEdits:
        """The state becomes ``value`` [B E P N] at these positions."""
        return cls(positions, torch.zeros_like(value), value)

    @classmethod
    def add(cls, positions: Sequence[int], value: torch.Tensor) -> StateEdits:
        """``value`` [B E P N] is added to the state at these positions."""
        return cls(positions, torch.ones_like(value), value)

    @classmethod
    def multiply(cls, positions: Sequence[int], factor: torch.Tensor) -> StateEdits:
        """The state is multiplied by ``factor`` [B E P N] at these positions."""
        return cls(positions, factor, torch.zeros_like(factor))


class ScanResult(NamedTuple):
    """``y`` in the dtype of ``x``; states in float32 (float64 for float64 input)."""

    y: Float[torch.Tensor, "batch pos d_inner"]
    final_state: Float[torch.Tensor, "batch d_inner d_state"] | None
    captured: Float[torch.Tensor, "batch channel capture d_state"] | None


class Options(NamedTuple):
    """What every backend takes beside the tensors of the recurrence, checked and in one form."""

    gate: torch.Tensor | None
    dt_bias: torch.Tensor | None
    dt_softplus: bool
    dt_weight: torch.Tensor | None
    """[E R], where dt is [B T R]; only the CPU loop without gradients meets one."""
    initial_state: torch.Tensor | None
    marks: torch.Tensor | None
    """[B T] uint8 on the device: RESET and PADDING bits; None when every position is an ordinary token."""
    capture: np.ndarray | None
    """Positions as int64."""
    channels: np.ndarray | None
    """The channels to capture as int64; None for all."""
    edits: StateEdits | None
    """With positions as an int64 array."""
    return_last_state: bool


def step_size_of(dt: torch.Tensor, bias: torch.Tensor | None, softplus: bool) -> torch.Tensor:
    """``softplus(dt + bias)``, each only if asked for, in the type of ``dt``."""
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return F.softplus(dt) if softplus else dt


def make_marks(
    mask: Bool[torch.Tensor, "batch pos"] | None, resets: Bool[torch.Tensor, "batch pos"] | None
) -> torch.Tensor | None:
    """One byte a position from a mask (true at tokens) and resets (true where a document begins)."""
    if mask is None and resets is None:
        return None
    marks = 0 if resets is None else resets.to(torch.uint8) * RESET
    if mask is not None:
        marks = marks + (~mask).to(torch.uint8) * PADDING
    return marks.contiguous()  # as kernels read it; a transposed mask would have passed on its strides


def checked_indices(indices: Sequence[int] | Literal["all"], size: int, name: str, what: str) -> np.ndarray:
    """``indices`` as an int64 array, ascending and distinct within ``0..size-1``."""
    if isinstance(indices, str):
        if indices != "all":
            raise InputError(f"{name}={indices!r} must be 'all' or a list of {what}")
        return np.arange(size)
    if isinstance(indices, torch.Tensor):
        indices = indices.cpu()
    values = np.asarray(indices)
    if values.ndim != 1 or not (values.size == 0 or np.issubdtype(values.dtype, np.integer)):
        raise InputError(f"{name} must be a list of whole numbers, not {str(indices)[:60]}")
    values = values.astype(np.int64)
    if values.size and (values[0] < 0 or values[-1] >= size or (np.diff(values) <= 0).any()):
        raise InputError(f"{name}={values[:8].tolist()} must be ascending, distinct {what} within 0..{size - 1}")
    return values
