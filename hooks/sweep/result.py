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
class PatchSweep:
    """The metrics of every cell; NaN where a layer has no such component, and in cells that were not reached."""

    values: dict[str, xr.DataArray]
    """Node -> the metrics of runs with one cell patched: axes metric, pair, layer, position, and head, expert or
    channels where cells are those."""
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

    def effects(self, least_difference: float = LEAST_DIFFERENCE) -> dict[str, xr.DataArray]:
        """``(patched - base) / (source - base)``: 0 where a patch does nothing, 1 where it does what the whole source
        run would. NaN for pairs whose runs differ by less than ``least_difference``; ``values`` still has them."""
        difference = self.source - self.base
        difference = difference.where(abs(difference) >= least_difference)
        return {name: (values - self.base) / difference for name, values in self.values.items()}

    def table(self, least_difference: float = LEAST_DIFFERENCE) -> pd.DataFrame:
        """One row for each metric, pair and cell that exists: node, layer, position, unit (the head, expert or group
        of channels), value, effect, clean, corrupted."""
        effects = self.effects(least_difference)
        frames = []
        for name, values in self.values.items():
            both = xr.Dataset(
                {"value": values, "effect": effects[name], "clean": self.clean, "corrupted": self.corrupted}
            )
            frame = both.to_dataframe().reset_index().dropna(subset="value")
            unit = next((dim for dim in values.dims[4:]), None)
            frame = frame.rename(columns={unit: "unit"}) if unit else frame.assign(unit=0)
            frames.append(frame.assign(node=name, of=unit or ""))
        columns = ["node", "layer", "position", "of", "unit", "metric", "pair", "value", "effect", "clean", "corrupted"]
        return pd.concat(frames, ignore_index=True)[columns]

    def top(self, k: int = 10, metric: str | None = None) -> pd.DataFrame:
        """The cells with the largest mean effect over pairs, by size: node, layer, position, of, unit, effect."""
        table = self.table()
        table = table[table["metric"] == (metric or table["metric"].iloc[0])]
        cells = table.groupby(["node", "layer", "position", "of", "unit"], sort=False)["effect"].mean().reset_index()
        return cells.iloc[np.argsort(-cells["effect"].abs().fillna(-1).to_numpy(), kind="stable")[:k]]

    def save(self, path: str | Path) -> None:
        """The table as parquet, whole or not at all."""
        table = self.table()
        table["position"] = table["position"].astype(str)
        write_table(Path(path), pa.Table.from_pandas(table, preserve_index=False))


class SweepError(InputError):
    """A metric that was not finite at some cell; ``result`` is what was known by then."""

    def __init__(self, message: str, result: PatchSweep) -> None:
        super().__init__(message)
        self.result = result
