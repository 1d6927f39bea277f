"""Emergence: steps of planted courses are found, heads and repetition are followed, and runs without a past refused."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest
import torch

from jambascope import HookedJamba
from jambascope.errors import CheckpointError, ConfigError
from jambascope.model import initialize
from jambascope.studies import emergence
from jambascope.studies.runner import run as running
from jambascope.studies.runner.spec import make_spec
from jambascope.studies.snapshots import half_way, snapshots

STEPS = (0, 100, 200, 400, 800)
SMALL = {"sequences": 8, "length": 6, "rows": 4, "context": 48, "documents": 3}


def spec_of(**values) -> emergence.EmergenceSpec:
    return make_spec("emergence", emergence.EmergenceSpec, SMALL | values)


# -- half of the way -----------------------------------------------------------------------------------------


def course(*means: float, noise: float = 0.0, samples: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.tensor(means)[None] + noise * torch.randn(samples, len(means), generator=generator)


@pytest.mark.parametrize(
    "means, step, between",
    [
        ((0, 0, 0, 1, 1), math.sqrt(200 * 400), (200, 400)),
        ((0, 0, 0, 0.75, 1), 200 * 2 ** (0.5 / 0.75), (200, 400)),
        ((1, 1, 1, 0, 0), math.sqrt(200 * 400), (200, 400)),
        ((0, 1, 0, 1, 1), math.sqrt(200 * 400), (200, 400)),
        ((0, 1, 1, 1, 1), 50, (0, 100)),
        ((0, 0, 0, 0, 1), math.sqrt(400 * 800), (400, 800)),
    ],
    ids=["step", "interpolated", "falling", "to stay", "from zero", "at the end"],
)
def test_half_of_the_way_is_where_it_was_planted(means, step, between):
    half = half_way(STEPS, course(*means))
    assert half.step == pytest.approx(step) and (half.before, half.after) == between
    assert half.low == pytest.approx(half.high) == pytest.approx(step)


def test_noise_widens_the_interval_around_the_step():
    half = half_way(STEPS, course(0, 0, 0.2, 0.8, 1, noise=0.3))
    assert half.low < half.step < half.high
    assert 200 < half.low and half.high < 400


def test_no_way_has_no_half():
    assert half_way(STEPS, course(1, 1, 1, 1, 1)).step == math.inf


# -- a planted training --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def micro() -> HookedJamba:
    return HookedJamba.from_pretrained("jamba-micro", dtype="float32")


@pytest.fixture(scope="module")
def trained(micro, tmp_path_factory):
    """A run whose weights are random up to step 200, and jamba-micro's from step 400 on."""
    directory = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    untrained = HookedJamba(micro.config)
    initialize(untrained)
    untrained.tokenizer = micro.tokenizer
    for step, model in zip(STEPS, (untrained,) * 3 + (micro,) * 2, strict=True):
        model.save_pretrained(directory / "snapshots" / f"step-{step:05d}")
    micro.save_pretrained(directory)
    (directory / "training.json").write_text(json.dumps({"name": "planted", "steps": 800, "stages": [{"until": 300}]}))
    return directory


def test_what_emerges_between_two_snapshots_is_found_there(trained, tmp_path):
    run = running.run("emergence", spec_of(models=str(trained)), tmp_path)
    _, study, spec, rows = running.read(run.path)
    halves = emergence.half_ways(rows).set_index("measure")
    assert set(halves.index) == set(emergence.EMERGING)
    for name in (emergence.INDUCTION, emergence.REPEATED, emergence.RECALL):
        assert halves.loc[name, "between"] == "200-400" and 200 < halves.loc[name, "mean"] < 400
        assert halves.loc[name, "last"] > halves.loc[name, "first"]
    assert halves.loc[emergence.REPEATED, "n"] == 4 and halves.loc[emergence.RECALL, "n"] == 3
    at_end = rows[rows.step == 800].groupby("measure")["value"].mean()
    assert at_end[emergence.REPEATED] > at_end[emergence.OTHER_ORDER] + 0.3
    assert at_end[emergence.INDUCTION] > at_end[emergence.IN_RANDOM_ORDER] + 0.3
    (_, table), *_ = study.tables(spec, rows)
    assert len(table) == 6
    assert [len(f.data) > 0 for f in study.figures(spec, rows)][:3] == [True] * 3
    text = study.reading(spec, rows)
    assert "planted (5 checkpoints, steps 0 to 800)" in text and "nan" not in text


def test_the_reading_says_what_came_when_and_what_did_not():
    rows = pd.DataFrame(
        [
            {"model": "m", "recipe": "m", "seed": 0, "measure": m, "step": step, "sample": i, "value": v + 0.01 * i}
            for m, values in {
                emergence.INDUCTION: (0, 1, 1, 1, 1),
                emergence.RECALL: (0, 0, 0, 0, 1),
                emergence.ICL: (0.3, 0.1, 0.2, 0.1, 0.3),
            }.items()
            for step, v in zip(STEPS, values, strict=True)
            for i in range(12)
        ]
    )
    text = emergence.reading(spec_of(), rows)
    assert "prefix matching (from 0.06 to 1.05, n = 12) is half way at step 50" in text
    assert f"{emergence.INDUCTION} before {emergence.RECALL}" in text
    assert "No clear change: ICL score (nats) (0.35 to 0.35)" in text
    flat = emergence.reading(spec_of(), rows[rows.measure == emergence.ICL])
    assert "nothing that is measured here changes clearly" in flat


def test_finished_weights_beyond_the_last_snapshot_count(trained):
    assert list(snapshots(trained)) == list(STEPS)
    record = trained / "training.json"
    before = record.read_text()
    try:
        record.write_text(json.dumps({"steps": 900}))
        assert list(snapshots(trained)) == [*STEPS, 900] and snapshots(trained)[900] == trained
    finally:
        record.write_text(before)


# -- refusals ------------------------------------------------------------------------------------------------


def test_a_model_without_snapshots_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match="emergence of jamba-micro: it has 0 snapshots/step-.*zoo train NAME --snapsh"
    ):
        running.run("emergence", spec_of(), tmp_path)


def test_snapshots_of_another_model_are_refused(small_model, model_of_kind, tmp_path):
    for step in (0, 1, 2):
        small_model.save_pretrained(tmp_path / "run" / "snapshots" / f"step-{step}")
    model_of_kind("hybrid").float().save_pretrained(tmp_path / "run")
    with pytest.raises(CheckpointError, match="step-0 is of another model"):
        running.run("emergence", spec_of(models=str(tmp_path / "run")), tmp_path / "runs")


@pytest.mark.parametrize("values, message", [({"length": 70}, "length=70 said twice exceeds its context of 128")])
def test_what_does_not_fit_is_refused(small_model, tmp_path, values, message):
    for name in ("", "snapshots/step-0", "snapshots/step-1", "snapshots/step-2"):
        small_model.save_pretrained(tmp_path / "run" / name)
    with pytest.raises(ConfigError, match=message):
        running.run("emergence", spec_of(models=str(tmp_path / "run"), **values), tmp_path / "runs")
