"""Compiled kernels on disk: taken as they are, unless a kernel's source has changed since."""

from __future__ import annotations

import os
from pathlib import Path

from numba.core.caching import FunctionCache

from jambascope.kernels import activations_cpu
from jambascope.kernels.compiling import NativeTask, drop_stale


def test_what_is_older_than_any_source_goes(tmp_path):
    for name, at in (("old.nbi", 0), ("old.nbc", 0), ("new.nbi", None)):
        (tmp_path / name).touch()
        if at is not None:
            os.utime(tmp_path / name, (at, at))
    drop_stale(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"old.nbc", "new.nbi"}
    drop_stale(tmp_path / "nowhere")


def test_a_kernel_of_older_source_is_compiled_anew_and_kept(caplog):
    function = activations_cpu.apply.function
    assert NativeTask(function).address  # on disk now, whoever compiled it
    folder = Path(FunctionCache(function).cache_path)
    (index,) = [
        p for p in folder.glob("activations_cpu.apply-*.nbi") if f"-{function.__code__.co_firstlineno}." in p.name
    ]
    caplog.clear()
    assert NativeTask(function).address and not caplog.records
    os.utime(index, (0, 0))
    assert NativeTask(function).address and "compiling the CPU kernel" in caplog.text
    assert index.stat().st_mtime > 0
