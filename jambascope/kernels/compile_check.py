"""Every Triton kernel compiled ahead of time, without a GPU, and what each configuration needs of the hardware.

``python -m jambascope.kernels.compile_check`` compiles what each ``kernels/<op>/triton.py`` lists in ``compile_cases()``
for sm_80, sm_90 and gfx942, prints registers, spills, shared memory, barriers and shuffles, and exits with status 1 if
anything spills.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one configuration in which it can be launched.

    ``signature`` names every parameter that is not ``tl.constexpr`` with Triton's type of it: a pointer ``"*fp32"``,
    ``"*bf16"``, ``"*fp16"``, ``"*i32"``, ``"*i64"``, ``"*i1"`` or ``"*i8"``, a scalar ``"i32"``, ``"i64"`` or ``"fp32"``.
    An option that is off is passed as ``None`` at a launch: say ``None`` (or leave it out of both) in ``constexprs``.
    ``constexprs`` names every ``tl.constexpr`` parameter with its value.

    Example::

        CompileCase(
            "forward-bf16-silu", forward_kernel, {"x": "*bf16", "out": "*bf16", "T": "i32", "E": "i32"},
            {"WIDTH": 4, "BLOCK_E": 64}, num_warps=2, multiples_of_16=("E",),
        )
    """

    name: str
    """Unique within its module; says what distinguishes the configuration."""
    kernel: Any
    """What ``@triton.jit`` returned."""
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    multiples_of_16: tuple[str, ...] = ()
    """Scalars that a launch would find divisible by 16; pointers always are (as torch allocates them)."""
