"""Whether a loop that reads and writes memory by address may stand in for torch's operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.autograd import forward_ad


def is_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether these are ordinary tensors with memory of their own: no fake ones, none that carries a forward-mode
    tangent or goes through a ``torch.func`` transform, which only torch's own operations follow."""
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(v is None or type(v) in (torch.Tensor, nn.Parameter) for v in tensors)


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)


class Parts:
    """The modules of a layer as it was built. Whoever puts another module, type or ``forward`` in their place wants
    that to be called, which a loop that takes their parameters would not."""

    def __init__(self, layer: nn.Module) -> None:
        self._children = tuple(
            (parent._modules, name, child, type(child))
            for parent in layer.modules()
            for name, child in parent._modules.items()
            if child is not None
        )
        self._sizes: tuple[int, ...] | None = None

    def intact(self) -> bool:
        """Whether all are where they were, of the type they had, with that type's ``forward``."""
        for modules, name, child, kind in self._children:
            if modules.get(name) is not child or type(child) is not kind or "forward" in child.__dict__:
                return False
        return True

    def addresses(self, tensors: Sequence[torch.Tensor | None]) -> tuple[int, ...] | None:
        """One per parameter, 0 for an absent one; None unless all are contiguous float32 on the CPU."""
        for v in tensors:
            if v is not None and not (v.dtype == torch.float32 and v.is_contiguous() and v.device.type == "cpu"):
                return None
        sizes = tuple([0 if v is None else v.numel() for v in tensors])
        if self._sizes is None:
            self._sizes = sizes
        return tuple([0 if v is None else v.data_ptr() for v in tensors]) if sizes == self._sizes else None
