"""The experts of an MoE layer: ``reference``, ``cpu`` (numba around torch's products) and ``triton`` backends."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int

from jambascope.errors import ConfigError
from jambascope.kernels import triton_runtime
from jambascope.kernels.experts import cpu, reference, triton
from jambascope.kernels.experts.int8 import ExpertsInt8

__all__ = ["Cost", "ExpertsInt8", "cost", "experts"]

_BACKENDS = {"reference": reference.experts, "cpu": cpu.experts, "triton": triton.experts}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def experts(
    x: Float[torch.Tensor, "token d_model"],
    indices: Int[torch.Tensor, "token slot"],
    weights: Float[torch.Tensor, "token slot"],
    gate_up: Float[torch.Tensor, "expert 2*d_mlp d_model"] | ExpertsInt8,
    down: Float[torch.Tensor, "expert d_model d_mlp"] | ExpertsInt8,
    *,
    addends: bool = False,
    backend: Literal["auto", "reference", "cpu", "triton"] = "auto",
) -> Float[torch.Tensor, "token d_model"] | Float[torch.Tensor, "token slot d_model"]:
    """The sum over a token's chosen experts of ``weight * down_e(SiLU(gate_e x) * up_e x)``.

    The feed-forward of an MoE layer (arXiv 2403.19887, section 2).

    Args:
        indices: the experts of each token, each in ``0..expert-1``; a token may name one twice.
        weights: the router's probabilities for them, used as they are (Jamba does not renormalise).
        gate_up: gate rows first, then up rows.
        addends: return the terms of the sum, [token slot d_model], instead.
        backend: ``"auto"`` takes ``triton`` on a GPU where it is installed and ``cpu`` on a CPU, both for float32,
            bfloat16 and float16, else ``reference``.

    Raises:
        ConfigError: an unknown backend, or one that does not take these tensors.
        InputError: an index out of range, where that can be seen without waiting for a device.
    """
    fits = {
        "reference": True,
        "cpu": x.device.type == "cpu" and x.dtype in _DTYPES,
        "triton": x.dtype in _DTYPES and triton_runtime.can_launch(x),
    }
    if backend == "auto":
        on_gpu = x.device.type == "cuda" and fits["triton"]
        backend = "triton" if on_gpu else "cpu" if fits["cpu"] else "reference"
    if backend not in _BACKENDS:
        raise ConfigError(f"backend={backend!r} is not one of {sorted(_BACKENDS)}; use 'auto' to have one chosen")
    if not fits[backend]:
        raise ConfigError(f"backend={backend!r} does not take {x.dtype} on {x.device} here; use 'auto'")
    return _BACKENDS[backend](x, indices, weights, gate_up, down, addends)


class Cost(NamedTuple):
    """What the experts of one layer cost at least."""

    operations: int
    """Floating-point operations of the products, a multiplication and an addition counted as two."""
    bytes: int
    """Read and written once: the experts used, x and the output."""


def cost(
    tokens: int,
    slots: int,
    experts_used: int,
    d_model: int,
    d_mlp: int,
    weight_bytes: int = 4,
    activation_bytes: int = 4,
) -> Cost:
    """The bound of a forward pass; ``weight_bytes`` 1 is ExpertsInt8, whose float32 scales are counted with it."""
    scales = 4 * experts_used * (2 * d_mlp + d_model) if weight_bytes == 1 else 0
    weights = experts_used * 3 * d_model * d_mlp * weight_bytes + scales
    return Cost(6 * tokens * slots * d_model * d_mlp, weights + 2 * tokens * d_model * activation_bytes)
