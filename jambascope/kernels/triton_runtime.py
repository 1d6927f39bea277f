"""Whether Triton kernels can run on a tensor, and how: on a GPU, or interpreted on the CPU (``TRITON_INTERPRET=1``)."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from functools import cache

import torch

# Fused multiply-adds, as the CPU kernels use them; said here so that no release of Triton decides it for us.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


@cache
def installed() -> bool:
    """Whether the ``triton`` library is there; looked up without importing it."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter. Decided when they are first imported: set the variable before."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def can_launch(x: torch.Tensor) -> bool:
    """Whether a Triton kernel can take ``x``: on a GPU, or on the CPU under the interpreter."""
    return installed() and (x.device.type == "cuda" or (x.device.type == "cpu" and interpreting()))


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Launches go to the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
