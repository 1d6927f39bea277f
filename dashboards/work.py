"""Long computations: in a thread of their own, with progress and a stop button, their results kept.

    found = work.result("sweep", key, compute, start="Patch every cell")
    if found is not None:
        draw(found.value)

A computation goes on when its reader turns to another page. What it found is kept for every session under its key,
which holds everything that decides it; so the same question is answered once.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import streamlit as st
from streamlit.runtime import exists, get_instance
from streamlit.runtime.scriptrunner import get_script_run_ctx

from jambascope.dashboards import widgets
from jambascope.errors import JambascopeError

KEPT = 64
"""Finished results of all sessions."""
POLL_SECONDS = 0.4
DRAW_SECONDS = 2.0
"""What is known so far is drawn anew so often: figures take a browser longer than a bar."""
GRACE_SECONDS = 0.3
"""What takes no longer than this needs no bar."""

Report = Callable[..., bool]
"""``report(share, text="", value=None)``: how far it is, what it is at, and what is known so far; False when it is to
end, with what it has."""


@dataclass(frozen=True)
class Result:
    """What a computation gave."""

    value: Any
    complete: bool
    """False where its reader stopped it."""
    seconds: float


@dataclass
class Job:
    """One computation under way, or over."""

    key: Hashable
    compute: Callable[[Report], Any]
    session: str | None
    """The browser session that waits for it."""
    share: float = 0.0
    text: str = ""
    value: Any = None
    """What is known so far."""
    result: Result | None = None
    problem: BaseException | None = None
    stopping: threading.Event = field(default_factory=threading.Event)
    _began: float = field(default_factory=time.monotonic)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True, name="jambascope work")
        self._thread.start()

    def stop(self) -> None:
        """Ask it to end; it does at its next report."""
        self.stopping.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it is over, at the latest after so many seconds."""
        self._thread.join(seconds)
        return self.over

    @property
    def over(self) -> bool:
        return self.result is not None or self.problem is not None

    @property
    def complete(self) -> bool:
        """Over with a result that nobody stopped."""
        return self.result is not None and self.result.complete

    def seconds_left(self) -> float | None:
        """By what the share done took; None while that says little."""
        took = time.monotonic() - self._began
        tells = took > 1 and self.share > 0.02 or took > 20 and self.share > 0
        return took / self.share * (1 - self.share) if tells else None

    def report(self, share: float, text: str = "", value: Any = None) -> bool:
        self.share, self.text = min(max(float(share), 0.0), 1.0), text or self.text
        self.value = self.value if value is None else value
        if not self.stopping.is_set() and self.session is not None and not _is_open(self.session):
            self.stopping.set()
        return not self.stopping.is_set()

    def _run(self) -> None:
        try:
            value = self.compute(self.report)
        except BaseException as problem:
            self.problem = problem
            return
        result = Result(value, not self.stopping.is_set(), time.monotonic() - self._began)
        if result.complete:
            finished().put(self.key, result)
        self.result = result  # last: whoever sees it over finds what it found


def _is_open(session: str) -> bool:
    """Whether somebody still waits: a browser that was closed needs no answer."""
    return not exists() or get_instance().is_active_session(session)


class Finished:
    """Results by key, the longest unused forgotten first."""

    def __init__(self) -> None:
        self._results: OrderedDict[Hashable, Result] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Result | None:
        with self._lock:
            if key in self._results:
                self._results.move_to_end(key)
            return self._results.get(key)

    def put(self, key: Hashable, result: Result) -> None:
        with self._lock:
            self._results[key] = result
            while len(self._results) > KEPT:
                self._results.popitem(last=False)


_FINISHED = Finished()


def finished() -> Finished:
    """The server's only one."""
    return _FINISHED


def result(
    name: str,
    key: Hashable,
    compute: Callable[[Report], Any],
    start: str,
    draw: Callable[[Any], None] | None = None,
    about: str = "",
    automatic: bool = False,
) -> Result | None:
    """The result of a computation once there is one; until then its button, or its progress with a stop button.

    Args:
        name: of the computation on this page; what it found for another key is forgotten when it begins anew.
        key: all that decides the result, hashable: checkpoint, token ids, settings. Never tensors.
        compute: given a :data:`Report`; runs outside Streamlit, so it must not call ``st``.
        start: text of the button.
        draw: shows what is known so far, while the computation goes on.
        about: what it costs, beside the button.
        automatic: begin without being asked.
    """
    slot, key = f"work {name}", (name, key)
    with st.container():  # always there, so that what follows keeps its place when a button or a bar comes or goes
        if (found := finished().get(key)) is not None:
            return found
        job: Job | None = st.session_state.get(slot)
        if job is not None and job.key != key:
            job.stop()
            job = None
        over = job is not None and job.over  # asked once: it may end at any moment
        if over and job.complete:
            return job.result  # others have been kept since
        if (job is None and automatic) or ((job is None or over) and _pressed(start, slot, about, job)):
            context = get_script_run_ctx(suppress_warning=True)
            job, over = Job(key, compute, context.session_id if context and exists() else None), False
            st.session_state[slot] = job
            job.start()
        if job is None:
            return None
        if not over:
            if not job.wait(GRACE_SECONDS):
                _progress(job)
                if draw is not None:
                    _so_far(job, draw)
                return None
            if not job.complete:
                st.rerun()  # which tells how it ended
        return job.result


def readable_time(seconds: float) -> str:
    """In the largest unit that is not less than two of it."""
    unit, length = next(((u, n) for u, n in (("h", 3600), ("min", 60)) if seconds >= 2 * n), ("s", 1))
    return f"{max(1, round(seconds / length))} {unit}"


def _pressed(start: str, slot: str, about: str, job: Job | None) -> bool:
    """The button that begins a computation, or begins it once more after what is said of how it ended; its progress
    takes their place."""
    place = st.empty()
    with place.container():
        if job is not None and job.problem is not None:
            if not isinstance(job.problem, JambascopeError):
                raise job.problem
            widgets.error(job.problem)
            about = ""
        elif job is not None:
            about = f"Stopped at {job.share:.0%}"
            if job.result.value is not None:
                about += ": what is shown is what was known by then."
        with st.container(horizontal=True, vertical_alignment="center"):
            if job is None:
                pressed = st.button(start, key=f"{slot} start", type="primary", icon=":material/play_arrow:")
            else:
                pressed = st.button(start, key=f"{slot} again", icon=":material/refresh:")
            if about:
                st.caption(about)
    if pressed:
        place.empty()
    return pressed


@st.fragment(run_every=POLL_SECONDS)
def _progress(job: Job) -> None:
    if job.over:
        st.rerun()
    left = job.seconds_left()
    words = [job.text, f"{job.share:.0%}", "" if left is None else f"about {readable_time(left)} left"]
    bar, button = st.columns([10, 1], vertical_alignment="bottom")
    bar.progress(job.share, text=widgets.plain(" · ".join(word for word in words if word)))
    if button.button("Stop", key=f"{job.key[0]} stop", icon=":material/stop:"):
        job.stop()


@st.fragment(run_every=DRAW_SECONDS)
def _so_far(job: Job, draw: Callable[[Any], None]) -> None:
    if job.value is not None:
        draw(job.value)
