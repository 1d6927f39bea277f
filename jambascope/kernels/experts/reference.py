"""Experts one by one, in torch: the definition, and fast where a Python loop over experts is cheap (a CPU).

Axes: M token, S chosen slot, X expert, D d_model, F d_mlp.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def experts(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """See :func:`jambascope.kernels.experts.experts`: tokens sorted by expert, two products per expert used."""
    tokens, slots = indices.shape
    if tokens == 1:  # decoding: nothing to sort
        outputs = [_expert(x, gate_up[e], down[e]) for e in indices[0].tolist()]
        return torch.stack(outputs, dim=1) * weights[..., None]
    order = indices.reshape(-1).argsort(stable=True)
    counts = indices.reshape(-1).bincount(minlength=gate_up.shape[0]).tolist()
    inputs = x[order // slots].split(counts)
    outputs = []
    # unbind, not gate_up[e]: the gradient is then one stack instead of a full-size zero tensor per expert.
    for part, gate_up_e, down_e in zip(inputs, gate_up.unbind(0), down.unbind(0), strict=True):
        if len(part):
            outputs.append(_expert(part, gate_up_e, down_e))
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return torch.cat(outputs)[place].view(tokens, slots, -1) * weights[..., None]


def _expert(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)
