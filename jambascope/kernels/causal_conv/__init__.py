"""Causal depthwise convolution over time, with or without SiLU: one function, interchangeable backends.

``reference``  short torch, any device and dtype: the definition every other backend is tested against
``cpu``        numba loops, float32 arithmetic
``triton``     CUDA and ROCm, float32 arithmetic
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float

from jambascope.errors import ConfigError, InputError
from jambascope.kernels.causal_conv import cpu, reference, triton
from jambascope.kernels.causal_conv.interface import neighbours, next_past
from jambascope.kernels.packed import checked_bounds, checked_rows, picked, refuse_packed, side_by_side
from jambascope.kernels.plain import is_plain, wants_gradient
from jambascope.kernels.triton_runtime import can_launch

__all__ = ["causal_conv1d", "causal_conv1d_step", "next_past"]

Backend = Literal["auto", "reference", "cpu", "triton"]
_BACKENDS = {"reference": reference, "cpu": cpu, "triton": triton}
_WIDEST = 8


def causal_conv1d(
    x: Float[torch.Tensor, "batch pos d_inner"],
    weight: Float[torch.Tensor, "d_inner d_conv"],
    bias: Float[torch.Tensor, " d_inner"] | None,
    past: Float[torch.Tensor, "batch d_conv-1 d_inner"] | None = None,
    *,
    silu: bool = False,
    mask: Bool[torch.Tensor, "batch pos"] | None = None,
    resets: Bool[torch.Tensor, "batch pos"] | None = None,
    cu_seqlens: Sequence[int] | None = None,
    past_rows: Sequence[int] | None = None,
    backend: Backend = "auto",
) -> Float[torch.Tensor, "batch pos d_inner"]:
    """``out_t = bias + sum_k weight[:, k] * in_{t - (d_conv - 1) + k}``, with ``past`` (or zeros) before position 0.

    The convolution of a Mamba mixer (arXiv 2312.00752, section 3.4), time-major, then SiLU if asked for.
    Differentiable in x, weight, bias and past, with the same bits on every run.

    Args:
        x: may be a slice of a wider tensor along its channels: it is read in place.
        past: the inputs before the first position, oldest first; :func:`next_past` gives those for the next call.
        mask: True for tokens, None when all are. Padding may stand anywhere: a token meets the tokens before it in
            its row as if padding were not there; outputs at padding are 0.
        resets: True at the first token of a document packed into the row: neither what is before it nor ``past`` is
            seen from there on.
        cu_seqlens: ascending from 0 to T: where rows of different lengths, packed one behind the other into x [1 T E],
            begin and end. ``past`` is then [row d_conv-1 E]; without mask and resets.
        past_rows: of packed rows, which of any number of pasts each meets; -1 for zeros.
        backend: ``"auto"`` takes ``cpu`` on a CPU and ``triton`` on a GPU that has it, for float32, bfloat16 and
            float16, else ``reference``.

    Raises:
        ConfigError: an unknown backend, or one that cannot take these tensors.
        InputError: shapes that do not fit, or a mask or resets that are not bool.
    """
    bounds = None if cu_seqlens is None else checked_bounds(cu_seqlens, x)
    past_rows = checked_rows("past_rows", past_rows, past, bounds)
    _check_shapes(x, "[B T E]", weight, bias, past, mask, resets, bounds, past_rows)
    chosen = _chosen(backend, x, weight)
    if bounds is None:
        return chosen.causal_conv1d(x, weight, bias, past, silu, neighbours(mask, resets, weight.shape[1]))
    refuse_packed(mask=mask, resets=resets)
    if chosen is cpu and not wants_gradient(x, weight, bias, past):
        return cpu.causal_conv1d(x, weight, bias, past, silu, None, bounds, past_rows)
    past = past if past_rows is None else picked(past, past_rows)
    (out,) = side_by_side(
        lambda wide, own: (chosen.causal_conv1d(wide[0], weight, bias, own[0], silu, None),), [x], [past], bounds
    )
    return out


def causal_conv1d_step(
    x: Float[torch.Tensor, "batch d_inner"],
    weight: Float[torch.Tensor, "d_inner d_conv"],
    bias: Float[torch.Tensor, " d_inner"] | None,
    past: Float[torch.Tensor, "batch d_conv-1 d_inner"],
    *,
    silu: bool = False,
    backend: Backend = "auto",
) -> tuple[Float[torch.Tensor, "batch d_inner"], Float[torch.Tensor, "batch d_conv-1 d_inner"]]:
    """One position of :func:`causal_conv1d`, for decoding: its output and the new past, which is another tensor.

    Raises as :func:`causal_conv1d` does. Where a gradient is wanted it runs as ``reference``.
    """
    _check_shapes(x, "[B E]", weight, bias, past)
    chosen = _chosen(backend, x, weight)
    if wants_gradient(x, weight, bias, past):
        chosen = reference
    return chosen.step(x, weight, bias, past, silu)


def _chosen(backend: str, x: torch.Tensor, weight: torch.Tensor):
    floats = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    narrow = weight.shape[1] <= _WIDEST
    if backend == "auto":
        fast = "cpu" if x.device.type == "cpu" else "triton"
        floats = floats and (fast == "triton" or is_plain(x))
        backend = fast if floats and narrow and (fast == "cpu" or can_launch(x)) else "reference"
    if backend not in _BACKENDS:
        raise ConfigError(f"backend={backend!r} is not one of {sorted(_BACKENDS)}; use 'auto' to have one chosen")
    if backend != "reference" and not narrow:
        raise ConfigError(f"backend={backend!r} takes d_conv up to {_WIDEST}, not {weight.shape[1]}; use 'auto'")
    if backend == "cpu" and not (floats and x.device.type == "cpu"):
        raise ConfigError(f"backend='cpu' computes in float32 on the CPU, not {x.dtype} on {x.device}; use 'auto'")
    if backend == "triton" and not (floats and can_launch(x)):
        raise ConfigError(
            f"backend='triton' needs the triton package and float32, bfloat16 or float16 on a GPU (or "
            f"TRITON_INTERPRET=1), not {x.dtype} on {x.device}; use 'auto'"
        )
    return _BACKENDS[backend]


def _check_shapes(x, axes, weight, bias, past, mask=None, resets=None, bounds=None, past_rows=None) -> None:
    if x.ndim != axes.count(" ") + 1 or weight.ndim != 2 or 0 in weight.shape:
        raise InputError(f"x and weight have shapes {tuple(x.shape)} and {tuple(weight.shape)}; give {axes} and [E K]")
    positions, channels, width = x.shape[:-1], x.shape[-1], weight.shape[1]
    rows = x.shape[0] if bounds is None else len(bounds) - 1
    if past_rows is not None and past is not None:
        rows = len(past)
    if 0 in positions[1:]:
        raise InputError("x has no positions (shape [B 0 E]); a convolution needs at least one")
    expected = (
        ("weight", weight, (channels, width)),
        ("bias", bias, (channels,)),
        ("past", past, (rows, width - 1, channels)),
        ("mask", mask, positions),
        ("resets", resets, positions),
    )
    for name, value, shape in expected:
        if value is None:
            continue
        if value.shape != shape:
            raise InputError(
                f"{name} has shape {tuple(value.shape)}; with x {tuple(x.shape)} it must be {tuple(shape)}"
            )
        if name in ("mask", "resets") and value.dtype != torch.bool:
            raise InputError(f"{name} is {value.dtype}; give bool, True for {'tokens' if name == 'mask' else 'starts'}")
