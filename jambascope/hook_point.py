"""A TransformerLens hook point that costs nothing unheard and checks what its hooks return."""

from __future__ import annotations

from typing import Any

import torch
import transformer_lens.hook_points
from torch import nn

from jambascope.errors import HookError


class HookPoint(transformer_lens.hook_points.HookPoint):
    """An identity that listeners can read and replace.

    Layers ask :attr:`heard` before they compute a value that only a listener needs.
    """

    @property
    def heard(self) -> bool:
        """Whether any forward or backward hook is attached."""
        return bool(self._forward_hooks or self._backward_hooks)

    @property
    def wants_gradient(self) -> bool:
        """Whether any backward hook is attached."""
        return bool(self._backward_hooks)

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        if not (self._forward_hooks or self._backward_hooks):
            return value
        returned = super().__call__(value)
        if returned is not value:
            _check_returned(self.name, value, returned)
        return returned


def listeners(layer: nn.Module) -> tuple[dict, ...]:
    """Where hooks on the parts of a layer are kept, hook points and torch's own alike: ``any()`` of it is whether
    somebody listens. A layer asks before it takes a path that computes everything at once and calls no part."""
    parts = tuple(layer.modules())[1:]
    return tuple(d for m in parts for d in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks))


def _check_returned(name: str | None, value: torch.Tensor, returned: Any) -> None:
    if not isinstance(returned, torch.Tensor):
        raise HookError(
            f"hook at {name} returned {type(returned).__name__}; return a tensor of shape {tuple(value.shape)}, "
            "or None to leave the activation as it is"
        )
    for what, got, expected in (
        ("shape", tuple(returned.shape), tuple(value.shape)),
        ("dtype", returned.dtype, value.dtype),
        ("device", returned.device, value.device),
    ):
        if got != expected:
            raise HookError(f"hook at {name} returned a tensor of {what} {got}; it must be {expected}")
