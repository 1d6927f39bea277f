"""The CPU backend: autograd and shapes around the numba loops of ``cpu_kernels`` and ``cpu_backward``."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from jambascope.kernels.compiling import announce_first_compile
from jambascope.kernels.packed import picked
from jambascope.kernels.selective_scan.interface import Options, ScanResult
from jambascope.kernels.threads import FLOAT32, run_items, run_loop

LOG2_E = math.log2(math.e)
SERIAL_BELOW = 65_536
"""State updates below which waking another thread costs more than it saves."""
_NOTHING = np.empty(0, np.float32)
_NO_SLOTS = np.empty(0, np.int32)


class _Plan(NamedTuple):
    """What the loops take beside tensors of numbers."""

    dt_softplus: bool
    marks: np.ndarray
    edit_slot: np.ndarray
    capture_slot: np.ndarray
    channel_slot: np.ndarray
    captured_size: tuple[int, int]
    """Positions and channels captured."""
    return_last_state: bool


class _Given(NamedTuple):
    """What the loops of both directions take, in the layout in which they read it."""

    edits_count: int
    tensors: list[torch.Tensor]
    """x, dt, A, B, C, D."""
    gate: torch.Tensor | None
    gate_row: int
    dt_bias: torch.Tensor | None
    plan: _Plan
    edits: list[torch.Tensor | None]
    """Scale and shift."""


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    options: Options,
    bounds: np.ndarray | None = None,
    initial_rows: np.ndarray | None = None,
) -> ScanResult:
    """See :func:`jambascope.kernels.selective_scan.selective_scan`. Arithmetic and states in float32.

    Rows of different lengths (``bounds``) without gradients, marks, edits and captures.
    """
    from jambascope.kernels.vectors import LANES

    length, d_inner = x.shape[1:]
    edits = options.edits
    scale, shift = (None, None) if edits is None else (edits.scale, edits.shift)
    if D is None:
        D = x.new_zeros(d_inner)
    pad = -d_inner % LANES
    if initial_rows is not None and (pad or not _is_solid(options.initial_state)):
        options = options._replace(initial_state=picked(options.initial_state, initial_rows))
        initial_rows = None
    inputs, dt_weight = (x, dt, A, B, C, D, options.gate, options.dt_bias, options.initial_state, scale, shift), None
    if options.dt_weight is not None:
        dt_weight = F.pad(options.dt_weight.T, (0, pad)) if pad else options.dt_weight.T
    if pad:
        inputs = _pad_channels(inputs, pad, dt_weight is None)
    plan = _plan(options, length, d_inner, pad)
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in inputs):
        assert dt_weight is None, "the adjoint takes step sizes that are written out"
        y, final, captured = _Scan.apply(*inputs, plan._replace(return_last_state=True))
    else:
        rows = dict(bounds=bounds, h0_rows=initial_rows)
        (y, final, captured), _ = _scan(*inputs, plan, keep=False, **rows, dt_weight=dt_weight)
    # Transposed here and not in the function: hooks may edit a view in place, but not one that a function returned.
    captured = None if options.capture is None else captured.permute(0, 3, 1, 2)
    if pad:
        y, final = y[..., :d_inner], None if final is None else final[:, :d_inner]
    return ScanResult(y, final, captured)


def _pad_channels(inputs: tuple, pad: int, dt_has_them: bool) -> tuple:
    x, dt, A, B, C, D, gate, dt_bias, h0, scale, shift = inputs
    x, D, gate, dt_bias = [None if v is None else F.pad(v, (0, pad)) for v in (x, D, gate, dt_bias)]
    dt = F.pad(dt, (0, pad)) if dt_has_them else dt
    A, h0 = [None if v is None else F.pad(v, (0, 0, 0, pad)) for v in (A, h0)]
    scale, shift = [None if v is None else F.pad(v, (0, 0, 0, 0, 0, pad)) for v in (scale, shift)]
    return x, dt, A, B, C, D, gate, dt_bias, h0, scale, shift


def _plan(options: Options, length: int, d_inner: int, pad: int) -> _Plan:
    capture, channels, edits = options.capture, options.channels, options.edits
    channel_slot, n_channels = _NO_SLOTS, 0
    if capture is not None:
        channels = np.arange(d_inner) if channels is None else channels
        channel_slot, n_channels = _slots(channels, d_inner + pad), len(channels)
    return _Plan(
        options.dt_softplus,
        np.empty(0, np.uint8) if options.marks is None else options.marks.numpy().reshape(-1),
        _slots(None if edits is None else edits.positions, length),
        _slots(capture, length),
        channel_slot,
        (0 if capture is None else len(capture), n_channels),
        options.return_last_state,
    )


def _slots(chosen: np.ndarray | None, size: int) -> np.ndarray:
    """[size] int32: which edit or capture slot an index has, -1 for none; empty when nothing is chosen."""
    if chosen is None or len(chosen) == 0:
        return _NO_SLOTS
    slots = np.full(size, -1, np.int32)
    slots[chosen] = np.arange(len(chosen), dtype=np.int32)
    return slots


def _is_solid(states: torch.Tensor | None) -> bool:
    """Whether the loop can read them where they are."""
    return states is None or (states.dtype == torch.float32 and states.mT.is_contiguous())


def solid(v: torch.Tensor | None) -> torch.Tensor | None:
    """Contiguous float32, as loops read it."""
    if v is None:
        return None
    v = v.detach()
    return v if v.dtype == torch.float32 and v.is_contiguous() else v.to(torch.float32).contiguous()


def in_step(v: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """[B T E] whose positions are all equally far apart, and how far: a slice of a projection is not copied."""
    if v is None:
        return None, 0
    v = v.detach()
    of_row, of_position, one = v.stride()
    if v.dtype != torch.float32 or one != 1 or not (len(v) == 1 or of_row == v.shape[1] * of_position):
        v = v.to(torch.float32).contiguous()
    return v, v.stride(1) if v.shape[1] > 1 else v.stride(0)


def _flat(v: torch.Tensor | None) -> np.ndarray:
    """As one run of numbers, which a slice of wider rows is a part of; none for an option that is off."""
    if v is None:
        return _NOTHING
    size = 1 + sum((n - 1) * apart for n, apart in zip(v.shape, v.stride(), strict=True)) if v.numel() else 0
    return v.as_strided((size,), (1,)).numpy()


def _address(v: torch.Tensor | None) -> int:
    return 0 if v is None else v.data_ptr()


def _address_of(array: np.ndarray) -> int:
    return array.ctypes.data if array.size else 0


def _chunk_length(d_state: int) -> int:
    """Positions per backward chunk: decays and states of a chunk stay within about 64 KiB."""
    return max(8, min(64, 512 // d_state))


def _scan(
    x, dt, A, B, C, D, gate, dt_bias, h0, scale, shift,
    plan: _Plan, keep: bool, bounds=None, h0_rows=None, dt_weight=None,
):  # fmt: skip
    """Results (y, final, captured [B slot N channel]) and, with ``keep``, what the backward needs. dt_weight [R E]."""
    from jambascope.kernels.selective_scan import cpu_kernels as k

    (batch, length, d_inner), d_state = x.shape, A.shape[1]
    chunk, y = _chunk_length(d_state), torch.empty(batch, length, d_inner, **FLOAT32)
    if bounds is None:
        bounds = np.arange(batch + 1) * length
    batch = len(bounds) - 1
    gate, gate_row = in_step(gate)
    # States go in and come out as [.. N E]: the layout in which the loop reads a lane block as one vector.
    given = _Given(
        0 if scale is None else scale.shape[2],
        [solid(v) for v in (x, dt, A.detach().float().T * LOG2_E, B, C, D)],
        gate,
        gate_row,
        solid(dt_bias),
        plan,
        [solid(None if v is None else v.permute(0, 2, 3, 1)) for v in (scale, shift)],
    )
    final = torch.empty(batch, d_state, d_inner, **FLOAT32) if plan.return_last_state else None
    positions, channels = plan.captured_size
    captured = torch.empty(batch, positions, d_state, channels, **FLOAT32)
    checkpoints = torch.empty(batch, -(-length // chunk), d_state, d_inner, **FLOAT32) if keep else None
    start_state, dt_weight = solid(None if h0 is None else h0.mT), solid(dt_weight)
    of_rows = bounds.ctypes.data, 0 if h0_rows is None else h0_rows.ctypes.data
    run_loop(
        k.forward, batch * d_inner // k.LANES,
        length, d_inner, d_state, given.edits_count, positions, channels, chunk,
        bool(plan.dt_softplus), 0 if dt_weight is None else len(dt_weight), _address(dt_weight), gate_row, *of_rows,
        *map(_address, given.tensors), _address(gate), _address(given.dt_bias),
        _address_of(plan.marks), _address_of(plan.edit_slot), *map(_address, given.edits),
        _address_of(plan.capture_slot), _address_of(plan.channel_slot),
        *map(_address, (start_state, y, final, captured, checkpoints)),
        serial=x.numel() * d_state < SERIAL_BELOW,
    )  # fmt: skip
    return (y.to(x.dtype), None if final is None else final.mT, captured), (given, checkpoints, chunk)


def step_sizes(dt: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """softplus(dt weight^T + bias), as the loop computes it: [B T R], [E R], [E] -> [B T E]; no gradients."""
    from jambascope.kernels.selective_scan import cpu_kernels as k

    d_inner, ranks = weight.shape
    pad = -d_inner % k.LANES
    dt, weight, bias = solid(dt), solid(F.pad(weight.T, (0, pad))), solid(F.pad(bias, (0, pad)))
    out = torch.empty(*dt.shape[:2], d_inner + pad, **FLOAT32)
    addresses = map(_address, (dt, weight, bias, out))
    serial = out.numel() < SERIAL_BELOW
    run_loop(k.step_sizes_of_low_rank, dt.shape[0] * dt.shape[1], d_inner + pad, ranks, *addresses, serial=serial)
    return out[..., :d_inner].contiguous() if pad else out


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, gate, dt_bias, h0, scale, shift, plan):
        inputs = (x, dt, A, B, C, D, gate, dt_bias, h0, scale, shift)
        results, ctx.kept = _scan(*inputs, plan, keep=True)
        ctx.save_for_backward(*inputs)
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dfinal, dcaptured):
        from jambascope.kernels.selective_scan import cpu_backward as k

        inputs = ctx.saved_tensors
        x, _, A, *_, gate, dt_bias, h0, scale, _ = inputs
        (batch, length, d_inner), d_state = x.shape, A.shape[1]
        groups = min(d_inner // k.LANES, max(1, -(-16 // batch)))
        grad_x, grad_dt = torch.empty(2, batch, length, d_inner, **FLOAT32)
        grad_gate = torch.empty(batch, length, d_inner, **FLOAT32) if gate is not None else torch.empty(0, **FLOAT32)
        grad_A = torch.empty(batch, d_state, d_inner, **FLOAT32)
        grad_D = torch.empty(batch, d_inner, **FLOAT32)
        # Zeros: with blocks that do not divide evenly, a trailing group may own none and write only its sums.
        grad_B, grad_C = torch.zeros(2, batch, groups, length, d_state, **FLOAT32)
        grad_h0 = torch.empty(batch, d_state, d_inner, **FLOAT32) if h0 is not None else torch.empty(0, **FLOAT32)
        n_edits = 0 if scale is None else scale.shape[2]
        grad_scale, grad_shift = torch.zeros(2, batch, n_edits, d_state, d_inner, **FLOAT32)
        above = _flat(solid(dy)), _flat(solid(dfinal.mT)), solid(dcaptured).numpy()
        announce_first_compile(k.backward)
        into = (grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_gate, grad_h0, grad_scale, grad_shift)
        given, checkpoints, chunk = ctx.kept
        plan = given.plan
        arguments = (
            *(groups, (length, d_inner, d_state, given.edits_count), *map(_flat, given.tensors)),
            *(_flat(given.gate), given.gate_row, _flat(given.dt_bias), plan.dt_softplus, plan.marks, plan.edit_slot),
            *(*map(_flat, given.edits), plan.capture_slot, plan.channel_slot, _flat(checkpoints), chunk),
            *(*above, *map(_flat, into)),
        )
        run_items(
            lambda start, stop: k.backward(start, stop, *arguments),
            batch * groups,
            serial=x.numel() * d_state < SERIAL_BELOW,
        )
        grads = [
            grad_x,
            grad_dt,
            grad_A.sum(0).T,
            grad_B.sum(1),
            grad_C.sum(1),
            grad_D.sum(0),
            grad_gate if gate is not None else None,
            grad_dt.sum((0, 1)) if dt_bias is not None else None,
            grad_h0.mT if h0 is not None else None,
            grad_scale.permute(0, 3, 1, 2) if scale is not None else None,
            grad_shift.permute(0, 3, 1, 2) if scale is not None else None,
        ]
        return *(None if g is None else g.to(v.dtype) for g, v in zip(grads, inputs, strict=True)), None
