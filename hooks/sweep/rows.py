"""The cells that a batch is patched with, each a row of its own, and how rows of different lengths run together.

R row.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from jambascope.devices import index_tensor
from jambascope.hooks.sweep.recorded import Base
from jambascope.packing import Packing


class Row(NamedTuple):
    """A cell of a prompt pair: what one row of a batch is patched with."""

    pair: int
    """The prompt of the base run, among those that are recorded together."""
    source: int
    """The prompt of the source run, the same way."""
    target: int
    """Index among the targets."""
    positions: tuple[int, ...]
    """Ascending; those after the last reading are not patched, but windows are counted from them."""
    cell: int
    """Among the target's."""
    place: tuple
    """Where its result belongs: a name, the pair among all, and the rest of the axes."""


@dataclass
class Entries:
    """The patched positions of rows one by one."""

    rows: Int[torch.Tensor, " entry"]
    prompts: Int[torch.Tensor, " entry"]
    """Of the source."""
    pairs: Int[torch.Tensor, " entry"]
    """Of the base."""
    positions: list[int]
    cells: list[int]
    batch: int
    """Rows."""

    @classmethod
    def of(cls, rows: Sequence[Row], length: int, device: torch.device) -> Entries:
        each = [
            (i, row.source, row.pair, p, row.cell) for i, row in enumerate(rows) for p in row.positions if p < length
        ]
        at, sources, pairs, positions, cells = zip(*each, strict=True)
        tensors = (index_tensor(v, device) for v in (at, sources, pairs))
        return cls(*tensors, list(positions), list(cells), len(rows))


def by_target(rows: Sequence[Row]) -> list[tuple[int, list[Row]]]:
    """Rows (sorted by target) of each target."""
    return [(target, list(group)) for target, group in groupby(rows, key=lambda row: row.target)]


class Together:
    """Rows one behind the other, each from where it begins, and the tokens that they are."""

    def __init__(self, rows: Sequence[Row], base: Base, device: torch.device) -> None:
        self.rows, self.base, self.device = rows, base, device
        self.packing = Packing(base.starts_of([row.positions[0] for row in rows]), base.length, device)
        self.pair_of = np.array([row.pair for row in rows])
        self.pairs = index_tensor(self.pair_of, device)
        self._first, self._entries = 0, {}
        self._whole: Together | None = None
        """What this is a part of; not itself, for a circle would live on until the garbage collector comes."""

    def part(self, first: int, stop: int) -> Together:
        """The rows from ``first`` to ``stop`` alone."""
        part = copy(self)
        part.rows, part.packing = self.rows[first:stop], self.packing.part(first, stop)
        part.pair_of, part.pairs = self.pair_of[first:stop], self.pairs[first:stop]
        part._first, part._whole = self._first + first, self._whole or self
        return part

    def entries(self, held: tuple[int, ...]) -> np.ndarray:
        """See :meth:`Base.entries`; found once for every layer and part."""
        known, whole = self._entries, self._whole or self
        if held not in known:
            known[held] = self.base.entries(whole.pair_of, whole.packing.starts, held)
        return known[held][self._first : self._first + len(self.rows)]

    def stream(self, layer: int) -> Float[torch.Tensor, "1 token d_model"]:
        """What enters a layer in the base run; after the last layer what leaves it."""
        places = self.pair_of[self.packing.row_of] * self.base.length + self.packing.position_of
        return self.base.stream(layer).flatten(0, 1).index_select(0, index_tensor(places, self.device))[None]

    def patched(self) -> tuple[Entries, Int[torch.Tensor, " entry"]]:
        """The patched positions one by one, and which tokens they are."""
        entries = Entries.of(self.rows, self.base.length, self.device)
        return entries, self._tokens(entries.rows.tolist(), entries.positions)

    def having(self, positions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Which rows reach back to which of some positions: indices of rows and of positions, row by row."""
        return (np.asarray(positions) >= self.packing.starts[:, None]).nonzero()

    def at(self, positions: Sequence[int]) -> Int[torch.Tensor, " token"]:
        """The tokens at some positions, row by row."""
        rows, which = self.having(positions)
        return self._tokens(rows, np.asarray(positions)[which])

    def _tokens(self, rows: Sequence[int], positions: Sequence[int]) -> Int[torch.Tensor, " token"]:
        return index_tensor(self.packing.tokens(rows, positions), self.device)
