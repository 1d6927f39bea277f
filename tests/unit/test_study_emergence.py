"""Emergence: steps of planted courses are found, heads and repetition are followed, and runs without a past refused."""

from __future__ import annotations

import json
import math
import re
import shlex

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from jambascope import HookedJamba, JambaConfig
from jambascope.cli import zoo_app
from jambascope.errors import CheckpointError, ConfigError
from jambascope.hooks.heads import repeated_random_tokens, score_heads
from jambascope.model import initialize
from jambascope.studies import emergence
from jambascope.studies.runner import run as running
from jambascope.studies.runner.spec import make_spec
from jambascope.studies.snapshots import half_way, snapshots
from jambascope.training import TrainingSpec
from jambascope.zoo import progress, recipes, train
from jambascope.zoo.recipes import Recipe, Stage
from jambascope.zoo.words import EOS, VOCABULARY

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
    chance = rows[rows.measure.str.startswith("chance: ")].set_index("measure")["value"]
    assert chance.to_dict() == {"chance: recall accuracy": 1 / 8, "chance: label mass": 2 / len(VOCABULARY)}
    (_, table), *_ = study.tables(spec, rows)
    assert len(table) == 6
    assert [len(f.data) > 0 for f in study.figures(spec, rows)][:3] == [True] * 3
    text = study.reading(spec, rows)
    assert "planted (5 checkpoints, steps 0 to 800)" in text and "nan" not in text
    assert re.search(
        r"Gain of the followed head less that of another .*prefix matching 0\.\d\d \[-?0\.\d\d, \d\.\d\d\]", text
    )
    assert re.search(r"recall accuracy [^;]* \(above chance, 0\.125\)", text)
    told = next(f for f in study.figures(spec, rows) if "What the context tells" in f.layout.title.text)
    levels = sorted(shape.y0 for shape in told.layout.shapes)
    assert levels == pytest.approx([2 / len(VOCABULARY), 1 / 8])


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


def test_followed_heads_are_the_first_and_the_last_of_the_finding_half(micro, trained):
    cell = {"model": str(trained), "seed": 0}
    rows = pd.DataFrame(emergence.measure(spec_of(rows=2, documents=2), cell, micro).rows)
    tokens = repeated_random_tokens(micro, 8, 6, seed=0)
    finding, held_out = (score_heads(micro, part)["induction"] for part in (tokens[:4], tokens[4:]))
    ranked = finding.top(4)
    for name, row in ((emergence.INDUCTION, ranked[0]), (emergence.OTHER_HEAD[emergence.INDUCTION], ranked[-1])):
        where = rows[rows.measure == f"head of {name}"][["layer", "head"]].to_numpy().tolist()
        assert where == [[row["layer"], row["head"]]]
        values = rows[(rows.measure == name) & (rows.step == 800)]["value"]
        assert values.to_list() == pytest.approx(held_out.samples[:, 0, row["head"]].tolist(), abs=1e-6)


@pytest.mark.parametrize(
    "mixers, expected",
    [
        (("mamba", "attention", "mamba"), {(1, 0)}),
        (("attention", "attention", "mamba"), {(1, 1), (1, 2), (1, 0)}),
    ],
    ids=["the last of one layer", "any other of the layer"],
)
def test_the_other_head_is_of_the_layer_or_the_last(mixers, expected):
    """Heads of layer 0 stand best; of one attention layer the one of lowest score is compared to."""
    config = JambaConfig(
        d_model=16, d_vocab=29, mixers=mixers, feed_forwards=("none",) * 3, n_heads=4, n_key_value_heads=2, d_head=4,
        d_inner=32, d_state=4, dt_rank=2,
    )  # fmt: skip
    others = [(layer, head) for layer in config.attention_layers for head in (2, 1, 0)]
    drawn = {emergence._other_head(config, (1, 3), others, seed) for seed in range(40)}
    assert drawn == expected


def test_the_reading_tells_heads_from_others_only_where_they_gain_more():
    values = {emergence.INDUCTION: (0, 0, 0, 1, 1), emergence.OTHER_HEAD[emergence.INDUCTION]: (0, 0, 0, 1, 1)}
    rows = pd.DataFrame(
        [
            {"model": "m", "recipe": "m", "seed": 0, "measure": m, "step": step, "sample": i}
            | {"value": v + (0.01 if m == emergence.INDUCTION else -0.01) * (-1) ** i}
            for m, of in values.items()
            for step, v in zip(STEPS, of, strict=True)
            for i in range(12)
        ]
    )
    assert "prefix matching 0.00 [0.00, 0.00] (not told apart, p = 1, n = 12)" in emergence.reading(spec_of(), rows)
    less = rows.assign(value=rows["value"].where(rows.measure == emergence.INDUCTION, 0.1))
    apart = r"prefix matching 1\.00 \[1\.00, 1\.00\] \(p = 0\.000\d+, n = 12\)"
    assert re.search(apart, emergence.reading(spec_of(), less))
    noisy = rows["value"] + 0.2 * (rows["sample"] % 4) * (rows.step == 800) * (rows.measure == emergence.INDUCTION)
    spread = r"prefix matching 0\.30 \[0\.1\d, 0\.4\d\] \(p = "
    assert re.search(spread, emergence.reading(spec_of(), rows.assign(value=noisy)))


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


SHRUNKEN = Recipe(
    about="shrunken",
    config=JambaConfig.jamba(
        n_layers=2, attn_layer_period=2, attn_layer_offset=1, d_model=16, d_vocab=len(VOCABULARY), n_heads=2, d_head=8,
        d_mlp=8, num_experts=4, d_state=4, bos_token_id=1, eos_token_ids=(EOS,), pad_token_id=0,
    ),
    spec=TrainingSpec(steps=3, learning_rate=1e-2, warmup_steps=1, evaluate_every=2, checkpoint_every=2),
    stages=(Stage(until=2, batch_size=2, sequence_length=8), Stage(until=None, batch_size=3, sequence_length=16)),
)  # fmt: skip


def test_a_model_without_snapshots_is_told_what_gives_them_and_that_does(tmp_path, monkeypatch):
    """What the error says is done, with a training shrunken to nothing, and then the study runs."""
    with pytest.raises(ConfigError, match="emergence of jamba-micro: it has 0 snapshots/step-") as raised:
        running.run("emergence", spec_of(), tmp_path)
    command, model = re.search(r"keep them: jambascope zoo (.*), then --model (\S+)$", str(raised.value)).groups()
    assert (command, model) == ("train jamba-micro --snapshots", "runs/zoo/jamba-micro/seed-0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(recipes.RECIPES, "jamba-micro", SHRUNKEN)
    monkeypatch.setattr(train, "SNAPSHOTS", (0, 1))
    monkeypatch.setattr(progress, "summary", lambda of: {})
    result = CliRunner().invoke(zoo_app, shlex.split(command))
    assert result.exit_code == 0, result.output
    _, study, spec, rows = running.read(running.run("emergence", spec_of(models=model), tmp_path / "runs").path)
    assert "jamba-micro (3 checkpoints, steps 0 to 3)" in study.reading(spec, rows)


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
