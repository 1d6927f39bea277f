"""Stability measures what hooks see, finds planted spikes and growth, and says so where training stays calm."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from jambascope import HookedJamba
from jambascope.errors import ConfigError, InputError
from jambascope.files import write_table
from jambascope.studies import stability, stability_reading, training_stress
from jambascope.studies.comparisons import PROMPTS
from jambascope.studies.runner import run as running
from jambascope.studies.runner.directory import table_of
from jambascope.studies.runner.spec import make_spec
from jambascope.studies.runner.study import load
from jambascope.studies.runner.summary import one, summarize
from jambascope.studies.training_stress import DIPS, DIVERGED, LARGEST, SPIKES

SMALL = {
    "models": "jamba-micro",
    "prompts": 3,
    "edges": "0,16,32,64",
    "trained": 32,
    "rates": "0.003",
    "steps": 6,
    "trainings": 0,
}


@pytest.fixture(scope="module")
def micro() -> HookedJamba:
    return HookedJamba.from_pretrained("jamba-micro", dtype="float32")


def spec_of(**values) -> stability.StabilitySpec:
    return make_spec("stability", stability.StabilitySpec, SMALL | values)


# -- activations ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(5, 200, (3, 64), generator=torch.Generator().manual_seed(0))


def test_sizes_are_those_of_the_cache(micro, tokens):
    found = stability.sizes(micro, tokens, (0, 16, 64), batch_size=2)
    layer = micro.config.ssm_layers[2]
    names = [f"blocks.{layer}.mixer.hook_dt", f"blocks.{layer}.mixer.hook_ssm_state", f"blocks.{layer}.hook_mixer_out"]
    with torch.no_grad():
        _, cache = micro.run_with_cache(tokens, names_filter=names)
    dt, out = cache[names[0]], cache[names[2]]
    state = cache[names[1]]
    state = state.movedim(micro.hook_rows[names[1]].axes.index("T"), 1)[:, 15::16].flatten(2)
    assert list(found["dt"]) == list(micro.config.ssm_layers)
    for quantity, rms in (("dt", dt), ("mixer out", out)):
        expected = rms[:, 16:].square().mean((1, 2)).sqrt()
        torch.testing.assert_close(found[quantity][layer][0][:, 1], expected)
        torch.testing.assert_close(found[quantity][layer][1][:, 0], rms[:, :16].abs().amax((1, 2)))
    torch.testing.assert_close(found["state"][layer][0][:, 1], state[:, 1:].square().mean((1, 2)).sqrt())


def test_a_state_that_never_decays_is_seen_to_grow(micro):
    """With A near zero the state sums up what is written; with the model's own it does not."""
    spec = spec_of(untrained="false")
    model = HookedJamba(micro.config)
    model.load_state_dict(micro.state_dict())
    model.tokenizer = micro.tokenizer
    with torch.no_grad():
        for layer in model.config.ssm_layers:
            model.blocks[layer].mixer.A_log.fill_(-20.0)
    growth = {}
    for name, asked in (("own", micro), ("endless", model.eval())):
        cell = {"model": "jamba-micro", "seed": 0, "part": "activations"}
        rows = table_of("stability", cell, name, stability.measure(spec, cell, asked)).to_pandas()
        growth[name] = one(summarize(rows, [stability.GROWTH + "state"], stability.BY))
    assert growth["own"].high < 1.3 < growth["endless"].low and growth["own"].n == 3


def test_the_report_of_jamba_micro_is_whole(tmp_path):
    spec = spec_of(trainings=1)
    run = running.run("stability", spec, tmp_path)
    _, study, spec, rows = running.read(run.path)
    text = study.reading(spec, rows)
    assert "beyond the trained length" in text and "3 prompts" in text and "nan" not in text
    assert "no training log lies beside the weights" in text and "0 of 1 diverge without" in text
    assert {"32-64", "32-64, untrained"} <= set(rows.condition.dropna())
    assert len(study.figures(spec, rows)) == 2
    (_, table), *_ = study.tables(spec, rows)
    assert set(table.n) == {3} and len(table) == 6 * 7 and "largest at 32-64" in table


