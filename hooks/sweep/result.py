"""What a sweep found: arrays with named axes, a table, and effects as shares of the whole difference."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import xarray as xr

from jambascope.errors import InputError
from jambascope.files import read_table, write_table

if TYPE_CHECKING:
    from jambascope.hooks.sweep.screening import Screen

LEAST_DIFFERENCE = 1e-3
"""Of the metric between the two runs: a share of less is mostly rounding, and is NaN."""


@dataclass(frozen=True, eq=False)
class Effects:
    """The metrics of runs with one thing changed, beside those of the clean and the corrupted run."""

    values: dict[str, xr.DataArray]
    """Name -> the metrics: axes metric, pair, and those of the cells; NaN in cells that do not exist or were not
    reached."""
    clean: xr.DataArray
    """The metrics of the clean runs: axes metric, pair."""
    corrupted: xr.DataArray
    direction: Literal["denoise", "noise"]
    """Denoise: clean values put into the corrupted run; noise: the reverse."""
    complete: bool = True
    """Whether every cell was reached."""
    name_column: ClassVar[str | None] = None
    """Of the table, which tells apart what ``values`` has by name; None where it is one thing."""

    @property
    def base(self) -> xr.DataArray:
        """The metrics of the runs that were patched into."""
        return self.corrupted if self.direction == "denoise" else self.clean

    @property
    def source(self) -> xr.DataArray:
        """The metrics of the runs whose values were put in."""
        return self.clean if self.direction == "denoise" else self.corrupted

    def changes(self) -> dict[str, xr.DataArray]:
        """``patched - base``, in the metrics' own units."""
        return {name: values - self.base for name, values in self.values.items()}

    def effects(self, least_difference: float = LEAST_DIFFERENCE) -> dict[str, xr.DataArray]:
        """``(patched - base) / (source - base)``: 0 where a patch does nothing, 1 where it does what the whole source
        run would. NaN for pairs whose runs differ by less than ``least_difference``; ``values`` still has them."""
        difference = self.source - self.base
        difference = difference.where(abs(difference) >= least_difference)
        return {name: (values - self.base) / difference for name, values in self.values.items()}

    def table(self, least_difference: float = LEAST_DIFFERENCE) -> pd.DataFrame:
        """One row for each metric, pair and cell that was reached: the axes, value, effect, clean, corrupted; the
        direction, and whether every cell was reached."""
        effects = self.effects(least_difference)
        frames = []
        for name, values in self.values.items():
            columns = {"value": values, "effect": effects[name], "clean": self.clean, "corrupted": self.corrupted}
            frame = xr.Dataset(columns | {"change": values - self.base}).to_dataframe().reset_index()
            frame = frame.dropna(subset="value").assign(direction=self.direction, complete=self.complete)
            frames.append(self._named(name, values, frame))
        return pd.concat(frames, ignore_index=True)

    def _named(self, name: str, values: xr.DataArray, frame: pd.DataFrame) -> pd.DataFrame:
        return frame[[*values.dims, *_NUMBERS]]

    def save(self, path: str | Path) -> None:
        """The table as parquet, whole or not at all; with the axes and the metrics of both runs as metadata.

        Raises:
            InputError: a path that cannot be written.
        """
        path, table = Path(path), pa.Table.from_pandas(self.table(), preserve_index=False)
        about = {
            "kind": type(self).__name__,
            "axes": {name: {d: values[d].values.tolist() for d in values.dims} for name, values in self.values.items()},
            "beside": {
                name: {c: (v.dims, v.values.tolist()) for c, v in values.coords.items() if c not in values.dims}
                for name, values in self.values.items()
            },
            "ends": {name: getattr(self, name).values.tolist() for name in ("clean", "corrupted")},
            "direction": self.direction,
            "complete": self.complete,
        }
        try:
            write_table(path, table.replace_schema_metadata({**table.schema.metadata, _ABOUT: json.dumps(about)}))
        except (OSError, pa.ArrowException) as problem:
            with suppress(OSError):
                path.with_name(path.name + ".tmp").unlink()
            raise InputError(
                f"path={str(path)!r} cannot be written ({problem}); give a file in a folder that exists, has room and "
                "may be written to"
            ) from problem

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What ``save`` of this class wrote.

        Raises:
            InputError: a file that cannot be read, or that ``save`` of this class did not write.
        """
        try:
            table = read_table(Path(path))
            about, cells = json.loads(table.schema.metadata[_ABOUT]), table.to_pandas()
            kind = about.get("kind", "PatchSweep" if "node" in cells else cls.__name__)  # older files do not say
            if kind != cls.__name__:
                raise InputError(f"path={str(path)!r} has {kind}; open it with {kind}.load")
            values = {}
            for name, axes in about["axes"].items():
                own = cells if cls.name_column is None else cells[cells[cls.name_column] == name]
                found = _filled(own[cls._columns([*axes])], own["value"], axes)
                beside = about.get("beside", {}).get(name, {})
                values[name] = found.assign_coords({c: tuple(v) for c, v in beside.items()})
            first = next(iter(values.values()))
            ends = {
                name: xr.DataArray(found, {d: first[d].values for d in ("metric", "pair")}, ["metric", "pair"])
                for name, found in about["ends"].items()
            }
        except (OSError, pa.ArrowException, TypeError, ValueError, KeyError) as problem:
            raise InputError(
                f"path={str(path)!r} is no sweep that {cls.__name__}.save wrote ({problem}); give one that is"
            ) from problem
        return cls(values, **ends, direction=about["direction"], complete=about["complete"])

    @staticmethod
    def _columns(axes: list[str]) -> list[str]:
        """Of the table, those that say where on the axes a cell stands."""
        return axes


_NUMBERS = ("value", "effect", "clean", "corrupted", "direction", "complete")
_WITHIN = ("unit", "group")
"""Columns of the axes by which cells at one position are told apart."""
_ABOUT = b"jambascope"


class KnockOuts(Effects):
    """The metrics of every edge knocked out: ``values`` of "attention" and "mamba" layers, with axes metric, pair,
    layer, edge, and head where heads are knocked out one by one. There is one run alone, ``clean``, so no effect is a
    share of a difference: ``changes()``."""

    name_column = "mixer"

    def _named(self, name: str, values: xr.DataArray, frame: pd.DataFrame) -> pd.DataFrame:
        columns = ["mixer", *values.dims, "query", "key", "value", "change", "clean", "complete"]
        return frame.assign(mixer=name)[columns]


class PatchSweep(Effects):
    """The metrics of every cell of a sweep: ``values`` by node, with axes metric, pair, layer, position, and head or
    expert, and channels where cells are told apart by them. In the table ``of`` names
    these axes, ``unit`` is the number on the first of them and ``group`` that on the second: of channels alone
    ("channels") the group is the unit, of a head's ("head, channels") it is the group."""

    name_column = "node"

    def _named(self, name: str, values: xr.DataArray, frame: pd.DataFrame) -> pd.DataFrame:
        axes = values.dims[4:]
        frame = frame.assign(node=name, of=", ".join(axes), unit=0, group=0)
        frame = frame.assign(**{column: frame[axis] for column, axis in zip(_WITHIN, axes, strict=False)})
        return frame[["node", "layer", "position", "of", *_WITHIN, "metric", "pair", *_NUMBERS]]

    @staticmethod
    def _columns(axes: list[str]) -> list[str]:
        return [*axes[:4], *_WITHIN][: len(axes)]

    def top(self, k: int = 10, metric: str | None = None) -> pd.DataFrame:
        """The cells with the largest mean effect over pairs, by size: node, layer, position, of, unit, group, effect.

        Args:
            metric: the first when None.

        Raises:
            InputError: no such metric, or ``k`` below 1.
        """
        if not isinstance(k, int) or k < 1:
            raise InputError(f"k={k!r} must be a whole number of at least 1")
        names = self.clean.metric.values.tolist()
        if metric is not None and metric not in names:
            raise InputError(f"metric={metric!r} was not measured; this sweep has {', '.join(names)}")
        table = self.table()
        table = table[table["metric"] == (metric or names[0])]
        cell = ["node", "layer", "position", "of", *_WITHIN]
        cells = table.groupby(cell, sort=False)["effect"].mean().reset_index()
        return cells.iloc[np.argsort(-cells["effect"].abs().fillna(-1).to_numpy(), kind="stable")[:k]]


def _filled(where: pd.DataFrame, found: pd.Series, axes: dict[str, list]) -> xr.DataArray:
    """Values as an array, of cells whose labels on each axis ``where`` says; NaN where there is none."""
    values = xr.DataArray(np.full([len(labels) for labels in axes.values()], np.nan), axes, list(axes))
    places = [pd.Index(values[d].values).get_indexer(where[c]) for d, c in zip(axes, where, strict=True)]
    if any((of_axis < 0).any() for of_axis in places):
        raise ValueError("a cell lies on no axis")
    values.values[tuple(places)] = found
    return values


class SweepError(InputError):
    """A sweep that failed at some cell, as where a metric raises or is not finite; ``result`` is what was known then,
    of a screen with its estimates."""

    def __init__(self, message: str, result: Effects | Screen) -> None:
        super().__init__(message)
        self.result = result
