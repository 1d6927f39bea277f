"""What a sweep keeps, in bytes, before any of it is kept, and how many prompt pairs at a time that leaves room for.

Kept of the base run: the stream that enters each layer, keys and values, the states of Mamba layers where rows start
and, where there is room, what their scans read; of both: the values that are patched, and of all pairs throughout the
logits that metrics read and the ids of their tokens. What a batch computes comes on top and is gone with it
(``engine.TOKENS_AT_ONCE``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jambascope.errors import InputError
from jambascope.hooks.sweep.nodes import Target, enters, needed, read_again
from jambascope.hooks.sweep.question import Question
from jambascope.hooks.sweep.recorded import base_points, mixing_points, state_points
from jambascope.hooks.sweep.rows import Row

if TYPE_CHECKING:
    from jambascope.model import HookedJamba

ENOUGH_ALIKE = 0.25
"""Share of the tokens of the rows that enter a layer from which on it pays to keep what the base run's scan reads."""


@dataclass(frozen=True)
class Room:
    """What is kept at a time."""

    pairs: int
    states: int
    """Positions whose states are kept, of each of these pairs."""
    left: int
    """Bytes."""


@dataclass(frozen=True)
class Need:
    """What a sweep wants to keep, in bytes."""

    of_pair: int
    """Without states, which is enough: then rows start at the first position."""
    of_state: int = 0
    """The states of one pair at one position."""
    starts: Sequence[int] = ()
    """Where rows are to start; where there is no memory for so many states, some start further left."""

    @property
    def states(self) -> int:
        """Of one pair, as many as are wanted; at the first position of a prompt there are none."""
        return sum(start > 0 for start in self.starts)

    @property
    def whole(self) -> int:
        """Of one pair with all states that are wanted."""
        return self.of_pair + self.states * self.of_state


