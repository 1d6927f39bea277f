"""The Runs page: what lies in a folder of runs, whatever it is; nothing in it is executed and no link followed."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import sys
import zipfile
from html import unescape
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow.parquet as pq
import pytest
from streamlit.testing.v1 import AppTest

from jambascope.dashboards import session
from jambascope.dashboards.results import runs as results
from jambascope.dashboards.results.frames import framed
from jambascope.dashboards.results.runs import DAMAGED, FINISHED, UNFINISHED
from jambascope.errors import RunError
from jambascope.studies.runner import compare as comparing
from jambascope.studies.runner import report
from jambascope.studies.runner import run as running
from jambascope.studies.runner.run import read
from jambascope.studies.runner.spec import make_spec
from jambascope.studies.runner.study import load

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """Two finished runs of one study."""
    root = tmp_path_factory.mktemp("kept") / "runs"
    study = load("activation_patching")
    prompt = "map : stone river , leaf mud ; {} ->"
    for (word, answer), (other, wrong) in itertools.permutations([("leaf", "mud"), ("stone", "river")]):
        asked = {
            "components": ("resid_pre", "z"), "directions": ("denoise",), "clean": prompt.format(word),
            "corrupted": prompt.format(other), "answer": answer, "wrong": wrong,
        }  # fmt: skip
        running.run(study.name, make_spec(study.name, study.spec, asked), root)
    return root


@pytest.fixture
def root(kept, tmp_path) -> Path:
    """A copy of them, to damage."""
    shutil.copytree(kept, tmp_path / "runs")
    return tmp_path / "runs"


def first_run(root: Path) -> Path:
    return min(root.glob("activation_patching-*"))


def change(path: Path, **values) -> None:
    record = json.loads((path / "spec.json").read_text())
    (path / "spec.json").write_text(json.dumps(record | values))


def entry_of(root: Path, name: str) -> results.Entry:
    return next(entry for entry in results.entries(root) if entry.name == name)


# -- the list ------------------------------------------------------------------------------------------------------


def test_finished_runs_are_listed_with_what_they_are(root):
    found = results.entries(root)
    assert [entry.state for entry in found] == [FINISHED] * 2
    entry = found[0]
    assert (entry.study, entry.models, entry.done, entry.cells) == ("activation_patching", "jamba-micro", 1, 1)
    assert entry.question.startswith("Where along the layers") and entry.ours and not entry.problem
    assert results.matches(entry, "ACTIVATION micro") and not results.matches(entry, "activation mamba")


def test_an_unfinished_run_tells_its_cells(root):
    path = first_run(root)
    (path / "results.parquet").unlink()
    entry = entry_of(root, path.name)
    assert (entry.state, entry.done, entry.cells) == (UNFINISHED, 0, 1)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: (path / "spec.json").unlink(), "has no spec.json, so it is no run, or half deleted"),
        (lambda path: (path / "spec.json").write_text("{"), "cannot be read"),
        (lambda path: (path / "spec.json").write_text("[]"), "not an object"),
        (lambda path: (path / "spec.json").write_bytes(b"\xff\xfe"), "cannot be read"),
        (lambda path: (path / "spec.json").write_text(" " * (results.MOST_SPEC + 1)), "no run's is so large"),
        (lambda path: change(path, format=7), "is a run of format=7"),
        (lambda path: change(path, models=[7]), "is not what a run writes"),
        (lambda path: change(path, study=["a"]), "is not what a run writes"),
        (lambda path: change(path, spec="a"), "is not what a run writes"),
        (lambda path: (path / "results.parquet").write_bytes(b"PAR1"), "results.parquet is damaged"),
        (lambda path: (path / "results.parquet").symlink_to("/etc/passwd"), "is a link, which is not followed"),
        (lambda path: (path / "inner").symlink_to("/etc"), "is a link, which is not followed"),
    ],
)
def test_damaged_directories_are_listed_with_their_problem(root, damage, problem):
    path = first_run(root)
    if "symlink" in problem or "link" in problem:
        (path / "results.parquet").unlink()
    damage(path)
    entry = entry_of(root, path.name)
    assert entry.state == DAMAGED and problem in entry.problem and "\n" not in entry.problem
    assert sum(other.state == FINISHED for other in results.entries(root)) == 1, "the others are not disturbed"


def test_a_link_to_elsewhere_is_not_followed(root, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.move(first_run(root), tmp_path / "elsewhere" / "run")
    (root / "linked").symlink_to(tmp_path / "elsewhere" / "run")
    assert entry_of(root, "linked").state == DAMAGED and "is a link" in entry_of(root, "linked").problem


def test_what_is_no_run_is_no_entry(root, tmp_path):
    (root / ".activation_patching-x").mkdir()
    (root / "a file").write_text("")
    assert len(results.entries(root)) == 2
    assert results.entries(tmp_path / "nowhere") == []


def test_another_version_is_told_and_not_opened(root):
    path = first_run(root)
    change(path, version=99)
    with pytest.raises(RunError, match="version=99.*run it anew"):
        results.opened(entry_of(root, path.name))
    (path / "results.parquet").unlink()
    assert "is of version 99" in entry_of(root, path.name).problem


def test_settings_without_end_are_not_counted(root):
    path = first_run(root)
    (path / "results.parquet").unlink()
    record = json.loads((path / "spec.json").read_text())
    change(path, spec=record["spec"] | {"seeds": list(range(9_000)), "models": ["m"] * 9_000})
    assert entry_of(root, path.name).cells is None


def test_a_study_of_somebody_is_never_executed(root, tmp_path):
    path, file = first_run(root), tmp_path / "theirs.py"
    file.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nstudy = None\n")
    for source, study in ((str(file), "theirs"), (str(file), "activation_patching"), ("activation_patching", "theirs")):
        change(path, source=source, study=study)
        entry = entry_of(root, path.name)
        assert not entry.ours and entry.state == FINISHED
        with pytest.raises(RunError, match="runs nobody's file"):
            results.opened(entry)
    assert not (tmp_path / "executed").exists()


# -- one run -------------------------------------------------------------------------------------------------------


def test_an_opened_run_is_what_its_report_says(root):
    path = first_run(root)
    opened = results.opened(entry_of(root, path.name))
    _, study, spec, rows = read(path)
    assert (opened.columns, opened.lines) == report.headline(study, rows)
    assert opened.reading == study.reading(spec, rows) and opened.command == running.command(study.name, spec)
    page = unescape((path / "report.html").read_text())
    assert opened.reading.split("\n\n")[0] in page and opened.command in page
    assert [fig.layout.title.text for fig in opened.figures] == [
        fig.layout.title.text for fig in study.figures(spec, rows)
    ]


def test_rows_that_are_not_a_studys_are_a_line(root):
    path = first_run(root)
    table = pq.read_table(path / "results.parquet")
    pq.write_table(table.drop_columns(["measure"]), path / "results.parquet")
    with pytest.raises(RunError, match="its results are not what its study writes"):
        results.opened(entry_of(root, path.name))


def test_names_in_figures_are_text():
    heat = go.Heatmap(z=np.eye(2), text=[[HOSTILE, "a<br>b"]] * 2, customdata=np.array([["<a href='x'>", 1.0]], object))
    fig = go.Figure(heat, {"title": {"text": f'<b>{HOSTILE}</b><span style="color:#0072B2">x</span>'}})
    fig.add_annotation(text='<span style="position:fixed">', x=0, y=0)
    shown = results.plain_texts(fig)
    assert shown.layout.title.text == '<b>&lt;script>alert(1)&lt;/script></b><span style="color:#0072B2">x</span>'
    assert list(shown.data[0].text[0]) == ["&lt;script>alert(1)&lt;/script>", "a<br>b"]
    assert shown.data[0].customdata[0][0] == "&lt;a href='x'>" and shown.layout.annotations[0].text.startswith("&lt;")
    np.testing.assert_array_equal(shown.data[0].z, np.eye(2))


def test_a_framed_page_stays_in_its_attribute():
    page = f"""<!doctype html><body>'"></iframe>{HOSTILE}"""
    shown = framed(page)
    assert shown.count("<iframe") == 1 and HOSTILE not in shown and 'sandbox="allow-scripts"' in shown
    assert "allow-same-origin" not in shown and "default-src 'none'" in unescape(shown)
    assert page in unescape(shown.split('srcdoc="')[1].rsplit('">', 1)[0])


