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
"""Bytes; from 32 MiB on glibc learns nothing from a block."""


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
    wide = max(wide, math.ceil((firsts[-1] - firsts[0] + 1) * state / max_bytes))
    return sorted({p - (p - firsts[0]) % wide for p in firsts})


def measured(engine: Engine, measure: Measure, rows: Sequence[Row]) -> Iterator[tuple[list[Row], np.ndarray]]:
    """Rows and their metrics [metric row], batch by batch."""
    if engine.model.device.type == "cpu":
        # Of what is freed glibc keeps twice the largest block that it ever gave back, and no more (mallopt(3),
        # M_MMAP_THRESHOLD): layer after layer the rest came anew, page by page, in a tenth of a sweep's time.
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
