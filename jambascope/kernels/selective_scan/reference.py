"""The definition of the selective scan: short, differentiable torch that reads like the paper.

Symbols (Mamba, arXiv 2312.00752, section 3; axis letters as everywhere in this project):

    B batch   T position   E channel (d_inner)   N state (d_state)

    x   [B T E]   input of the scan (after conv and SiLU)
    dt  [B T E]   step size, already through softplus, > 0
    A   [E N]     continuous decay, < 0
    B,C [B T N]   input and output maps, one per position
    D   [E]       skip connection
    h   [B E N]   the state, always at least float32

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t          (eqs. 2a and 4, with the simplified B discretisation)
    y_t = C_t h_t + D x_t
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum

from jambascope.kernels.selective_scan.interface import ScanResult, StateEdits


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    gate: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    capture: torch.Tensor | None,
    edits: StateEdits | None,
) -> ScanResult:
    """See :func:`jambascope.kernels.selective_scan.selective_scan`; one Python step per position."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch, length, d_inner = x.shape
    out_dtype, x, dt, A, B, C = x.dtype, x.to(dtype), dt.to(dtype), A.to(dtype), B.to(dtype), C.to(dtype)
    h = x.new_zeros(batch, d_inner, A.shape[1]) if initial_state is None else initial_state.to(dtype)
    edit_at = {} if edits is None else {int(p): i for i, p in enumerate(edits.positions)}
    keep = set() if capture is None else {int(p) for p in capture}

    ys, kept = [], {}
    for t in range(length):
        decay = torch.exp(einsum(dt[:, t], A, "b e, e n -> b e n"))
        write = einsum(dt[:, t] * x[:, t], B[:, t], "b e, b n -> b e n")
        h = decay * h + write
        if t in edit_at:
            h = h * edits.scale[:, :, edit_at[t]].to(dtype) + edits.shift[:, :, edit_at[t]].to(dtype)
        if t in keep:
            kept[t] = h
        ys.append(einsum(h, C[:, t], "b e n, b n -> b e"))

    y = torch.stack(ys, dim=1)
    if D is not None:
        y = y + D.to(dtype) * x
    if gate is not None:
        y = y * F.silu(gate.to(dtype))
    captured = None
    if capture is not None:
        empty = h.new_empty(batch, d_inner, 0, A.shape[1])
        captured = torch.stack([kept[int(p)] for p in capture], dim=2) if len(capture) else empty
    return ScanResult(y.to(out_dtype), h, captured)
