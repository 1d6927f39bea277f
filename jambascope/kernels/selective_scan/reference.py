"""The definition of the selective scan: short, differentiable torch that reads like the paper.

Symbols (Mamba, arXiv 2312.00752, section 3; axis letters as everywhere in this project):

    B batch   T position   E channel (d_inner)   N state (d_state)

    x   [B T E]   input of the scan (after conv and SiLU)
    dt  [B T E]   step size, > 0: softplus(dt + dt_bias) where asked for
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

from jambascope.kernels.selective_scan.interface import PADDING, RESET, Options, ScanResult, step_size_of


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    options: Options,
) -> ScanResult:
    """See :func:`jambascope.kernels.selective_scan.selective_scan`; one Python step per position."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch, length, d_inner = x.shape
    out_dtype, x, dt, A, B, C = x.dtype, x.to(dtype), dt.to(dtype), A.to(dtype), B.to(dtype), C.to(dtype)
    h = options.initial_state
    h = x.new_zeros(batch, d_inner, A.shape[1]) if h is None else h.to(dtype)
    dt = step_size_of(dt, options.dt_bias, options.dt_softplus)
    padding = resets = None
    if options.marks is not None:
        padding, resets = (options.marks & PADDING).bool(), (options.marks & RESET).bool()
        x, dt = x.masked_fill(padding[..., None], 0.0), dt.masked_fill(padding[..., None], 0.0)
    edits = options.edits
    edit_at = {} if edits is None else {int(p): i for i, p in enumerate(edits.positions)}
    keep = set() if options.capture is None else {int(p) for p in options.capture}

    ys, kept = [], []
    for t in range(length):
        if resets is not None:
            h = h.masked_fill(resets[:, t, None, None], 0.0)
        decay = torch.exp(einsum(dt[:, t], A, "b e, e n -> b e n"))
        write = einsum(dt[:, t] * x[:, t], B[:, t], "b e, b n -> b e n")
        h = decay * h + write
        if t in edit_at:
            h = h * edits.scale[:, :, edit_at[t]].to(dtype) + edits.shift[:, :, edit_at[t]].to(dtype)
        if t in keep:
            kept.append(h if options.channels is None else h[:, torch.as_tensor(options.channels)])
        ys.append(einsum(h, C[:, t], "b e n, b n -> b e"))

    y = torch.stack(ys, dim=1)
    if D is not None:
        y = y + D.to(dtype) * x
    if options.gate is not None:
        y = y * F.silu(options.gate.to(dtype))
    if padding is not None:
        y = y.masked_fill(padding[..., None], 0.0)
    captured = None
    if options.capture is not None:
        channels = d_inner if options.channels is None else len(options.channels)
        captured = torch.stack(kept, dim=2) if kept else h.new_empty(batch, channels, 0, A.shape[1])
    return ScanResult(y.to(out_dtype), h, captured)
