"""From rows to intervals, comparisons of runs, and the same cells on a Ray cluster."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch

from jambascope import HookedJamba
from jambascope.cli import main
from jambascope.errors import ConfigError, RunError
from jambascope.hooks.intervals import bootstrap_interval
from jambascope.model import initialize
from jambascope.studies.runner import compare as comparing
from jambascope.studies.runner import run as running
from jambascope.studies.runner.directory import RunDirectory
from jambascope.studies.runner.models import find_models
from jambascope.studies.runner.spec import make_spec
from jambascope.studies.runner.study import load
from jambascope.studies.runner.summary import summarize
from jambascope.studies.zoo.summary import wilson

SOURCE = str(Path(__file__).with_name("norm_study.py"))


@pytest.fixture(scope="module")
def trainings(small_config, tmp_path_factory) -> list[str]:
    """Three trainings of one recipe, a fourth of another learning rate, and a directory that tells nothing."""
    folder, found = tmp_path_factory.mktemp("trainings"), []
    for seed, rate in ((0, 1e-3), (1, 1e-3), (2, 1e-3), (3, 2e-3), (4, None)):
        torch.manual_seed(seed)
        model = HookedJamba(small_config)
        initialize(model, std=0.2)
        model.save_pretrained(folder / str(seed))
        if rate is not None:
            record = {"name": "small", "spec": {"seed": seed, "learning_rate": rate}, "stages": []}
            (folder / str(seed) / "training.json").write_text(json.dumps(record))
        found.append(str(folder / str(seed)))
    return found


@pytest.fixture
def ask(tmp_path):
    def asked(models, ray=None, tell=None, **values) -> running.Run:
        spec = make_spec("norms", load(SOURCE).spec, {"models": models} | values)
        return running.run(SOURCE, spec, tmp_path / "runs", running.Workers(ray=ray), tell)

    return asked


# -- intervals -----------------------------------------------------------------------------------------------


def test_trainings_of_one_recipe_are_pooled_and_others_stand_alone(trainings):
    first = find_models(trainings[:3])
    assert [m.recipe for m in first] == ["small"] * 3 and [m.training_seed for m in first] == [0, 1, 2]
    differing = find_models([trainings[0], trainings[3], trainings[4]])
    assert [m.recipe for m in differing] == [trainings[0], trainings[3], trainings[4]]
    assert differing[2].training_seed is None


def test_intervals_are_over_samples_of_one_training_and_over_trainings_of_several(ask, trainings):
    one, several = (running.read(ask(trainings[:n], seeds="0,1", sequences=6).path)[3] for n in (1, 3))
    (line,) = summarize(one[one.place == "last"], ["norm"], ["place"]).to_dict("records")
    values = torch.tensor(one[one.place == "last"]["value"].to_list(), dtype=torch.float64)
    low, high = (end.item() for end in bootstrap_interval(values))
    assert line == pytest.approx(
        {"recipe": "small", "measure": "norm", "place": "last", "mean": values.mean().item(), "low": low, "high": high,
         "n": 12, "trainings": 1}
    )  # fmt: skip
    pooled = summarize(several, ["norm"], ["place"])
    assert list(pooled.trainings) == [3, 3] and list(pooled.n) == [36, 36]
    alone = summarize(several, ["norm"], ["place"], pooled="model")
    assert len(alone) == 6
    own = alone[alone.place == "last"]
    whole = pooled[pooled.place == "last"].iloc[0]
    assert whole["mean"] == pytest.approx(own["mean"].mean()) and whole.low <= own["mean"].mean() <= whole.high
    assert whole.low >= own.low.min() - 1e-9 and whole.high <= own.high.max() + 1e-9


def rows_of(values, kind=None, labels=None):
    return pd.DataFrame(
        [
            {"recipe": "r", "model": "m", "seed": 0, "measure": "x", "sample": i, "value": v, "kind": kind}
            | (labels or {})
            for i, v in enumerate(values)
        ]
    )


def test_samples_that_agree_are_certain_only_where_values_are_no_hits():
    most = wilson(torch.tensor(0.0), torch.tensor(8.0))[1].item()
    for kind, values, ends in (
        (None, [1.0] * 8, (1, 1)),
        ("hit", [1.0] * 8, (1 - most, 1)),
        ("change of hits", [0.0] * 8, (-most, most)),
        ("hit", [0.5], (-math.inf, math.inf)),
    ):
        line = summarize(rows_of(values, kind), ["x"], []).iloc[0]
        assert (line.low, line.high) == pytest.approx(ends), kind


def test_two_values_of_one_sample_are_an_error():
    rows = pd.concat([rows_of([1.0, 2.0]), rows_of([3.0])])
    with pytest.raises(RunError, match="twice for the same sample"):
        summarize(rows, ["x"], [])


# -- comparisons ---------------------------------------------------------------------------------------------


def test_a_run_compared_with_a_scaled_one_differs_by_the_scale(ask, trainings):
    plain, scaled = ask(trainings[:1], sequences=8), ask(trainings[:1], sequences=8, scale=1.5)
    found = comparing.compare(plain.path, scaled.path)
    rows = running.read(plain.path)[3]
    for _, line in found.frame.iterrows():
        halves = torch.tensor(rows[rows.place == line.place]["value"].to_list(), dtype=torch.float64) / 2
        low, high = bootstrap_interval(halves)
        assert line["mean"] == pytest.approx(halves.mean().item()) and line.paired == "samples and trainings"
        assert (line.low, line.high) == pytest.approx((low.item(), high.item()))  # of the differences: paired
    assert found.settings == [("scale", "1.0", "1.5")]
    page = comparing.page_of(found)
    assert "scale" in page and plain.path.name in page and "difference and 95 % interval" in page


def test_what_cannot_be_paired_is_drawn_by_itself(ask, trainings):
    first = ask(trainings[:1], sequences=8)
    other_model, other_prompts = ask(trainings[1:2], sequences=8), ask(trainings[:1], sequences=8, seeds=(1,))
    assert set(comparing.compare(first.path, other_model.path).frame.paired) == {"samples"}
    found = comparing.compare(first.path, other_prompts.path).frame
    assert (
        set(found.paired) == {"trainings"} and (found.low < found["mean"]).all() and (found["mean"] < found.high).all()
    )
    same = comparing.compare(first.path, first.path).frame
    assert (same["mean"] == 0).all() and (same.low == 0).all() and (same.high == 0).all()


def test_lone_recipes_are_compared_whatever_their_names(ask, trainings):
    found = comparing.compare(ask(trainings[:2]).path, ask(trainings[4:]).path).frame
    assert set(found.recipe) == {f"{trainings[4]} less small"} and len(found) == 2


def test_a_comparison_tells_how_far_it_is_and_can_be_stopped(ask, trainings):
    run, told = ask(trainings[:1], sequences=8).path, []
    found = comparing.compare(run, run, lambda share, text: told.append((share, text)) or True)
    n = len(found.frame)
    assert n > 1 and told == [(i / n, f"drawing samples: {m}") for i, m in enumerate(found.frame.measure)]
    assert comparing.compare(run, run, lambda share, _: share == 0) is None


@pytest.mark.parametrize(("first", "second"), [(1.0, 1.0), (0.0, 1.0)])
def test_hits_that_all_agree_leave_room_for_one_that_does_not(first, second):
    """As a summary of their differences does: no resampling of eight hits finds a miss."""
    hits = [pd.DataFrame([[value] * 8], index=["m"]) for value in (first, second)]
    for kind in ("hit", "change of hits"):
        found = comparing._difference(*hits, kind)
        assert found["high"] - found["low"] > 0.3 and found["low"] <= second - first <= found["high"] <= 1
    assert comparing._difference(*hits)["low"] == second - first


def test_what_cannot_be_compared_says_why(ask, trainings, tmp_path):
    first, second = ask(trainings[:1]), ask(trainings[:1], seeds=(1,))
    record = json.loads((second.path / "spec.json").read_text())
    (second.path / "spec.json").write_text(json.dumps(record | {"study": "label_heads"}))
    with pytest.raises(RunError, match="norms version 1 and .* of label_heads version 1"):
        comparing.compare(first.path, second.path)
    both, others = ask(trainings[2:4]), ask([trainings[0], trainings[4]], seeds=(5,))
    frame = comparing.compare(both.path, both.path).frame
    assert set(frame.recipe) == set(trainings[2:4])
    with pytest.raises(RunError, match="no number in common"):
        comparing.compare(both.path, others.path)


# -- the command and the cluster -----------------------------------------------------------------------------


def call(monkeypatch, capsys, *words) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["jambascope", "study", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, *capsys.readouterr()


def test_the_command_runs_reports_resumes_and_compares(trainings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jambascope.cli._add_commands_of_other_floors", add_study_once())
    ask = ("run", SOURCE, "--model", trainings[0], "--seeds", "0,1", "--runs", tmp_path / "runs")
    code, out, err = call(monkeypatch, capsys, *ask)
    assert code == 0 and "How large is the residual stream" in out and "[1 of 2] model" in err and "n = 6" in out
    (path,) = (tmp_path / "runs").iterdir()
    code, out, _ = call(monkeypatch, capsys, *ask)
    assert code == 0 and "answered from what was kept" in out
    (path / "report.html").unlink()
    assert call(monkeypatch, capsys, "report", path)[0] == 0 and (path / "report.html").exists()
    assert "answered from what was kept" in call(monkeypatch, capsys, "resume", path)[1]
    code, out, _ = call(monkeypatch, capsys, "compare", path, path, "--html", tmp_path / "page.html")
    assert code == 0 and "0 [0, 0]" in out.replace("\xa0", " ") and (tmp_path / "page.html").exists()
    code, out, _ = call(monkeypatch, capsys, "list", "label_heads")
    assert code == 0 and "figure 7" in out and "prompts" in out
    code, _, err = call(monkeypatch, capsys, *ask, "--set", "fault=interrupt", "--set", f"log={tmp_path / 'log'}")
    assert code == 130 and "interrupted; 1 of 2 cells are kept; go on with: jambascope study resume" in err
    code, _, err = call(monkeypatch, capsys, *ask, "--set", "seeds=3")
    assert code == 1 and "--seeds and --set seeds are both given" in err
    code, _, err = call(monkeypatch, capsys, "run", "--ray", SOURCE)
    assert code == 2 or "is no address" in err


def add_study_once():
    """The entry points, added to the one app at the first call only."""
    from jambascope import cli

    real, added = cli._add_commands_of_other_floors, []
    return lambda: None if added or any(g.name == "study" for g in cli.app.registered_groups) else added.append(real())


def test_without_ray_the_remedy_is_said(ask, trainings, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "ray" else real(name, *more))
    with pytest.raises(ConfigError, match="pip install 'jambascope\\[ray\\]'"):
        ask(trainings[:1], ray="local")


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra `ray`)")
def test_a_ray_cluster_gives_the_same_and_survives_a_killed_worker(ask, trainings, tmp_path):
    heard: set[str] = set()

    def listen(done, doing):
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):  # a worker may end meanwhile, one is even killed
                heard.update(c.laddr.ip for c in process.net_connections() if c.status == "LISTEN")

    values = dict(models=trainings[:1], seeds="0,1,2", log=str(tmp_path / "log"), fault="kill")
    run = ask(**values, ray="local", tell=lambda cells: listen)
    assert heard and all(ip.removeprefix("::ffff:") == "127.0.0.1" for ip in heard)
    assert (tmp_path / "log.fault").exists() and run.measured == 3  # the worker of seed 1 was killed, once
    found = running.read(run.path)
    shutil.move(tmp_path / "runs", tmp_path / "kept")
    alone = running.read(ask(**values).path)
    pd.testing.assert_frame_equal(found[3], alone[3], rtol=1e-5)
    for name, tensor in alone[0].tensors().items():
        torch.testing.assert_close(RunDirectory.open(tmp_path / "kept" / run.path.name).tensors()[name], tensor)
