"""The clock, and rounds in which every side of a race runs once: what a ratio here is made of."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Side:
    """One runner of a race."""

    call: Callable[[], object]
    bytes: float = 0
    """Memory that it is known to need at its peak, beside what it was given; it is not started where there is less."""
    calls: int = 1
    """Calls to one timing, for calls too short to be timed alone."""
    length: int | None = None
    """Tokens of a sequence, where the sides of one race differ in them."""
    units: int = 1
    """Tokens or cells that a call is about, where a race's times are per token or per cell."""


class Clock(Protocol):
    """What measures: one per kind of device."""

    warm_ups: int

    def time(self, call: Callable[[], object]) -> float:
        """Milliseconds from before the call until its work is done."""
        ...

    def free_bytes(self) -> float:
        """Memory that a side could still take."""
        ...


class CpuClock:
    warm_ups = 1

    def time(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    def free_bytes(self) -> float:
        try:
            lines = dict(line.split(":", 1) for line in open("/proc/meminfo"))
            return 1024.0 * int(lines["MemAvailable"].split()[0])
        except (OSError, KeyError):  # not Linux
            return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


class CudaClock:
    """Events on the device: the host's part counts only where the device waits for it."""

    warm_ups = 3

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def time(self, call: Callable[[], object]) -> float:
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)

    def free_bytes(self) -> float:
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return float(torch.cuda.mem_get_info(self.device)[0] + cached)


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


class Forecast:
    """What a side will take at a length, from what it took at shorter ones."""

    def __init__(self) -> None:
        self._seen: dict[tuple, dict[int, float]] = {}

    def note(self, side: tuple, length: int, ms: float) -> None:
        self._seen.setdefault(side, {})[length] = ms

    def ms(self, side: tuple, length: int) -> float | None:
        """A power law through the last two lengths, its exponent within 0 to 2.5; None with nothing to go by.

        From one length alone a quarter of what is proportional: part of the cost may not depend on the length.
        """
        seen = sorted(s for s in self._seen.get(side, {}).items() if s[0] < length)
        if not seen:
            return None
        t, ms = seen[-1]
        if len(seen) == 1:
            return max(ms, ms * length / t / 4)
        t0, ms0 = seen[-2]
        exponent = min(2.5, max(0.0, math.log(ms / ms0) / math.log(t / t0)))
        return ms * (length / t) ** exponent


@dataclass(frozen=True)
class Budget:
    """What a side may cost, and how often it runs."""

    repeats: int
    """Timed runs of each side."""
    seconds: float
    """A side whose timed runs would take longer together is left out."""
    most_repeats: int
    """Runs while those of all sides fit into ``seconds``: differences of a percent need more than ``repeats``."""


def run_race(
    clock: Clock,
    sides: dict[str, Side],
    budget: Budget,
    expected_ms: Callable[[str], float | None] = lambda side: None,
    progress: Callable[[str], None] = lambda doing: None,
    own: str | None = None,
    note_ms: Callable[[str, float], None] = lambda side, ms: None,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Times in milliseconds of every side, by round, and why the others were left out.

    A side that fails, in the warm-up or later, is left out with its error, a ``Failure``. ``own`` is warmed up with
    more patience. ``note_ms`` hears what a side's timing took in the warm-up, also of those then left out.

    After a warm-up, each round runs every side once, every second round in the opposite order, so that what drifts
    in the machine meets all of them alike and none always follows the same neighbour.
    """
    running, skipped = {}, {}
    first_ms = {}
    for name, side in sides.items():
        progress(f"{name}, warm-up")
        reason = _hopeless(side, clock, budget, expected_ms(name))
        if reason is None:
            try:
                first_ms[name] = _warm_up(clock, side, budget, patient=name == own)
                note_ms(name, first_ms[name] / side.calls)
            except Exception as e:  # of any kind: no reason to lose what else is measured
                reason = failure(e)
        if reason is None and first_ms[name] * budget.repeats > 1e3 * budget.seconds:
            runs = "1 run of {} is" if budget.repeats == 1 else f"{budget.repeats} runs of {{}} are"
            reason = f"{runs.format(f'{first_ms[name] / 1e3:.3g} s')} more than --budget {budget.seconds:g} s"
        if reason is None:
            running[name] = side
        else:
            skipped[name] = reason
    times: dict[str, list[float]] = {name: [] for name in running}
    rounds = budget.repeats
    if running:
        round_ms = sum(first_ms[name] for name in running)
        rounds = int(min(max(budget.repeats, 1e3 * budget.seconds / max(round_ms, 1e-3)), budget.most_repeats))
    for i in range(rounds):
        for name in list(running) if i % 2 == 0 else list(running)[::-1]:
            progress(f"{name}, run {i + 1} of {rounds}")
            side = running[name]
            try:
                times[name].append(clock.time(_repeated(side)) / side.calls)
            except Exception as e:  # as in the warm-up
                skipped[name] = failure(e)
                del running[name], times[name]
    return times, skipped


def _repeated(side: Side) -> Callable[[], object]:
    """The calls of one timing; what one returns is dropped at once."""
    if side.calls == 1:
        return side.call

    def call() -> None:
        for _ in range(side.calls):
            side.call()

    return call


def _warm_up(clock: Clock, side: Side, budget: Budget, patient: bool) -> float:
    """What a timing will take, in milliseconds.

    A first run that is too slow for the budget may have compiled something: it is tried again, unless that would
    cost much more than the budget gives. Without our own side a race says nothing: it is tried twice more.
    """
    limit = 1e3 * budget.seconds / budget.repeats
    enough = limit * (100 if patient else 2)
    ms = [clock.time(side.call) * side.calls for _ in range(clock.warm_ups)][-1]
    for _ in range(2 if patient else 1):
        if limit < ms < enough:
            ms = min(ms, clock.time(side.call) * side.calls)
    return ms


def _hopeless(side: Side, clock: Clock, budget: Budget, expected_ms: float | None) -> str | None:
    """Why a side should not even be tried."""
    free = clock.free_bytes()
    if side.bytes > 0.9 * free:
        return f"needs about {side.bytes / 1e9:.3g} GB of memory; {free / 1e9:.3g} GB are free"
    if expected_ms is not None and expected_ms * budget.repeats > 1e3 * budget.seconds:
        least = f"a run should take {expected_ms / 1e3:.3g} s or more"
        exceed = "exceeds" if budget.repeats == 1 else "exceed"
        return f"{least}; {budget.repeats} {exceed} --budget {budget.seconds:g} s"
    return None


class Failure(str):
    """Why a side was left out, where that is an error and not its cost."""


def failure(e: Exception) -> Failure:
    """An error in one line."""
    text = str(e)
    if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return Failure("ran out of memory")
    return Failure(f"failed: {type(e).__name__}: {(text.splitlines() or [''])[0]}")
