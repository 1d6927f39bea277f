"""The Triton backend: launches, autograd, and the configurations that CI compiles ahead of time.

Every launch is an operator of torch that knows the shapes of its results, so that a forward pass works on tensors
without data. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch

from jambascope.kernels import triton_runtime
from jambascope.kernels.causal_conv.interface import Neighbours
from jambascope.kernels.compile_check import CompileCase

BLOCK_T, BLOCK_E, STEP_BLOCK_E = 32, 64, 256
NUM_WARPS = 4


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    past: torch.Tensor | None,
    silu: bool,
    tables: Neighbours | None,
) -> torch.Tensor:
    """See :func:`jambascope.kernels.causal_conv.causal_conv1d`. Arithmetic in float32."""
    if x.stride(2) != 1:
        x = x.contiguous()
    weight, bias, past = (None if v is None else v.contiguous() for v in (weight, bias, past))
    return _Conv.apply(x, weight, bias, past, silu, *(tables or (None, None)))


def step(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, past: torch.Tensor, silu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`jambascope.kernels.causal_conv.causal_conv1d_step`; no gradients."""
    x = x if x.stride(1) == 1 else x.contiguous()
    return _step(x, weight.contiguous(), None if bias is None else bias.contiguous(), past.contiguous(), silu)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, past, silu, source, target):
        ctx.save_for_backward(x, weight, bias, past, source, target)
        ctx.silu = silu
        return _forward(x, weight, bias, past, source, silu)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        x, weight, bias, past, source, target = ctx.saved_tensors
        grads = _backward(dout.contiguous(), x, weight, bias, past, source, target, ctx.silu)
        grads = [None if v is None else g.to(v.dtype) for g, v in zip(grads, (x, weight, bias, past), strict=True)]
        return *grads, None, None, None


