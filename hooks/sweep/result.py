"""What a sweep found: arrays with named axes, a table, and effects as shares of the whole difference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import xarray as xr

from jambascope.errors import InputError
from jambascope.files import write_table

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
        """One row for each metric, pair and cell that was reached: the axes, value, effect, clean, corrupted."""
        effects = self.effects(least_difference)
        frames = []
        for name, values in self.values.items():
            columns = {"value": values, "effect": effects[name], "clean": self.clean, "corrupted": self.corrupted}
            frame = xr.Dataset(columns).to_dataframe().reset_index().dropna(subset="value")
            frames.append(self._named(name, values, frame))
        return pd.concat(frames, ignore_index=True)

    def _named(self, name: str, values: xr.DataArray, frame: pd.DataFrame) -> pd.DataFrame:
        return frame[[*values.dims, "value", "effect", "clean", "corrupted"]]

    def save(self, path: str | Path) -> None:
        """The table as parquet, whole or not at all."""
        write_table(Path(path), pa.Table.from_pandas(self.table(), preserve_index=False))


class PatchSweep(Effects):
    """The metrics of every cell of a sweep: ``values`` by node, with axes metric, pair, layer, position, and head,
    expert or channels where cells are those."""

    def _named(self, name: str, values: xr.DataArray, frame: pd.DataFrame) -> pd.DataFrame:
        unit = next(iter(values.dims[4:]), None)
        frame = frame.rename(columns={unit: "unit"}) if unit else frame.assign(unit=0)
        columns = ["node", "layer", "position", "of", "unit", "metric", "pair", "value", "effect", "clean", "corrupted"]
        return frame.assign(node=name, of=unit or "")[columns]

    def top(self, k: int = 10, metric: str | None = None) -> pd.DataFrame:
        """The cells with the largest mean effect over pairs, by size: node, layer, position, of, unit, effect.

        Args:
            metric: the first when None.

        Raises:
            InputError: no such metric.
        """
        names = self.clean.metric.values.tolist()
        if metric is not None and metric not in names:
            raise InputError(f"metric={metric!r} was not measured; this sweep has {', '.join(names)}")
        table = self.table()
        table = table[table["metric"] == (metric or names[0])]
        cells = table.groupby(["node", "layer", "position", "of", "unit"], sort=False)["effect"].mean().reset_index()
        return cells.iloc[np.argsort(-cells["effect"].abs().fillna(-1).to_numpy(), kind="stable")[:k]]


class SweepError(InputError):
    """A metric that was not finite at some cell; ``result`` is what was known by then."""

    def __init__(self, message: str, result: Effects) -> None:
        super().__init__(message)
        self.result = result
