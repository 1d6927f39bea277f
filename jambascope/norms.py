"""RMSNorm, computed in float32 whatever the model's dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from jambascope.hook_point import HookPoint, listeners
from jambascope.kernels import rms_norm


class InnerNorm(nn.Module):
    """RMSNorm: ``x / sqrt(mean(x**2) + eps) * weight`` over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if rms_norm.fits(x, self.weight):
            return rms_norm.rms_norm(x, self.weight, self.eps)
        if x.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class RMSNorm(InnerNorm):
    """RMSNorm with TransformerLens's two hooks: the divisor, and the value before the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps)
        self.hook_scale = HookPoint()  # [B T 1]
        self.hook_normalized = HookPoint()  # [B T D]
        self._listeners = listeners(self)

    @property
    def w(self) -> torch.Tensor:
        """The weight under TransformerLens's name."""
        return self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not any(self._listeners):
            return super().forward(x)
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        if rms_norm.fits(x32, self.weight):
            scale = rms_norm.root_mean_square(x32, self.eps)
        else:
            scale = (x32.square().mean(-1, keepdim=True) + self.eps).sqrt()
        scale = self.hook_scale(scale)
        return self.weight * self.hook_normalized((x32 / scale).to(x.dtype))


class GatedNorm(nn.Module):
    """``RMSNorm(x * SiLU(gate))`` of each of ``groups`` equal parts of the last axis (Mamba-2's, in float32)."""

    def __init__(self, width: int, eps: float, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.groups = eps, groups

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """[... E], [... E] -> [... E]"""
        dtype = torch.promote_types(x.dtype, torch.float32)
        parts = (x.to(dtype) * F.silu(gate.to(dtype))).unflatten(-1, (self.groups, -1))
        return (F.rms_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2) * self.weight).to(x.dtype)
