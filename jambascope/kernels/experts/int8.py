"""ExpertsInt8 (arXiv 2408.12570, section 3.2): expert weights in int8 with one float32 scale per output row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Float32, Int8
from torch import nn

QUANTIZE = "experts_int8"
"""The name of the method, where a model is loaded."""
LEVELS = 127
"""Symmetric: -127..127 around zero."""


def quantize_rows(
    weight: Float[torch.Tensor, "*row k"],
) -> tuple[Int8[torch.Tensor, "*row k"], Float32[torch.Tensor, "*row"]]:
    """``values`` and ``scale`` with ``weight ~ values * scale``, scale = max|row| / 127.

    Each weight is off by at most half its row's scale (and the quotient's rounding, 2**-17 of a scale). A row of
    zeros, whose scale would be zero, takes the smallest normal number.
    """
    weight = weight.float()
    scale = (weight.abs().amax(-1) / LEVELS).clamp_min_(torch.finfo(torch.float32).tiny)
    return (weight / scale[..., None]).round_().to(torch.int8), scale


class ExpertsInt8(nn.Module):
    """One weight of all experts, quantised at load: stands where the parameter stood; not trainable."""

    values: Int8[torch.Tensor, "expert row k"]
    scale: Float32[torch.Tensor, "expert row"]

    def __init__(self, values: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)

    @classmethod
    def empty(cls, shape: torch.Size, device: torch.device | str) -> ExpertsInt8:
        """Memory for the quantised form of a weight [expert row k]."""
        return cls(
            torch.empty(shape, dtype=torch.int8, device=device),
            torch.empty(shape[:-1], dtype=torch.float32, device=device),
        )

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[torch.Tensor, "expert row k"]:
        """The weights that the products see."""
        return (self.values * self.scale[..., None]).to(dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ExpertsInt8:
        """``model.to(bfloat16)`` moves the scales but leaves them float32."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.values.device)
        return self


def is_quantized(model: nn.Module) -> bool:
    """Whether any expert weight of the model is int8."""
    return any(isinstance(module, ExpertsInt8) for module in model.modules())
