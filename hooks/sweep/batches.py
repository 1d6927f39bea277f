"""Which rows run together: those that begin at one position, in batches that a cache holds."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from jambascope.devices import index_tensor
from jambascope.hooks.sweep.engine import Engine
from jambascope.hooks.sweep.patches import Row
from jambascope.hooks.sweep.question import Measure

if TYPE_CHECKING:
    from jambascope.model import HookedJamba

TOKENS_AT_ONCE = {"cpu": 4096}
"""Rows x positions of a batch, by device."""
MOST_TOKENS = 1 << 16
"""On other devices."""
MOST_LOGITS = 1 << 25
"""Numbers in the logits of a batch."""
WIDEST = 8
"""Positions whose cells begin together, where memory does not ask for more."""
KEPT = 31 << 20
"""Bytes; from 32 MiB on glibc learns nothing from a block."""


def tokens_at_once(model: HookedJamba) -> int:
    return TOKENS_AT_ONCE.get(model.device.type, MOST_TOKENS)


def starts_of(
    model: HookedJamba, firsts: Collection[int], n_rows: int, length: int, most: int | None = None
) -> list[int]:
    """The positions from which rows run: their own first ones, but several together where that fills batches, or where
    there is memory for the states at ``most`` alone; none are needed at the first of a prompt."""
    firsts = sorted(firsts)
    if not firsts:
        return []
    wide = min(WIDEST, max(1, round(tokens_at_once(model) / (n_rows / len(firsts) * length / 2))))
    starts = {p - (p - firsts[0]) % wide for p in firsts}
    if most is not None and sum(p > 0 for p in starts) > most:
        first = firsts[0] if most else 0
        wide = math.ceil((firsts[-1] - first + 1) / (most + (first == 0)))
        starts = {p - (p - first) % wide for p in firsts}
    return sorted(starts)


def measured(engine: Engine, measure: Measure, rows: Sequence[Row]) -> Iterator[tuple[list[Row], np.ndarray]]:
    """Rows and their metrics [metric row], batch by batch."""
    if engine.model.device.type == "cpu":
        # Of what is freed glibc keeps twice the largest block that it ever gave back, and no more (mallopt(3),
        # M_MMAP_THRESHOLD): layer after layer the rest came anew, page by page, in a tenth of a sweep's time.
        torch.empty(KEPT, dtype=torch.uint8)
    begins = np.searchsorted(engine.base.starts, [row.positions[0] for row in rows], side="right") - 1
    most = MOST_LOGITS // (len(engine.reads) * engine.model.config.d_vocab)
    by_start: dict[int, list[Row]] = {}
    for row, begin in zip(rows, begins, strict=True):
        by_start.setdefault(engine.base.starts[begin], []).append(row)
    for start in sorted(by_start):
        here = sorted(by_start[start], key=engine.order)
        n = max(1, min(most, tokens_at_once(engine.model) // (engine.base.length - start)))
        for batch in (here[i : i + n] for i in range(0, len(here), n)):
            logits = engine.logits(batch, start)
            found = measure(logits, index_tensor([row.place[1] for row in batch], logits.device))
            yield batch, found.detach().cpu().numpy()