def _programs(batch: int, length: int, channels: int) -> tuple[int]:
    return (batch * -(-length // BLOCK_T) * -(-channels // BLOCK_E),)


@torch.library.custom_op("jambascope::causal_conv_forward", mutates_args=())
def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    past: torch.Tensor | None,
    source: torch.Tensor | None,
    silu: bool,
) -> torch.Tensor:
    from jambascope.kernels.causal_conv import triton_kernels as k

    (batch, length, channels), width = x.shape, weight.shape[1]
    out = x.new_empty(batch, length, channels)
    with triton_runtime.on(x.device):
        k.forward_kernel[_programs(*x.shape)](
            x, x.stride(0), x.stride(1), weight, bias, past, source, out, length, channels,
            K=width, SILU=silu, HAS_BIAS=bias is not None, HAS_PAST=past is not None and width > 1,
            TABLES=source is not None, BLOCK_T=BLOCK_T, BLOCK_E=BLOCK_E, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


@_forward.register_fake
def _(x, weight, bias, past, source, silu):
    return x.new_empty(x.shape)


@torch.library.custom_op("jambascope::causal_conv_backward", mutates_args=())
def _backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    past: torch.Tensor | None,
    source: torch.Tensor | None,
    target: torch.Tensor | None,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from jambascope.kernels.causal_conv import triton_kernels as k

    (batch, length, channels), width = x.shape, weight.shape[1]
    blocks = batch * -(-length // BLOCK_T)
    through = x.new_empty(batch, length, channels, dtype=torch.float32)
    grad_weight = through.new_empty(blocks, width, channels)
    grad_bias = through.new_empty(blocks, channels)
    grad_x = x.new_empty(batch, length, channels)
    grad_past = (x if past is None else past).new_empty(batch, width - 1, channels)
    sizes = dict(K=width, TABLES=source is not None, BLOCK_T=BLOCK_T, BLOCK_E=BLOCK_E, num_warps=NUM_WARPS)
    with triton_runtime.on(x.device):
        k.backward_weights_kernel[_programs(*x.shape)](
            x, x.stride(0), x.stride(1), weight, bias, past, source, dout, through, grad_weight, grad_bias,
            length, channels, SILU=silu, HAS_BIAS=bias is not None, HAS_PAST=past is not None and width > 1, **sizes,
        )  # fmt: skip
    with triton_runtime.on(x.device):
        k.backward_inputs_kernel[_programs(batch, width - 1 + length, channels)](
            weight, target, through, grad_x, grad_past, length, channels, **sizes
        )
    return grad_x, grad_weight.sum(0).T.contiguous(), grad_bias.sum(0), grad_past


@_backward.register_fake
def _(dout, x, weight, bias, past, source, target, silu):
    single = weight.new_empty(weight.shape, dtype=torch.float32)
    grad_past = (x if past is None else past).new_empty(x.shape[0], weight.shape[1] - 1, x.shape[2])
    return x.new_empty(x.shape), single, single.new_empty(x.shape[2]), grad_past


@torch.library.custom_op("jambascope::causal_conv_step", mutates_args=())
def _step(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, past: torch.Tensor, silu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    from jambascope.kernels.causal_conv import triton_kernels as k

    batch, channels = x.shape
    out, new_past = x.new_empty(batch, channels), past.new_empty(past.shape)
    with triton_runtime.on(x.device):
        k.step_kernel[(batch * -(-channels // STEP_BLOCK_E),)](
            x, x.stride(0), weight, bias, past, out, new_past, channels,
            K=weight.shape[1], SILU=silu, HAS_BIAS=bias is not None, BLOCK_E=STEP_BLOCK_E, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out, new_past


@_step.register_fake
def _(x, weight, bias, past, silu):
    return x.new_empty(x.shape), past.new_empty(past.shape)


def compile_cases() -> list[CompileCase]:
    """Every kernel and option at the d_conv of all published models, and the widest, in float32, which needs most.

    Not listed, being less of the same code: other widths, no bias, no past; float16, which is as bfloat16.
    """
    variants = [
        ("bf16", 4, True, True, False),
        ("bf16", 4, False, True, True),
        ("fp32", 4, True, True, True),
        ("fp32", 4, True, False, False),
        ("fp32", 8, True, True, True),
    ]
    return [case for variant in variants for case in _cases(*variant)]


def _cases(dtype: str, width: int, silu: bool, has_past: bool, tables: bool) -> list[CompileCase]:
    from jambascope.kernels.causal_conv import triton_kernels as k

    x, single, table = f"*{dtype}", "*fp32", "*i32"
    blocks = dict(BLOCK_T=BLOCK_T, BLOCK_E=BLOCK_E)
    flags = dict(K=width, SILU=silu, HAS_BIAS=True, HAS_PAST=has_past, TABLES=tables, **blocks)
    inputs = dict(x=x, x_batch="i64", x_row="i32", weight=x, bias=x)
    sizes = dict(T="i32", E="i32")
    optional: dict[str, Any] = dict(past=x if has_past else None, source=table if tables else None)
    signature = {n: v for n, v in optional.items() if v is not None}
    absent = {n: None for n, v in optional.items() if v is None}
    name = f"{dtype}-d_conv{width}" + "-silu" * silu + "-past" * has_past + "-tables" * tables
    sums = dict(dout=x, through=single, grad_weight=single, grad_bias=single)
    options = dict(num_warps=NUM_WARPS, multiples_of_16=("E", "x_batch", "x_row"))
    cases = [
        CompileCase(
            f"forward-{name}", k.forward_kernel, inputs | signature | sizes | dict(out=x), absent | flags, **options
        ),
        CompileCase(
            f"backward-weights-{name}", k.backward_weights_kernel, inputs | signature | sizes | sums, absent | flags,
            **options,
        ),
    ]  # fmt: skip
    if has_past:  # which the other two kernels always handle
        gradients = dict(weight=x, through=single, grad_x=x, grad_past=x) | sizes
        cases.append(
            CompileCase(
                f"backward-inputs-{name}", k.backward_inputs_kernel,
                gradients | (dict(target=table) if tables else {}),
                dict(K=width, TABLES=tables, **blocks) | ({} if tables else dict(target=None)), **options,
            )
        )  # fmt: skip
    if has_past:
        arrays = dict(x=x, x_batch="i32", weight=x, bias=x, past=x, out=x, new_past=x, E="i32")
        constants = dict(K=width, SILU=silu, HAS_BIAS=True, BLOCK_E=STEP_BLOCK_E)
        cases.append(CompileCase(f"step-{name}", k.step_kernel, arrays, constants, **options))
    return cases
