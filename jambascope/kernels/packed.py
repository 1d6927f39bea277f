"""Rows of different lengths, one behind the other on one time axis or some side by side, padded to the longest.

``cu_seqlens`` [R + 1] says where rows begin and end, as for flash-attention's functions of that kind: row r has the
positions from ``cu_seqlens[r]`` to ``cu_seqlens[r + 1]``. Numbers, not a tensor on a device: nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float

from jambascope.devices import index_tensor
from jambascope.errors import InputError

LONGEST = 1.5
"""How many times the shortest of rows that run side by side the longest may be: more padding, or more groups."""


def checked_bounds(cu_seqlens: Sequence[int], x: torch.Tensor) -> np.ndarray:
    """``cu_seqlens`` as int64.

    Raises:
        InputError: it does not cut the time axis of ``x`` [1 T ...] into rows.
    """
    bounds = _whole_numbers(cu_seqlens)
    fits = bounds is not None and len(bounds) > 1 and bounds[0] == 0 and bounds[-1] == x.shape[1]
    if not fits or (bounds[1:] <= bounds[:-1]).any():
        raise InputError(f"cu_seqlens={str(cu_seqlens)[:60]} must ascend from 0 to the {x.shape[1]} positions of x")
    if x.shape[0] != 1:
        raise InputError(f"cu_seqlens cuts one sequence into rows, but x has {x.shape[0]}; give x [1 T ...]")
    return bounds


def _whole_numbers(values: Sequence[int]) -> np.ndarray | None:
    """As int64, one behind the other in memory, for loops read them by address; None where they are something else."""
    try:
        found = np.asarray(values)
    except (TypeError, ValueError):  # a tensor elsewhere, a ragged list
        return None
    whole = found.ndim == 1 and np.issubdtype(found.dtype, np.integer)
    return np.ascontiguousarray(found, dtype=np.int64) if whole else None


def refuse_packed(**options: object) -> None:
    """Raise InputError for an option that packed rows do not go with."""
    for name, option in options.items():
        if option is not None:
            raise InputError(f"{name} goes with rows of one length; leave out cu_seqlens, or {name}")


def checked_rows(
    name: str, rows: Sequence[int] | None, held: torch.Tensor | None, bounds: np.ndarray | None
) -> np.ndarray | None:
    """Which entry of ``held`` each packed row begins with, as int64; None where that is not asked for.

    Raises:
        InputError: not one of those for each row, or no packed rows.
    """
    if rows is None:
        return None
    if bounds is None:
        raise InputError(f"{name} goes with cu_seqlens; leave it out, or give both")
    found, count = _whole_numbers(rows), 0 if held is None else len(held)
    if found is None or len(found) != len(bounds) - 1 or found.min() < -1 or found.max() >= count:
        each = f"one of 0..{count - 1}, or -1, for each of {len(bounds) - 1} rows"
        raise InputError(f"{name}={str(rows)[:60]} must be {each}")
    return found


def picked(held: Float[torch.Tensor, "entry ..."] | None, rows: np.ndarray) -> Float[torch.Tensor, "row ..."] | None:
    """The entry of each row; zeros for -1. None of no entries."""
    if held is None or not len(held):
        return None
    found = held.index_select(0, index_tensor(np.maximum(rows, 0), held.device))
    none = np.flatnonzero(rows < 0)
    return found.index_fill(0, index_tensor(none, held.device), 0) if none.size else found


def by_length(bounds: np.ndarray) -> list[np.ndarray]:
    """Rows in groups of about one length, the longest first."""
    lengths = np.diff(bounds)
    order = np.argsort(-lengths, kind="stable")
    groups, first = [], 0
    while first < len(order):
        count = int((lengths[order[first:]] * LONGEST >= lengths[order[first]]).sum())
        groups.append(order[first : first + count])
        first += count
    return groups


def tokens_of(bounds: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of some rows, row by row, and where each stands when these are side by side, padded to the longest."""
    lengths = bounds[rows + 1] - bounds[rows]
    within = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
    return np.repeat(bounds[rows], lengths) + within, np.repeat(np.arange(len(rows)) * lengths.max(), lengths) + within


def side_by_side(
    run: Callable[[list[torch.Tensor], list[torch.Tensor | None]], tuple[torch.Tensor, ...]],
    over_time: Sequence[Float[torch.Tensor, "1 pos ..."]],
    of_rows: Sequence[Float[torch.Tensor, "row ..."] | None],
    bounds: np.ndarray,
) -> list[torch.Tensor]:
    """What ``run`` gives for packed rows, which it takes side by side, some of about one length at a time.

    Args:
        run: of tensors [some longest ...], padded with zeros after each row's last position, and of what those rows
            have, [some ...]; gives a tensor over time, and any number of tensors with a row for each.
    """
    device, groups, found = over_time[0].device, by_length(bounds), []
    all_tokens = []
    for rows in groups:
        tokens, places = tokens_of(bounds, rows)
        all_tokens.append(tokens)
        longest, at = int(np.diff(bounds)[rows].max()), index_tensor(places, device)
        which = index_tensor(tokens, device)
        wide = []
        for x in over_time:
            empty = x.new_zeros(len(rows) * longest, *x.shape[2:])
            wide.append(empty.index_copy(0, at, x[0].index_select(0, which)).unflatten(0, (len(rows), -1)))
        own = [None if v is None else v.index_select(0, index_tensor(rows, device)) for v in of_rows]
        out, *rest = run(wide, own)
        found.append((out.flatten(0, 1).index_select(0, at), *rest))
    orders = [np.concatenate(all_tokens)] + [np.concatenate(groups)] * (len(found[0]) - 1)
    out, *rest = (
        torch.cat(parts).index_select(0, index_tensor(order.argsort(), device))
        for parts, order in zip(zip(*found, strict=True), orders, strict=True)
    )
    return [out[None], *rest]
