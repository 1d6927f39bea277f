"""Says what a first compile is doing, so that a pause of some seconds is not mistaken for a hang."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

log = logging.getLogger("jambascope")
_announced: set[int] = set()


def announce_first_compile(kernel: Any) -> None:
    """Log one line when numba is about to compile ``kernel`` and no earlier process left it in the disk cache."""
    if id(kernel) in _announced:
        return
    _announced.add(id(kernel))
    name = f"{kernel.__module__}.{kernel.__name__}"
    folder = Path(kernel.stats.cache_path)
    stem = f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}-"
    if not any(p.name.startswith(stem) and p.suffix == ".nbi" for p in folder.glob("*.nbi")):
        log.warning("compiling the CPU kernel %s (once, some seconds; cached in %s)", name, folder)
