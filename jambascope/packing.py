"""Rows of different lengths that run one behind the other, [1 token ...], and end together."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int

from jambascope.devices import index_tensor


class Packing:
    """Row r has the positions from ``starts[r]`` to ``length``, or to ``ends[r]``; what it did before lies in the state
    of its run."""

    def __init__(
        self, starts: Sequence[int], length: int, device: torch.device, ends: Sequence[int] | None = None
    ) -> None:
        self.starts, self.length, self.device = np.asarray(starts), length, device
        lengths = (length if ends is None else np.asarray(ends)) - self.starts
        self.bounds = np.concatenate(([0], lengths.cumsum()))
        """Where rows begin and end among the tokens: the kernels' ``cu_seqlens``."""
        self.row_of = np.repeat(np.arange(len(lengths)), lengths)
        """Of each token."""
        self.position_of = np.arange(self.bounds[-1]) - np.repeat(self.bounds[:-1] - self.starts, lengths)
        """Of each token."""

    def part(self, first: int, stop: int) -> Packing:
        """The rows from ``first`` to ``stop`` alone."""
        part, tokens = copy(self), slice(self.bounds[first], self.bounds[stop])
        for name in ("rows", "positions"):
            vars(part).pop(name, None)
        part.starts, part.bounds = self.starts[first:stop], self.bounds[first : stop + 1] - self.bounds[first]
        part.row_of, part.position_of = self.row_of[tokens] - first, self.position_of[tokens]
        return part

    @cached_property
    def rows(self) -> Int[torch.Tensor, " token"]:
        return index_tensor(self.row_of, self.device)

    @cached_property
    def positions(self) -> Int[torch.Tensor, " token"]:
        return index_tensor(self.position_of, self.device)

    def tokens(self, rows: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        """Which tokens are at these positions of these rows."""
        rows = np.asarray(rows)
        return self.bounds[rows] + np.asarray(positions) - self.starts[rows]
