"""Causal depthwise convolution over time, with or without SiLU: ``reference`` and ``cpu`` (numba) backends."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float

from jambascope.errors import ConfigError
from jambascope.kernels.causal_conv import cpu, reference

__all__ = ["causal_conv1d"]

_BACKENDS = {"reference": reference.causal_conv1d, "cpu": cpu.causal_conv1d}


def causal_conv1d(
    x: Float[torch.Tensor, "batch pos d_inner"],
    weight: Float[torch.Tensor, "d_inner d_conv"],
    bias: Float[torch.Tensor, d_inner] | None,
    past: Float[torch.Tensor, "batch d_conv-1 d_inner"] | None = None,
    *,
    silu: bool = False,
    backend: Literal["auto", "reference", "cpu"] = "auto",
) -> Float[torch.Tensor, "batch pos d_inner"]:
    """``out_t = bias + sum_k weight[:, k] * in_{t - (d_conv - 1) + k}``, with ``past`` (or zeros) before position 0.

    The convolution of a Mamba mixer (arXiv 2312.00752, section 3.4), time-major, then SiLU if asked for.

    Args:
        past: the inputs before the first position, oldest first.
        backend: ``"auto"`` takes ``cpu`` for float32 on a CPU, else ``reference``.

    Raises:
        ConfigError: an unknown backend, or ``cpu`` for other tensors than it takes.
    """
    fits_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    if backend == "auto":
        backend = "cpu" if fits_cpu else "reference"
    if backend not in _BACKENDS:
        raise ConfigError(f"backend={backend!r} is not one of {sorted(_BACKENDS)}; use 'auto' to have one chosen")
    if backend == "cpu" and not fits_cpu:
        raise ConfigError(f"backend='cpu' takes float32 on the CPU, not {x.dtype} on {x.device}; use 'auto'")
    if past is None:
        past = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
    return _BACKENDS[backend](x, weight, bias, past, silu)
