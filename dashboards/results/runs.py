"""What the Runs page shows. A run directory may come from anywhere: nothing in it is executed, no link in it is
followed, and what it says is shown as text."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow.parquet as pq
import streamlit as st

from jambascope.errors import JambascopeError, RunError
from jambascope.files import read_table
from jambascope.memory import readable_bytes
from jambascope.studies.runner import report
from jambascope.studies.runner import run as running
from jambascope.studies.runner.directory import CELLS, KEY, REPORT, RESULTS, SPEC, RunDirectory
from jambascope.studies.runner.spec import Spec, make_spec
from jambascope.studies.runner.study import NAMES, Study, load, questions

FINISHED, UNFINISHED, DAMAGED = "finished", "unfinished", "cannot be read"
MOST_SPEC = 1 << 20
MOST_REPORT = 64 << 20
MOST_ZIP = 1 << 30
MOST_CELLS = 100_000
"""Beyond such sizes a file is not read, a run not counted."""


@dataclass(frozen=True)
class Entry:
    """One directory of the list."""

    name: str
    path: Path
    stamp: tuple[int, ...]
    """Changes when its files do."""
    state: str
    problem: str = ""
    """In one line."""
    study: str = ""
    question: str = ""
    models: str = ""
    when: float = 0.0
    """Seconds since 1970, of its last change."""
    done: int = 0
    cells: int | None = None
    """None where that is not known."""
    ours: bool = False
    """Whether its study is one that ships; another's is a file of its author's, which is not run here."""


# -- the list ----------------------------------------------------------------------------------------------------


def entries(root: Path) -> list[Entry]:
    """What lies in the directory of runs, the latest first."""
    try:
        found = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except OSError:
        return []
    listed = [_entry(str(path), _stamp(path)) for path in found]
    return sorted(listed, key=lambda entry: (-entry.when, entry.name))


def _stamp(path: Path) -> tuple[int, ...]:
    found = []
    for name in ("", SPEC, RESULTS, REPORT, CELLS):
        try:
            found.append((path / name).lstat().st_mtime_ns)
        except OSError:
            found.append(0)
    return tuple(found)


@st.cache_data(max_entries=2048, show_spinner=False)
def _entry(path: str, stamp: tuple[int, ...]) -> Entry:
    directory = Path(path)
    entry = {"name": directory.name, "path": directory, "stamp": stamp, "when": max(stamp) / 1e9}
    try:
        record = record_of(directory)
        ours = shipped(record) is not None
        about = {"study": record["study"], "models": ", ".join(str(m["model"]) for m in record["models"]), "ours": ours}
        if ours:
            about["question"] = _questions()[record["study"]]
        if (directory / RESULTS).exists():
            done = _finished_cells(directory)
            return Entry(**entry, **about, state=FINISHED, done=done, cells=done)
        done = sum(1 for _ in (directory / CELLS).glob("*.parquet"))
        return Entry(**entry, **about, state=UNFINISHED, done=done, cells=_cells(record) if ours else None)
    except (JambascopeError, OSError) as problem:
        return Entry(**entry, state=DAMAGED, problem=str(problem).splitlines()[0])


def record_of(path: Path) -> dict[str, Any]:
    """``spec.json`` of a run, with the types that it should have.

    Raises:
        RunError: as ``RunDirectory.open``; a link in the directory, or a file that is too large.
    """
    if path.is_symlink():
        raise RunError(f"{path} is a link; start the dashboard with --runs on the folder that holds what it leads to")
    if link := next((p for p in path.rglob("*") if p.is_symlink()), None):
        raise RunError(f"{link} is a link, which is not followed; put the file itself there")
    spec = path / SPEC
    if spec.exists() and spec.stat().st_size > MOST_SPEC:
        raise RunError(f"{spec} has {readable_bytes(spec.stat().st_size)}; no run's is so large, so move {path} away")
    record = RunDirectory.open(path).record
    texts = all(isinstance(record[name], str) for name in ("study", "source", "package", "command"))
    models = record["models"]
    known = isinstance(models, list) and all(isinstance(m, dict) and {"model", "recipe"} <= m.keys() for m in models)
    if not (texts and known and isinstance(record["spec"], dict)):
        raise RunError(f"{spec} is not what a run writes; move {path} away and run the study anew")
    return record


def shipped(record: dict[str, Any]) -> str | None:
    """The study that ships and that a run is of; None for a study that is somebody's file."""
    name = record["source"].replace("-", "_")
    return name if name in NAMES and name == record["study"] else None


@cache
def _questions() -> dict[str, str]:
    return dict(questions())


def _finished_cells(path: Path) -> int:
    try:
        return len(json.loads(pq.read_schema(path / RESULTS).metadata[KEY])["cells"])
    except Exception as problem:  # whatever a damaged file makes of it
        raise RunError(f"{path / RESULTS} is damaged ({_first_line(problem)}); run the study anew") from None


