"""The Triton backend: launches, sizes of blocks, and autograd around the kernels of ``triton_kernels``.

Nothing here waits for the device: the grid is the most tiles that any choice of experts could need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from jambascope.kernels import triton_runtime
from jambascope.kernels.experts.int8 import ExpertsInt8

if TYPE_CHECKING:
    from jambascope.kernels.compile_check import CompileCase

FEW_PAIRS = 8
"""Pairs up to which experts are read by the vector kernels: a token or a few, where sorting would cost more."""
COMBINE_BLOCK = 1024


@dataclass(frozen=True)
class Blocks:
    """Sizes of the blocks of a grouped product, and how it is compiled."""

    rows: int
    n: int
    k: int
    warps: int
    stages: int


def gate_up_blocks(dtype: torch.dtype, rows_per_expert: float) -> Blocks:
    """Two accumulators to a program: narrower than the other products."""
    if dtype == torch.float32:
        return Blocks(16, 32, 32, 4, 2) if rows_per_expert <= 16 else Blocks(64, 32, 16, 4, 2)
    return Blocks(16, 64, 64, 4, 3) if rows_per_expert <= 16 else Blocks(64, 64, 32, 4, 3)


def product_blocks(dtype: torch.dtype, rows_per_expert: float) -> Blocks:
    if dtype == torch.float32:
        return Blocks(16, 32, 32, 4, 2) if rows_per_expert <= 16 else Blocks(64, 64, 16, 4, 2)
    return Blocks(16, 64, 64, 4, 3) if rows_per_expert <= 16 else Blocks(64, 128, 32, 4, 3)


def dact_blocks(dtype: torch.dtype, rows_per_expert: float) -> Blocks:
    """The SwiGLU's adjoint holds five tiles at its end: more warps to hold them."""
    if dtype == torch.float32 or rows_per_expert <= 16:
        return gate_up_blocks(dtype, rows_per_expert)
    return Blocks(64, 32, 64, 8, 3)


def gradient_blocks(dtype: torch.dtype) -> Blocks:
    """Of a weight's gradient: rows x n of the weight, k pairs at a time."""
    return Blocks(64, 64, 16, 4, 2) if dtype == torch.float32 else Blocks(64, 128, 32, 4, 3)


def vector_blocks() -> Blocks:
    return Blocks(1, 4, 512, 4, 2)


def experts(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor | ExpertsInt8,
    down: torch.Tensor | ExpertsInt8,
    addends: bool,
) -> torch.Tensor:
    """See :func:`jambascope.kernels.experts.experts`. Sums in float32."""
    gate_up_values, gate_up_scale = _parts(gate_up)
    down_values, down_scale = _parts(down)
    inputs = (x, weights, gate_up_values, down_values)
    if torch.is_grad_enabled() and any(v.requires_grad for v in inputs):
        return _Experts.apply(*inputs, gate_up_scale, down_scale, indices, addends)
    return _forward(x, indices, weights, gate_up_values, gate_up_scale, down_values, down_scale, addends, False)[0]


def _parts(weight: torch.Tensor | ExpertsInt8) -> tuple[torch.Tensor, torch.Tensor | None]:
    return (weight.values, weight.scale) if isinstance(weight, ExpertsInt8) else (weight, None)


