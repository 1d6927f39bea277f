"""The Runs page in a real browser: a run's numbers and files, two compared, and directories that mean no good."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path

import pytest

from jambascope.studies.runner import compare as comparing
from jambascope.studies.runner import report
from jambascope.studies.runner import run as running
from jambascope.studies.runner.spec import make_spec
from jambascope.studies.runner.study import load

pytest.importorskip("playwright")
from browser_tools import cells, choose, eventually, expect_query, figure, no_exception  # noqa: E402
from playwright.sync_api import expect  # noqa: E402

HOSTILE = "<img src=x onerror=alert(1)>"
ATTACK = """<!doctype html><body>a report<script>
try { top.document.title = "taken"; document.title = "reached"; } catch (e) { document.title = "kept out"; }
try { top.location = "about:blank"; } catch (e) {}
fetch("/_stcore/health").then(() => document.body.append("loaded"), () => document.body.append("nothing loads"));
</script>"""


@pytest.fixture(scope="module")
def kept(runs_root) -> Path:
    """A finished run, a copy of it, a hostile one, one half deleted and one unfinished."""
    study = load("activation_patching")
    prompt = "map : stone river , leaf mud ; {} ->"
    asked = {
        "components": ("z",), "directions": ("denoise",), "clean": prompt.format("leaf"), "answer": "mud",
        "corrupted": prompt.format("stone"), "wrong": "river",
    }  # fmt: skip
    path = running.run(study.name, make_spec(study.name, study.spec, asked), runs_root).path
    for name in ("activation_patching-copy", f"hostile {HOSTILE}", "half deleted", "unfinished"):
        shutil.copytree(path, runs_root / name)
    hostile = runs_root / f"hostile {HOSTILE}"
    record = json.loads((hostile / "spec.json").read_text())
    source = {"study": f"theirs {HOSTILE}", "source": "theirs.py", "command": f"rm {HOSTILE}"}
    (hostile / "spec.json").write_text(json.dumps(record | source))
    (hostile / "report.html").write_text(ATTACK)
    (runs_root / "half deleted" / "spec.json").unlink()
    (runs_root / "unfinished" / "results.parquet").unlink()
    return path


def test_a_run_is_what_its_report_says(open_page, kept):
    page = open_page("runs", run=kept.name, run_report="true")
    _, study, spec, rows = running.read(kept)
    expect(page.get_by_role("heading", name=kept.name)).to_be_visible()
    columns, lines = report.headline(study, rows)
    eventually(page, lambda: _same(cells(page, "headline", columns.index("measure")), [line[1] for line in lines]))
    expect(page.get_by_text(running.command(study.name, spec)).first).to_be_visible()
    expect(figure(page, "run_figure_0")).to_contain_text("jamba-micro, denoise")
    framed = page.frame_locator("iframe[title='The report of the run']").frame_locator("iframe[title=report]")
    expect(framed.locator("h1")).to_have_text(study.question)
    for button, name in (("CSV", "results.csv"), ("All as zip", "zip"), ("Report", "report.html")):
        with page.expect_download() as download:
            page.get_by_test_id("stDownloadButton").filter(has_text=button).first.click()
        content = Path(download.value.path()).read_bytes()
        assert download.value.suggested_filename.endswith(name)
        if name == "zip":
            assert f"{kept.name}/results.parquet" in zipfile.ZipFile(io.BytesIO(content)).namelist()
        elif name == "report.html":
            assert content == (kept / name).read_bytes()
        else:
            assert content.count(b"\n") == len(rows) + 1
    no_exception(page)


def _same(found: list[str], wanted: list[str]) -> None:
    assert found and found == wanted[: len(found)]


def test_the_list_is_searched_and_shows_what_is_wrong(open_page, kept):
    page = open_page("runs")
    eventually(page, lambda: _all_there(cells(page, "run_list", 0), kept))
    search = page.get_by_role("textbox", name="Search")
    search.fill("half")
    search.press("Enter")
    eventually(page, lambda: _same(cells(page, "run_list", 0), ["half deleted"]))
    choose(page, "Run", "half deleted")
    expect(page.get_by_test_id("stAlert")).to_contain_text("has no spec.json, so it is no run, or half deleted")
    choose(page, "Run", "unfinished")
    expect(page.get_by_text("0 of 1 cells are measured")).to_be_visible()
    expect_query(page, run="unfinished", run_search="half")
    no_exception(page)


def _all_there(found: list[str], kept: Path) -> None:
    assert {kept.name, "activation_patching-copy", f"hostile {HOSTILE}", "half deleted", "unfinished"} <= set(found)


def test_two_runs_are_compared_and_the_page_is_downloaded(open_page, kept):
    page = open_page("runs", run=kept.name, run_less="activation_patching-copy")
    columns = comparing.lines(comparing.compare(kept.parent / "activation_patching-copy", kept))[0]
    at = columns.index("difference and 95 % interval")
    eventually(page, lambda: _zero(cells(page, "differences", at)))
    with page.expect_download() as download:
        page.get_by_test_id("stDownloadButton").filter(has_text="Page").click()
    assert "two runs compared" in Path(download.value.path()).read_text()
    no_exception(page)


def _zero(found: list[str]) -> None:
    assert found and all(float(text.split()[0].split("\u00a0")[0]) == 0 for text in found)


def test_a_hostile_run_is_text_and_its_report_is_locked_in(open_page, kept):
    page = open_page("runs", run=f"hostile {HOSTILE}", run_report="true")
    dialogs: list = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    expect(page.get_by_role("heading", name=HOSTILE)).to_be_visible()
    expect(page.get_by_test_id("stAlert")).to_contain_text("the dashboard runs nobody's file")
    framed = page.frame_locator("iframe[title='The report of the run']").frame_locator("iframe[title=report]")
    expect(framed.locator("body")).to_contain_text("a reportnothing loads")
    inner = next(frame for frame in page.frames if frame.parent_frame and frame.parent_frame.parent_frame)
    assert inner.evaluate("[window.origin, document.title]") == ["null", "kept out"]
    assert page.title() == "jambascope" and "/runs" in page.url
    assert not dialogs and page.locator("[data-testid=stMain] img[src=x]").count() == 0
    no_exception(page)


@pytest.mark.parametrize("name", ["../bare0", "/etc", ".."])
def test_a_link_reaches_nothing_outside_the_folder(open_page, kept, name):
    page = open_page("runs", run=name)
    expect(page.get_by_text("Choose a run to see its numbers")).to_be_visible()
    assert "root:" not in page.content()
    no_exception(page)
