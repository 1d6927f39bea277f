"""Every Triton kernel compiled ahead of time, without a GPU, and what each configuration needs of the hardware.

``python -m jambascope.kernels.compile_check`` compiles what each ``kernels/<op>/triton.py`` lists in
``compile_cases()`` for sm_80, sm_90 and gfx942, prints registers, spills, shared memory, barriers and shuffles, and
exits with status 1 if anything spills. ``--record FILE`` writes down what was compiled, and ``--known FILE`` leaves out
what is as it was then, but for one configuration of each kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import importlib.util
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jambascope.errors import ConfigError

if TYPE_CHECKING:
    from triton.compiler import ASTSource


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one configuration in which it can be launched.

    ``signature`` names every parameter that is not ``tl.constexpr`` with Triton's type of it: a pointer ``"*fp32"``,
    ``"*bf16"``, ``"*fp16"``, ``"*i32"``, ``"*i64"``, ``"*i1"`` or ``"*i8"``, a scalar ``"i32"``, ``"i64"`` or
    ``"fp32"``.
    ``constexprs`` names every other parameter with its value: those that are ``tl.constexpr``, and pointers that a
    launch of this configuration passes as ``None``.

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
    targets: tuple[str, ...] | None = None
    """Where this configuration is launched, if not everywhere: block sizes may follow the width of a warp."""


OPERATIONS = ("selective_scan", "causal_conv", "experts")
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}
"""The targets, and the most shared memory (bytes) that one block may ask for there.

CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability"; AMD CDNA 3 white paper (LDS).
"""


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel needs. Barriers and shuffles are instructions in its code, not how often they run."""

    name: str
    target: str
    registers: int
    """Per thread (AMD: vector registers and accumulation registers)."""
    spill_stores: int
    spill_loads: int
    """Bytes (AMD, where only registers are told: spilled vector and scalar registers, 4 bytes each)."""
    stack: int
    """Bytes of local memory per thread, which spills and arrays indexed at run time need."""
    shared: int
    """Bytes per block."""
    barriers: int
    shuffles: int

    @property
    def fault(self) -> str | None:
        """Why CI must fail, or None."""
        if self.spill_stores or self.spill_loads or self.stack:
            return f"spills ({self.spill_stores} B stored, {self.spill_loads} B loaded, {self.stack} B of stack)"
        if self.shared > SHARED_MEMORY[self.target]:
            return f"needs {self.shared} B of shared memory, {self.target} has {SHARED_MEMORY[self.target]}"
        return None


def all_cases() -> dict[str, CompileCase]:
    """Every case of every operation that has Triton kernels, by ``operation/name``."""
    from jambascope.kernels import triton_runtime

    if triton_runtime.interpreting():
        raise ConfigError("TRITON_INTERPRET=1 replaces kernels by their interpreter: unset it to compile them")
    cases: dict[str, CompileCase] = {}
    for operation in OPERATIONS:
        module = f"jambascope.kernels.{operation}.triton"
        if importlib.util.find_spec(module) is None:
            continue
        for case in importlib.import_module(module).compile_cases():
            name = f"{operation}/{case.name}"
            if name in cases:
                raise ConfigError(f"two compile cases are named {name!r}; a name must say what tells them apart")
            cases[name] = case
    return cases


def _source(name: str, case: CompileCase) -> ASTSource:
    from triton.compiler import ASTSource

    parameters = case.kernel.arg_names
    known, expected = case.signature.keys() | case.constexprs.keys(), set(parameters)
    if known != expected:
        raise ConfigError(
            f"compile case {name!r}: {case.kernel.__name__} takes no {sorted(known - expected)} and is not told of "
            f"{sorted(expected - known)}"
        )
    signature = {p: case.signature.get(p, "constexpr") for p in parameters}
    aligned = [i for i, p in enumerate(parameters) if signature[p].startswith("*") or p in case.multiples_of_16]
    return ASTSource(case.kernel, signature, dict(case.constexprs), {(i,): [["tt.divisibility", 16]] for i in aligned})


def digest(name: str, case: CompileCase) -> str:
    """Of all that a compiled case and its faults follow from: sources, types, constants, options, Triton's version, and
    what the targets have."""
    import triton

    parts = (triton.__version__, _source(name, case).hash(), case.num_warps, case.num_stages, *SHARED_MEMORY.items())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def compile_usage(name: str, case: CompileCase, target: str) -> Usage:
    """Compile one case for ``"sm_XX"`` or ``"gfxXXX"`` and read what it needs."""
    import triton
    from triton.backends.compiler import GPUTarget

    source = _source(name, case)
    nvidia = target.startswith("sm_")
    machine = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):  # where Triton prints what ptxas said
        compiled = triton.compile(
            source, target=machine, options={"num_warps": case.num_warps, "num_stages": case.num_stages}
        )
    read = _read_ptxas if nvidia else _read_amdgcn
    return Usage(name, target, shared=compiled.metadata.shared, **read(compiled.asm, log.getvalue()))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's report has changed: no {pattern!r} in\n{text[-2000:]}")
    return int(found[1])


