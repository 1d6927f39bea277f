"""``patch_sweep``: patch every cell of chosen components, in a fraction of a forward pass for each.

A cell is a node, a layer, a position (or several together), and a head, an expert or a group of channels. What it
costs: a cell at layer l and position p of L layers and P positions needs (L - l) / L of the depth and (P - p) / P of
the width, so a quarter of a forward pass on average; cells before the first token in which the prompts differ, or after
the last position that the metrics read, need nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import xarray as xr

from jambascope.errors import InputError
from jambascope.hooks.sweep.batches import measured, starts_of
from jambascope.hooks.sweep.engine import Engine
from jambascope.hooks.sweep.metrics import Metric
from jambascope.hooks.sweep.nodes import Node, Target, needed, read_again, targets
from jambascope.hooks.sweep.patches import Row
from jambascope.hooks.sweep.progress import Progress, watched
from jambascope.hooks.sweep.question import Direction, Measure, Question, position
from jambascope.hooks.sweep.recorded import Base, record
from jambascope.hooks.sweep.result import PatchSweep, SweepError

if TYPE_CHECKING:
    from jambascope.model import HookedJamba, Input


def patch_sweep(
    model: HookedJamba,
    clean: Input,
    corrupted: Input,
    metric: Metric | Callable | Sequence[Metric | Callable],
    nodes: str | Node | Sequence[str | Node] = "resid_pre",
    *,
    layers: Iterable[int] | None = None,
    positions: Iterable[int | tuple[int, ...]] | Literal["all"] | None = None,
    direction: Direction = "denoise",
    progress: bool | Progress = True,
    max_bytes: int = 1 << 30,
) -> PatchSweep:
    """The metrics of runs with one cell of one node patched, for every cell: equal to a loop of ``run(model, base,
    interventions(...))`` to the model's precision.

    Ctrl-C ends it early with what is done (``complete`` is then False).

    Args:
        clean, corrupted: a prompt each, or as many; ids [T], [pair T] or text. All of one length.
        metric: see ``jambascope.hooks.sweep.metrics``.
        nodes: components by name, or ``Node``s that say more.
        layers: layers to patch, which must have the nodes; all that have them when None.
        positions: each of them is a cell, several in a tuple are patched together, "all" is one cell of every
            position; negative ones count from the end. None: every position.
        direction: "denoise" puts clean values into the corrupted run (is this enough?), "noise" the reverse (is this
            needed?).
        progress: a bar on a terminal; or a function of (share done, result so far), which returns False to stop.
        max_bytes: of kept activations. The layers are swept in several goes where it is not enough for all.

    Raises:
        HookError: a node that no layer, or one of ``layers``, has.
        InputError: prompts of different lengths, positions or tokens that do not exist, a metric that is not finite,
            hooks already attached, or ``max_bytes`` too small for one layer.
    """
    question = Question.of(model, clean, corrupted, metric, direction)
    cells = Cells(model, nodes, layers, positions, question.prompt_length)
    return swept(question, cells, progress, max_bytes)


class Cells:
    """What is patched: nodes in their layers, and positions."""

    def __init__(
        self,
        model: HookedJamba,
        nodes: str | Node | Sequence[str | Node],
        layers: Iterable[int] | None,
        positions: Iterable[int | tuple[int, ...]] | str | None,
        length: int,
    ) -> None:
        """
        Raises:
            HookError, InputError: what does not exist.
        """
        given = [nodes] if isinstance(nodes, (str, Node)) else list(nodes)
        if not given:
            raise InputError("nodes=[] patches nothing; give at least one")
        layers = None if layers is None else tuple(layers)
        self.nodes: list[list[Target]] = [targets(model, node, layers) for node in given]
        names = [of_node[0].node.name for of_node in self.nodes]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"nodes: {twice!r} is given twice")
        self.positions = _positions(positions, length)
        self.targets = [target for of_node in self.nodes for target in of_node]

    def rows(self, pairs: int) -> Iterator[Row]:
        """Every cell of every pair; its place is (node, pair, layer, index of the positions, unit)."""
        index = 0
        for n, of_node in enumerate(self.nodes):
            for target in of_node:
                for pair in range(pairs):
                    for i, positions in enumerate(self.positions):
                        for unit in range(target.units):
                            yield Row(pair, pair, index, positions, unit, (n, pair, target.layer, i, unit))
                index += 1


def swept(
    question: Question,
    cells: Cells,
    progress: bool | Progress,
    max_bytes: int,
    wanted: Callable[[Row], bool] = lambda row: True,
) -> PatchSweep:
    """The cells that are wanted, NaN elsewhere."""
    sweep = _Sweep(question, cells, wanted)
    with watched(progress) as show:
        try:
            for part in sweep.parts(max_bytes):
                for _ in sweep.run(part, max_bytes):
                    if show(sweep.done / max(sweep.work, 1), sweep.result) is False:
                        return sweep.result()
        except KeyboardInterrupt:
            return sweep.result()
    return sweep.result(complete=True)


class _Sweep:
    """The rows of a question, and what is known of them."""

    def __init__(self, question: Question, cells: Cells, wanted: Callable[[Row], bool]) -> None:
        self.question, self.cells, self.model = question, cells, question.model
        shape = len(question.metrics), question.pairs, self.model.config.n_layers, len(cells.positions)
        self.values = [np.full((*shape, max(t.units for t in of_node)), np.nan) for of_node in cells.nodes]
        self.runs: dict[str, np.ndarray] = {}
        """Run -> its metrics, [metric pair]."""
        self._same_up_to = question.same_up_to
        self.rows = [row for row in cells.rows(question.pairs) if wanted(row)]
        self.done, self.work = 0, sum(self._cost(row) for row in self.rows if self._moves(row))

    def _moves(self, row: Row) -> bool:
        """Whether a patch can change anything that is read."""
        return row.positions[0] < self.question.length and row.positions[-1] >= self._same_up_to[row.pair]

    def _cost(self, row: Row) -> int:
        """Positions x layers."""
        layers = self.model.config.n_layers - self.cells.targets[row.target].layer
        return (self.question.length - row.positions[0]) * layers

    def parts(self, max_bytes: int) -> Iterator[list[Row]]:
        """The rows in as many goes as the memory asks for: layers that are recorded together."""
        moving = [row for row in self.rows if self._moves(row)]
        sizes = [self._bytes(target) for target in self.cells.targets]
        if moving and max(sizes) > max_bytes // 2:
            worst = self.cells.targets[max(range(len(sizes)), key=sizes.__getitem__)]
            raise InputError(
                f"max_bytes={max_bytes}: the values of {worst.name} alone are {max(sizes)} bytes, and half as many may "
                "be; give fewer positions or pairs at a time, or more bytes"
            )
        group, total = set(), 0
        groups = [group]
        for i in sorted(range(len(sizes)), key=lambda i: self.cells.targets[i].layer):
            if total + sizes[i] > max_bytes // 2:
                group, total = set(), 0
                groups.append(group)
            group.add(i)
            total += sizes[i]
        for group in groups:
            yield [row for row in moving if row.target in group]

    def _bytes(self, target: Target) -> int:
        """What is kept of both runs for a target."""
        rows = {self.model.hook_rows[name] for name in needed(target)}
        n = len({p for positions in self.cells.positions for p in positions if p < self.question.length})
        size = sum(row.nbytes(self.model.config, self.question.pairs, 1, self.model.dtype) for row in rows)
        return n * size * (2 if target.read_again else 1)

    def run(self, rows: list[Row], max_bytes: int) -> Iterator[None]:
        """Measure rows, batch by batch."""
        question = self.question
        starts = starts_of(self.model, rows, question.length, question.pairs, max_bytes // 2)
        engine, source_logits = self._recorded(rows, starts)
        measure = Measure(question, engine.base.logits, source_logits)
        if not self.runs:
            self.runs = measure.runs()
            base = self.runs["corrupted" if question.direction == "denoise" else "clean"]
            still = [row for row in self.rows if not self._moves(row)]  # their metrics are those of the base
            self._fill(still, base[:, [row.pair for row in still]])
            yield
        for batch, found in measured(engine, measure, rows):
            self._fill(batch, found)
            self.done += sum(map(self._cost, batch))
            yield

    def _recorded(self, rows: list[Row], starts: list[int]) -> tuple[Engine, torch.Tensor]:
        """Both runs, with what the rows need of them."""
        question, config = self.question, self.model.config
        of_source: dict[str, set[int]] = {}
        of_base: dict[str, set[int]] = {}
        for row in rows:
            target = self.cells.targets[row.target]
            for name in needed(target):
                of_source.setdefault(name, set()).update(row.positions)
            for name, positions in read_again(target, row.positions, question.length, config.d_conv).items():
                of_base.setdefault(name, set()).update(positions)
        source, source_logits = record(self.model, question.source, _sorted(of_source))
        lowest = min((self.cells.targets[row.target].layer for row in rows), default=config.n_layers - 1)
        base = Base.record(self.model, question.base, starts, range(lowest, config.n_layers), _sorted(of_base))
        return Engine(self.model, self.cells.targets, base, source, question.all_reads), source_logits

    def _fill(self, rows: list[Row], found: np.ndarray) -> None:
        for i, row in enumerate(rows):
            node, *place = row.place
            self.values[node][(slice(None), *place)] = found[:, i]
        if not np.isfinite(found).all():
            m, i = np.argwhere(~np.isfinite(found))[0]
            name, target = self.question.metrics[m].name, self.cells.targets[rows[i].target]
            where = f"{target.name} at {rows[i].positions}" + (f", {target.axis} {rows[i].unit}" if target.axis else "")
            raise SweepError(f"{name} is {found[m, i]} where {where} of pair {rows[i].pair} is patched", self.result())

    def result(self, complete: bool = False) -> PatchSweep:
        """What is known so far."""
        names, pairs = [m.name for m in self.question.metrics], list(range(self.question.pairs))
        labels = [_label(positions) for positions in self.cells.positions]
        arrays = {}
        for of_node, values in zip(self.cells.nodes, self.values, strict=True):
            coords = {"metric": names, "pair": pairs, "layer": list(range(values.shape[2])), "position": labels}
            if of_node[0].axis is None:
                values = values[..., 0]
            else:
                coords[UNITS.get(of_node[0].axis, "channels")] = list(range(values.shape[4]))
            arrays[of_node[0].node.name] = xr.DataArray(values, coords, list(coords))
        coords = {"metric": names, "pair": pairs}
        runs = (xr.DataArray(self.runs[name], coords, list(coords)) for name in ("clean", "corrupted"))
        return PatchSweep(arrays, *runs, self.question.direction, complete)


UNITS = {"H": "head", "K": "key_value_head", "H2": "head", "X": "expert", "expert": "expert"}
"""Axis -> what its cells are called."""


def _sorted(wanted: dict[str, set[int]]) -> dict[str, list[int]]:
    return {name: sorted(positions) for name, positions in wanted.items()}


def _label(positions: tuple[int, ...]) -> int | str:
    if len(positions) == 1:
        return positions[0]
    stretch = positions[-1] - positions[0] + 1 == len(positions)
    return f"{positions[0]}..{positions[-1]}" if stretch else str(positions)


def _positions(given: Iterable[int | tuple[int, ...]] | str | None, length: int) -> list[tuple[int, ...]]:
    """The cells' positions, each ascending."""
    if given is None:
        return [(p,) for p in range(length)]
    if given == "all":
        return [tuple(range(length))]
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InputError(f"positions={given!r} must be a list of positions, 'all' or None")
    cells = []
    for p in given:
        cell = tuple(sorted(position(q, length, "positions") for q in (p if isinstance(p, (tuple, list)) else (p,))))
        if not cell or len(set(cell)) < len(cell) or cell in cells:
            raise InputError(f"positions: {p!r} names nothing, or something twice")
        cells.append(cell)
    if not cells:
        raise InputError("positions=[] patches nothing; leave it out for every position")
    return cells
