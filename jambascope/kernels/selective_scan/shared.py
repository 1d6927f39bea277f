"""Many states carried on through the same inputs: what a sweep's rows do in the layer that they enter.

R row, A sequence, T position, E d_inner, N d_state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from jambascope.devices import index_tensor
from jambascope.kernels.plain import is_plain, wants_gradient
from jambascope.kernels.selective_scan import selective_scan
from jambascope.kernels.threads import FLOAT32, run_loop

TOGETHER = 16
"""Rows whose decays are computed once: their states stay in L1."""


class Inputs(NamedTuple):
    """Of whole sequences; ``dt`` is the step size itself."""

    x: Float[torch.Tensor, "sequence pos d_inner"]
    dt: Float[torch.Tensor, "sequence pos d_inner"]
    B: Float[torch.Tensor, "sequence pos d_state"]
    C: Float[torch.Tensor, "sequence pos d_state"]
    gate: Float[torch.Tensor, "sequence pos d_inner"]


def scan_on(
    states: Float[torch.Tensor, "row d_inner d_state"],
    sequences: Sequence[int],
    firsts: Sequence[int],
    inputs: Inputs,
    A: Float[torch.Tensor, "d_inner d_state"],
    D: Float[torch.Tensor, " d_inner"],
) -> Float[torch.Tensor, "1 token d_inner"]:
    """``selective_scan`` of each row from its first position to the end of its sequence, one row behind the other.

    Decays and writes are those of the sequence, whatever the state: where rows share one, each is computed once, which
    leaves two of a dozen operations to a row.

    Args:
        states: before the first positions.
        sequences, firsts: of each row; a first position is at most the length, where a row has no token.
    """
    sequences, firsts, length = np.asarray(sequences), np.asarray(firsts), inputs.x.shape[1]
    counts = length - firsts
    bounds = np.concatenate(([0], counts.cumsum()))
    if not bounds[-1]:
        return inputs.x.new_empty(1, 0, inputs.x.shape[2])
    tensors = (states, *inputs, A, D)
    fits = all(v.dtype == torch.float32 and v.device.type == "cpu" for v in tensors) and is_plain(*tensors)
    if fits and A.shape[0] % _lanes() == 0 and not wants_gradient(*tensors):
        return _in_groups(states, sequences, firsts, bounds, inputs, A, D)
    some = np.flatnonzero(counts)
    rows = np.repeat(np.arange(len(firsts)), counts)
    device = inputs.x.device
    at = (
        index_tensor(sequences[rows], device),
        index_tensor(np.arange(bounds[-1]) - bounds[rows] + firsts[rows], device),
    )
    x, dt, B, C, gate = (v[at][None] for v in inputs)
    states = states.index_select(0, index_tensor(some, device))
    cut = np.concatenate(([0], counts[some].cumsum()))
    return selective_scan(x, dt, A, B, C, D, gate=gate, initial_state=states, cu_seqlens=cut).y


def _in_groups(states, sequences, firsts, bounds, inputs: Inputs, A, D) -> torch.Tensor:
    """By the loop of the CPU: neighbouring rows of one sequence at a time."""
    from jambascope.kernels.selective_scan import cpu, shared_kernels

    order = np.lexsort((firsts, sequences))
    new = np.flatnonzero(np.diff(sequences[order], prepend=-1))
    groups = [range(a, b)[i : i + TOGETHER] for a, b in zip(new, [*new[1:], len(order)], strict=True)
              for i in range(0, b - a, TOGETHER)]  # fmt: skip
    cuts = np.array([group.start for group in groups] + [len(order)])
    table = np.stack((sequences[order], firsts[order], bounds[:-1][order], order), axis=1)
    (_, length, d_inner), d_state = inputs.x.shape, A.shape[1]
    y = torch.empty(1, bounds[-1], d_inner, **FLOAT32)
    gate, gate_row = cpu.in_step(inputs.gate)
    held = [cpu.solid(v) for v in (states.mT, inputs.x, inputs.dt, A.T * cpu.LOG2_E, inputs.B, inputs.C, D)]
    run_loop(
        shared_kernels.scan_on, len(groups) * d_inner // _lanes(),
        length, d_inner, d_state, gate_row, cuts.ctypes.data, table.ctypes.data,
        *(v.data_ptr() for v in (*held, gate, y)),
        serial=bounds[-1] * d_inner * d_state < cpu.SERIAL_BELOW,
    )  # fmt: skip
    return y


def _lanes() -> int:
    from jambascope.kernels.vectors import LANES

    return LANES
