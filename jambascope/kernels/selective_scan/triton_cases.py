"""The configurations of the Triton scan that are compiled ahead of time (``jambascope.kernels.compile_check``)."""

from __future__ import annotations

from typing import Any

from jambascope.kernels.compile_check import CompileCase
from jambascope.kernels.selective_scan import triton_launch as launch

ROWS = ("x", "dt", "gate", "y", "dy", "grad_x", "grad_dt", "grad_gate")
"""Of the activations' type; everything else is float32, but for:"""
OTHER_TYPES = {
    "marks": "*u8", "edit_slot": "*i32", "capture_slot": "*i32", "channel_slot": "*i32", "T": "i32", "E": "i32",
    "NE": "i32", "segment_length": "i32", "segments": "i32", "n_edits": "i32", "n_captured": "i32",
    "n_channels": "i32", "n_checkpoints": "i32",
}  # fmt: skip
OPTIONS = {
    "D": ("D",),
    "gate": ("gate", "grad_gate"),
    "bias": ("dt_bias",),
    "marks": ("marks",),
    "start": ("starts", "given"),
    "edits": ("edit_slot", "edits"),
    "capture": ("capture_slot", "captured", "dcaptured"),
    "channels": ("channel_slot",),
}
"""The pointers that are None when an option is not given."""
MODEL = frozenset(("D", "gate", "bias"))
ALL = frozenset(OPTIONS)
SETS = {
    "plain": frozenset(),
    "model": MODEL,
    "documents": MODEL | {"marks", "start"},
    "capture": MODEL | {"capture"},
    "capture-documents": MODEL | {"marks", "start", "capture", "channels"},
    "edits": MODEL | {"edits"},
    "all": ALL,
}


def scan_cases() -> list[CompileCase]:
    """Every kernel with no options, with a model's, with each group of further ones and with all of them, in bfloat16
    at 16 states; the two that use most registers also in float32 and with fewer states."""
    cases = []
    for lanes, targets in ((32, ("sm_80", "sm_90")), (64, ("gfx942",))):
        for name, options in SETS.items():
            cases += _set(name, options, "bf16", 16, lanes, targets)
        sizes = sorted({launch.padded_states(n, lanes) for n in (1, 4, 8)})
        for dtype, d_state in (("fp32", 16), *(("bf16", n) for n in sizes if n < 16)):
            for name in ("model", "all"):
                largest = _set(name, SETS[name], dtype, d_state, lanes, targets)
                cases += [case for case in largest if case.name.startswith(("forward-keep", "backward"))]
    return cases + _small_cases()


def _set(name, options, dtype, d_state, lanes, targets) -> list[CompileCase]:
    from jambascope.kernels.selective_scan import triton_backward as b
    from jambascope.kernels.selective_scan import triton_kernels as k

    constants = dict(DT_SOFTPLUS=bool(options), CHUNK=launch.CHUNK, N=d_state, BLOCK_E=lanes)
    label = f"{name}-{dtype}-d_state{d_state}-lanes{lanes}"
    ends = options - {"D", "gate", "capture", "channels", "start"}
    kinds = {
        "forward": (k.forward_kernel, options, {"ends", "products", "checkpoints"}),
        "forward-keep": (k.forward_kernel, options, {"ends", "products"}),
        "ends": (k.forward_kernel, ends, {"y", "last", "checkpoints"}),
        "backward": (b.backward_kernel, options, set()),
        "adjoint-ends": (b.adjoint_ends_kernel, options, set()),
    }
    cases = []
    for kind, (kernel, has, absent) in kinds.items():
        shape = launch.layout(lanes, kind == "backward", "edits" in has, "capture" in has, d_state)
        warps = 1 if kind == "adjoint-ends" else shape.pop("num_warps")
        if kind == "ends" and "edits" not in options and "capture" in options:
            continue  # it captures nothing: as without
        cases.append(_case(f"{kind}-{label}", kernel, has, absent, dtype, constants | shape, warps, targets))
    return cases


def _small_cases() -> list[CompileCase]:
    from jambascope.kernels.selective_scan import triton_kernels as k

    carry = dict(BLOCK=launch.CARRY_BLOCK)
    cases = [
        _case("carry", k.carry_kernel, ALL, set(), "fp32", carry | dict(REVERSE=False), num_warps=4),
        _case("carry-reverse", k.carry_kernel, ALL, set(), "fp32", carry | dict(REVERSE=True), num_warps=4),
    ]
    for d_state in (16, 256):
        block = dict(N=d_state, BLOCK_N=d_state, BLOCK_E=launch.STATES_PER_STEP // d_state, DT_SOFTPLUS=True)
        for dtype in ("bf16", "fp32"):
            name = f"step-{dtype}-d_state{d_state}"
            cases.append(_case(name, k.state_update_kernel, ALL, set(), dtype, block, num_warps=2))
    return cases


def _case(
    name: str,
    kernel: Any,
    options: frozenset[str],
    absent: set[str],
    dtype: str,
    constants: dict[str, Any],
    num_warps: int = 1,
    targets: tuple[str, ...] | None = None,
) -> CompileCase:
    absent = absent | {p for option, names in OPTIONS.items() if option not in options for p in names}
    signature, constexprs = {}, {}
    for parameter in kernel.params:
        n = parameter.name
        if parameter.is_constexpr:
            constexprs[n] = constants[n]
        elif n in absent:
            constexprs[n] = None
        elif n.startswith("stride_"):
            signature[n] = "i64" if n.endswith("b") else "i32"
        else:
            signature[n] = OTHER_TYPES.get(n) or ("*" + dtype if n in ROWS else "*fp32")
    aligned = ("E", "NE", "segment_length", "n_channels", *(n for n in signature if n.startswith("stride_")))
    return CompileCase(name, kernel, signature, constexprs, num_warps, 1, aligned, targets)
