"""Says when a kernel is compiled, so that a pause of seconds is not mistaken for a hang; none is of older source."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

log = logging.getLogger("jambascope")
_announced: set[int] = set()


def announce_first_compile(kernel: Any) -> None:
    """Log one line when numba is about to compile ``kernel`` and no earlier process left it in the disk cache."""
    if id(kernel) not in _announced:
        _announced.add(id(kernel))
        _announce(kernel, kernel.stats.cache_path)


def _announce(function: Callable, cache_path: str) -> None:
    name, folder = f"{function.__module__}.{function.__name__}", Path(cache_path)
    drop_stale(folder)
    in_file = function.__qualname__.replace("<", "").replace(">", "")  # as numba writes it
    stem = f"{function.__module__.rpartition('.')[2]}.{in_file}-"
    if not any(p.name.startswith(stem) and p.suffix == ".nbi" for p in folder.glob("*.nbi")):
        log.warning("compiling the CPU kernel %s (once, some seconds; cached in %s)", name, folder)


def drop_stale(folder: Path) -> None:
    """Have kernels of a cache folder compiled anew that are older than any kernel's source.

    numba compares a kernel with the file that it stands in, and not with those whose functions are compiled into it.
    """
    for index in folder.glob("*.nbi"):
        try:
            if index.stat().st_mtime < _newest_source():
                index.unlink()
        except OSError:  # another process was faster, or the folder is not ours to write in
            continue


@cache
def _newest_source() -> float:
    return max(path.stat().st_mtime for path in Path(__file__).parent.rglob("*.py"))


class NativeTask:
    """A function of one pointer, compiled by numba to be called from C; compiled when it is first needed."""

    def __init__(self, function: Callable[[Any], None], count: int | None = None) -> None:
        """``count``: of a loop, its own numbers (``native.numbers``)."""
        self.function, self.count = function, count

    @cached_property
    def _compiled(self) -> Any:
        from numba import cfunc, types
        from numba.core.caching import FunctionCache

        _announce(self.function, FunctionCache(self.function).cache_path)
        return cfunc(types.void(types.voidptr), cache=True)(self.function)

    @cached_property
    def address(self) -> int:
        """Of the machine code."""
        return self._compiled.address

    @cached_property
    def call(self) -> Callable[[int], None]:
        """Call it on an address, in this thread and without the GIL."""
        return self._compiled.ctypes


def loop_task(count: int) -> Callable[[Callable[[Any], None]], NativeTask]:
    """A task over work items that takes so many numbers; see ``native``."""
    return lambda function: NativeTask(function, count)
