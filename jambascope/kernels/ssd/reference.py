"""The definition of SSD, the recurrence of Mamba-2: short, differentiable torch that reads like the paper.

Symbols (Mamba-2, arXiv 2405.21060, sections 2.1 and 6; axis letters as everywhere in this project):

    B batch   T position   H head   P channel of a head   G group of H / G heads   N state

    x   [B T H P]  input of the scan (after conv and SiLU)
    dt  [B T H]    step size, >= 0
    A   [H]        continuous decay, < 0: one number for all P x N entries of a head's state
    B,C [B T G N]  input and output maps, one per position, shared by the heads of a group
    D   [H]        skip connection
    h   [B H P N]  the state, always at least float32

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T
    y_t = h_t C_t + D x_t
"""

from __future__ import annotations

import torch
from einops import einsum

from jambascope.kernels.selective_scan.interface import StateEdits
from jambascope.kernels.ssd.interface import SSDResult


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    resets: torch.Tensor | None,
    capture: list[int] | None,
    edits: StateEdits | None,
) -> SSDResult:
    """See :func:`jambascope.kernels.ssd.ssd`; step sizes final, one Python step per position."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch, length, heads, d_head = x.shape
    out_dtype, x, dt, A = x.dtype, x.to(dtype), dt.to(dtype), A.to(dtype)
    B, C = (m.to(dtype).repeat_interleave(heads // m.shape[2], dim=2) for m in (B, C))  # [B T H N]
    h = initial_state
    h = x.new_zeros(batch, heads, d_head, B.shape[-1]) if h is None else h.to(dtype)
    edit_at = {} if edits is None else {p: i for i, p in enumerate(edits.positions)}
    keep = set(capture or ())

    ys, kept = [], []
    for t in range(length):
        if resets is not None:
            h = h.masked_fill(resets[:, t, None, None, None], 0.0)
        decay = torch.exp(dt[:, t] * A)
        write = einsum(dt[:, t], x[:, t], B[:, t], "b h, b h p, b h n -> b h p n")
        h = decay[..., None, None] * h + write
        if t in edit_at:
            h = h * edits.scale[:, :, :, edit_at[t]] + edits.shift[:, :, :, edit_at[t]]
        if t in keep:
            kept.append(h)
        ys.append(einsum(h, C[:, t], "b h p n, b h n -> b h p"))

    y = torch.stack(ys, dim=1)
    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    captured = None
    if capture is not None:
        captured = torch.stack(kept, dim=3) if kept else h.new_empty(batch, heads, d_head, 0, B.shape[-1])
    return SSDResult(y.to(out_dtype), h, captured)
