"""Which rows run together: those that begin at one position, in batches that a cache holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from jambascope.devices import index_tensor
from jambascope.hooks.sweep.engine import Engine
from jambascope.hooks.sweep.patches import Row
from jambascope.hooks.sweep.question import Measure
from jambascope.hooks.sweep.recorded import memory_points

if TYPE_CHECKING:
    from jambascope.model import HookedJamba

TOKENS_AT_ONCE = {"cpu": 2048}
"""Rows x positions of a batch, by device."""
MOST_TOKENS = 1 << 16
"""On other devices."""
WIDEST = 8
"""Positions whose cells begin together, where memory does not ask for more."""
KEPT = 31 << 20
"""Bytes, just below what glibc stops to learn from (32 MiB)."""


def tokens_at_once(model: HookedJamba) -> int:
    return TOKENS_AT_ONCE.get(model.device.type, MOST_TOKENS)


def starts_of(model: HookedJamba, rows: Sequence[Row], length: int, pairs: int, max_bytes: int) -> list[int]:
    """The positions from which rows run: their own first ones, but several together where that fills batches, or where
    states kept at all of them would exceed ``max_bytes``."""
    firsts = sorted({row.positions[0] for row in rows})
    if not firsts:
        return []
    wide = min(WIDEST, max(1, round(tokens_at_once(model) / (len(rows) / len(firsts) * length / 2))))
    names = [f"blocks.{layer}.{tail}" for layer in model.config.ssm_layers for tail in memory_points(model)]
    state = sum(model.hook_rows[name].nbytes(model.config, pairs, 1, model.dtype) for name in names)
    wide = max(wide, math.ceil(len(firsts) * state / max_bytes))
    return sorted({p - (p - firsts[0]) % wide for p in firsts})


def measured(engine: Engine, measure: Measure, rows: Sequence[Row]) -> Iterator[tuple[list[Row], np.ndarray]]:
    """Rows and their metrics [metric row], batch by batch."""
    if engine.model.device.type == "cpu":
        # glibc keeps twice the largest block that was ever given back, and hands what else is freed to the system
        # (mallopt(3), M_TRIM_THRESHOLD); fetched again, page by page, that was a tenth of a sweep's time.
        torch.empty(KEPT, dtype=torch.uint8)
    begins = np.searchsorted(engine.base.starts, [row.positions[0] for row in rows], side="right") - 1
    by_start: dict[int, list[Row]] = {}
    for row, begin in zip(rows, begins, strict=True):
        by_start.setdefault(engine.base.starts[begin], []).append(row)
    for start in sorted(by_start):
        here = sorted(by_start[start], key=engine.order)
        n = max(1, tokens_at_once(engine.model) // (engine.base.length - start))
        for batch in (here[i : i + n] for i in range(0, len(here), n)):
            logits = engine.logits(batch, start)
            found = measure(logits, index_tensor([row.pair for row in batch], logits.device))
            yield batch, found.detach().cpu().numpy()
