"""What goes into a selective scan beside its tensors, and what comes out: shared by every backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int


class StateEdits(NamedTuple):
    """An affine edit of the state at chosen positions: ``h_t <- scale * h_t + shift``.

    Set is (0, value), add is (1, value), scale is (factor, 0). The edited state flows on into every
    later position, and gradients flow through both fields.
    """

    positions: Int[torch.Tensor, edit]
    """Positions within this call, ascending and distinct."""
    scale: Float[torch.Tensor, "batch d_inner edit d_state"]
    shift: Float[torch.Tensor, "batch d_inner edit d_state"]


class ScanResult(NamedTuple):
    """``y`` in the dtype of ``x``; states in float32 (float64 for float64 input)."""

    y: Float[torch.Tensor, "batch pos d_inner"]
    final_state: Float[torch.Tensor, "batch d_inner d_state"]
    captured: Float[torch.Tensor, "batch d_inner capture d_state"] | None
