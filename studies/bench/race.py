"""What a race is, and how one is run over widths and lengths into rows, one per measurement."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from jambascope.errors import InputError
from jambascope.studies.bench.timing import Budget, Clock, Failure, Forecast, Side, failure, run_race

if TYPE_CHECKING:
    from jambascope.studies.bench.models import Lab

LENGTHS = (64, 128, 512)
FULL_LENGTHS = (64, 128, 512, 2048, 8192, 32768)
D_MODELS = (128, 512)
OURS = "jambascope"
EVERY_SIDE = "every side"
"""Of a race that could not be set up."""


@dataclass(frozen=True)
class Setting:
    """Where a race is run."""

    d_model: int
    batch: int
    length: int
    """Tokens per sequence; 0 where a race has none."""


@dataclass(frozen=True)
class Row:
    """One measurement."""

    race: str
    side: str
    d_model: int
    batch: int
    length: int
    run: int
    quantity: str
    """``ms``, or what else was measured, with its unit."""
    value: float


@dataclass(frozen=True)
class Skip:
    """A side that did not run, and why."""

    race: str
    side: str
    d_model: int
    batch: int
    length: int
    reason: str
    failed: bool = False
    """Whether it is our own side, or the race's setting up, and the reason an error."""


@dataclass(frozen=True)
class Race:
    """A race by name: the sides that it has in a setting, each a call, or the reason why it cannot run."""

    name: str
    title: str
    sides: Callable[[Lab, Setting], dict[str, Side | str]]
    baseline: str = OURS
    """The side whose time the others' are divided by."""
    bounds: tuple[str, ...] = ()
    """Sides that are no peers but what any implementation has to do at least."""
    by_length: bool = True
    lengths: tuple[int, ...] = ()
    """Run at these where no length is asked for, in place of the usual ones."""
    d_models: tuple[int, ...] = ()
    """The same of widths."""
    one_row: bool = False
    """One sequence whatever ``--batch`` says."""
    extra: Callable[[Lab, Setting], Iterable[tuple[str, str, float] | tuple[str, str]]] | None = None
    """More measurements that are no timed calls: (side, quantity, value), or (side, reason) where there is none."""
    precise: int = 1
    """How many times ``--repeats`` may run while there is time left."""
    patience: float = 1
    """Times ``--budget``."""
    quantity: Literal["ms", "us per token", "ms per cell"] = "ms"
    """What times are given in: of a call, or of one of its units."""
    opt_in: bool = False
    all_ours: bool = False
    """No side is a peer's."""

    @property
    def per_token(self) -> bool:
        return self.quantity == "us per token"


@dataclass
class Results:
    """Rows and skips of all races run."""

    rows: list[Row] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {"rows": [asdict(r) for r in self.rows], "skips": [asdict(s) for s in self.skips]}


def choose(names: list[str] | None, races: dict[str, Race]) -> list[Race]:
    """The races of these names, or all but those that have to be asked for."""
    for name in names or []:
        if name not in races:
            raise InputError(f"race={name!r} must be one of {', '.join(races)}")
    return [races[n] for n in dict.fromkeys(names)] if names else [r for r in races.values() if not r.opt_in]


def settings(
    races: list[Race], d_models: list[int] | None, batch: int, lengths: list[int] | None, full: bool = False
) -> Iterator[tuple[Race, Setting]]:
    """Every race once at every size that was asked for, or at its own; lengths ascending, so that a longer one can be
    foreseen."""
    for d_model in dict.fromkeys(d_models or (*D_MODELS, *(d for race in races for d in race.d_models))):
        for race in races:
            if not d_models and d_model not in (race.d_models or D_MODELS):
                continue
            usual = race.lengths or (FULL_LENGTHS if full else LENGTHS)
            for length in sorted(set(lengths or usual)) if race.by_length else [0]:
                yield race, Setting(d_model, 1 if race.one_row else batch, length)