def test_tables_take_columns_of_one_name():
    assert results.table(["", "a", ""], [["1", "2", "3"]]).columns.tolist() == ["", "a", " (2)"]


# -- its files -----------------------------------------------------------------------------------------------------


def test_downloads_are_the_files_themselves(root):
    path = first_run(root)
    entry = entry_of(root, path.name)
    assert results.file_of(entry, "spec.json") == (path / "spec.json").read_bytes()
    rows = pd.read_csv(io.BytesIO(results.csv_of(entry)))
    assert rows["value"].tolist() == pytest.approx(read(path)[3]["value"].tolist())
    archive = zipfile.ZipFile(io.BytesIO(results.zip_of(entry)))
    assert sorted(archive.namelist()) == sorted(f"{path.name}/{p.name}" for p in path.iterdir() if p.name[0] != ".")
    assert archive.read(f"{path.name}/report.html") == (path / "report.html").read_bytes()
    assert results.size_of(entry) == sum(info.file_size for info in archive.infolist())


def test_no_download_follows_a_link(root, tmp_path):
    path, secret = first_run(root), tmp_path / "secret"
    secret.write_text("secret")
    entry = entry_of(root, path.name)
    (path / "report.html").unlink()
    (path / "report.html").symlink_to(secret)
    with pytest.raises(RunError, match="is no file"):
        results.file_of(entry, "report.html")
    assert b"secret" not in b"".join(
        zipfile.ZipFile(io.BytesIO(results.zip_of(entry))).read(name)
        for name in zipfile.ZipFile(io.BytesIO(results.zip_of(entry))).namelist()
    )


