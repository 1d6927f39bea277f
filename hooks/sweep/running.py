"""A sweep under way: its batches measured and written down, and what is known so far at any moment."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from jambascope.errors import JambascopeError
from jambascope.hooks.sweep.batches import measured
from jambascope.hooks.sweep.engine import Engine
from jambascope.hooks.sweep.progress import Progress, watched
from jambascope.hooks.sweep.question import Measure, Question
from jambascope.hooks.sweep.recorded import Base
from jambascope.hooks.sweep.result import Effects, SweepError
from jambascope.hooks.sweep.rows import Row


class Running(ABC):
    """What a sweep knows, and how it goes on."""

    made: type[Effects] = Effects

    def __init__(self, question: Question) -> None:
        self.question, self.model = question, question.model
        self.axes = {"metric": [m.name for m in question.metrics], "pair": list(range(question.pairs))}
        self._labels: dict[str, xr.DataArray] = {}
        """Name -> its axes, made once: for an index xarray takes longer than a batch does."""
        nothing = self._nothing("clean", self.axes)
        self._labels["corrupted"] = self._labels["clean"]
        self.runs = {"clean": nothing, "corrupted": nothing.copy()}
        """Run -> its metrics, [metric pair]."""
        self.coords: dict[str, dict[str, list]] = {}
        """Name -> axes of its cells, in order."""
        self.values: dict[str, np.ndarray] = {}
        """Name -> the metrics, [metric pair ...]; NaN where nothing is known."""
        self.measure = Measure(question)

    def add(self, name: str, coords: dict[str, list]) -> None:
        """Make room for the cells of a name."""
        self.coords[name] = coords
        self.values[name] = self._nothing(name, self.axes | coords)

    def _nothing(self, name: str, axes: dict[str, list]) -> np.ndarray:
        values = np.full([len(labels) for labels in axes.values()], np.nan)
        self._labels[name] = xr.DataArray(values, axes, list(axes))
        return values

    def _labelled(self, name: str, values: np.ndarray) -> xr.DataArray:
        return self._labels[name].copy(deep=False, data=values.copy())

    @property
    def runs_of_base(self) -> np.ndarray:
        """The metrics of the runs that are patched into, [metric pair]."""
        return self.runs["corrupted" if self.question.direction == "denoise" else "clean"]

    @abstractmethod
    def run(self) -> Iterator[float]:
        """Measure; after each batch the share that is done."""

    def ends(self, first: int, base: Base, source_logits: torch.Tensor) -> None:
        """Both runs of the pairs from ``first`` on, measured and written down.

        Raises:
            InputError: a metric that fails or is not finite.
        """
        some = slice(first, first + len(base.logits))
        for name, found in self.measure.add(first, base.logits, source_logits).items():
            self.runs[name][:, some] = found
        base.logits = self.measure.base[some]

    def until_done(self, progress: bool | Progress) -> Any:
        """The result, of what is done where Ctrl-C or ``progress`` ended it early.

        Raises:
            SweepError: what failed after something was done, with that.
        """
        with watched(progress) as show:
            try:
                for share in self.run():
                    if show(share, self.result) is False:
                        return self.result(complete=share == 1)
            except KeyboardInterrupt:
                return self.result()
            except Exception as problem:
                if isinstance(problem, SweepError) or all(np.isnan(values).all() for values in self.values.values()):
                    raise
                what = problem if isinstance(problem, JambascopeError) else f"{type(problem).__name__}: {problem}"
                raise SweepError(f"{what}; .result has what is done", self.result()) from problem.__cause__ or problem
        return self.result(complete=True)

    def batches(self, engine: Engine, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """Measure rows and write them down; each batch when that is done.

        Raises:
            SweepError: a metric that is not finite.
        """
        for batch, found in measured(engine, self.measure, rows):
            self.write(batch, found)
            yield batch

    def write(self, rows: Sequence[Row], found: np.ndarray) -> None:
        """Keep the metrics of rows, [metric row]."""
        for i, row in enumerate(rows):
            name, *place = row.place
            self.values[name][(slice(None), *place)] = found[:, i]
        if not np.isfinite(found).all():
            m, i = np.argwhere(~np.isfinite(found))[0]
            name, *place = rows[i].place
            axes = {"pair": self.axes["pair"]} | self.coords[name]
            where = ", ".join(f"{axis} {labels[at]}" for (axis, labels), at in zip(axes.items(), place, strict=True))
            raise SweepError(f"{self.axes['metric'][m]} is {found[m, i]} at {name}, {where}", self.result())

    def result(self, complete: bool = False) -> Effects:
        """What is known so far."""
        arrays = {name: self._labelled(name, values) for name, values in self.values.items()}
        ends = (self._labelled(name, values) for name, values in self.runs.items())
        return self.made(arrays, *ends, self.question.direction, complete)