def run(
    lab: Lab,
    clock: Clock,
    plan: list[tuple[Race, Setting]],
    repeats: int,
    seconds: float,
    progress: Callable[[int, str], None],
    results: Results,
) -> None:
    """Run the plan into ``results``, which holds what was measured also when this is interrupted."""
    forecast = Forecast()
    for i, (race, at) in enumerate(plan):
        where = f"{race.name}, d_model {at.d_model}" + (f", batch {at.batch} x {at.length}" if at.length else "")
        progress(i, f"{where}: setting up")
        try:
            sides = race.sides(lab, at)
        except Exception as e:  # the other races are still worth running
            results.skips.append(_skip(race, at, EVERY_SIDE, failure(e)))
            continue
        results.skips += [_skip(race, at, name, why) for name, why in sides.items() if isinstance(why, str)]
        sides = {name: side for name, side in sides.items() if isinstance(side, Side)}
        times, skipped = run_race(
            clock,
            sides,
            Budget(repeats, race.patience * seconds, race.precise * repeats),
            lambda name, at=at, race=race: forecast.ms((race.name, name, at.d_model), at.length),
            lambda doing, i=i, where=where: progress(i, f"{where}: {doing}"),
            own=OURS,
            note_ms=lambda name, ms, at=at, race=race: forecast.note((race.name, name, at.d_model), at.length, ms),
        )
        results.skips += [_skip(race, at, name, why) for name, why in skipped.items()]
        for name, ms in times.items():
            forecast.note((race.name, name, at.d_model), at.length, statistics.median(ms))
            length = at.length if sides[name].length is None else sides[name].length
            scale = (1e3 if race.per_token else 1) / sides[name].units
            sizes = race.name, name, at.d_model, at.batch, length
            results.rows += [Row(*sizes, k, race.quantity, scale * v) for k, v in enumerate(ms)]
        _run_extra(lab, race, at, results)
        del sides  # their tensors
        gc.collect()


def _run_extra(lab: Lab, race: Race, at: Setting, results: Results) -> None:
    try:
        for side, *found in race.extra(lab, at) if race.extra else ():
            if len(found) == 1:
                results.skips.append(_skip(race, at, side, Failure(found[0])))
            else:
                results.rows.append(Row(race.name, side, at.d_model, at.batch, at.length, 0, *found))
    except Exception as e:  # as in setting up
        results.skips.append(_skip(race, at, EVERY_SIDE, failure(e)))


def _skip(race: Race, at: Setting, side: str, reason: str) -> Skip:
    failed = isinstance(reason, Failure) and (race.all_ours or side in (OURS, EVERY_SIDE))
    return Skip(race.name, side, at.d_model, at.batch, at.length, str(reason), failed)


@dataclass(frozen=True)
class Summary:
    """One side at one size: its median and spread, and against the race's baseline."""

    race: str
    side: str
    d_model: int
    batch: int
    length: int
    quantity: str
    runs: int
    median: float
    low: float
    high: float
    ratio: float | None
    """Median over the rounds of this side's time over the baseline's in the same round; None without a baseline."""
    ratio_low: float | None
    ratio_high: float | None


def summarize(results: Results, races: dict[str, Race]) -> list[Summary]:
    """Medians with the lowest and highest run, and ratios of neighbouring runs."""
    groups: dict[tuple, list[float]] = {}
    for r in results.rows:
        groups.setdefault((r.race, r.d_model, r.batch, r.length, r.quantity, r.side), []).append(r.value)
    found = []
    for (race, d_model, batch, length, quantity, side), values in groups.items():
        base = groups.get((race, d_model, batch, length, quantity, races[race].baseline))
        comparable = base and len(base) == len(values) and 0 not in base
        ratios = [v / b for v, b in zip(values, base, strict=True)] if comparable else None
        median = statistics.median(values)
        spread = (statistics.median(ratios), min(ratios), max(ratios)) if ratios else (None,) * 3
        sizes = (race, side, d_model, batch, length)
        found.append(Summary(*sizes, quantity, len(values), median, min(values), max(values), *spread))
    return found
