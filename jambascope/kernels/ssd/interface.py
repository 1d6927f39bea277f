"""What comes out of SSD: shared by every backend. State edits are those of the selective scan."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float


class SSDResult(NamedTuple):
    """``y`` in the dtype of ``x``; states in float32 (float64 for float64 input)."""

    y: Float[torch.Tensor, "batch pos head d_head"]
    final_state: Float[torch.Tensor, "batch head d_head d_state"]
    captured: Float[torch.Tensor, "batch head d_head capture d_state"] | None
