"""Runs: the study runs that are kept, each with its numbers, figures and files, and two of them compared."""

from __future__ import annotations

import shlex
from datetime import datetime
from functools import partial
from pathlib import Path

import streamlit as st

from jambascope.dashboards import session, widgets, work
from jambascope.dashboards.results import runs as results
from jambascope.dashboards.results.frames import framed
from jambascope.dashboards.results.runs import DAMAGED, FINISHED, UNFINISHED, Entry, Opened
from jambascope.errors import JambascopeError
from jambascope.memory import readable_bytes
from jambascope.studies.runner import compare as comparing
from jambascope.studies.runner import report
from jambascope.studies.runner.directory import REPORT, RESULTS, SPEC

ALL = "all"


def page() -> None:
    st.title("Runs")
    root = session.start().runs
    found = results.entries(root)
    if not found:
        _no_runs(root)
        return
    chosen = _choose(found, root)
    if chosen is None:
        st.info("Choose a run to see its numbers, figures and files.", icon=":material/info:")
        return
    st.subheader(widgets.plain(chosen.name), anchor=False)
    if chosen.state == DAMAGED:
        st.error(widgets.plain(chosen.problem), icon=":material/error:")
        return
    if chosen.state == UNFINISHED:
        of = f" of {chosen.cells}" if chosen.cells is not None else ""
        st.info(f"{chosen.done}{of} cells are measured and kept. This goes on with it:", icon=":material/info:")
        st.code(f"jambascope study resume {shlex.quote(str(chosen.path))}", language="bash")
        return
    _downloads(chosen)
    try:
        opened = results.opened(chosen)
    except JambascopeError as problem:
        widgets.error(problem)
    else:
        _results(opened)
        _compare(chosen, [entry for entry in found if entry.study == chosen.study and entry is not chosen])
    _report(chosen)


def _no_runs(root: Path) -> None:
    st.info(
        f"There are no runs in {widgets.plain(str(root))} yet. A study asks one question of models and keeps the "
        "answer; this makes one, and the Patching page saves what it shows as one.",
        icon=":material/info:",
    )
    st.code(f"jambascope study run induction_heads --runs {shlex.quote(str(root))}", language="bash")
    st.caption("jambascope study list tells all studies; another folder is given by jambascope dashboard --runs.")


# -- the list ----------------------------------------------------------------------------------------------------


def _choose(found: list[Entry], root: Path) -> Entry | None:
    left, right = st.columns([7, 5], gap="medium")
    with left:
        words = st.text_input("Search", key="run_search", bind="query-params", placeholder="study, model or question")
    with right:
        state = widgets.choose("Runs that are", (ALL, FINISHED, UNFINISHED, DAMAGED), "run_state")
    listed = [entry for entry in found if results.matches(entry, words) and state in (ALL, entry.state)]
    rows = [_row(entry) for entry in listed]
    columns = {
        "run": st.column_config.TextColumn("Run", width=180),
        "study": st.column_config.TextColumn("Study", width=125),
        "question": st.column_config.TextColumn("Question, or what is wrong", width=330),
        "models": st.column_config.TextColumn("Models", width=95),
        "when": st.column_config.DatetimeColumn("Last change", format="YYYY-MM-DD HH:mm", width=125),
        "state": st.column_config.TextColumn("State", width=95),
        "cells": st.column_config.TextColumn("Cells", width=70),
    }
    if rows:
        take = partial(_take_row, [entry.name for entry in listed])
        options = {"on_select": take, "selection_mode": "single-row", "height": min(330, 38 + 35 * len(rows))}
        with st.container(key="run_list"):
            st.dataframe(rows, hide_index=True, column_config=columns, key="run_rows", **options)
    st.caption(f"{len(listed)} of {len(found)} in {widgets.plain(str(root))}.")
    names = [entry.name for entry in found]
    if st.session_state.get("run") not in (None, *names):
        st.session_state.run = None
    elif "run" not in st.session_state and "run" not in st.query_params:
        st.session_state.run = (listed or found)[0].name
    name = st.selectbox("Run", names, index=None, key="run", bind="query-params", placeholder="choose a run")
    return next((entry for entry in found if entry.name == name), None)


def _row(entry: Entry) -> dict:
    return {
        "run": entry.name,
        "study": entry.study,
        "question": entry.problem.replace(f"{entry.path.parent}/", "") or entry.question,
        "models": entry.models,
        "when": datetime.fromtimestamp(entry.when),
        "state": entry.state,
        "cells": str(entry.done) if entry.cells in (None, entry.done) else f"{entry.done} of {entry.cells}",
    }


def _take_row(names: list[str]) -> None:
    rows = st.session_state.run_rows.selection.rows
    if rows:
        st.session_state.run = names[rows[0]]


