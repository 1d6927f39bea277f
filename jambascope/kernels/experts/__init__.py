"""The experts of an MoE layer; a fused GPU backend will take the same arguments."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int

from jambascope.kernels.experts import reference

__all__ = ["experts"]


def experts(
    x: Float[torch.Tensor, "token d_model"],
    indices: Int[torch.Tensor, "token slot"],
    weights: Float[torch.Tensor, "token slot"],
    gate_up: Float[torch.Tensor, "expert 2*d_mlp d_model"],
    down: Float[torch.Tensor, "expert d_model d_mlp"],
) -> Float[torch.Tensor, "token slot d_model"]:
    """The weighted output of each chosen expert: ``weight * down_e(SiLU(gate_e x) * up_e x)``.

    Summed over slots it is the layer's output (arXiv 2403.19887, section 2).

    Args:
        indices: the experts of each token, each in ``0..expert-1``; a token may name one twice.
        weights: the router's probabilities for them, used as they are (Jamba does not renormalise).
        gate_up: gate rows first, then up rows.
    """
    return reference.experts(x, indices, weights, gate_up, down)
