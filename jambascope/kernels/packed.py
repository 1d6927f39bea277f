"""Rows of different lengths, one behind the other on one time axis or side by side, padded to the longest.

``cu_seqlens`` [R + 1] says where rows begin and end, as for flash-attention's functions of that kind: row r has the
positions from ``cu_seqlens[r]`` to ``cu_seqlens[r + 1]``. Numbers, not a tensor on a device: nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from jambascope.devices import index_tensor
from jambascope.errors import InputError


def checked_bounds(cu_seqlens: Sequence[int], x: torch.Tensor) -> np.ndarray:
    """``cu_seqlens`` as int64.

    Raises:
        InputError: it does not cut the time axis of ``x`` [1 T ...] into rows.
    """
    bounds = np.asarray(cu_seqlens)
    whole = bounds.ndim == 1 and len(bounds) > 1 and np.issubdtype(bounds.dtype, np.integer)
    if not whole or bounds[0] != 0 or bounds[-1] != x.shape[1] or (bounds[1:] <= bounds[:-1]).any():
        shown = str(np.asarray(cu_seqlens)[:8].tolist())[:60]
        raise InputError(f"cu_seqlens={shown} must ascend from 0 to the {x.shape[1]} positions of x")
    if x.shape[0] != 1:
        raise InputError(f"cu_seqlens cuts one sequence into rows, but x has {x.shape[0]}; give x [1 T ...]")
    return bounds.astype(np.int64, copy=False)


def refuse_packed(**options: object) -> None:
    """Raise InputError for an option that packed rows do not go with."""
    for name, option in options.items():
        if option is not None:
            raise InputError(f"{name} goes with rows of one length; leave out cu_seqlens, or {name}")


def checked_rows(
    name: str, rows: Sequence[int] | None, held: torch.Tensor | None, bounds: np.ndarray
) -> np.ndarray | None:
    """Which entry of ``held`` each packed row begins with, as int64.

    Raises:
        InputError: not one of those for each row.
    """
    if rows is None:
        return None
    found, count = np.asarray(rows), 0 if held is None else len(held)
    whole = found.shape == (len(bounds) - 1,) and np.issubdtype(found.dtype, np.integer)
    if not whole or found.min() < -1 or found.max() >= count:
        each = f"one of 0..{count - 1}, or -1, for each of {len(bounds) - 1} rows"
        raise InputError(f"{name}={str(rows)[:60]} must be {each}")
    return found.astype(np.int64, copy=False)


def picked(held: Float[torch.Tensor, "entry ..."], rows: np.ndarray) -> Float[torch.Tensor, "row ..."]:
    """The entry of each row; zeros for -1."""
    found = held.index_select(0, index_tensor(np.maximum(rows, 0), held.device))
    none = np.flatnonzero(rows < 0)
    return found.index_fill(0, index_tensor(none, held.device), 0) if none.size else found


def side_by_side(x: Float[torch.Tensor, "1 pos ..."], bounds: np.ndarray) -> Float[torch.Tensor, "row longest ..."]:
    """Each row from the first position on, zeros after its last."""
    longest = int(np.diff(bounds).max())
    wide = x.new_zeros((len(bounds) - 1) * longest, *x.shape[2:])
    return wide.index_copy(0, _places(bounds, x.device), x[0]).unflatten(0, (-1, longest))


def one_behind_the_other(
    x: Float[torch.Tensor, "row longest ..."], bounds: np.ndarray
) -> Float[torch.Tensor, "1 pos ..."]:
    """The inverse of :func:`side_by_side`."""
    return x.flatten(0, 1).index_select(0, _places(bounds, x.device))[None]


def _places(bounds: np.ndarray, device: torch.device) -> torch.Tensor:
    """Where each position stands among those of rows of the longest's length."""
    lengths = np.diff(bounds)
    before = np.arange(len(lengths)) * lengths.max() - bounds[:-1]
    return index_tensor(np.arange(bounds[-1]) + np.repeat(before, lengths), device)