def _cells(record: dict[str, Any]) -> int | None:
    """Of an unfinished run of a study that ships."""
    axes = [len(value) for value in record["spec"].values() if isinstance(value, list)]
    if math.prod(axes) > MOST_CELLS:
        return None
    study = load(shipped(record))
    if study.version != record["version"]:
        raise RunError(
            f"is of version {record['version']} of {study.name}, and this is version {study.version}; run it anew"
        )
    return len(study.cells(make_spec(study.name, study.spec, record["spec"])))


def _first_line(problem: Exception) -> str:
    return str(problem).splitlines()[0] if str(problem) else type(problem).__name__


def matches(entry: Entry, words: str) -> bool:
    """Whether every word is somewhere in what the list says of it."""
    text = " ".join((entry.name, entry.study, entry.question, entry.models, entry.state, entry.problem)).lower()
    return all(word in text for word in words.lower().split())


# -- one run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """A finished run of a study that ships."""

    study: Study
    spec: Spec
    rows: pd.DataFrame
    columns: list[str]
    lines: list[list[str]]
    """The table of results."""
    reading: str
    figures: list[go.Figure]
    command: str


@st.cache_resource(max_entries=8, show_spinner=False)
def _opened(path: str, stamp: tuple[int, ...]) -> Opened:
    try:
        _, study, spec, rows = running.read(Path(path))
        columns, lines = report.headline(study, rows)
        figures = [plain_texts(fig) for fig in study.figures(spec, rows)]
        reading, command = study.reading(spec, rows), running.command(study.name, spec)
    except JambascopeError:
        raise
    except Exception as problem:  # rows that are not what the study writes
        raise RunError(f"{path}: its results are not what its study writes ({_first_line(problem)})") from problem
    return Opened(study, spec, rows, columns, lines, reading, figures, command)


def opened(entry: Entry) -> Opened:
    """The results of a finished run. Shared between sessions: read only.

    Raises:
        RunError: a damaged run, one of another version, or one whose study does not ship.
    """
    if not entry.ours:
        raise RunError(
            f"{entry.name} is of a study that does not ship with jambascope, and the dashboard runs nobody's file; its "
            f"report is below, and `jambascope study report {entry.path}` writes it anew"
        )
    return _opened(str(entry.path), entry.stamp)


def table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> pd.DataFrame:
    """Lines of text as a table whose columns all have different names."""
    names = [name if columns.index(name) == i else f"{name} ({i})" for i, name in enumerate(columns)]
    return pd.DataFrame([list(line) for line in lines], columns=names)


MARKUP = re.compile(r'<(?!/?(?:b|i|br|sub|sup|extra|span)>|span style="color:#[0-9A-Fa-f]{6}">)')
"""The beginning of a tag that no figure of ours has."""


def plain_texts(fig: go.Figure) -> go.Figure:
    """A figure in which names from a run's rows are text: no tags but line breaks, bold and colours."""

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return MARKUP.sub("&lt;", value)
        if isinstance(value, dict) and value.keys() >= {"bdata", "dtype"}:
            return _numbers(value)
        if isinstance(value, dict):
            return {key: clean(own) for key, own in value.items()}
        return [clean(own) for own in value] if isinstance(value, (list, tuple, np.ndarray)) else value

    return go.Figure(clean(fig.to_plotly_json()))


def _numbers(packed: dict[str, str]) -> np.ndarray:
    """An array as Plotly packs it."""
    flat = np.frombuffer(base64.b64decode(packed["bdata"]), packed["dtype"])
    return flat.reshape([int(size) for size in packed["shape"].split(",")]) if "shape" in packed else flat


# -- its files ---------------------------------------------------------------------------------------------------


def file_of(entry: Entry, name: str) -> bytes:
    """A file of a run.

    Raises:
        RunError: it is gone, or a link.
    """
    path = entry.path / name
    if path.is_symlink() or not path.is_file():
        raise RunError(f"{path} is no file; run the study anew")
    return path.read_bytes()


def csv_of(entry: Entry) -> bytes:
    """Every row of the results."""
    file_of(entry, RESULTS)
    return read_table(entry.path / RESULTS).to_pandas().to_csv(index=False).encode()


def size_of(entry: Entry) -> int:
    return sum(path.stat().st_size for path in _files(entry))


def zip_of(entry: Entry) -> bytes:
    """The whole directory, under its name."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in _files(entry):
            archive.write(path, Path(entry.name) / path.relative_to(entry.path))
    return out.getvalue()


def _files(entry: Entry) -> list[Path]:
    return sorted(p for p in entry.path.rglob("*") if p.is_file() and not p.is_symlink() and not p.name.startswith("."))
