"""``patch_sweep``: patch every cell of chosen components, in a fraction of a forward pass for each.

A cell is a node, a layer, a position (or several together), a head or an expert, and a group of channels. What it
costs: a cell at layer l and position p of L layers and P positions needs (L - l) / L of the depth and (P - p) / P of
the width, so a quarter of a forward pass on average; cells before the first token in which the prompts differ, or after
the last position that the metrics read, need nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import torch

from jambascope.errors import InputError
from jambascope.hooks.intervals import at_least
from jambascope.hooks.sweep.batches import starts_of
from jambascope.hooks.sweep.engine import Engine
from jambascope.hooks.sweep.memory import Needs, Room, values_bytes
from jambascope.hooks.sweep.metrics import Metric
from jambascope.hooks.sweep.nodes import Node, axes_of, targets_of
from jambascope.hooks.sweep.progress import Progress
from jambascope.hooks.sweep.question import Direction, Question, layers_of, listed, position
from jambascope.hooks.sweep.recorded import Base, Prompts
from jambascope.hooks.sweep.result import PatchSweep
from jambascope.hooks.sweep.rows import Row
from jambascope.hooks.sweep.running import Running

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
        max_bytes: of what is kept of both runs: streams, keys and values, states, the values that are patched, logits.
            Pairs are swept in several goes where it is not enough for all, and layers where it is not for one pair.

    Raises:
        HookError: a node that no layer, or one of ``layers``, has.
        InputError: prompts of different lengths, positions or tokens that do not exist, a metric that is not finite,
            hooks already attached, or ``max_bytes`` too small for one pair in one layer.
        SweepError: a metric that fails or is not finite at some cell; ``result`` has what was done by then.
    """
    at_least("max_bytes", max_bytes)
    question = Question.of(model, clean, corrupted, metric, direction)
    cells = Cells(model, nodes, layers, positions, question.prompt_length)
    return Sweep(question, cells, max_bytes).until_done(progress)


class Cells:
    """What is patched: nodes in their layers, and positions."""

    def __init__(
        self,
        model: HookedJamba,
        nodes: str | Node | Sequence[str | Node] | None,
        layers: Iterable[int] | None,
        positions: Iterable[int | tuple[int, ...]] | str | None,
        length: int,
    ) -> None:
        """
        Raises:
            HookError, InputError: what does not exist.
        """
        self.nodes = targets_of(model, "nodes", nodes, layers_of(model, layers))
        self.positions = _positions(positions, length)
        self.targets = [target for of_node in self.nodes for target in of_node]

    def rows(self, same_up_to: Sequence[int]) -> Iterator[Row]:
        """Every cell of every pair; its place is (node, pair, layer, index of the positions, *place in the target).

        Where a pair is the same there is nothing to patch: rows begin at its first difference.
        """
        index = 0
        for of_node in self.nodes:
            for target in of_node:
                name, within = target.node.name, [target.place(cell) for cell in range(target.cells)]
                for pair, first in enumerate(same_up_to):
                    for i, positions in enumerate(self.positions):
                        positions = tuple(p for p in positions if p >= first) or positions
                        for cell, place in enumerate(within):
                            yield Row(pair, pair, index, positions, cell, (name, pair, target.layer, i, *place))
                index += 1


