"""The experts of an MoE layer: ``reference``, ``cpu`` (numba around torch's products) and ``triton`` backends."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int

from jambascope.errors import ConfigError, InputError
from jambascope.kernels import triton_runtime
from jambascope.kernels.experts import cpu, reference, triton
from jambascope.kernels.experts.int8 import ExpertsInt8

__all__ = ["ExpertsInt8", "experts"]

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
        indices: the experts of each token, each in ``0..expert-1``, of any integer type; a token may name one twice.
        weights: the router's probabilities for them, used as they are (Jamba does not renormalise).
        gate_up: gate rows first, then up rows.
        addends: return the terms of the sum, [token slot d_model], instead.
        backend: ``"auto"`` takes ``triton`` on a GPU where it is installed and ``cpu`` on a CPU, both for float32,
            bfloat16 and float16, where gate_up and down are both of the type of x or both ExpertsInt8, else
            ``reference``.

    Raises:
        ConfigError: an unknown backend, or one that does not take these tensors.
        InputError: shapes or devices that do not fit; an index out of range, where that can be seen without waiting
            for a device.
    """
    _check_shapes(x, indices, weights, gate_up, down)
    kinds = {_kind(gate_up), _kind(down)}
    compiled = x.dtype in _DTYPES and weights.dtype in _DTYPES and kinds in ({x.dtype}, {"ExpertsInt8"})
    fits = {
        "reference": x.is_floating_point() and kinds <= {x.dtype, "ExpertsInt8"},
        "cpu": compiled and x.device.type == "cpu",
        "triton": compiled and triton_runtime.can_launch(x),
    }
    if backend == "auto":
        on_gpu = x.device.type == "cuda" and fits["triton"]
        backend = "triton" if on_gpu else "cpu" if fits["cpu"] else "reference"
    if backend not in _BACKENDS:
        raise ConfigError(f"backend={backend!r} is not one of {sorted(_BACKENDS)}; use 'auto' to have one chosen")
    if not fits[backend]:
        remedy = "use 'auto'" if fits["reference"] else "convert gate_up and down to the type of x, or to ExpertsInt8"
        raise ConfigError(
            f"backend={backend!r} does not take {x.dtype} on {x.device} here, with gate_up {_kind(gate_up)}, "
            f"down {_kind(down)} and weights {weights.dtype}; {remedy}"
        )
    return _BACKENDS[backend](x, indices.to(torch.int64), weights, gate_up, down, addends)


def _kind(weight: torch.Tensor | ExpertsInt8) -> torch.dtype | str:
    return "ExpertsInt8" if isinstance(weight, ExpertsInt8) else weight.dtype


def _check_shapes(x, indices, weights, gate_up, down) -> None:
    if x.ndim != 2 or indices.ndim != 2 or len(down.shape) != 3:
        raise InputError(
            f"x, indices and down have shapes {tuple(x.shape)}, {tuple(indices.shape)} and {tuple(down.shape)}; "
            "give [M D], [M S] and [X D F]"
        )
    (tokens, d_model), slots, (n_experts, _, d_mlp) = x.shape, indices.shape[1], down.shape
    expected = {
        "indices": (indices, (tokens, slots)),
        "weights": (weights, (tokens, slots)),
        "gate_up": (gate_up, (n_experts, 2 * d_mlp, d_model)),
        "down": (down, (n_experts, d_model, d_mlp)),
    }
    for name, (value, shape) in expected.items():
        if tuple(value.shape) != shape:
            raise InputError(
                f"{name} has shape {tuple(value.shape)}; with x {tuple(x.shape)}, indices {tuple(indices.shape)} "
                f"and down {tuple(down.shape)} it must be {shape}"
            )
        for part in (value.values, value.scale) if isinstance(value, ExpertsInt8) else (value,):
            if part.device != x.device:
                raise InputError(f"{name} is on {part.device} and x on {x.device}; move them to one device")
    if indices.dtype == torch.bool or indices.is_floating_point() or indices.is_complex():
        raise InputError(f"indices are {indices.dtype}; give integers (indices.long())")