def room(question: Question, max_bytes: int, need: Need, what: str) -> Room:
    """How many pairs at a time.

    Raises:
        InputError: not one.
    """
    free = max_bytes - measure_bytes(question)
    if need.of_pair > free:
        least = max_bytes - free + need.of_pair
        raise InputError(
            f"max_bytes={max_bytes} is too little: {what} keeps {least} bytes with one pair at a time, "
            f"{max_bytes - free} of them for the metrics of all {question.pairs}; give max_bytes={least} or more, "
            "shorter prompts, fewer pairs, or fewer positions to patch or to read"
        )
    pairs = min(question.pairs, max(1, free // need.whole))
    states = need.states
    if need.of_state:
        states = min(states, (free // pairs - need.of_pair) // need.of_state)
    return Room(pairs, states, free - pairs * (need.of_pair + states * need.of_state))


def measure_bytes(question: Question) -> int:
    """Both runs' logits where metrics read, of all pairs, and the ids of the tokens that metrics ask about."""
    model = question.model
    ids = sum(of.untyped_storage().nbytes() for metric in question.token_ids.values() for of in metric.values())
    return ids + 2 * question.pairs * len(question.all_reads) * model.config.d_vocab * model.dtype.itemsize


def values_bytes(model: HookedJamba, wanted: Mapping[str, Sequence[int]], length: int) -> int:
    """Of hook points at chosen positions, for one prompt of a length."""
    rows = {name: model.hook_rows[name] for name in wanted}
    whole = {name: row.nbytes(model.config, 1, length, model.dtype) for name, row in rows.items()}
    return sum(whole[name] // length * len(positions) for name, positions in wanted.items())


def base_bytes(model: HookedJamba, length: int, layers: range, further: Mapping[str, Sequence[int]]) -> int:
    """Of the base run of one prompt: streams, keys and values and ``further`` points, without states."""
    config = model.config
    attention = sum(config.mixers[layer] == "attention" for layer in layers)
    keys = 2 * attention * length * config.n_key_value_heads * config.d_head * model.dtype.itemsize
    return keys + values_bytes(model, base_points(length, layers, further), length)


def states_bytes(model: HookedJamba, layers: range) -> int:
    """Of the base run of one prompt at one position where rows start."""
    return values_bytes(model, {name: (0,) for name in state_points(model, layers)}, 1)


class Needs:
    """What the rows of a sweep need of both runs, target by target."""

    def __init__(self, question: Question, targets: Sequence[Target], rows: Iterable[Row]) -> None:
        self.question, self.model, self.targets = question, question.model, targets
        self._of: dict[int, _Wanted] = {}
        length, d_conv = question.length, self.model.config.d_conv
        patched: dict[int, set[tuple[int, ...]]] = {}
        for row in rows:
            patched.setdefault(row.target, set()).add(row.positions)
        for target, cells in patched.items():
            mine, of = self._of.setdefault(target, _Wanted()), targets[target]
            mine.firsts = {positions[0] for positions in cells}
            every = {p for positions in cells for p in positions if p < length}
            mine.source = {name: set(every) for name in needed(of)}
            for positions in cells if of.read_again else ():
                for name, at in read_again(of, positions, length, d_conv).items():
                    mine.base.setdefault(name, set()).update(p for p in at if p < length)

    def of_source(self, group: Iterable[int]) -> dict[str, list[int]]:
        """Hook points of the source run, and positions."""
        return _merged(self._of[i].source for i in group)

    def of_base(self, group: Iterable[int]) -> dict[str, list[int]]:
        """Those of the base run, besides what every row needs."""
        return _merged(self._of[i].base for i in group)

    def mixing(self, rows: Iterable[Row]) -> list[str]:
        """Hook points of the base run that rows are computed from faster, where there is memory for them: of Mamba
        layers that they enter and read like the base run soon after."""
        config, length = self.model.config, self.question.length
        whole, alike = Counter(), Counter()
        for row in rows:
            target = self.targets[row.target]
            if enters(target) and config.mixers[target.layer] == "mamba":
                whole[target.layer] += length - row.positions[0]
                alike[target.layer] += max(0, length - config.d_conv - row.positions[-1])
        return mixing_points(sorted(layer for layer in whole if alike[layer] >= ENOUGH_ALIKE * whole[layer]))

    def layers(self, group: Iterable[int]) -> range:
        """Those that rows pass through."""
        n = self.model.config.n_layers
        return range(min((self.targets[i].layer for i in group), default=n - 1), n)

    def need(self, group: Sequence[int]) -> Need:
        """Of targets that are swept together."""
        length, layers = self.question.length, self.layers(group)
        of_pair = values_bytes(self.model, self.of_source(group), length)
        of_pair += base_bytes(self.model, length, layers, self.of_base(group))
        firsts = set().union(*(self._of[i].firsts for i in group))
        return Need(of_pair, states_bytes(self.model, layers), sorted(firsts))

    def groups(self, max_bytes: int) -> tuple[list[list[int]], list[Room]]:
        """The targets in as few groups as may be, and the room for each: all together where one pair fits.

        Raises:
            InputError: one pair and one target do not.
        """
        free = max_bytes - measure_bytes(self.question)
        groups: list[list[int]] = [sorted(self._of, key=lambda i: self.targets[i].layer)]
        if self.need(groups[0]).whole > free:
            ordered, groups = groups[0], [[]]
            for i in ordered:
                if groups[-1] and self.need([*groups[-1], i]).whole > free:
                    groups.append([])
                groups[-1].append(i)
        needs = [self.need(group) for group in groups]
        largest = max(range(len(groups)), key=lambda i: needs[i].of_pair)
        name = self.targets[groups[largest][0]].name if groups[largest] else "nothing"
        room(self.question, max_bytes, needs[largest], f"patching {name}")
        return groups, [room(self.question, max_bytes, need, "patching") for need in needs]


@dataclass
class _Wanted:
    """By a target's rows: hook points of both runs and their positions, and the rows' first ones."""

    source: dict[str, set[int]] = field(default_factory=dict)
    base: dict[str, set[int]] = field(default_factory=dict)
    firsts: set[int] = field(default_factory=set)


def _merged(wanted: Iterable[dict[str, set[int]]]) -> dict[str, list[int]]:
    found: dict[str, set[int]] = {}
    for points in wanted:
        for name, positions in points.items():
            found.setdefault(name, set()).update(positions)
    return {name: sorted(positions) for name, positions in found.items()}