@pytest.mark.parametrize(
    "values, message",
    [
        ({"edges": "0,64"}, "edges=.* must be three or more"),
        ({"edges": "0,32,40"}, "rise by 16"),
        ({"trained": "20"}, "trained=20 must be one of the edges"),
        ({"trained": "64"}, "trained=64 must be one of the edges"),
    ],
)
def test_windows_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        spec_of(**values)


@pytest.mark.parametrize(
    "kind, error, message",
    [("attention", ConfigError, "it has no Mamba layers"), ("hybrid", InputError, "it has no tokenizer")],
)
def test_models_without_mamba_or_text_are_refused(model_of_kind, tmp_path, kind, error, message):
    model_of_kind(kind).float().save_pretrained(tmp_path / "model")
    with pytest.raises(error, match=message):
        running.run("stability", spec_of(models=str(tmp_path / "model")), tmp_path / "runs")


# -- logs ----------------------------------------------------------------------------------------------------


def noisy(steps: int = 400) -> np.ndarray:
    return 3 + 0.1 * np.random.default_rng(0).standard_normal(steps)


@pytest.mark.parametrize(
    "at, starts, found",
    [((), (), []), ((200,), (), [200]), ((200, 203, 300), (), [200, 300]), ((200,), (180,), []), ((20,), (), [])],
    ids=["noise", "one", "two that belong together", "after a change of data", "in the beginning"],
)
def test_planted_spikes_are_found(at, starts, found):
    losses = noisy()
    losses[list(at)] += 2
    assert training_stress.excursions(losses, starts) == found
    assert training_stress.excursions(-losses, starts) == []


def test_a_log_beside_the_weights_is_read(tmp_path):
    losses = noisy()
    losses[[120, 250]] += 2
    columns = {"step": list(range(400)), "lm": losses.tolist(), "gradient_norm": [0.5] * 300 + [2.0] * 100}
    assert training_stress.log_rows(tmp_path) == []
    (tmp_path / "training").mkdir()
    write_table(tmp_path / "training" / "log.parquet", pa.table(columns))
    record = {"stages": [{"until": 240}, {"until": None}], "spec": {"clip_norm": 1.0}}
    (tmp_path / "training.json").write_text(json.dumps(record))
    rows = training_stress.log_rows(tmp_path)
    values = {row["measure"]: row["value"] for row in rows if row.get("condition") == "training log"}
    assert values == {SPIKES: 1, DIPS: 0, training_stress.GRADIENT: 2.0, training_stress.CLIPPED: 0.25}
    (tmp_path / "training" / "log.parquet").write_text("no table")
    with pytest.raises(InputError, match="is no training log"):
        training_stress.log_rows(tmp_path)


# -- stress --------------------------------------------------------------------------------------------------


def test_without_inner_norms_a_rate_far_too_high_makes_activations_explode():
    found = {
        inner: training_stress.stressed(training_stress.stress_recipe(inner, 1.0, 6, 0)) for inner in (True, False)
    }
    assert found[False].get(LARGEST, math.inf) > 100 * found[True][LARGEST]
    assert training_stress.stressed(training_stress.stress_recipe(True, 3e-3, 6, 0))[DIVERGED] == 0


def test_a_loss_that_is_no_number_counts_as_diverged(monkeypatch):
    def blow_up(model, *args, **kwargs):
        raise ConfigError("the loss became nan")

    monkeypatch.setattr(training_stress.training, "fit", blow_up)
    assert training_stress.stressed(training_stress.stress_recipe(False, 0.1, 10, 0)) == {DIVERGED: 1.0}


