"""``patch_sweep``: patch every cell of chosen components, in a fraction of a forward pass for each.

A cell is a node, a layer, a position (or several together), and a head, an expert or a group of channels. What it
costs: a cell at layer l and position p of L layers and P positions needs (L - l) / L of the depth and (P - p) / P of
the width, so a quarter of a forward pass on average; cells before the first token in which the prompts differ, or after
the last position that the metrics read, need nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int

from jambascope.devices import index_tensor
from jambascope.errors import InputError
from jambascope.hook_point import listeners
from jambascope.hooks.sweep.engine import Engine
from jambascope.hooks.sweep.metrics import Metric, Reference, as_metrics, token_ids
from jambascope.hooks.sweep.nodes import CONV_STATE, EXPERT_OUT, STATE, Node, Target, needed, read_again, targets
from jambascope.hooks.sweep.patches import Row
from jambascope.hooks.sweep.progress import Progress, watched
from jambascope.hooks.sweep.recorded import Base, record
from jambascope.hooks.sweep.result import PatchSweep

if TYPE_CHECKING:
    from jambascope.model import HookedJamba, Input

TOKENS_AT_ONCE = {"cpu": 2048}
"""Rows x positions of a batch, by device."""
MOST_TOKENS = 1 << 16
"""On other devices."""
WIDEST = 8
"""Positions whose cells start together, where memory does not ask for more."""


def patch_sweep(
    model: HookedJamba,
    clean: Input,
    corrupted: Input,
    metric: Metric | Callable | Sequence[Metric | Callable],
    nodes: str | Node | Sequence[str | Node] = "resid_pre",
    *,
    layers: Iterable[int] | None = None,
    positions: Iterable[int | tuple[int, ...]] | Literal["all"] | None = None,
    direction: Literal["denoise", "noise"] = "denoise",
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
    plan = _Plan.of(model, clean, corrupted, metric, nodes, layers, positions, direction)
    return _run(plan, progress, max_bytes)


@dataclass
class _Plan:
    """A sweep, checked."""

    model: HookedJamba
    base: Int[torch.Tensor, "pair pos"]
    source: Int[torch.Tensor, "pair pos"]
    metrics: list[Metric]
    reads: dict[str, tuple[int, ...]]
    """Metric -> its positions."""
    nodes: list[list[Target]]
    positions: list[tuple[int, ...]]
    direction: str

    @classmethod
    def of(cls, model, clean, corrupted, metric, nodes, layers, positions, direction) -> _Plan:
        if direction not in ("denoise", "noise"):
            raise InputError(f"direction={direction!r} must be 'denoise' or 'noise'")
        if any(listeners(model)):
            raise InputError(
                "the model has hooks attached, which would act on every cell; model.reset_hooks() takes them off"
            )
        clean, corrupted = prompt_pairs(model, clean, corrupted)
        metrics, length = as_metrics(metric), clean.shape[1]
        reads = {m.name: tuple(_position(p, length, f"{m.name}: positions") for p in m.positions) for m in metrics}
        base, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
        given = [nodes] if isinstance(nodes, (str, Node)) else list(nodes)
        if not given:
            raise InputError("nodes=[] patches nothing; give at least one")
        found = [targets(model, node, None if layers is None else tuple(layers)) for node in given]
        names = [of_node[0].node.name for of_node in found]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"nodes: {twice!r} is given twice")
        return cls(model, base, source, metrics, reads, found, _positions(positions, length), direction)

    @property
    def all_reads(self) -> tuple[int, ...]:
        return tuple(sorted({p for reads in self.reads.values() for p in reads}))

    @property
    def length(self) -> int:
        """Positions that matter: up to the last that is read."""
        return self.all_reads[-1] + 1


def prompt_pairs(
    model: HookedJamba, clean: Input, corrupted: Input
) -> tuple[Int[torch.Tensor, "pair pos"], Int[torch.Tensor, "pair pos"]]:
    """Checked ids of prompts that correspond token by token.

    Raises:
        InputError: prompts of different lengths or numbers, or padding.
    """
    found = []
    for name, given in (("clean", clean), ("corrupted", corrupted)):
        tokens, mask = model._prepare(given, None, None, None)
        if mask is not None and not bool(mask.all()):
            lengths = sorted(set(mask.sum(1).tolist()))
            raise InputError(
                f"{name} has prompts of {', '.join(map(str, lengths))} tokens; sweep each length on its own"
            )
        found.append(tokens)
    if found[0].shape != found[1].shape:
        sizes = [f"{n} x {t} tokens" for n, t in (tokens.shape for tokens in found)]
        raise InputError(
            f"clean has {sizes[0]} and corrupted {sizes[1]}; a patch needs prompts that correspond token by token"
        )
    return found[0], found[1]


def _run(plan: _Plan, progress: bool | Progress, max_bytes: int) -> PatchSweep:
    sweep = _Sweep(plan)
    with watched(progress) as show:
        try:
            for part in sweep.parts(max_bytes):
                for _ in sweep.run(part, max_bytes):
                    if show(sweep.done / max(sweep.work, 1), sweep.result()) is False:
                        return sweep.result()
        except KeyboardInterrupt:
            return sweep.result()
    return sweep.result(complete=True)


class _Sweep:
    """The rows of a plan, and what is known of them."""

    def __init__(self, plan: _Plan) -> None:
        self.plan, self.model = plan, plan.model
        self.targets = [target for of_node in plan.nodes for target in of_node]
        self.values = [np.full(self._shape(of_node), np.nan) for of_node in plan.nodes]
        self.metrics: dict[str, np.ndarray] = {}
        """Of the clean and the corrupted run, [metric pair]."""
        differ = (plan.base != plan.source)[:, : plan.length]
        self._same_up_to = torch.where(differ.any(1), differ.int().argmax(1), plan.length).tolist()
        self.rows = list(self._rows())
        self.done, self.work = 0, sum(self._cost(row, row.positions[0]) for row in self.rows if self._moves(row))

    def _shape(self, of_node: list[Target]) -> tuple[int, ...]:
        units = max(target.units for target in of_node)
        plan = self.plan
        return len(plan.metrics), len(plan.base), self.model.config.n_layers, len(plan.positions), units

    def _rows(self) -> Iterator[Row]:
        index = 0
        for n, of_node in enumerate(self.plan.nodes):
            for target in of_node:
                for pair in range(len(self.plan.base)):
                    for i, positions in enumerate(self.plan.positions):
                        for unit in range(target.units):
                            yield Row(pair, pair, index, positions, unit, (n, pair, target.layer, i, unit))
                index += 1

    def _moves(self, row: Row) -> bool:
        """Whether a patch can change anything that is read."""
        return row.positions[0] < self.plan.length and row.positions[-1] >= self._same_up_to[row.pair]

    def _cost(self, row: Row, start: int) -> int:
        """Positions x layers."""
        return (self.plan.length - start) * (self.model.config.n_layers - self.targets[row.target].layer)

    def parts(self, max_bytes: int) -> Iterator[list[Row]]:
        """The rows in as many goes as the memory asks for: layers that are recorded together."""
        moving = [row for row in self.rows if self._moves(row)]
        sizes = [self._bytes(target) for target in self.targets]
        if moving and max(sizes) > max_bytes // 2:
            worst = self.targets[max(range(len(sizes)), key=sizes.__getitem__)]
            raise InputError(
                f"max_bytes={max_bytes}: the values of {worst.name} alone are {max(sizes)} bytes, and half as many may "
                "be; give fewer positions or pairs at a time, or more bytes"
            )
        group, total = set(), 0
        groups = [group]
        for i in sorted(range(len(sizes)), key=lambda i: self.targets[i].layer):
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
        n = len({p for positions in self.plan.positions for p in positions if p < self.plan.length})
        both = 2 if target.node.window or target.tail in (EXPERT_OUT, "hook_mlp_out") else 1
        size = sum(row.nbytes(self.model.config, len(self.plan.base), 1, self.model.dtype) for row in rows)
        return n * both * size

    def run(self, rows: list[Row], max_bytes: int) -> Iterator[None]:
        """Measure rows, batch by batch."""
        plan = self.plan
        stride = self._stride(rows, max_bytes // 2)
        first = min((row.positions[0] for row in rows), default=0)
        starts: dict[int, list[Row]] = {}
        for row in rows:
            starts.setdefault(row.positions[0] - (row.positions[0] - first) % stride, []).append(row)
        engine, source_logits = self._recorded(rows, sorted(starts))
        measure = self._measure(engine.base.logits, source_logits)
        if not self.metrics:
            self._begin(measure)
            yield
        at_once = TOKENS_AT_ONCE.get(self.model.device.type, MOST_TOKENS)
        for start in sorted(starts):
            here = sorted(starts[start], key=engine.order)
            n = max(1, at_once // (plan.length - start))
            for batch in (here[i : i + n] for i in range(0, len(here), n)):
                logits = engine.logits(batch, start)
                found = measure(logits, index_tensor([row.pair for row in batch], logits.device))
                self._fill(batch, found.cpu().numpy())
                self.done += sum(self._cost(row, row.positions[0]) for row in batch)
                yield

    def _stride(self, rows: list[Row], max_bytes: int) -> int:
        """Positions whose cells start together: enough rows for a batch, and few enough states kept between them."""
        plan, config = self.plan, self.model.config
        at_once = TOKENS_AT_ONCE.get(self.model.device.type, MOST_TOKENS)
        spread = len({row.positions[0] for row in rows}) or 1
        stride = min(WIDEST, max(1, round(at_once / (len(rows) / spread * plan.length / 2))) if rows else 1)
        tails = [STATE, CONV_STATE][: 2 if config.d_conv > 1 else 1]
        names = [f"blocks.{layer}.{tail}" for layer in config.ssm_layers for tail in tails]
        state = sum(self.model.hook_rows[n].nbytes(config, len(plan.base), 1, self.model.dtype) for n in names)
        most = max(1, max_bytes // max(state, 1))
        return max(stride, math.ceil(spread / most))

    def _recorded(self, rows: list[Row], starts: list[int]) -> tuple[Engine, torch.Tensor]:
        """Both runs, with what the rows need of them."""
        plan, config = self.plan, self.model.config
        wanted: dict[str, set[int]] = {}
        of_base: dict[str, set[int]] = {}
        for row in rows:
            target = self.targets[row.target]
            for name in needed(target):
                wanted.setdefault(name, set()).update(row.positions)
            for name, positions in read_again(target, row.positions, plan.length, config.d_conv).items():
                of_base.setdefault(name, set()).update(positions)
        source, source_logits = record(self.model, plan.source[:, : plan.length], _sorted(wanted))
        lowest = min((self.targets[row.target].layer for row in rows), default=config.n_layers - 1)
        layers = range(lowest, config.n_layers)
        base = Base.record(self.model, plan.base[:, : plan.length], starts, layers, _sorted(of_base))
        return Engine(self.model, self.targets, base, source, plan.all_reads), source_logits

    def _measure(self, base_logits: torch.Tensor, source_logits: torch.Tensor) -> Callable:
        """A function of (logits of rows [row read vocab], their pairs) -> [metric row], float64."""
        plan, reads = self.plan, self.plan.all_reads
        runs = (source_logits, base_logits) if plan.direction == "denoise" else (base_logits, source_logits)
        clean, corrupted = (logits[:, list(reads)] for logits in runs)
        ids = {m.name: token_ids(self.model, m, len(plan.base)) for m in plan.metrics}
        places = {m.name: [reads.index(p) for p in plan.reads[m.name]] for m in plan.metrics}

        def measure(logits: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
            found = []
            for metric in plan.metrics:
                at = places[metric.name]
                reference = Reference(pairs, clean[:, at], corrupted[:, at], ids[metric.name])
                value = metric.function(logits[:, at], reference)
                if not isinstance(value, torch.Tensor) or value.shape != pairs.shape:
                    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                    raise InputError(
                        f"{metric.name} gave {shape} for {len(pairs)} rows; it must give a number for each"
                    )
                found.append(value.double())
            return torch.stack(found)

        measure.runs = {"clean": clean, "corrupted": corrupted}
        return measure

    def _begin(self, measure: Callable) -> None:
        """The metrics of both runs; they are those of all cells whose patch changes nothing that is read."""
        plan = self.plan
        pairs = torch.arange(len(plan.base), device=self.model.device)
        for name, logits in measure.runs.items():
            found = measure(logits, pairs).cpu().numpy()
            for metric, values in zip(plan.metrics, found, strict=True):
                if not np.isfinite(values).all():
                    pair = int(np.flatnonzero(~np.isfinite(values))[0])
                    raise InputError(
                        f"{metric.name} is {values[pair]} in the {name} run of pair {pair}; it must be finite"
                    )
            self.metrics[name] = found
        base = self.metrics["corrupted" if plan.direction == "denoise" else "clean"]
        still = [row for row in self.rows if not self._moves(row)]
        self._fill(still, base[:, [row.pair for row in still]])

    def _fill(self, rows: list[Row], found: np.ndarray) -> None:
        for i, row in enumerate(rows):
            node, *place = row.place
            self.values[node][(slice(None), *place)] = found[:, i]
        if not np.isfinite(found).all():
            m, i = np.argwhere(~np.isfinite(found))[0]
            row = rows[i]
            target = self.targets[row.target]
            where = f"{target.name} at {row.positions}" + (f", {target.axis} {row.unit}" if target.axis else "")
            raise SweepError(
                f"{self.plan.metrics[m].name} is {found[m, i]} where {where} of pair {row.pair} is patched",
                self.result(),
            )

    def result(self, complete: bool = False) -> PatchSweep:
        """What is known so far."""
        plan = self.plan
        names = [m.name for m in plan.metrics]
        pairs = range(len(plan.base))
        labels = [p[0] if len(p) == 1 else f"{p[0]}..{p[-1]}" if _stretch(p) else str(p) for p in plan.positions]
        arrays = {}
        for of_node, values in zip(plan.nodes, self.values, strict=True):
            dims, coords = ["metric", "pair", "layer", "position"], [names, pairs, range(values.shape[2]), labels]
            unit = UNITS.get(of_node[0].axis, "channels")
            if of_node[0].axis is None:
                values = values[..., 0]
            else:
                dims, coords = [*dims, unit], [*coords, range(values.shape[4])]
            arrays[of_node[0].node.name] = xr.DataArray(values, dict(zip(dims, map(list, coords), strict=True)), dims)
        runs = {
            name: xr.DataArray(found, {"metric": names, "pair": list(pairs)}, ["metric", "pair"])
            for name, found in self.metrics.items()
        }
        return PatchSweep(arrays, runs["clean"], runs["corrupted"], plan.direction, complete)


UNITS = {"H": "head", "K": "key_value_head", "H2": "head", "X": "expert", "expert": "expert"}
"""Axis -> what its cells are called."""


class SweepError(InputError):
    """A metric that was not finite at some cell; ``result`` is what was known by then."""

    def __init__(self, message: str, result: PatchSweep) -> None:
        super().__init__(message)
        self.result = result


def _sorted(wanted: dict[str, set[int]]) -> dict[str, list[int]]:
    return {name: sorted(positions) for name, positions in wanted.items()}


def _stretch(positions: tuple[int, ...]) -> bool:
    return positions[-1] - positions[0] + 1 == len(positions)


def _position(position: int, length: int, field: str) -> int:
    if not isinstance(position, int) or not -length <= position < length:
        raise InputError(
            f"{field}: {position!r} is not in a prompt of {length} tokens (0..{length - 1}, or from the end)"
        )
    return position % length


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
        cell = sorted(_position(q, length, "positions") for q in (p if isinstance(p, (tuple, list)) else (p,)))
        if not cell or len(set(cell)) < len(cell) or tuple(cell) in cells:
            raise InputError(f"positions: {p!r} names nothing, or something twice")
        cells.append(tuple(cell))
    if not cells:
        raise InputError("positions=[] patches nothing; leave it out for every position")
    return cells
