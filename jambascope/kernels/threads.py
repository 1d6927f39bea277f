"""Runs a numba loop over work items on torch's own OpenMP threads.

``run_loop`` shares out tasks that get nothing but numbers, so that no thread needs Python to begin. ``run_items`` calls
loops that take arrays, from Python in every thread: each call waits for the interpreter's lock, which the loops release
(``nogil=True``). numba's ``parallel=True`` is not used: its default layer aborts the process when two Python threads
enter a parallel kernel at once, as two dashboard users do. Nor are threads of our own, where it can be helped: torch's
spin for a while after each operation, and ours would have to share their cores with them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import Path

import torch

from jambascope.kernels.compiling import NativeTask

CUTS_PER_THREAD = 4
HEAD = 3
"""The int64 of a loop's call before its own numbers: the next part to take, items, parts."""
FLOAT32 = {"dtype": torch.float32, "device": "cpu"}
"""Of the tensors that loops write to by address, whatever torch's defaults are."""
_TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run_items(loop: Callable[[int, int], None], items: int, serial: bool = False) -> None:
    """Call ``loop(start, stop)`` so that every item in ``range(items)`` is done once; the caller works too."""
    threads = 1 if serial else min(torch.get_num_threads(), items)
    if threads <= 1:
        loop(0, items)
        return
    # More cuts than threads, each taken by whoever is free: a thread that wakes late leaves its share to the others.
    parts = min(items, CUTS_PER_THREAD * threads)
    cuts = iter([(items * k // parts, items * (k + 1) // parts) for k in range(parts)])

    def work() -> None:
        for start, stop in cuts:  # the GIL makes taking the next one atomic
            loop(start, stop)

    openmp = _torch_openmp()
    if openmp is None:
        _run_in_pool(work, threads)
    else:
        _run_in_openmp(openmp, work, threads)


def run_loop(task: NativeTask, items: int, *numbers: int, serial: bool = False) -> None:
    """Have every item in ``range(items)`` done by a task that asks for them (``native.next_items``)."""
    threads = 1 if serial else min(torch.get_num_threads(), items)
    parts = 1 if threads <= 1 else min(items, CUTS_PER_THREAD * threads)
    assert len(numbers) == task.count, f"{task.function.__qualname__} reads {task.count} numbers, not {len(numbers)}"
    call = (ctypes.c_int64 * (HEAD + len(numbers)))(0, items, parts, *numbers)
    run_native(task, call, threads)


def run_native(task: NativeTask, arguments: ctypes.Array, threads: int) -> None:
    """Call ``task(arguments)`` on that many threads at once, without Python in any of them.

    The task shares out its work itself, by an atomic counter among its arguments. Some microseconds a call.
    """
    address = ctypes.addressof(arguments)
    if threads <= 1:
        task.call(address)
        return
    openmp = _torch_openmp()
    if openmp is None:
        _run_in_pool(lambda: task.call(address), threads)
    else:
        openmp.GOMP_parallel(ctypes.c_void_p(task.address), ctypes.c_void_p(address), threads, 0)


@cache
def _torch_openmp() -> ctypes.CDLL | None:
    """The GNU OpenMP library that torch's wheel brings and has loaded; None where torch uses another."""
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        return ctypes.CDLL(str(path))
    return None


def _run_in_openmp(openmp: ctypes.CDLL, work: Callable[[], None], threads: int) -> None:
    """One parallel region, as the compiler would write it."""
    failures: list[BaseException] = []

    def task(_: int | None) -> None:
        try:
            work()
        except BaseException as e:  # must not leave the C frame
            failures.append(e)

    openmp.GOMP_parallel(_TASK(task), None, threads, 0)
    if failures:
        raise failures[0]


def _run_in_pool(work: Callable[[], None], threads: int) -> None:
    others = [_pool(threads - 1, os.getpid()).submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        other.result()


@lru_cache(maxsize=2)
def _pool(workers: int, pid: int) -> ThreadPoolExecutor:
    """One pool per size and process (a forked child must not wait for its parent's threads)."""
    return ThreadPoolExecutor(workers, thread_name_prefix="jambascope-kernel")
