"""What a sweep found, as maps and as a list of cells. R row, C column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float

from jambascope.dashboards.results.patching import CHANGE, EFFECT, METRICS, VALUE, Asked, Cell
from jambascope.hooks import sweep
from jambascope.studies.figures.patching import strongest

LARGEST, EACH = "largest", "each"
MOST_ROWS = 64
"""Of a map with a row for each head."""


def shown_of(found: sweep.PatchSweep, shown: str) -> dict[str, xr.DataArray]:
    """Node -> [layer position (unit)] of normalised effects, changes of the metric, or its values."""
    arrays = {EFFECT: found.effects, CHANGE: found.changes, VALUE: lambda: found.values}[shown]()
    return {name: array[0, 0] for name, array in arrays.items()}


@dataclass(frozen=True)
class Map:
    """A node's cells as rows and columns. R row, C column."""

    rows: tuple[str, ...]
    values: Float[np.ndarray, "R C"]
    layers: tuple[int, ...]
    """Of each row."""
    units: np.ndarray
    """[R C]"""
    axis: str = "layer (index)"
    note: str = ""


def map_of(values: xr.DataArray, layers: Sequence[int], heads: str | int) -> Map:
    """The map of a node in the given layers.

    Args:
        heads: where the node has them, a row for :data:`EACH`, the :data:`LARGEST` at each place, or one by its number.
    """
    own = values.values[list(layers)]
    if own.ndim == 2:
        names = tuple(str(layer) for layer in layers)
        return Map(names, own, tuple(layers), np.zeros(own.shape, int))
    units = own.shape[2]
    unit = str(values.dims[2]).replace("_", " ")
    letter, axis = unit[0].upper(), f"layer and {unit}"
    if heads == EACH and len(layers) * units <= MOST_ROWS:
        names = tuple(f"{layer} {letter}{i}" for layer in layers for i in range(units))
        rows = own.transpose(0, 2, 1).reshape(len(names), -1)
        which = np.tile(np.arange(units), len(layers))[:, None].repeat(rows.shape[1], 1)
        return Map(names, rows, tuple(layer for layer in layers for _ in range(units)), which, axis)
    if isinstance(heads, int):
        names = tuple(f"{layer} {letter}{heads}" for layer in layers)
        one = own[..., heads] if heads < units else np.full(own.shape[:2], np.nan)
        return Map(names, one, tuple(layers), np.full(one.shape, min(heads, units - 1)), axis)
    best, which = strongest(own)
    names = tuple(str(layer) for layer in layers)
    return Map(names, best, tuple(layers), which, note=f"; the strongest {unit} of {units} at each place")


def cells_of_map(drawn: Map, kind: str, asked: Asked) -> list[list[tuple]]:
    """[row][position]: node kind, layer, position and unit of each cell."""
    first = asked.positions[0]
    return [
        [(kind, layer, first + i, int(unit)) for i, unit in enumerate(units)]
        for layer, units in zip(drawn.layers, drawn.units, strict=True)
    ]


def place_of(drawn: Map, cell: Cell, asked: Asked) -> tuple[int, int] | None:
    """Row and column of a cell, if it is in a map."""
    column = cell.position - asked.positions[0]
    rows = [row for row, layer in enumerate(drawn.layers) if layer == cell.layer]
    own = [row for row in rows if drawn.units[row, column] == cell.unit] or (rows if len(rows) == 1 else [])
    return (own[0], column) if own else None


def top_cells(found: sweep.PatchSweep, asked: Asked, most: int = 4) -> list[tuple[Cell, float, float]]:
    """Cells with their effects and values, the largest changes first, at most so many of each kind; the stream that
    enters layer 0, which is the input itself, is none."""
    effects, base, best = found.effects(), float(found.base[0, 0]), []
    for kind in asked.kinds:
        if (name := asked.node(kind).name) not in effects:  # stopped before it, or in none of the layers
            continue
        values, effect = found.values[name].values[0, 0], effects[name].values[0, 0]  # [layer position] or with units
        changed = np.abs(values - base)
        known = np.isfinite(changed)
        if kind == "resid_pre":
            known[0] = False
        order = np.argsort(np.where(known, -changed, np.inf), axis=None, kind="stable")[: min(most, known.sum())]
        for place in zip(*np.unravel_index(order, changed.shape), strict=True):
            layer, position, *unit = map(int, place)
            cell = Cell(kind, layer, asked.positions[0] + position, *unit)
            best.append((changed[place], (cell, float(effect[place]), float(values[place]))))
    return [entry for _, entry in sorted(best, key=lambda pair: -pair[0])]


def rule_of(asked: Asked, shown: str) -> str:
    """What a map's numbers are."""
    base, source = ("corrupted", "clean") if asked.direction == "denoise" else ("clean", "corrupted")
    rule = {EFFECT: f"(patched − {base}) / ({source} − {base})", CHANGE: f"patched − {base}", VALUE: "patched run"}[
        shown
    ]
    return f"{asked.direction}, {source} into {base}; {asked.metric}: {rule}"


def unit_of(asked: Asked, shown: str) -> str:
    return "effect (share of 1)" if shown == EFFECT else f"{asked.metric} ({METRICS[asked.metric]})"
