"""Launches of the Triton scan as operators of torch, which know the shapes of their results without running."""

from __future__ import annotations

import math

import torch

from jambascope.kernels import triton_runtime

CHUNK = 32
"""Positions between two checkpoints of the state."""
CARRY_BLOCK = 128
STATES_PER_STEP = 512
"""Of one program of the single-step update: few, so that a batch of one still spreads over the GPU."""
LN_2 = math.log(2)


def layout(lanes: int, backward: bool, edits: bool, captures: bool, d_state: int) -> dict[str, int]:
    """STEPS, the positions computed between two loads, and warps per program, such that nothing spills.

    Addresses of edited and captured states take registers, so programs that have them go by single positions, as do
    all backwards with 64 lanes (AMD), whose scalar registers would spill. Backwards with edits a warp of 32 lanes
    would spill; two warps hold half of the states of a channel in each thread, and the sums over N cross them.
    """
    steps = 1 if edits or captures or (backward and lanes == 64) else 2
    return dict(STEPS=steps, num_warps=2 if backward and edits and lanes == 32 and d_state == 16 else 1)


def lanes() -> int:
    """Threads of a warp, and channels of a program."""
    return 64 if torch.version.hip else 32


def padded_states(d_state: int, lanes: int) -> int:
    """A power of two; with 64 lanes 1 or 16, since fewer would leave more addresses in scalar registers than fit."""
    return 16 if lanes == 64 and d_state > 1 else 1 << (d_state - 1).bit_length()


def _strides(*tensors: torch.Tensor | None) -> tuple[int, ...]:
    """Of batch and time."""
    return tuple(s for v in tensors for s in ((0, 0) if v is None else v.stride()[:2]))


