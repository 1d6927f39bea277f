"""Which rows run together: those of neighbouring layers, in batches that a cache holds."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch

from jambascope.devices import index_tensor
from jambascope.hooks.sweep.engine import Engine, tokens_at_once
from jambascope.hooks.sweep.question import Measure
from jambascope.hooks.sweep.rows import Row

MOST_LOGITS = 1 << 25
"""Numbers in the logits of a batch."""
KEPT = 31 << 20
"""Bytes; from 32 MiB on glibc learns nothing from a block."""


def starts_of(firsts: Collection[int], most: int) -> list[int]:
    """The positions from which rows run: their own first ones, but several together where there is memory for the
    states at ``most`` alone; none are needed at the first of a prompt."""
    firsts = sorted(firsts)
    if sum(p > 0 for p in firsts) <= most:
        return firsts
    first = firsts[0] if most else 0
    wide = math.ceil((firsts[-1] - first + 1) / (most + (first == 0)))
    return sorted({p - (p - first) % wide for p in firsts})


def measured(engine: Engine, measure: Measure, rows: Sequence[Row]) -> Iterator[tuple[list[Row], np.ndarray]]:
    """Rows and their metrics [metric row], batch by batch."""
    if engine.model.device.type == "cpu":
        # Of what is freed glibc keeps twice the largest block that it ever gave back, and no more (mallopt(3),
        # M_MMAP_THRESHOLD): layer after layer the rest came anew, page by page, in a tenth of a sweep's time.
        torch.empty(KEPT, dtype=torch.uint8)
    most = MOST_LOGITS // (len(engine.reads) * engine.model.config.d_vocab)
    for batch in _batches(engine, sorted(rows, key=engine.order), max(1, most)):
        logits = engine.logits(batch)
        found = measure(logits, index_tensor([row.place[1] for row in batch], logits.device))
        yield batch, found.detach().cpu().numpy()


def _batches(engine: Engine, rows: Sequence[Row], most: int) -> Iterator[list[Row]]:
    """At most so many rows together, in batches of equally many tokens."""
    lengths = engine.base.length - engine.base.starts_of([row.positions[0] for row in rows])
    share = lengths.sum() / max(1, round(lengths.sum() / tokens_at_once(engine.model)))
    batch: list[Row] = []
    room = share
    for row, length in zip(rows, lengths, strict=True):
        batch.append(row)
        room -= length
        if room <= 0 or len(batch) == most:
            yield batch
            batch, room = [], share
    if batch:
        yield batch
