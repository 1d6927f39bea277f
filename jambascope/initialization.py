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


@torch.no_grad()
def mimetic(model: HookedJamba) -> None:
    """Turn the Mamba layers of an initialised model into near copies of linear attention, so that they learn to recall
    more easily (arXiv 2410.11135): a control that tells what a state cannot hold from what training did not find.

    Decay: A = -1 / 1024 in every state, and dt = 1 whatever the input, so that a state forgets 2 % in twenty tokens.
    Keys and queries: B and C begin with the same projection, so that C_i B_j is largest where inputs are alike; with
    inner norms it is the cosine between them.
    """
    for layer in model.config.mamba_layers:
        mixer = model.blocks[layer].mixer
        R, N = model.config.dt_rank, model.config.d_state
        mixer.A_log.fill_(math.log(1 / 1024))
        mixer.dt_proj.weight.zero_()
        mixer.dt_proj.bias.fill_(math.log(math.expm1(1)))  # softplus of it is 1
        mixer.x_proj.weight[R + N :] = mixer.x_proj.weight[R : R + N]
        if model.config.inner_norms:
            mixer.b_layernorm.weight.fill_(N**-0.5)
            mixer.c_layernorm.weight.fill_(N**-0.5)
