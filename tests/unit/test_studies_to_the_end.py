"""Studies from the question to the page where a model lacks what a study's labels tell apart: that is a result too."""

from __future__ import annotations

import html

import pytest

from jambascope.studies.runner import run as running
from jambascope.studies.runner.report import headline
from jambascope.studies.runner.spec import make_spec
from jambascope.studies.runner.study import load

SMALL = {
    "pairs the model does not tell apart": (
        "activation_patching",
        dict(models="mamba-micro", pairs="4", shots="2", components="resid_pre", directions="denoise", draws="2"),
        "nothing",
    ),
    "no Mamba layer below the head": (
        "previous_token",
        dict(models="attention-micro", sequences="4", length="16"),
        "by edge to the token before",
    ),
    "half-lives alone": (
        "state_memory",
        dict(models="jamba-micro", asked="half-life", prompts="20", untrained="false"),
        "alf-li",
    ),
}


@pytest.mark.parametrize("case", SMALL)
def test_a_page_says_what_there_is(case, tmp_path):
    name, settings, said = SMALL[case]
    run = running.run(name, make_spec(name, load(name).spec, settings), tmp_path / "runs")
    _, study, spec, rows = running.read(run.path)
    page = (run.path / "report.html").read_text()
    columns, lines = headline(study, rows)
    assert lines and all(len(line) == len(columns) for line in lines)
    assert html.escape(study.question) in page and said in study.reading(spec, rows)
    assert running.rewrite_report(run.path).stat().st_size == len(page.encode())
