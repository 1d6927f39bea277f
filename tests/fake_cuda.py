"""A GPU without a GPU: tensors on ``cuda`` that have shapes but no data, on which any look at a value raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Within it ``device="cuda"`` makes fake tensors; ``.item()``, ``bool(tensor)`` and shapes from data raise."""
    with FakeTensorMode(), _WithoutDeviceGuard():
        yield


class _WithoutDeviceGuard(TorchFunctionMode):
    """Methods that, on a torch without CUDA, ask for the device itself, as functions that do not."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__ and args[0].device.type == "cuda":
            return _index(*args)
        if func is torch.Tensor.__invert__ and args[0].dtype == torch.bool:
            return torch.logical_not(args[0])
        if func is torch.Tensor.contiguous and args[0].device.type == "cuda":
            return args[0] if args[0].is_contiguous() else args[0].clone(memory_format=torch.contiguous_format)
        if func is torch.Tensor.to and isinstance(args[1], torch.device | str) and torch.device(args[1]).type == "cuda":
            return torch.ops.aten._to_copy.default(args[0], device=torch.device(args[1]), **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _index(x: torch.Tensor, key) -> torch.Tensor:
    key = key if isinstance(key, tuple) else (key,)
    spread = [k is Ellipsis for k in key]
    at = spread.index(True) if any(spread) else len(key)
    rest = [k for k in key[at + 1 :]]
    missing = x.ndim - sum(k is not None for k in [*key[:at], *rest])
    dim = 0
    for k in [*key[:at], *[slice(None)] * missing, *rest]:
        if k is None:
            x = x.unsqueeze(dim)
        elif isinstance(k, int):
            x = x.select(dim, k)
            continue
        elif isinstance(k, slice):
            x = torch.ops.aten.slice.Tensor(x, dim, k.start, k.stop, 1 if k.step is None else k.step)
        elif isinstance(k, list):
            x = x.index_select(dim, torch.tensor(k, device=x.device))
        else:
            raise NotImplementedError(f"indexing with {type(k).__name__}: write it as a function")
        dim += 1
    return x