# -- one run -----------------------------------------------------------------------------------------------------


def _downloads(entry: Entry) -> None:
    there = {path.name for path in entry.path.iterdir()}
    files = [
        ("Parquet", partial(results.file_of, entry, RESULTS), RESULTS, "results.parquet", RESULTS),
        ("CSV", partial(results.csv_of, entry), RESULTS, "results.csv", "text/csv"),
        ("Report", partial(results.file_of, entry, REPORT), REPORT, "report.html", "text/html"),
        ("spec.json", partial(results.file_of, entry, SPEC), SPEC, "spec.json", "application/json"),
    ]
    with st.container(horizontal=True, vertical_alignment="center"):
        for label, content, needs, name, mime in files:
            if needs in there:
                mime = "application/vnd.apache.parquet" if name == RESULTS else mime
                _download(label, content, f"{entry.name}-{name}", mime)
        size = results.size_of(entry)
        if size <= results.MOST_ZIP:
            _download(
                f"All as zip ({readable_bytes(size)})",
                partial(results.zip_of, entry),
                f"{entry.name}.zip",
                "application/zip",
            )
        else:
            st.caption(f"Its {readable_bytes(size)} are too many for a zip: copy {widgets.plain(str(entry.path))}.")


def _download(label: str, content, name: str, mime: str) -> None:
    """A button whose file is made when it is pressed."""
    icon = ":material/download:"
    st.download_button(label, content, name, mime, key=f"download {name}", on_click="ignore", icon=icon)


def _results(opened: Opened) -> None:
    st.markdown(f"##### {widgets.plain(opened.study.question)}")
    for part in opened.reading.split("\n\n"):
        st.markdown(widgets.plain(part.strip()))
    with st.container(key="headline"):
        table = results.table(opened.columns, opened.lines)
        st.dataframe(table, hide_index=True, height=min(400, 38 + 35 * len(table)))
    st.caption(report.INTERVALS)
    st.code(opened.command, language="bash", wrap_lines=True)
    with st.expander("What was asked", icon=":material/tune:"):
        columns = ("setting", "value", "meaning")
        with st.container(key="settings"):
            st.dataframe(results.table(columns, report.settings(opened.spec)), hide_index=True)
    for i, fig in enumerate(opened.figures):
        widgets.show(fig, f"run_figure_{i}")


def _report(entry: Entry) -> None:
    path = entry.path / REPORT
    if not path.is_file():
        return
    if not st.toggle(
        "Show its report", key="run_report", bind="query-params", help="In a frame that can load nothing."
    ):
        return
    if path.stat().st_size > results.MOST_REPORT:
        st.caption(f"The report has {readable_bytes(path.stat().st_size)}: download it instead.")
        return
    st.iframe(
        framed(results.file_of(entry, REPORT).decode("utf-8", "replace")), height=900, alt="The report of the run"
    )


# -- two runs ----------------------------------------------------------------------------------------------------


def _compare(second: Entry, others: list[Entry]) -> None:
    others = [entry for entry in others if entry.state == FINISHED]
    with st.expander(
        "Compare with another run", icon=":material/compare_arrows:", expanded="run_less" in st.query_params
    ):
        if not others:
            st.caption(f"There is no other finished run of {widgets.plain(second.study)}.")
            return
        names = [entry.name for entry in others]
        if st.session_state.get("run_less") not in (None, *names):
            st.session_state.run_less = None
        help = "The results of the run above less those of this one."
        name = st.selectbox(
            "Less the run",
            names,
            index=None,
            key="run_less",
            bind="query-params",
            placeholder="choose a run",
            help=help,
        )
        if name is None:
            return
        first = next(entry for entry in others if entry.name == name)
        key = tuple((str(entry.path), entry.stamp) for entry in (first, second))
        compute = partial(comparing.compare, first.path, second.path)
        found = work.result("compare", key, compute, start="Compare", automatic=True)
        if found is not None and found.value is not None:
            _differences(found.value, f"{second.name}-less-{first.name}")


def _differences(found: comparing.Comparison, name: str) -> None:
    columns, lines = comparing.lines(found)
    with st.container(key="differences"):
        table = results.table(columns, lines)
        st.dataframe(table, hide_index=True, height=min(400, 38 + 35 * len(table)))
    st.caption(comparing.ABOUT)
    if found.settings:
        st.dataframe(results.table(("setting", "first", "second"), found.settings), hide_index=True)
    with st.container(horizontal=True):
        _download("CSV", lambda: found.frame.to_csv(index=False).encode(), f"{name}.csv", "text/csv")
        _download("Page", lambda: comparing.page_of(found).encode(), f"{name}.html", "text/html")
