"""Whether a loop that reads and writes memory by address may stand in for torch's operations."""

from __future__ import annotations

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
