"""The bench's clock and races: rounds, budgets, forecasts, what is left out and why."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

from jambascope.studies.bench.race import OURS, Race, Results, Row, Setting, run, settings, summarize
from jambascope.studies.bench.races import RACES
from jambascope.studies.bench.timing import Budget, Failure, Forecast, Side, run_race

AT = Setting(d_model=32, batch=2, length=19)


class TellingClock:
    """Says for each call what the call returns, in milliseconds."""

    warm_ups = 1

    def __init__(self, free: float = 1e9) -> None:
        self.free = free

    def time(self, call) -> float:
        return call()

    def free_bytes(self) -> float:
        return self.free


def test_rounds_alternate_their_order():
    order = []
    sides = {name: Side(lambda name=name: order.append(name) or 1.0) for name in "ab"}
    times, skipped = run_race(TellingClock(), sides, Budget(3, 1, 3))
    assert skipped == {} and times == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert "".join(order) == "ab" + "abbaab"  # after a warm-up


def test_a_first_run_that_compiles_is_not_held_against_a_side():
    for patient, slow_runs in ((True, 2), (False, 1)):
        said = iter([900.0] * slow_runs + [1.0] * 9)
        times, skipped = run_race(
            TellingClock(), {OURS: Side(lambda said=said: next(said))}, Budget(2, 1, 2), own=OURS if patient else None
        )
        assert times == {OURS: [1.0, 1.0]} and skipped == {}


def test_short_calls_are_timed_together():
    alive, most = weakref.WeakSet(), []

    class CountingClock(TellingClock):
        def time(self, call) -> float:
            before = len(most)
            call()
            return 2.0 * (len(most) - before)

    def output() -> torch.Tensor:
        most.append(len(alive))
        made = torch.empty(1)
        alive.add(made)
        return made

    times, _ = run_race(CountingClock(), {"a": Side(output, calls=5)}, Budget(1, 1, 1))
    assert times == {"a": [2.0]}
    assert most == [0] * 6  # nothing that was returned is kept


def test_precise_races_run_while_there_is_time():
    sides = {"a": Side(lambda: 10.0), "b": Side(lambda: 40.0)}
    assert len(run_race(TellingClock(), sides, Budget(2, 1, 100))[0]["a"]) == 20
    assert len(run_race(TellingClock(), sides, Budget(2, 1, 6))[0]["a"]) == 6
    assert len(run_race(TellingClock(), sides, Budget(2, 0.08, 6))[0]["a"]) == 2


def test_what_is_left_out_is_named_and_not_started():
    started = []

    def slow():
        started.append("slow")
        return 700.0

    def fails():
        raise RuntimeError("no such operator\nand more")

    def full():
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")

    def never():
        started.append("never")
        return 0.0

    sides = {
        OURS: Side(lambda: 1.0),
        "slow": Side(slow),
        "fails": Side(fails),
        "full": Side(full),
        "large": Side(never, bytes=2e9),
        "foreseen": Side(never),
    }
    times, skipped = run_race(TellingClock(), sides, Budget(2, 1, 2), lambda name: 9e3 if name == "foreseen" else None)
    assert set(times) == {OURS} and started == ["slow"] * 2
    assert skipped == {
        "slow": "2 runs of 0.7 s are more than --budget 1 s",
        "fails": "failed: RuntimeError: no such operator",
        "full": "ran out of memory",
        "large": "needs about 2 GB of memory; 1 GB are free",
        "foreseen": "a run should take 9 s or more; 2 exceed --budget 1 s",
    }
    _, one = run_race(TellingClock(), {"slow": Side(lambda: 2e3)}, Budget(1, 1, 1))
    assert one == {"slow": "1 run of 2 s is more than --budget 1 s"}


def test_a_side_that_fails_in_a_round_leaves_the_others(own=OURS):
    said = iter([1.0, 1.0])  # the warm-up and one round
    sides = {own: Side(lambda: next(said)), "peer": Side(lambda: 3.0)}
    times, skipped = run_race(TellingClock(), sides, Budget(3, 1, 3), own=own)
    assert times == {"peer": [3.0] * 3} and skipped == {own: "failed: StopIteration: "}
    assert isinstance(skipped[own], Failure)


@pytest.mark.parametrize(
    ("where", "names", "failed"),
    [("setting up", ["every side"], True), ("extra", ["every side"], True), (OURS, [OURS], True),
     ("peer", ["peer"], False)],
)  # fmt: skip
def test_an_error_of_one_race_leaves_the_others(where, names, failed):
    def error(name: str, value: object) -> object:
        if name == where:
            raise ValueError("bad")
        return value

    def sides(lab, at) -> dict:
        return error("setting up", {n: Side(lambda n=n: error(n, 1.0)) for n in (OURS, "peer")})

    first = Race("scan", "", sides, extra=lambda lab, at: error("extra", ()))
    second = Race("prefill", "", lambda lab, at: {OURS: Side(lambda: 2.0)})
    results = Results()
    run(None, TellingClock(), [(first, AT), (second, AT)], 1, 1.0, lambda done, doing: None, results)
    assert [s.side for s in results.skips] == names
    assert all(s.failed == failed and s.reason == "failed: ValueError: bad" for s in results.skips)
    assert [r.value for r in results.rows if r.race == "prefill"] == [2.0]


def test_forecast_follows_the_power_law_of_the_last_two_lengths():
    forecast = Forecast()
    assert forecast.ms(("a",), 64) is None
    forecast.note(("a",), 64, 10.0)
    assert forecast.ms(("a",), 128) == pytest.approx(10)
    assert forecast.ms(("a",), 6400) == pytest.approx(250)  # nothing else known: a quarter of proportional
    forecast.note(("a",), 128, 40.0)
    assert forecast.ms(("a",), 512) == pytest.approx(640)  # quadratic
    assert forecast.ms(("b",), 512) is None
    forecast.note(("a",), 128, 40.0)
    assert forecast.ms(("a",), 512) == pytest.approx(640)  # the same length again


def test_a_side_left_out_at_one_length_is_foreseen_at_the_next():
    tried = []

    def sides(lab, at) -> dict:
        return {OURS: Side(lambda: 1.0), "peer": Side(lambda: tried.append(at.length) or 10.0 * at.length)}

    plan = list(settings([Race("prefill", "", sides)], [32], 1, [4, 64, 256]))
    results = Results()
    run(None, TellingClock(), plan, 2, 1.0, lambda done, doing: None, results)
    assert set(tried) == {4, 64}  # 64: two runs of 0.64 s; 256 is not even warmed up
    assert [(s.length, s.reason[:16]) for s in results.skips] == [(64, "2 runs of 0.64 s"), (256, "a run should tak")]


def test_ratios_are_of_neighbouring_runs():
    rows = [Row("scan", side, 32, 1, 8, k, "ms", v) for side, t in ((OURS, (1, 2, 4)), ("peer", (3, 4, 20)))
            for k, v in enumerate(t)]  # fmt: skip
    ours, peer = summarize(Results(rows), RACES)
    assert (ours.median, ours.low, ours.high, ours.ratio) == (2, 1, 4, 1)
    assert (peer.median, peer.ratio, peer.ratio_low, peer.ratio_high) == (4, 3, 2, 5)
    (alone,) = summarize(Results(rows[3:]), RACES)
    assert alone.ratio is None
    zero = [replace(r, value=0.0) if r.side == OURS else r for r in rows]
    assert [s.ratio for s in summarize(Results(zero), RACES)] == [None, None]


def test_races_of_cells_say_what_a_cell_costs():
    def sides(lab, at) -> dict:
        return {OURS: Side(lambda: 6.0, units=12), "peer": Side(lambda: 10.0, units=2)}

    race, results = Race("sweep", "", sides, quantity="ms per cell"), Results()
    run(None, TellingClock(), [(race, AT)], 2, 1.0, lambda done, doing: None, results)
    ours, peer = summarize(results, RACES)
    assert (ours.median, peer.median, peer.ratio, peer.quantity) == (0.5, 5, 10, "ms per cell")


def test_a_race_has_sizes_of_its_own_where_none_are_asked_for():
    races = [RACES["prefill"], RACES["sweep"]]
    sizes = [(race.name, at.d_model, at.length) for race, at in settings(races, None, 4, None)]
    usual = [("prefill", d_model, length) for d_model in (128, 512) for length in (64, 128, 512)]
    assert sorted(sizes) == sorted([*usual, ("sweep", 128, 64), ("sweep", 128, 256)])
    assert [at.length for _, at in settings(races, [32], 4, [16])] == [16, 16]
    assert max(at.length for _, at in settings(races[:1], [32], 4, None, full=True)) == 32768
    assert [at.length for _, at in settings(races[1:], [32], 4, None, full=True)] == [64, 256]


def test_the_plan_foresees_longer_lengths_and_asks_for_slow_races_only_by_name():
    plan = list(settings([RACES["scan"], RACES["load"], RACES["generate"]], [128, 128], 4, [512, 64, 512]))
    assert [(race.name, at.batch, at.length) for race, at in plan] == [
        ("scan", 4, 64), ("scan", 4, 512), ("load", 4, 0), ("generate", 1, 64), ("generate", 1, 512),
    ]  # fmt: skip
