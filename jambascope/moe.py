"""Mixture of experts: softmax over all experts, top-k, kept weights not renormalised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from jambascope.config import JambaConfig
from jambascope.errors import HookError
from jambascope.hook_point import HookPoint
from jambascope.kernels.experts import ExpertsInt8, experts
from jambascope.state import Run

MOST_BYTES_OF_STEP = 1 << 20
"""Gate and up of one expert from which on several threads read faster than one."""


class Router(nn.Module):
    """Chooses experts. Edited logits or weights re-select; edited indices force the route."""

    def __init__(self, config: JambaConfig) -> None:
        super().__init__()
        self.experts_per_token = config.experts_per_token
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.d_model))
        self.hook_out = HookPoint()  # [B T X] logits
        self.hook_expert_weights = HookPoint()  # [B T X] probabilities of all experts, float32
        self.hook_expert_indices = HookPoint()  # [B T S]

    def forward(self, x: torch.Tensor, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
        """[B T D] -> indices [B T S] and their probabilities [B T S] in the dtype of x."""
        logits = self.hook_out(F.linear(x, self.weight))
        if run.auxiliary is not None:
            run.auxiliary.router_logits.append(logits)
        weights = logits.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))
        weights = self.hook_expert_weights(weights)
        kept, indices = weights.topk(self.experts_per_token, dim=-1)
        if self.hook_expert_indices.heard:
            indices = self.hook_expert_indices(indices)
            _check_indices(indices, weights.shape[-1], self.hook_expert_indices.name)
            kept = weights.gather(-1, indices)
        return indices, kept.to(x.dtype)


def _check_indices(indices: torch.Tensor, n: int, name: str | None) -> None:
    message = f"hook at {name} chose an expert outside 0..{n - 1}"
    inside = ((indices >= 0) & (indices < n)).all()
    if indices.device.type == "cuda":
        torch._assert_async(inside, message)  # on the device, when it gets there: nothing here waits for it
    elif not inside:
        raise HookError(message)


class MoE(nn.Module):
    """Routed SwiGLU experts."""

    gate_up_proj: nn.Parameter | ExpertsInt8
    down_proj: nn.Parameter | ExpertsInt8

    def __init__(self, config: JambaConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * config.d_mlp, config.d_model))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.d_model, config.d_mlp))
        self.hook_expert_out = HookPoint()  # [B T S D] weighted addend of each chosen expert

    def forward(self, x: torch.Tensor, run: Run) -> torch.Tensor:
        """[B T D] -> [B T D]"""
        indices, weights = self.router(x, run)
        heard = self.hook_expert_out.heard
        out = experts(
            x.flatten(0, 1),
            indices.flatten(0, 1),
            weights.flatten(0, 1),
            self.gate_up_proj,
            self.down_proj,
            addends=heard,
        )
        return self.hook_expert_out(out.view(*indices.shape, -1)).sum(2) if heard else out.view_as(x)

    def parameters_of_step(self) -> tuple[torch.Tensor | None, ...] | None:
        """As ``decode`` takes them: router, gate and up, nothing, down. None where ``experts`` does better: with int8
        weights, and with more of them than one core should read."""
        gate_up, down = self.gate_up_proj, self.down_proj
        if isinstance(gate_up, ExpertsInt8) or gate_up[0].nbytes > MOST_BYTES_OF_STEP:
            return None
        return self.router.weight, gate_up, None, down

    def make_int8(self) -> None:
        """Put uninitialised ExpertsInt8 where the expert weights stand, on the same device."""
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(self, name)
            delattr(self, name)
            setattr(self, name, ExpertsInt8.empty(weight.shape, weight.device))