def _carry(ends, products, given, starts, reverse: bool) -> None:
    from jambascope.kernels.selective_scan import triton_kernels as k

    batch, segments, d_state, d_inner = ends.shape
    size = d_state * d_inner
    k.carry_kernel[(batch * -(-size // CARRY_BLOCK),)](
        ends, products, given, starts, segments, size, REVERSE=reverse, BLOCK=CARRY_BLOCK, num_warps=4
    )


@torch.library.custom_op("jambascope::selective_scan_forward", mutates_args=())
def scan_forward(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    BC: torch.Tensor,
    D: torch.Tensor | None,
    gate: torch.Tensor | None,
    bias: torch.Tensor | None,
    h0: torch.Tensor | None,
    edits: torch.Tensor | None,
    marks: torch.Tensor | None,
    edit_slot: torch.Tensor | None,
    capture_slot: torch.Tensor | None,
    channel_slot: torch.Tensor | None,
    n_captured: int,
    n_channels: int,
    softplus: bool,
    segment: int,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y [B T E], last [B N E], captured [B P N channel], checkpoints [B ceil(T/CHUNK) N E] (empty unless ``keep``)."""
    from jambascope.kernels.selective_scan import triton_kernels as k

    (batch, length, d_inner), d_state = x.shape, A.shape[0]
    results = _forward_results(x, n_captured, n_channels, d_state, keep)
    y, last, captured, checkpoints = results
    block_e = lanes()
    segments = -(-length // segment)
    n_edits = 0 if edits is None else edits.shape[1]
    sizes = (length, d_inner, segment, n_edits, n_captured, n_channels, checkpoints.shape[1])
    numbers = (*sizes, *_strides(x, dt, gate))
    constants = dict(
        DT_SOFTPLUS=softplus, N=d_state, CHUNK=CHUNK, BLOCK_E=block_e, num_stages=1,
        **layout(block_e, False, edit_slot is not None, capture_slot is not None, d_state),
    )  # fmt: skip
    grid = (batch * segments * -(-d_inner // block_e),)
    with triton_runtime.on(x.device):
        starts = h0
        if segments > 1:
            ends, products, starts = last.new_empty(3, batch, segments, d_state, d_inner)
            k.forward_kernel[grid](
                x, dt, A, BC, None, None, bias, marks, None, edit_slot, edits, None, None,
                None, None, None, None, ends, products, *numbers, **constants,
            )  # fmt: skip
            _carry(ends, products, h0, starts, False)
        k.forward_kernel[grid](
            x, dt, A, BC, D, gate, bias, marks, starts, edit_slot, edits, capture_slot, channel_slot,
            y, last, captured if n_captured else None, checkpoints if keep else None, None, None, *numbers, **constants,
        )  # fmt: skip
    return results


def _forward_results(x, n_captured, n_channels, d_state, keep):
    batch, length, d_inner = x.shape
    state = x.new_empty(batch, d_state, d_inner, dtype=torch.float32)
    captured = state.new_empty(batch, n_captured, d_state, n_channels)
    checkpoints = state.new_empty(batch, -(-length // CHUNK) if keep else 0, d_state, d_inner)
    return x.new_empty(batch, length, d_inner), state, captured, checkpoints


@scan_forward.register_fake
def _(x, dt, A, BC, D, gate, bias, h0, edits, marks, edit_slot, capture_slot, channel_slot, n_captured,
      n_channels, softplus, segment, keep):  # fmt: skip
    return _forward_results(x, n_captured, n_channels, A.shape[0], keep)


@torch.library.custom_op("jambascope::selective_scan_backward", mutates_args=())
def scan_backward(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    BC: torch.Tensor,
    D: torch.Tensor | None,
    gate: torch.Tensor | None,
    bias: torch.Tensor | None,
    h0: torch.Tensor | None,
    edits: torch.Tensor | None,
    marks: torch.Tensor | None,
    edit_slot: torch.Tensor | None,
    capture_slot: torch.Tensor | None,
    channel_slot: torch.Tensor | None,
    checkpoints: torch.Tensor,
    dy: torch.Tensor,
    dlast: torch.Tensor,
    dcaptured: torch.Tensor,
    n_captured: int,
    n_channels: int,
    softplus: bool,
    segment: int,
) -> list[torch.Tensor]:
    """Gradients of the first nine arguments; empty for those that are None."""
    from jambascope.kernels.selective_scan import triton_backward as k

    batch, length, d_inner = x.shape
    results = _gradients(x, dt, A, BC, D, gate, bias, h0, edits)
    grad_x, grad_dt, _, _, _, grad_gate, _, _, grad_edits = results
    block_e = lanes()
    segments, blocks = -(-length // segment), -(-d_inner // block_e)
    n_edits, d_state = 0 if edits is None else edits.shape[1], A.shape[0]
    shape = layout(block_e, True, edit_slot is not None, capture_slot is not None, d_state)
    sizes = (length, d_inner, segment, n_edits, n_captured, n_channels)
    constants = dict(DT_SOFTPLUS=softplus, N=d_state, CHUNK=CHUNK, BLOCK_E=block_e, num_stages=1)
    scratch = A.new_empty(batch * segments * blocks, CHUNK // shape["STEPS"], d_state, block_e)
    sums = A.new_empty(batch, segments, 2 * d_state + 2, d_inner)
    part_BC = A.new_empty(blocks, *BC.shape)
    if not n_captured:
        dcaptured = None
    grid = (batch * segments * blocks,)
    with triton_runtime.on(x.device):
        lambdas = dlast
        if segments > 1:
            ends, products, lambdas = A.new_empty(3, batch, segments, d_state, d_inner)
            k.adjoint_ends_kernel[grid](
                dt, A, BC, gate, bias, marks, edit_slot, edits, capture_slot, channel_slot, dy, dcaptured,
                ends, products, *sizes, *_strides(dt, gate), num_warps=1, **constants,
            )  # fmt: skip
            _carry(ends, products, dlast, lambdas, True)
        k.backward_kernel[grid](
            x, dt, A, BC, D, gate, bias, marks, edit_slot, edits, capture_slot, channel_slot,
            checkpoints, dy, lambdas, dcaptured, scratch, grad_x, grad_dt, None if gate is None else grad_gate,
            part_BC, sums, grad_edits, *sizes, *_strides(x, dt, gate), **shape,
            **constants,
        )  # fmt: skip
    of_A, of_start, of_D, of_bias = sums.split((d_state, d_state, 1, 1), dim=2)
    results[2] = of_A.sum((0, 1)) * LN_2
    results[3] = part_BC.sum(0)
    if D is not None:
        results[4] = of_D.sum((0, 1, 2))
    if bias is not None:
        results[6] = of_bias.sum((0, 1, 2))
    if h0 is not None:
        results[7] = of_start[:, 0].contiguous()
    return results


def _gradients(*inputs: torch.Tensor | None) -> list[torch.Tensor]:
    """Contiguous, one of each input's shape and type."""
    return [inputs[0].new_empty(0) if v is None else v.new_empty(v.shape) for v in inputs]


@scan_backward.register_fake
def _(x, dt, A, BC, D, gate, bias, h0, edits, *rest):
    return _gradients(x, dt, A, BC, D, gate, bias, h0, edits)


@torch.library.custom_op("jambascope::selective_state_update", mutates_args=())
def state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    gate: torch.Tensor | None,
    bias: torch.Tensor | None,
    softplus: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [B E] and the new state, laid out as ``state`` is."""
    from jambascope.kernels.selective_scan import triton_kernels as k

    batch, d_inner, d_state = state.shape
    state = _dense(state)
    y, new_state = x.new_empty(batch, d_inner), torch.empty_like(state)
    block_n = 1 << (d_state - 1).bit_length()
    block_e = max(1, STATES_PER_STEP // block_n)
    with triton_runtime.on(x.device):
        k.state_update_kernel[(batch * -(-d_inner // block_e),)](
            state, x, dt, A, B, C, D, gate, bias, y, new_state, d_inner, *state.stride(), *A.stride(), x.stride(0),
            dt.stride(0), B.stride(0), C.stride(0), 0 if gate is None else gate.stride(0),
            DT_SOFTPLUS=softplus, N=d_state, BLOCK_N=block_n, BLOCK_E=block_e, num_warps=2, num_stages=1,
        )  # fmt: skip
    return y, new_state


def _dense(state: torch.Tensor) -> torch.Tensor:
    """As it is if each element has an address of its own and none lies between: [B E N] or [B N E] in memory."""
    return state if state.is_contiguous() or state.transpose(1, 2).is_contiguous() else state.contiguous()


@state_update.register_fake
def _(state, x, dt, A, B, C, D, gate, bias, softplus):
    return x.new_empty(x.shape), torch.empty_like(_dense(state))