def _sort(indices: torch.Tensor, n_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """order [P] int64 and offsets [X+1] int32; bincount would wait for the device."""
    sorted_experts, order = indices.reshape(-1).sort(stable=True)
    edges = torch.arange(n_experts + 1, device=indices.device, dtype=sorted_experts.dtype)
    return order, torch.searchsorted(sorted_experts, edges, out_int32=True)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


# -- forward -------------------------------------------------------------------------------------------------


@torch.library.custom_op("jambascope::experts_forward", mutates_args=())
def _forward(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down: torch.Tensor,
    down_scale: torch.Tensor | None,
    addends: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, and for the backward hidden [P 2F], order [P] and offsets [X+1]; empty without ``keep``."""
    x, indices, weights, gate_up, down = (v.contiguous() for v in (x, indices, weights, gate_up, down))
    (tokens, d_model), slots = x.shape, indices.shape[1]
    out = x.new_empty(tokens, slots, d_model) if addends else x.new_empty(tokens, d_model)
    if not keep and tokens * slots <= FEW_PAIRS:
        _vectors(x, indices, weights, gate_up, gate_up_scale, down, down_scale, addends, out)
        return out, x.new_empty(0), indices.new_empty(0), indices.new_empty(0, dtype=torch.int32)
    order, offsets = _sort(indices, len(gate_up))
    terms = out if addends else x.new_empty(tokens, slots, d_model)
    hidden = _products(x, weights, gate_up, gate_up_scale, down, down_scale, order, offsets, slots, keep, terms)
    if not addends:
        _combine(terms, out)
    if keep:
        return out, hidden, order, offsets
    return out, x.new_empty(0), indices.new_empty(0), indices.new_empty(0, dtype=torch.int32)


@_forward.register_fake
def _(x, indices, weights, gate_up, gate_up_scale, down, down_scale, addends, keep):
    shape = (*indices.shape, x.shape[1]) if addends else x.shape
    pairs, d_mlp, n_experts = indices.numel(), down.shape[2], gate_up.shape[0]
    sizes = ((pairs, 2 * d_mlp), (pairs,), (n_experts + 1,)) if keep else ((0,), (0,), (0,))
    return (
        x.new_empty(shape),
        x.new_empty(sizes[0]),
        indices.new_empty(sizes[1]),
        indices.new_empty(sizes[2], dtype=torch.int32),
    )


def _vectors(x, indices, weights, gate_up, gate_up_scale, down, down_scale, addends, out):
    from jambascope.kernels.experts import triton_kernels as k

    (tokens, d_model), slots, d_mlp = x.shape, indices.shape[1], down.shape[2]
    act = torch.empty(tokens * slots, d_mlp, dtype=torch.float32, device=x.device)
    b = vector_blocks()
    quantized = gate_up_scale is not None
    options = dict(QUANTIZED=quantized, BLOCK_N=b.n, BLOCK_K=b.k, num_warps=b.warps, num_stages=b.stages)
    with triton_runtime.on(x.device):
        k.gate_up_vector_kernel[tokens * slots, _ceil(d_mlp, b.n)](
            x, indices, gate_up, gate_up_scale, act, slots, d_model, d_mlp, **options
        )
    with triton_runtime.on(x.device):
        k.down_vector_kernel[tokens, _ceil(d_model, b.n)](
            act, indices, weights, down, down_scale, out, slots, d_model, d_mlp, ADDENDS=addends, **options
        )


def _products(x, weights, gate_up, gate_up_scale, down, down_scale, order, offsets, slots, keep, terms):
    """terms [M S D], the weighted outputs; returns hidden [P 2F] if kept."""
    from jambascope.kernels.experts import triton_kernels as k

    n_experts, d_model, d_mlp = down.shape
    pairs = len(order)
    act = x.new_empty(pairs, d_mlp)
    hidden = x.new_empty(pairs, 2 * d_mlp) if keep else None
    b = gate_up_blocks(x.dtype, pairs / n_experts)
    with triton_runtime.on(x.device):
        k.gate_up_kernel[_ceil(pairs, b.rows) + n_experts, _ceil(d_mlp, b.n)](
            x, order, offsets, gate_up, gate_up_scale, act, hidden, slots, d_model, d_mlp, n_experts,
            QUANTIZED=gate_up_scale is not None, KEEP=keep, **_options(b, n_experts, x.dtype),
        )  # fmt: skip
    _product(act, down, down_scale, weights, order, offsets, terms, transposed=False)
    return hidden


def _product(rows, weight, scale, weights, order, offsets, out, transposed):
    from jambascope.kernels.experts import triton_kernels as k

    n_experts, pairs = len(weight), len(order)
    b = product_blocks(rows.dtype, pairs / n_experts)
    depth, n = rows.shape[1], out.shape[-1]
    with triton_runtime.on(rows.device):
        k.product_kernel[_ceil(pairs, b.rows) + n_experts, _ceil(n, b.n)](
            rows, weight, scale, weights, order, offsets, out, depth, n, n_experts,
            TRANSPOSED=transposed, QUANTIZED=scale is not None, WEIGHTED=weights is not None,
            **_options(b, n_experts, rows.dtype, scaled_inputs=transposed and scale is not None),
        )  # fmt: skip


def _combine(terms: torch.Tensor, out: torch.Tensor) -> None:
    from jambascope.kernels.experts import triton_kernels as k

    grid = (_ceil(out.numel(), COMBINE_BLOCK),)
    with triton_runtime.on(out.device):
        k.combine_kernel[grid](terms, out, out.numel(), *terms.shape[1:], BLOCK=COMBINE_BLOCK, num_warps=4)


def _options(b: Blocks, n_experts: int, dtype: torch.dtype, scaled_inputs: bool = False) -> dict[str, Any]:
    return dict(
        BLOCK_R=b.rows,
        BLOCK_N=b.n,
        BLOCK_K=b.k,
        BLOCK_X=_power_of_2(n_experts),
        num_warps=b.warps,
        num_stages=b.stages,
        **_dot(dtype, scaled_inputs),
    )


def _dot(dtype: torch.dtype, scaled_inputs: bool = False) -> dict[str, Any]:
    """In what type a product multiplies.

    Inputs times an int8 weight's scale may leave the range of float16: TF32 has its precision with float32's range.
    The interpreter multiplies bfloat16 as the integers in which it keeps it, and is given float32.
    """
    import triton.language as tl

    if dtype == torch.float16 and scaled_inputs:
        return dict(DOT=tl.float32, PRECISION="tf32")
    if dtype == torch.bfloat16 and triton_runtime.interpreting():
        return dict(DOT=tl.float32, PRECISION="ieee")
    return dict(DOT=getattr(tl, str(dtype).removeprefix("torch.")), PRECISION="ieee")


# -- backward ------------------------------------------------------------------------------------------------


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, gate_up, down, gate_up_scale, down_scale, indices, addends):
        out, hidden, order, offsets = _forward(
            x, indices, weights, gate_up, gate_up_scale, down, down_scale, addends, True
        )
        ctx.save_for_backward(x, weights, gate_up, down, gate_up_scale, down_scale, hidden, order, offsets)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        need_x, _, need_gate_up, need_down, *_ = ctx.needs_input_grad
        grads = _backward(dout, *ctx.saved_tensors, need_x, need_gate_up, need_down)
        needed = ctx.needs_input_grad[:4]
        return *(g if need else None for g, need in zip(grads, needed, strict=True)), None, None, None, None


@torch.library.custom_op("jambascope::experts_backward", mutates_args=())
def _backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down_scale: torch.Tensor | None,
    hidden: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    need_x: bool,
    need_gate_up: bool,
    need_down: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weights, gate_up and down; empty where not needed. dout [M D], or [M S D] for addends."""
    from jambascope.kernels.experts import triton_kernels as k

    dout, x, weights, gate_up, down = (v.contiguous() for v in (dout, x, weights, gate_up, down))
    (n_experts, d_model, d_mlp), pairs, slots = down.shape, len(order), weights.shape[1]
    dy_slots = 1 if dout.ndim == 3 else slots
    dhidden = torch.empty_like(hidden)
    act = x.new_empty(pairs, d_mlp) if need_down else None
    b = dact_blocks(x.dtype, pairs / n_experts)
    blocks = _ceil(d_mlp, b.n)
    dweights = torch.empty(blocks, pairs, dtype=torch.float32, device=x.device)
    with triton_runtime.on(x.device):
        k.dact_kernel[_ceil(pairs, b.rows) + n_experts, blocks](
            dout, order, offsets, down, down_scale, weights, hidden, dhidden, act, dweights,
            pairs, dy_slots, d_model, d_mlp, n_experts,
            QUANTIZED=down_scale is not None, ACT=need_down,
            **_options(b, n_experts, x.dtype, scaled_inputs=down_scale is not None),
        )  # fmt: skip
    nothing = x.new_empty(0)
    grad_x, grad_gate_up, grad_down = nothing, nothing.clone(), nothing.clone()
    if need_x:
        terms, grad_x = x.new_empty(*weights.shape, d_model), torch.empty_like(x)
        _product(dhidden, gate_up, gate_up_scale, None, order, offsets, terms, transposed=True)
        _combine(terms, grad_x)
    if need_gate_up:
        grad_gate_up = _weight_gradient(dhidden, x, order, offsets, None, slots, gate_up)
    if need_down:
        grad_down = _weight_gradient(dout.view(-1, d_model), act, order, offsets, dy_slots, None, down)
    return grad_x, dweights.sum(0).view(weights.shape).to(weights.dtype), grad_gate_up, grad_down


@_backward.register_fake
def _(dout, x, weights, gate_up, down, _1, _2, hidden, order, offsets, need_x, need_gate_up, need_down):
    def like(v: torch.Tensor, need: bool) -> torch.Tensor:
        return v.new_empty(v.shape if need else 0, dtype=x.dtype if v is not weights else v.dtype)

    return like(x, need_x), like(weights, True), like(gate_up, need_gate_up), like(down, need_down)


def _weight_gradient(left, right, order, offsets, left_slots, right_slots, weight):
    """[X I J] = per expert left^T right; a side with slots is gathered by token, one without is sorted."""
    from jambascope.kernels.experts import triton_kernels as k

    out = torch.empty_like(weight)
    n_experts, i, j = out.shape
    b = gradient_blocks(weight.dtype)
    with triton_runtime.on(left.device):
        k.weight_gradient_kernel[_ceil(i, b.rows) * _ceil(j, b.n), n_experts](
            left, right, order, offsets, out, left_slots or 1, right_slots or 1, i, j,
            GATHER_LEFT=left_slots is not None, GATHER_RIGHT=right_slots is not None,
            BLOCK_I=b.rows, BLOCK_J=b.n, BLOCK_R=b.k, num_warps=b.warps, num_stages=b.stages, **_dot(left.dtype),
        )  # fmt: skip
    return out


# -- what can be launched ------------------------------------------------------------------------------------


def compile_cases() -> list[CompileCase]:
    """Every kernel in every configuration of blocks and types, for 16 experts."""
    cases = [_combine_case(kind) for kind in _KINDS]
    for kind, dtype in _KINDS.items():
        for weight in (kind, "i8"):
            cases += _vector_cases(kind, weight)
            for rows_per_expert in (1, 1000):
                cases += _product_cases(kind, weight, dtype, rows_per_expert)
        cases += _gradient_cases(kind, dtype)
    return cases


_KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SIZES = ("D", "F", "K", "N", "left_columns", "right_columns")


def _case(name: str, kernel: Any, types: dict[str, str | None], constexprs: dict[str, Any]) -> CompileCase:
    """Parameters named in ``types`` (None for a pointer that is not passed), the rest int32 scalars."""
    from jambascope.kernels.compile_check import CompileCase

    options = dict(num_warps=constexprs.pop("num_warps"), num_stages=constexprs.pop("num_stages"))
    absent = {p: None for p, kind in types.items() if kind is None}
    given = {p: types.get(p, "i32") for p in kernel.arg_names if p not in constexprs and p not in absent}
    sizes = tuple(p for p in given if p in _SIZES)
    return CompileCase(name, kernel, given, constexprs | absent, multiples_of_16=sizes, **options)


def _combine_case(kind: str) -> CompileCase:
    from jambascope.kernels.experts import triton_kernels as k

    types = dict(addends=f"*{kind}", out=f"*{kind}", size="i64")
    return _case(f"combine-{kind}", k.combine_kernel, types, dict(BLOCK=COMBINE_BLOCK, num_warps=4, num_stages=2))


def _vector_cases(kind: str, weight: str) -> list[CompileCase]:
    from jambascope.kernels.experts import triton_kernels as k

    b, w, a = vector_blocks(), f"*{weight}", f"*{kind}"
    scale = "*fp32" if weight == "i8" else None
    common = dict(QUANTIZED=weight == "i8", BLOCK_N=b.n, BLOCK_K=b.k, num_warps=b.warps, num_stages=b.stages)
    types = dict(x=a, indices="*i64", gate_up=w, scale=scale, act="*fp32")
    cases = [_case(f"gate_up_vector-{kind}-{weight}", k.gate_up_vector_kernel, types, dict(common))]
    types = dict(act="*fp32", indices="*i64", pair_weights=a, down=w, scale=scale, out=a)
    for addends in (False, True):
        name = f"down_vector-{kind}-{weight}" + ("-addends" if addends else "")
        cases.append(_case(name, k.down_vector_kernel, types, dict(common, ADDENDS=addends)))
    return cases


def _product_cases(kind: str, weight: str, dtype: torch.dtype, rows: int) -> list[CompileCase]:
    from jambascope.kernels.experts import triton_kernels as k

    w, a, quantized = f"*{weight}", f"*{kind}", weight == "i8"
    sort = dict(order="*i64", offsets="*i32", scale="*fp32" if quantized else None)
    label = f"{kind}-{weight}-{'few' if rows == 1 else 'many'}-rows"
    narrow = _options(gate_up_blocks(dtype, rows), 16, dtype)
    cases = []
    for keep in (False, True):
        types = dict(sort, x=a, gate_up=w, act=a, hidden=a if keep else None)
        options = dict(narrow, QUANTIZED=quantized, KEEP=keep)
        cases.append(_case(f"gate_up-{label}" + ("-keep" if keep else ""), k.gate_up_kernel, types, options))
    for transposed in (False, True):
        types = dict(sort, rows=a, weight=w, pair_weights=None if transposed else a, out=a)
        wide = _options(product_blocks(dtype, rows), 16, dtype, scaled_inputs=transposed and quantized)
        options = dict(wide, TRANSPOSED=transposed, QUANTIZED=quantized, WEIGHTED=not transposed)
        cases.append(_case(f"{'dx' if transposed else 'down'}-{label}", k.product_kernel, types, options))
    types = dict(
        sort, dy=a, down=w, pair_weights=a, hidden=a, dhidden=a, act=None if quantized else a, dweights="*fp32"
    )
    options = _options(dact_blocks(dtype, rows), 16, dtype, scaled_inputs=quantized)
    options |= dict(QUANTIZED=quantized, ACT=not quantized)
    cases.append(_case(f"dact-{label}", k.dact_kernel, types, options))
    return cases


def _gradient_cases(kind: str, dtype: torch.dtype) -> list[CompileCase]:
    from jambascope.kernels.experts import triton_kernels as k

    b, a = gradient_blocks(dtype), f"*{kind}"
    types = dict(left=a, right=a, order="*i64", offsets="*i32", out=a)
    blocks = dict(BLOCK_I=b.rows, BLOCK_J=b.n, BLOCK_R=b.k, num_warps=b.warps, num_stages=b.stages, **_dot(dtype))
    return [
        _case(
            f"{name}_gradient-{kind}", k.weight_gradient_kernel, types,
            dict(blocks, GATHER_LEFT=left, GATHER_RIGHT=not left),
        )
        for name, left in (("gate_up", False), ("down", True))
    ]  # fmt: skip
