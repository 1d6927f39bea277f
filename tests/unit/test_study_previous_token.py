"""Cuts of Mamba layers equal models that cannot look back, and the study finds the convolution that was built in."""

from __future__ import annotations

import copy

import pytest
import torch

from jambascope import HookedJamba
from jambascope.errors import ConfigError
from jambascope.studies import previous_token as study_module
from jambascope.studies import previous_token_report as report
from jambascope.studies.mixer_cuts import WAYS, Cut, cut_hooks, earlier_means, widths
from jambascope.studies.runner import run as running
from jambascope.studies.runner.directory import table_of
from jambascope.studies.runner.spec import make_spec
from jambascope.studies.runner.summary import one, summarize


def spec_of(**values) -> study_module.PreviousTokenSpec:
    return make_spec("previous_token", study_module.PreviousTokenSpec, values)


def rows_of(spec, model, name="built"):
    (cell,) = study_module.study.cells(spec)
    return table_of("previous_token", cell, name, study_module.measure(spec, cell, model)).to_pandas()


def lost(rows, way, layers="all below", mode="taken"):
    own = rows[(rows["mode"] == mode) & (rows.way == way) & (rows.layers == layers)]
    single = report.SINGLE if layers.isdigit() else ""
    return one(summarize(own, [single + report.CHANGES[0]], ()))


@pytest.fixture(scope="module")
def built_rows(built):
    spec = spec_of(sequences=12, length=8, groups=6, k=3, draws=5)
    return spec, rows_of(spec, built)


# -- cuts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hybrid", "mamba2"])
@pytest.mark.parametrize("ways", [("conv",), ("state",), WAYS], ids="+".join)
def test_a_cut_is_a_model_that_cannot_look_back(model_of_kind, kind, ways, tokens):
    """A convolution whose earlier taps are zero; a state that is forgotten at every step."""
    model = model_of_kind(kind)
    other, tokens = copy.deepcopy(model), tokens % 29
    mixer = other.blocks[0].mixer
    with torch.no_grad():
        if "conv" in ways:
            mixer.conv1d.weight[..., :-1] = 0
        if "state" in ways:
            mixer.A_log.fill_(50.0)
    cuts = [Cut(0, way) for way in ways]
    with torch.no_grad(), model.hooks(cut_hooks(model, cuts, range(tokens.shape[1]))):
        found = model(tokens)
    with torch.no_grad():
        torch.testing.assert_close(found, other(tokens))
        assert not torch.allclose(found, model(tokens))


@pytest.mark.parametrize("kind", ["hybrid", "mamba2"])
@pytest.mark.parametrize("way", WAYS)
def test_cuts_keep_to_positions_and_channels_and_means_stand_in(model_of_kind, kind, way, tokens):
    model, tokens = model_of_kind(kind), tokens % 29
    point = f"blocks.0.mixer.hook_{'conv' if way == 'conv' else 'y'}"
    width = widths(model, 0)[way]
    means = earlier_means(model, tokens, range(1, 11), [0])
    channels = torch.arange(width) < 3

    def seen(hooks) -> torch.Tensor:
        kept = {}
        with torch.no_grad(), model.hooks([*hooks, (point, lambda value, hook: kept.update(y=value.clone()))]):
            model(tokens)
        return kept["y"]

    plain, zero, mean = (seen(hooks) for hooks in (
        [], cut_hooks(model, [Cut(0, way, channels)], [4, 5]), cut_hooks(model, [Cut(0, way)], range(1, 11), means)
    ))  # fmt: skip
    differ = (plain != zero).any(0)
    assert differ[[4, 5], :3].any() and not differ[:4].any() and not differ[6:].any() and not differ[:, 3:].any()
    torch.testing.assert_close(mean[:, 1:].mean((0, 1)), plain[:, 1:].mean((0, 1)))  # on average nothing changes
    assert means[0, way].shape == (width,)


# -- the study -----------------------------------------------------------------------------------------------


def test_the_built_convolution_is_found(built_rows):
    """Layer 0 writes the previous token by its convolution; its state holds nothing, and head 0 reads it."""
    _, rows = built_rows
    base = rows[rows["mode"] == "nothing taken"]
    assert set(base[base.measure == report.SCORE]["head"]) == {0}
    score = one(summarize(base, [report.SCORE], ()))
    assert score.low > 0.99 and score.n == 6
    assert lost(rows, "conv").high < -0.5 and lost(rows, "conv", "0").high < -0.5
    assert abs(lost(rows, "state")["mean"]) < 1e-6
    assert lost(rows, "conv", "0", "only this left").low > -1e-6
    assert lost(rows, "state", "0", "only this left").high < -0.5


