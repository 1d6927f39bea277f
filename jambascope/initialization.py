"""How parameters start before training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jambascope.model import HookedJamba


@torch.no_grad()
def initialize(model: HookedJamba, std: float = 0.02) -> None:
    """Random weights: normal for matrices; A, D = 1 and dt in [0.001, 0.1] as the authors start them.

    A is -(1..N) in each channel of Mamba, uniform in [-16, -1] over the heads of Mamba-2.
    """
    for name, p in model.named_parameters():
        if name.endswith("norm.weight") or ".ln" in name or name.startswith("ln_final"):
            p.fill_(1.0)
        elif name.endswith("A_log") and p.ndim == 1:
            p.uniform_(1, 16).log_()
        elif name.endswith("A_log"):
            p.copy_(torch.arange(1, p.shape[1] + 1, device=p.device).float().log().expand_as(p))
        elif name.endswith(".D"):
            p.fill_(1.0)
        elif name.endswith(("dt_proj.bias", "dt_bias")):
            dt = torch.exp(torch.empty(p.shape, device=p.device).uniform_(math.log(1e-3), math.log(1e-1)))
            p.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        elif name.endswith("dt_proj.weight"):
            p.uniform_(-(p.shape[1] ** -0.5), p.shape[1] ** -0.5)
        elif name.endswith("conv1d.weight"):
            p.uniform_(-(p.shape[2] ** -0.5), p.shape[2] ** -0.5)
        elif name.endswith("bias"):
            p.zero_()
        else:
            p.normal_(0.0, std)
