"""The CPU backend: autograd and shapes around the numba loops of ``cpu_kernels``."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from jambascope.kernels.compiling import announce_first_compile
from jambascope.kernels.selective_scan.interface import ScanResult, StateEdits
from jambascope.kernels.threads import run_items

LOG2_E = math.log2(math.e)
SERIAL_BELOW = 65_536
"""State updates below which waking another thread costs more than it saves."""
_NOTHING = np.empty((0, 0, 0, 0), np.float32)
_NO_SLOTS = np.empty(0, np.int32)


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
    """See :func:`jambascope.kernels.selective_scan.selective_scan`. Arithmetic and states in float32."""
    from jambascope.kernels.selective_scan.cpu_kernels import LANES

    d_inner, length = x.shape[2], x.shape[1]
    if D is None:
        D = x.new_zeros(d_inner)
    scale, shift = (None, None) if edits is None else (edits.scale, edits.shift)
    pad = -d_inner % LANES
    channels_last = [x, dt, gate, D]
    channels_first = [A, initial_state]
    if pad:
        channels_last = [None if v is None else F.pad(v, (0, pad)) for v in channels_last]
        channels_first = [None if v is None else F.pad(v, (0, 0, 0, pad)) for v in channels_first]
        scale, shift = [None if v is None else F.pad(v, (0, 0, 0, 0, 0, pad)) for v in (scale, shift)]
    x_, dt_, gate_, D_ = channels_last
    A_, h0_ = channels_first
    inputs = (x_, dt_, A_, B, C, D_, gate_, h0_, scale, shift)
    slots = (
        _slots(None if edits is None else edits.positions, length),
        _slots(capture, length),
        0 if capture is None else len(capture),
    )
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in inputs):
        y, final, captured = _Scan.apply(*inputs, *slots)
    else:
        (y, final, captured), _ = _scan(*inputs, *slots, keep=False)
    # Transposed here and not in the function: hooks may edit a view in place, but not one that a function returned.
    captured = None if capture is None else captured.permute(0, 3, 1, 2)[:, :d_inner]
    if pad:
        y, final = y[..., :d_inner], final[:, :d_inner]
    return ScanResult(y, final, captured)


def _slots(positions: torch.Tensor | None, length: int) -> np.ndarray:
    """[T] int32: which edit or capture slot a position has, -1 for none; empty when there are no positions."""
    if positions is None or len(positions) == 0:
        return _NO_SLOTS
    slots = np.full(length, -1, np.int32)
    slots[positions.cpu().numpy()] = np.arange(len(positions), dtype=np.int32)
    return slots


def _array(v: torch.Tensor | None) -> np.ndarray:
    if v is None:
        return _NOTHING
    return v.detach().to(torch.float32).contiguous().numpy()


def _rank(v: np.ndarray, ndim: int) -> np.ndarray:
    """Numba compiles per rank: an option that is off is an empty array of the rank it would have."""
    return v if v.ndim == ndim else np.empty((0,) * ndim, np.float32)


def _chunk_length(d_state: int) -> int:
    """Positions per backward chunk: decays and states of a chunk stay within about 64 KiB."""
    return max(8, min(64, 512 // d_state))


def _scan(x, dt, A, B, C, D, gate, h0, scale, shift, edit_slot, capture_slot, n_captured, keep):
    """Results (y, final, captured [B slot N E]) and, with ``keep``, what the backward needs."""
    from jambascope.kernels.selective_scan import cpu_kernels as k

    (batch, length, d_inner), d_state = x.shape, A.shape[1]
    chunk = _chunk_length(d_state)
    arrays = [_array(v) for v in (x, dt, A * LOG2_E, B, C, D)]
    arrays.append(_rank(_array(gate), 3))
    h0_array = _rank(_array(h0), 3)
    # [B E slot N] -> [B slot N E]: the layout in which the loop reads a lane block as one vector.
    edit_arrays = [_array(None if v is None else v.permute(0, 2, 3, 1)) for v in (scale, shift)]
    y = torch.empty(batch, length, d_inner)
    final = torch.empty(batch, d_inner, d_state)
    captured = torch.empty(batch, n_captured, d_state, d_inner)
    checkpoints = np.empty((batch, -(-length // chunk) if keep else 0, d_state, d_inner), np.float32)
    outputs = y.numpy(), final.numpy(), captured.numpy(), checkpoints
    announce_first_compile(k.forward)
    run_items(
        lambda start, stop: k.forward(
            start, stop, *arrays, h0_array, edit_slot, *edit_arrays, capture_slot, *outputs, chunk
        ),
        batch * d_inner // k.LANES,
        serial=x.numel() * d_state < SERIAL_BELOW,
    )
    return (y.to(x.dtype), final, captured), (arrays, edit_arrays, checkpoints, chunk)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, gate, h0, scale, shift, edit_slot, capture_slot, n_captured):
        inputs = (x, dt, A, B, C, D, gate, h0, scale, shift)
        results, ctx.kept = _scan(*inputs, edit_slot, capture_slot, n_captured, keep=True)
        ctx.save_for_backward(*inputs)
        ctx.slots = edit_slot, capture_slot
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dfinal, dcaptured):
        from jambascope.kernels.selective_scan import cpu_kernels as k

        inputs = ctx.saved_tensors
        x, _, A, *_, gate, h0, scale, _ = inputs
        (batch, length, d_inner), d_state = x.shape, A.shape[1]
        groups = min(d_inner // k.LANES, max(1, -(-16 // batch)))
        grad_x, grad_dt = torch.empty(2, batch, length, d_inner)
        grad_gate = torch.empty(batch, length, d_inner) if gate is not None else torch.empty(0, 0, 0)
        grad_A = torch.empty(batch, d_inner, d_state)
        grad_D = torch.empty(batch, d_inner)
        # Zeros: with blocks that do not divide evenly, a trailing group may own none and write only its sums.
        grad_B, grad_C = torch.zeros(2, batch, groups, length, d_state)
        grad_h0 = torch.empty(batch, d_inner, d_state) if h0 is not None else torch.empty(0, 0, 0)
        n_edits = 0 if scale is None else scale.shape[2]
        grad_scale, grad_shift = torch.zeros(2, batch, n_edits, d_state, d_inner)
        edit_slot, capture_slot = ctx.slots
        arrays, edit_arrays, checkpoints, chunk = ctx.kept
        dy, dfinal = _array(dy), _array(dfinal)
        dcaptured = _array(dcaptured)
        announce_first_compile(k.backward)
        into = (grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_gate, grad_h0, grad_scale, grad_shift)
        into = [g.numpy() for g in into]
        saved = (*arrays, edit_slot, *edit_arrays, capture_slot, checkpoints, chunk)
        run_items(
            lambda start, stop: k.backward(start, stop, groups, *saved, dy, dfinal, dcaptured, *into),
            batch * groups,
            serial=x.numel() * d_state < SERIAL_BELOW,
        )
        grads = [
            grad_x,
            grad_dt,
            grad_A.sum(0),
            grad_B.sum(1),
            grad_C.sum(1),
            grad_D.sum(0),
            grad_gate if gate is not None else None,
            grad_h0 if h0 is not None else None,
            grad_scale.permute(0, 3, 1, 2) if scale is not None else None,
            grad_shift.permute(0, 3, 1, 2) if scale is not None else None,
        ]
        grads = [None if g is None else g.to(v.dtype) for g, v in zip(grads, inputs, strict=True)]
        return *grads, None, None, None
