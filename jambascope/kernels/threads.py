"""Runs a numba loop over work items on as many threads as torch uses.

The loops release the GIL (``nogil=True``) and take a range of items, so plain Python threads share them. This
replaces numba's own ``parallel=True``: its default layer aborts the process when two Python threads enter
a parallel kernel at once, as two dashboard users do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch


@lru_cache(maxsize=2)
def _pool(workers: int, pid: int) -> ThreadPoolExecutor:
    """One pool per size and process (a forked child must not wait for its parent's threads)."""
    return ThreadPoolExecutor(workers, thread_name_prefix="jambascope-kernel")


def run_items(loop: Callable[[int, int], None], items: int, serial: bool = False) -> None:
    """Call ``loop(start, stop)`` so that every item in ``range(items)`` is done once; the caller works too."""
    threads = 1 if serial else min(torch.get_num_threads(), items)
    if threads <= 1:
        loop(0, items)
        return
    cuts = [items * k // threads for k in range(threads + 1)]
    pool = _pool(torch.get_num_threads() - 1, os.getpid())
    others = [pool.submit(loop, cuts[k], cuts[k + 1]) for k in range(1, threads)]
    loop(cuts[0], cuts[1])
    for other in others:
        other.result()
