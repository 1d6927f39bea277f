"""Experts one by one, in torch: the definition.

Axes: M token, S chosen slot, X expert, D d_model, F d_mlp.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from jambascope.kernels.experts.int8 import ExpertsInt8


def experts(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor | ExpertsInt8,
    down: torch.Tensor | ExpertsInt8,
    addends: bool,
) -> torch.Tensor:
    """See :func:`jambascope.kernels.experts.experts`: tokens sorted by expert, two products per expert used."""
    tokens, slots = indices.shape
    order = indices.reshape(-1).argsort(stable=True)
    counts = indices.reshape(-1).bincount(minlength=gate_up.shape[0]).tolist()
    outputs = []
    for part, gate_up_e, down_e in zip(x[order // slots].split(counts), _each(gate_up), _each(down), strict=True):
        gate, up = _product(part, gate_up_e).chunk(2, dim=-1)
        outputs.append(_product(F.silu(gate) * up, down_e))
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    result = torch.cat(outputs)[place].view(tokens, slots, x.shape[1]) * weights[..., None]
    return result if addends else result.sum(1)


def _each(weight: torch.Tensor | ExpertsInt8) -> list:
    # unbind, not weight[e]: the gradient is then one stack instead of a full-size zero tensor per expert.
    if isinstance(weight, ExpertsInt8):
        return list(zip(weight.values.unbind(0), weight.scale.unbind(0), strict=True))
    return list(weight.unbind(0))


def _product(x: torch.Tensor, weight: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    if isinstance(weight, tuple):
        values, scale = weight
        return (F.linear(x, values.to(x.dtype)) * scale).to(x.dtype)
    return F.linear(x, weight)