class Sweep(Running):
    """The rows of a question that are wanted."""

    made = PatchSweep

    def __init__(
        self, question: Question, cells: Cells, max_bytes: int, wanted: Callable[[Row], bool] = lambda row: True
    ) -> None:
        """
        Raises:
            InputError: ``max_bytes`` too small for one pair and one target.
        """
        super().__init__(question)
        self.cells = cells
        labels = [_label(positions) for positions in cells.positions]
        for of_node in cells.nodes:
            coords = {"layer": list(range(self.model.config.n_layers)), "position": labels}
            coords |= {name: list(range(count)) for name, count in axes_of(of_node).items()}
            self.add(of_node[0].node.name, coords)
        self._same_up_to = question.same_up_to
        self.moving: dict[int, list[Row]] = {}
        self.still: dict[int, list[Row]] = {}
        """Rows of each pair: those whose patch can change what is read, and the others."""
        for row in filter(wanted, cells.rows(self._same_up_to)):
            (self.moving if self._moves(row) else self.still).setdefault(row.pair, []).append(row)
        self.needs = Needs(question, cells.targets, itertools.chain(*self.moving.values()))
        self.groups, self.rooms = self.needs.groups(max_bytes)

    def _moves(self, row: Row) -> bool:
        """Whether a patch can change anything that is read."""
        return row.positions[0] < self.question.length and row.positions[-1] >= self._same_up_to[row.pair]

    def _cost(self, row: Row) -> int:
        """Positions x layers."""
        layers = self.model.config.n_layers - self.cells.targets[row.target].layer
        return (self.question.length - row.positions[0]) * layers

    def run(self) -> Iterator[float]:
        """Measure the rows that move anything; the others have the metrics of the base."""
        done, work = 0, sum(self._cost(row) for rows in self.moving.values() for row in rows)
        n = min(room.pairs for room in self.rooms)
        for first in range(0, self.question.pairs, n):
            some = self.question.some(first, n)
            pairs = range(first, first + some.pairs)
            moving = [_shifted(row, first) for pair in pairs for row in self.moving.get(pair, ())]
            still = [row for pair in pairs for row in self.still.get(pair, ())]
            for i, (group, room) in enumerate(zip(self.groups, self.rooms, strict=True)):
                rows = [row for row in moving if row.target in group]
                if rows or not i:
                    engine, source_logits = self._recorded(some, group, rows, room)
                    self.ends(first, engine.base, source_logits)
                    del source_logits
                    self.write(still, self.runs_of_base[:, [row.pair for row in still]])
                    yield done / work if work else 1.0
                    for batch in self.batches(engine, rows):
                        done += sum(map(self._cost, batch))
                        yield done / work
                    del engine  # before the next is recorded beside it

    def _recorded(
        self, question: Question, group: Sequence[int], rows: Sequence[Row], room: Room
    ) -> tuple[Engine, torch.Tensor]:
        """Both runs of some pairs, with what the rows need of them."""
        reads, needs = question.all_reads, self.needs
        starts, of_base = starts_of({row.positions[0] for row in rows}, room.states), needs.of_base(group)
        everywhere = dict.fromkeys(needs.mixing(rows), range(question.length))
        if question.pairs * values_bytes(self.model, everywhere, question.length) <= room.left:
            of_base |= everywhere
        prompts = Prompts(question.source, needs.of_source(group))
        base, [(source, source_logits)] = Base.record(
            self.model, question.base, reads, starts, needs.layers(group), of_base, prompts
        )
        return Engine(self.model, self.cells.targets, base, source, reads), source_logits


def _shifted(row: Row, first: int) -> Row:
    """A row among those of pairs from ``first`` on."""
    return row._replace(pair=row.pair - first, source=row.source - first) if first else row


def _label(positions: tuple[int, ...]) -> int | str:
    if len(positions) == 1:
        return positions[0]
    stretch = positions[-1] - positions[0] + 1 == len(positions)
    return f"{positions[0]}..{positions[-1]}" if stretch else str(positions)


def _positions(given: Iterable[int | tuple[int, ...]] | str | None, length: int) -> list[tuple[int, ...]]:
    """The cells' positions, each ascending."""
    if given is None:
        return [(p,) for p in range(length)]
    if isinstance(given, str) and given == "all":
        return [tuple(range(length))]
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InputError(f"positions={given!r} must be a list of positions, 'all' or None")
    cells: dict[tuple[int, ...], None] = {}
    for p in listed(given):
        cell = tuple(sorted(position(q, length, "positions") for q in (p if isinstance(p, (tuple, list)) else (p,))))
        if not cell or len(set(cell)) < len(cell) or cell in cells:
            raise InputError(f"positions: {p!r} names nothing, or something twice")
        cells[cell] = None
    if not cells:
        raise InputError("positions=[] patches nothing; leave it out for every position")
    return list(cells)