# -- the page ------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(monkeypatch):
    """``page(root, **query)``: the Runs page of a folder, as a link with that query opens it."""

    def show(root: Path, **query: str) -> AppTest:
        monkeypatch.setattr(sys, "argv", ["app.py", "--runs", str(root)])
        session.start.cache_clear()
        app = AppTest.from_string("from jambascope.dashboards.pages import runs\nruns.page()", default_timeout=60)
        for name, value in query.items():
            app.query_params[name] = value
        return app.run()

    yield show
    session.start.cache_clear()


def test_no_runs_yet_tells_how_to_make_one(page, tmp_path):
    app = page(tmp_path / "none")
    assert "There are no runs in" in app.info[0].value
    assert app.code[0].value == f"jambascope study run induction_heads --runs {tmp_path / 'none'}"


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "..", ".", "activation_patching-x/../../elsewhere"])
def test_a_link_names_runs_of_the_list_only(root, page, tmp_path, name):
    shutil.copytree(first_run(root), tmp_path / "elsewhere")
    name = str(tmp_path / "elsewhere") if name == "/etc" else name
    app = page(root, run=name)
    assert not app.exception and app.selectbox(key="run").value is None
    assert app.info[0].value == "Choose a run to see its numbers, figures and files." and not app.subheader


def test_the_page_shows_every_kind_of_directory(root, page):
    path = first_run(root)
    (root / f"half{HOSTILE.replace('/', '')}").mkdir()
    shutil.copytree(path, root / "begun")
    (root / "begun" / "results.parquet").unlink()
    app = page(root)
    for entry in results.entries(root):
        app.selectbox(key="run").set_value(entry.name).run()
        assert not app.exception
        if entry.state == DAMAGED:
            assert "so it is no run, or half deleted" in app.error[0].value and "<script" not in app.error[0].value
        elif entry.state == UNFINISHED:
            assert app.code[0].value.startswith("jambascope study resume ")
        else:
            assert app.code[0].value == results.opened(entry).command


def test_two_runs_are_compared(root, page):
    first, second = sorted(p.name for p in root.iterdir())
    app = page(root, run=second, run_less=first)
    if "work compare" in app.session_state:
        app.session_state["work compare"].wait(20)
        app.run()
    assert not app.exception and not app.error
    shown = [frame.value for frame in app.dataframe if "paired" in frame.value.columns]
    columns, lines = comparing.lines(comparing.compare(root / first, root / second))
    assert len(shown) == 1 and shown[0].columns.tolist() == columns and shown[0].values.tolist() == lines