def _read_ptxas(asm: dict, log: str) -> dict[str, int]:
    return dict(
        registers=_number(r"Used (\d+) registers", log),
        spill_stores=_number(r"(\d+) bytes spill stores", log),
        spill_loads=_number(r"(\d+) bytes spill loads", log),
        stack=_number(r"(\d+) bytes stack frame", log),
        barriers=len(re.findall(r"\bbar(?:rier)?\.(?:cta\.)?sync", asm["ptx"])),
        shuffles=len(re.findall(r"\bshfl\.sync", asm["ptx"])),
    )


def _read_amdgcn(asm: dict, log: str) -> dict[str, int]:
    text = asm["amdgcn"]
    spilled = _number(r"\.vgpr_spill_count:\s*(\d+)", text) + _number(r"\.sgpr_spill_count:\s*(\d+)", text)
    return dict(
        registers=_number(r"\.vgpr_count:\s*(\d+)", text),
        spill_stores=4 * spilled,
        spill_loads=4 * spilled,
        stack=_number(r"\.private_segment_fixed_size:\s*(\d+)", text),
        barriers=len(re.findall(r"\bs_barrier\b", text)),
        shuffles=len(re.findall(r"\b(?:ds_bpermute|ds_permute|ds_swizzle|v_permlane|v_\w+_dpp)", text)),
    )


_cases: dict[str, CompileCase] = {}
"""Filled before the workers are forked: a compiled function cannot be sent to another process."""


def _prepare_worker(cache: str) -> None:
    os.environ.update(TRITON_CACHE_DIR=cache, TRITON_ALWAYS_COMPILE="1", TRITON_DUMP_PTXAS_LOG="1")


def _work(name: str, target: str) -> Usage:
    return compile_usage(name, _cases[name], target)


Known = dict[str, dict[str, str]]
"""Of what was compiled without a fault: name -> target -> digest."""


def jobs_of(cases: dict[str, CompileCase], targets: Sequence[str], known: Known | None = None) -> list[tuple[str, str]]:
    """Names of cases and where each is compiled: for every target that launches it; of what is ``known`` and has not
    changed, one case of each kernel for each target."""
    jobs, kernels, known = [], set(), known or {}
    digests = {name: digest(name, cases[name]) for name in known if name in cases}
    for name, case in cases.items():
        launched = [target for target in targets if case.targets is None or target in case.targets]
        for target in launched:
            same = name in digests and known[name].get(target) == digests[name]
            if not same or (target, id(case.kernel)) not in kernels:
                kernels.add((target, id(case.kernel)))
                jobs.append((name, target))
    return jobs


def check(targets: Sequence[str] = tuple(SHARED_MEMORY), known: Known | None = None) -> list[Usage]:
    """Compile what :func:`jobs_of` names, in one forked process per core, and away from Triton's cache."""
    _cases.update(all_cases())
    jobs = jobs_of(_cases, targets, known)
    fork = multiprocessing.get_context("fork")
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(len(os.sched_getaffinity(0)), fork, _prepare_worker, (cache,)) as pool,
    ):
        return list(pool.map(_work, *zip(*jobs, strict=True))) if jobs else []


def _recorded(known: Known, usages: Sequence[Usage]) -> str:
    """What is known now, of cases that still exist, as JSON."""
    now = {name: dict(known.get(name, {})) for name in _cases}
    for usage in usages:
        now[usage.name].pop(usage.target, None)
        if usage.fault is None:
            now[usage.name][usage.target] = digest(usage.name, _cases[usage.name])
    return json.dumps({name: of for name, of in sorted(now.items()) if of}, indent=1, sort_keys=True) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jambascope.kernels.compile_check", description=__doc__)
    parser.add_argument(
        "--target", action="append", choices=list(SHARED_MEMORY), help="repeat for several; default: all"
    )
    parser.add_argument("--known", type=Path, help="what --record wrote: leave out what is as it was")
    parser.add_argument("--record", type=Path, help="write down what was compiled, beside what --known says")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)
    known: Known = json.loads(options.known.read_text()) if options.known else {}
    usages = check(options.target or tuple(SHARED_MEMORY), known)
    width = max((len(u.name) for u in usages), default=4)
    columns = ("registers", "spill_stores", "spill_loads", "stack", "shared", "barriers", "shuffles")
    print(f"{'kernel and configuration':{width}}  target  " + " ".join(f"{c:>12}" for c in columns))
    for usage in usages:
        numbers = " ".join(f"{getattr(usage, c):12}" for c in columns)
        print(f"{usage.name:{width}}  {usage.target:6}  {numbers}" + (f"  {usage.fault}" if usage.fault else ""))
    faults = [u for u in usages if u.fault]
    print(f"{len(usages)} compiled, {len(faults)} that must not be launched")
    if options.record:
        options.record.write_text(_recorded(known, usages))
    if options.json:
        options.json.write_text(json.dumps([asdict(u) | {"fault": u.fault} for u in usages], indent=2) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
