"""Every Triton kernel compiles ahead of time for the GPUs of both makers, and none of its configurations spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jambascope.errors import ConfigError
from jambascope.kernels import compile_check
from jambascope.kernels.compile_check import CompileCase, Usage, all_cases, jobs_of

pytest.importorskip("triton", reason="the check compiles with the triton package (extra 'test' on Linux)")


COMPILED = Path(__file__).with_name("compiled_kernels.json")
"""Every configuration for every target, written by ``python -m jambascope.kernels.compile_check --record`` this file:
three minutes of both cores, where one of each kernel takes some seconds."""


def test_no_configuration_spills(tmp_path):
    """In its own process: under TRITON_INTERPRET, which this one may run with, there is nothing to compile. One case of
    each kernel for each target, and each case that is not as COMPILED has it."""
    table = tmp_path / "usage.json"
    command = [sys.executable, "-m", "jambascope.kernels.compile_check", "--known", str(COMPILED)]
    command += ["--json", str(table)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    usages = json.loads(table.read_text())
    operations = {u["name"].split("/")[0] for u in usages}
    assert "causal_conv" in operations and operations <= set(compile_check.OPERATIONS)
    for target in compile_check.SHARED_MEMORY:
        found = [u for u in usages if u["target"] == target]
        assert {u["name"].split("/")[0] for u in found} == operations
        assert all(u["registers"] > 0 and u["fault"] is None for u in found)


GREEDY = '''
import triton, triton.language as tl
from jambascope.kernels.causal_conv import triton as module
from jambascope.kernels.compile_check import CompileCase

@triton.jit
def greedy(x, out, N: tl.constexpr):
    """Keeps N values a lane over a barrier."""
    i = tl.arange(0, N)
    v = tl.load(x + i)
    w = tl.load(x + N + i)
    s = tl.sum(v * w, axis=0)
    tl.store(out + i, tl.exp2(v + s))
    tl.store(out + N + i, w * s)

def compile_cases():
    return [CompileCase("greedy", greedy, {"x": "*fp32", "out": "*fp32"}, {"N": 16384}, num_warps=1)]
'''


def test_a_spill_is_found_and_fails(tmp_path):
    script = tmp_path / "spilling.py"
    main = "\nmodule.compile_cases = compile_cases\nfrom jambascope.kernels.compile_check import main, OPERATIONS\n"
    main += "import jambascope.kernels.compile_check as c\nc.OPERATIONS = ('causal_conv',)\n"
    script.write_text(GREEDY + main + "raise SystemExit(main([]))\n")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.count("spills (") == 3 and "3 compiled, 3 that must not be launched" in done.stdout


def test_what_is_a_fault():
    usage = dict(name="a/b", target="gfx942", registers=10, spill_stores=0, spill_loads=0, stack=0, shared=65_536)
    usage |= dict(barriers=1, shuffles=1)
    assert Usage(**usage).fault is None
    assert "spills (4 B stored" in Usage(**usage | dict(spill_stores=4)).fault
    assert "needs 65540 B of shared memory, gfx942 has 65536" in Usage(**usage | dict(shared=65_540)).fault


def test_every_kernel_is_compiled_for_every_target_that_launches_it():
    def kernel(): ...

    def other(): ...

    other.__name__ = kernel.__name__  # as in two modules
    cases = {
        "a/1": CompileCase("1", kernel, {}),
        "a/2": CompileCase("2", kernel, {}, targets=("sm_80", "sm_90")),
        "a/3": CompileCase("3", kernel, {}, targets=("gfx942",)),
        "b/4": CompileCase("4", other, {}),
    }
    everywhere = [(name, target) for name in ("a/1", "b/4") for target in compile_check.SHARED_MEMORY]
    jobs = jobs_of(cases, tuple(compile_check.SHARED_MEMORY))
    assert sorted(jobs) == sorted([*everywhere, ("a/2", "sm_80"), ("a/2", "sm_90"), ("a/3", "gfx942")])


def test_what_is_known_is_left_out_until_it_changes(monkeypatch):
    def kernel(): ...

    cases = {f"a/{i}": CompileCase(str(i), kernel, {}, {"N": i}) for i in range(3)}
    monkeypatch.setattr(compile_check, "digest", lambda name, case: f"{name} {case.constexprs}")
    targets = ("sm_90", "gfx942")
    known = {name: dict.fromkeys(targets, compile_check.digest(name, case)) for name, case in cases.items()}
    one_each = [("a/0", target) for target in targets]
    assert jobs_of(cases, targets, known) == one_each
    cases["a/2"] = CompileCase("2", kernel, {}, {"N": 7})
    assert jobs_of(cases, targets, known) == [*one_each, *(("a/2", target) for target in targets)]
    del known["a/1"]["gfx942"]
    assert set(jobs_of(cases, targets, known)) == {*one_each, ("a/1", "gfx942"), *(("a/2", t) for t in targets)}
    assert len(jobs_of(cases, targets, {})) == 6


DIGESTS = """
import triton, triton.language as tl
from jambascope.kernels.compile_check import CompileCase, digest

@triton.jit
def kernel(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), 0.0)

def of(**changed):
    plain = dict(name="a", kernel=kernel, signature={"x": "*fp32"}, constexprs={"N": 64})
    return digest("a", CompileCase(**(plain | changed)))

changes = [{}, {"signature": {"x": "*bf16"}}, {"constexprs": {"N": 32}}, {"num_warps": 8}, {"num_stages": 3}]
assert of() == of() and len({of(**change) for change in changes}) == len(changes)
"""


def test_a_digest_follows_what_is_compiled(tmp_path):
    script = tmp_path / "digests.py"
    script.write_text(DIGESTS)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ConfigError, match="unset it to compile"):
        all_cases()
