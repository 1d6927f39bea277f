"""Long computations of pages: finished, stopped with what they have, failed and tried again, and answered once."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

import pytest
from streamlit.testing.v1 import AppTest

from jambascope.dashboards import work
from jambascope.errors import InputError

SCRIPT = """
import streamlit as st
from jambascope.dashboards import work

asked = st.session_state
found = work.result(
    asked.get("work_name", "test"), asked.key, asked.compute, start="Go", about="4 steps", automatic=asked.automatic,
    draw=lambda value: st.text(f"so far {value}"),
)
st.text("nothing yet" if found is None else f"value {found.value}, complete {found.complete}")
"""
KEYS = itertools.count()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(work, "GRACE_SECONDS", 0.02)


@pytest.fixture
def page() -> Callable[..., AppTest]:
    """``page(compute)``: a page that shows a computation, run once."""
    jobs = []

    def run(compute: Callable, key: object = None, automatic: bool = True) -> AppTest:
        app = AppTest.from_string(SCRIPT, default_timeout=20)
        app.session_state.key = ("a test", next(KEYS)) if key is None else key
        app.session_state.compute, app.session_state.automatic = compute, automatic
        jobs.append(app)
        return app.run()

    yield run
    for app in jobs:
        if "work test" in app.session_state:
            app.session_state["work test"].stop()


class Steps:
    """A computation that goes on, step by step, while it is told to; its value is how many it took."""

    def __init__(self) -> None:
        self.done, self.go, self.calls = 0, threading.Semaphore(0), 0

    def __call__(self, report: work.Report) -> int:
        self.calls += 1
        for step in range(1, 5):
            self.go.acquire(timeout=10)
            self.done = step
            if not report(step / 4, f"step {step}", step):
                break
        return self.done


def job_of(app: AppTest) -> work.Job:
    return app.session_state["work test"]


def texts(app: AppTest) -> list[str]:
    return [text.value for text in app.text]


def until(check: Callable[[], bool]) -> None:
    waited = threading.Event()
    for _ in range(500):
        if check():
            return
        waited.wait(0.01)
    raise AssertionError("waited for five seconds")


def test_what_is_quick_is_there_at_once(page):
    app = page(lambda report: 7)
    job_of(app).wait(5)
    assert texts(app.run()) == ["value 7, complete True"]
    assert not app.button and not app.exception


def test_nothing_begins_without_being_asked(page):
    steps = Steps()
    app = page(steps, automatic=False)
    assert texts(app) == ["nothing yet"] and steps.calls == 0
    assert app.button[0].label == "Go" and app.caption[0].value == "4 steps"
    steps.go.release(4)
    app.button[0].click().run()
    job_of(app).wait(5)
    assert texts(app.run()) == ["value 4, complete True"] and steps.calls == 1


def test_progress_shows_what_is_known_so_far_and_stop_keeps_it(page):
    steps = Steps()
    app = page(steps)
    assert texts(app) == ["nothing yet"]
    steps.go.release(2)
    until(lambda: job_of(app).value == 2)
    assert texts(app.run()) == ["so far 2", "nothing yet"]
    stop = next(button for button in app.button if button.label == "Stop")
    stop.click().run()
    steps.go.release()
    assert job_of(app).wait(5)
    assert texts(app.run()) == ["value 3, complete False"]
    assert "Stopped at 75%" in app.caption[0].value
    assert work.finished().get(("test", app.session_state.key)) is None, "what was stopped is nobody else's answer"


def test_what_ends_while_its_reader_looks_is_told(page, monkeypatch):
    ends = threading.Event()

    def compute(report: work.Report) -> None:
        ends.wait(10)
        raise InputError("there are no tokens; give some")

    app = page(compute)
    assert texts(app) == ["nothing yet"] and not app.error
    monkeypatch.setattr(work, "GRACE_SECONDS", 10)
    threading.Timer(0.2, ends.set).start()
    app.run()
    assert [error.value for error in app.error] == ["there are no tokens; give some"] and app.button


def test_what_others_pushed_out_is_still_there_for_who_asked(page):
    app = page(lambda report: 7)
    job_of(app).wait(5)
    for i in range(work.KEPT):
        work.finished().put(("other", i), work.Result(i, True, 0.0))
    assert work.finished().get(job_of(app).key) is None
    assert texts(app.run()) == ["value 7, complete True"] and not app.button


def test_what_was_stopped_can_be_begun_anew(page):
    steps = Steps()
    app = page(steps)
    job_of(app).stop()
    steps.go.release()
    job_of(app).wait(5)
    app.run()
    steps.go.release(4)
    app.button[0].click().run()
    job_of(app).wait(5)
    assert texts(app.run()) == ["value 4, complete True"] and steps.calls == 2


def test_a_mistake_is_told_in_a_line_and_can_be_tried_again(page):
    failing = [True]

    def compute(report: work.Report) -> str:
        if failing:
            raise InputError(f"tokens={failing.pop()} are <none>; give some")
        return "well"

    app = page(compute)
    job_of(app).wait(5)
    app.run()
    assert "tokens=True are &lt;none&gt;; give some" in app.error[0].value
    assert texts(app) == ["nothing yet"] and not app.exception
    app.button[0].click().run()
    job_of(app).wait(5)
    assert texts(app.run()) == ["value well, complete True"] and not app.error


def test_a_fault_of_ours_is_no_silent_nothing(page):
    def compute(report: work.Report) -> None:
        raise ZeroDivisionError("a fault")

    app = page(compute)
    job_of(app).wait(5)
    assert app.run().exception[0].message == "a fault"


def test_one_question_is_answered_once_for_all_sessions(page):
    calls = []
    first = page(lambda report: calls.append(1) or "found", key="shared")
    job_of(first).wait(5)
    second = page(lambda report: calls.append(1) or "again", key="shared")
    assert texts(second) == ["value found, complete True"] and len(calls) == 1
    assert "work test" not in second.session_state


def test_another_question_stops_the_one_before(page):
    steps = Steps()
    app = page(steps)
    before = job_of(app)
    app.session_state.key, app.session_state.compute = "another", lambda report: "new"
    app.run()
    assert before.stopping.is_set() and job_of(app) is not before
    steps.go.release()
    assert before.wait(5) and not before.result.complete
    job_of(app).wait(5)
    assert texts(app.run()) == ["value new, complete True"]


def test_the_longest_unused_results_are_forgotten(monkeypatch):
    monkeypatch.setattr(work, "KEPT", 2)
    kept = work.Finished()
    for name in ("a", "b"):
        kept.put(name, work.Result(name, True, 0.0))
    kept.get("a")
    kept.put("c", work.Result("c", True, 0.0))
    assert kept.get("b") is None
    assert [kept.get(name).value for name in ("a", "c")] == ["a", "c"]


def test_reports_stay_within_bounds_and_keep_what_they_had():
    job = work.Job("key", lambda report: None, None)
    assert job.report(-1, "begins", value="first") and job.share == 0.0
    assert job.report(7) and (job.share, job.text, job.value) == (1.0, "begins", "first")
    assert job.seconds_left() is None
    job._began -= 10
    job.report(0.25)
    assert job.seconds_left() == pytest.approx(30, rel=0.05)
    job._began, job.share = time.monotonic() - 30, 0.001
    assert work.readable_time(job.seconds_left()) == "8 h"  # long before a hundredth is done
    assert [work.readable_time(s) for s in (0.2, 119, 121, 7199, 7201)] == ["1 s", "119 s", "2 min", "120 min", "2 h"]
    job.stop()
    assert job.report(0.5) is False


def test_a_closed_browser_ends_its_computation(monkeypatch):
    monkeypatch.setattr(work, "_is_open", lambda session: session != "closed")
    assert work.Job("key", lambda report: None, "open").report(0.1)
    assert not work.Job("key", lambda report: None, "closed").report(0.1)
