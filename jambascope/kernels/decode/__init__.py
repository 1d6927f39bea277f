"""One token through a whole Mamba-1 layer in one call, on a CPU in float32: what decoding takes when nobody listens.

A token's work is so little that calling torch operation by operation costs more than the operations do. A block takes
:func:`mamba_block_step`, which computes what its parts compute, when :func:`fits` says so.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from jaxtyping import Float

from jambascope.config import JambaConfig
from jambascope.kernels.compiling import announce_first_compile
from jambascope.kernels.plain import is_plain

CHANNELS = 16
"""What the channels of a mixer must be a multiple of: the lanes of a vector."""
MOST_ROWS = 4
"""Batch rows from which on torch's products, which read a weight once for all rows, are faster."""


NO_FEED_FORWARD = (None,) * 5
"""Norm, router, gate, up and down of a layer without a feed-forward."""


def fits(x: torch.Tensor) -> bool:
    """Whether ``x`` [B T D] is one token of few rows, in float32 on the CPU, and nobody wants gradients."""
    return (
        x.shape[1] == 1
        and x.shape[0] <= MOST_ROWS
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and is_plain(x)
    )


class Sizes(NamedTuple):
    """Of a layer; those of a feed-forward that it lacks are 0."""

    d_model: int
    d_inner: int
    d_state: int
    dt_rank: int
    d_conv: int
    d_mlp: int
    experts: int
    experts_per_token: int

    @classmethod
    def of(cls, c: JambaConfig, layer: int) -> Sizes:
        experts = (c.num_experts, c.experts_per_token) if c.feed_forwards[layer] == "moe" else (0, 0)
        return cls(c.d_model, c.d_inner, c.d_state, c.dt_rank, c.d_conv, c.d_mlp, *experts)


def mamba_block_step(
    hidden: Float[torch.Tensor, "batch d_model"],
    past: Float[torch.Tensor, "batch d_conv-1 d_inner"],
    state: Float[torch.Tensor, "batch d_inner d_state"],
    sizes: Sizes,
    eps: float,
    weights: tuple[int, ...],
) -> tuple[
    Float[torch.Tensor, "batch d_model"],
    Float[torch.Tensor, "batch d_conv-1 d_inner"],
    Float[torch.Tensor, "batch d_inner d_state"],
]:
    """A Mamba-1 block (arXiv 2403.19887, section 2) for one token: the residual stream, the new past and state.

    ``d_inner`` a multiple of CHANNELS. The new past and state are other tensors than the old. ``weights`` are
    addresses, in the order in which ``cpu_kernels.mamba_block_step`` takes them.
    """
    hidden, past, state = hidden.contiguous(), past.contiguous(), state.mT.contiguous()
    out, new_past, new_state = torch.empty_like(hidden), torch.empty_like(past), torch.empty_like(state)
    moving = [v.data_ptr() for v in (hidden, past, state, out, new_past, new_state)]
    _kernels().mamba_block_step((len(hidden), *sizes), eps, *moving, *weights)
    return out, new_past, new_state.mT


@cache
def _kernels() -> ModuleType:
    from jambascope.kernels.decode import cpu_kernels

    announce_first_compile(cpu_kernels.mamba_block_step)
    return cpu_kernels
