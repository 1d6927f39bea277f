"""The dense feed-forward: SwiGLU."""

from __future__ import annotations

import torch
from torch import nn

from jambascope.config import JambaConfig
from jambascope.hook_point import HookPoint, listeners
from jambascope.kernels.activations import gated
from jambascope.kernels.experts import dense
from jambascope.kernels.plain import Parts
from jambascope.state import Run


class DenseMLP(nn.Module):
    """``down(SiLU(gate(x)) * up(x))``; hook names as in TransformerLens's gated MLP."""

    def __init__(self, config: JambaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_mlp, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_mlp, bias=False)
        self.down_proj = nn.Linear(config.d_mlp, config.d_model, bias=False)
        self.hook_pre = HookPoint()  # [B T F]
        self.hook_pre_linear = HookPoint()  # [B T F]
        self.hook_post = HookPoint()  # [B T F]
        self._listeners, self._parts = listeners(self), Parts(self)

    @property
    def W_out(self) -> torch.Tensor:
        """[F D]: the down projection under TransformerLens's name."""
        return self.down_proj.weight.T

    def forward(self, x: torch.Tensor, run: Run) -> torch.Tensor:
        """[B T D] -> [B T D]"""
        if not any(self._listeners) and self._parts.intact():
            parts = self.gate_proj, self.up_proj, self.down_proj
            weights = [part.weight for part in parts]
            if dense.fits(x, *weights) and all(part.bias is None for part in parts):
                return dense.feed_forward(x, *weights)
        pre = self.hook_pre(self.gate_proj(x))
        pre_linear = self.hook_pre_linear(self.up_proj(x))
        return self.down_proj(self.hook_post(gated(pre_linear, pre)))

    def parameters_of_step(self) -> tuple[torch.Tensor | None, ...]:
        """As ``decode`` takes them: no router, gate, up, down."""
        gate, up, down = (self._modules[name]._parameters["weight"] for name in ("gate_proj", "up_proj", "down_proj"))
        return None, gate, up, down