def stressed_rows(without: dict, with_: dict, pairs: int) -> pd.DataFrame:
    """Of every rate as many pairs: measure -> value, to which a little is added that differs from pair to pair."""
    return pd.DataFrame(
        [
            {"measure": m, "condition": f"{word} inner norms, rate {rate:g}", "sample": i}
            | {"value": v + 0.1 * i * (m == LARGEST and word == "without"), "kind": "hit" if m == DIVERGED else None}
            | {"model": "m", "recipe": "m", "seed": 0, "part": "learning-rate stress"}
            for word, of in (("without", without), ("with", with_))
            for rate in (0.003, 0.1)
            for i in range(pairs)
            for m, v in of.items()
        ]
    )


def test_what_diverged_and_grew_is_told_by_exact_tests_over_pairs():
    """McNemar's: of 2 x 8 pairs that all part one way p is 2 / 2^16; of 2 x 2 pairs nothing can be told at a rate."""
    study, spec = load("stability"), spec_of(rates="0.003,0.1")
    rows = stressed_rows({DIVERGED: 1.0, LARGEST: 50.0}, {DIVERGED: 0.0, LARGEST: 5.0}, 8)
    text = study.reading(spec, rows)
    assert "Over all 2 rates: 16 of 16 diverge without and 0 of 16 with, 1.00 [0.81, 1.00] of the pairs apart" in text
    assert re.search(r"inside Mamba is 10\.07 \[[\d., ]*\] times as large without \(p = 6\.1e-05, n = 16\)", text)
    (at,) = re.findall(r"At rate 0\.1 8 of 8 diverge without and 0 of 8 with, [^(]*\(p = ([\d.]+)\)", text)
    assert float(at) == pytest.approx(4 * 2 / 2**8, abs=0.001)  # Holm over 2 rates x 2 measures
    same = stressed_rows({DIVERGED: 1.0, LARGEST: 5.0}, {DIVERGED: 1.0, LARGEST: 5.0}, 2)
    text = study.reading(spec, same.assign(value=same["value"].where(same.measure == DIVERGED, 5.0)))
    assert text.count("no difference told, p = 1") == 6 and "2 pairs at each rate cannot tell anything there" in text


def test_pairs_have_equal_seeds_and_batches_and_rates_none_in_common(monkeypatch):
    asked = []
    monkeypatch.setattr(training_stress, "stressed", lambda recipe: asked.append(recipe) or {DIVERGED: 0.0})
    training_stress.stress_rows((0.003, 0.1), 5, 3, seed=2)
    seeds = [recipe.spec.seed for recipe in asked]
    assert seeds[::2] == seeds[1::2] and len(set(seeds)) == 6
    assert [recipe.config.inner_norms for recipe in asked] == [True, False] * 6


def activation_rows(scale: dict[str, float], prompts: float = 1.0) -> pd.DataFrame:
    rows = []
    for recipe, times in scale.items():
        own = {"model": recipe, "recipe": recipe, "seed": 0, "part": "activations"}
        rows.append(own | {"measure": stability.NORMS, "sample": 0, "value": float(times == 1)})
        rows.append(own | {"measure": PROMPTS, "sample": 0, "value": prompts if times == 1 else 1.0})
        rows += [
            own | {"measure": stability.MAX + q, "condition": "32-64", "sample": i, "value": times * (1 + i)}
            for q in stability.POINTS
            for i in range(12)
        ]
    return pd.DataFrame(rows)


def test_models_with_and_without_inner_norms_are_compared_on_the_same_prompts():
    (text,) = stability_reading._between(spec_of(), activation_rows({"plain": 3.0, "normed": 1.0}))
    assert "plain (without inner norms), times those of normed (with inner norms) on the same 12 prompts" in text
    assert text.count("3.00 [3.00, 3.00]") == 6 and "not told" not in text
    assert stability_reading._between(spec_of(), activation_rows({"plain": 3.0, "normed": 1.0}, prompts=2.0)) == []


@pytest.mark.parametrize("rates", ["0,0.1", "0.1,0.01", "-0.1"])
def test_rates_rise_and_are_positive(rates):
    with pytest.raises(ConfigError, match="rates=.*give positive numbers that rise"):
        spec_of(rates=rates)