def test_channels_of_the_right_layer_and_way_are_compared_with_random_ones(built_rows):
    _, rows = built_rows
    channels = rows[rows.measure == report.CHANNELS]
    assert set(channels.layers) == {"0"} and set(channels.way) == {"conv"}
    summary = summarize(channels, [report.CHANNELS], ("set",))
    assert one(summary, set="found")["mean"] < 0 and one(summary, set="random").n == 6
    assert (rows.measure == report.CHANNEL_SET).sum() == 5


def test_the_reading_names_who_does_it_or_that_there_is_nothing(built_rows):
    spec, rows = built_rows
    text = report.reading(spec, rows)
    assert "layer 1 head 0" in text and "So it needs convolutions." in text and "conv of layer 0 1.00" in text
    none = rows.assign(value=rows["value"].where(rows.measure != report.SCORE, 0.01))
    assert "nothing was found" in report.reading(spec, none)
    spared = rows.assign(value=rows["value"].where(~rows.measure.str.endswith(report.CHANGES[0]), 0.0))
    assert "the step is not here" in report.reading(spec, spared)
    assert "No single layer below makes a difference" in report.reading(spec, spared)


def test_heads_below_and_random_edges_are_cut_too(model_of_kind):
    """Of two attention layers the first cannot hold the head; its edges can be taken away."""
    rows = rows_of(spec_of(sequences=4, length=6), model_of_kind("attention"), "attention")
    assert set(rows.way.dropna()) == {study_module.EDGE, study_module.RANDOM_EDGE, study_module.EVERYTHING}
    assert set(rows[rows.measure == report.SCORE].layer) == {1}
    assert lost(rows, study_module.EDGE)["mean"] == lost(rows, study_module.EVERYTHING)["mean"] != 0


def test_convolutions_do_it_in_jamba_micro_and_layers_above_do_nothing(tmp_path):
    spec = spec_of(sequences=8, length=30, groups=4, k=1, draws=2)
    run = running.run("previous_token", spec, tmp_path)
    _, study, spec, rows = running.read(run.path)
    assert lost(rows, "conv").high < -0.5 and lost(rows, "state").low > -0.1
    above = rows[(rows.side == "above") & rows.measure.str.endswith(report.CHANGES[0])]
    assert set(above.layers) == {"5", "6", "7", "all above"} and (above["value"] == 0).all()
    assert (rows[(rows.side == "above") & rows.measure.str.endswith(report.CHANGES[1])]["value"] != 0).any()
    assert "So it needs convolutions" in study.reading(spec, rows)
    page = (run.path / "report.html").read_text()
    assert page.count("plotly-graph-div") >= 4 and "Layers cut off one by one" in page


@pytest.mark.parametrize(
    "kind, values, message",
    [
        ("no-attention", {}, "it has no attention layers"),
        ("one-slot", {}, "its only attention layer is the first"),
        ("hybrid", {"length": 40}, "length=40 said twice exceeds its context of 64"),
        ("hybrid", {"length": 10, "k": 9}, "k=9 must be at most half of groups=16"),
    ],
)
def test_what_cannot_be_asked_is_refused(model_of_kind, kind, values, message):
    with pytest.raises(ConfigError, match=message):
        study_module.check(spec_of(**values), model_of_kind(kind).config, None)


def test_random_edges_lead_to_earlier_tokens_that_are_not_the_one_before(model_of_kind):
    model: HookedJamba = model_of_kind("attention")
    at = study_module.Setting(spec_of(length=6), model, (1, 0), 1, None)

    def hidden(hooks) -> list[tuple[int, int]]:
        kept = {}
        look = ("blocks.0.attn.hook_pattern", lambda value, hook: kept.update(pattern=value.clone()))
        with torch.no_grad(), model.hooks([*hooks, look]):
            model(torch.arange(3, 16)[None])
        return [(q, k) for q, k in (kept["pattern"][0, 0] == 0).nonzero().tolist() if k < q]

    seen = [hidden(at.edges([0])), hidden(at.edges([0], seed=1))]
    assert seen[0] == [(q, q - 1) for q in at.cut_at]
    assert [q for q, _ in seen[1]] == list(at.cut_at) and all(k < q - 1 for q, k in seen[1] if q > 2)
