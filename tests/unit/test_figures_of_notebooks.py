"""Figures that notebooks brought: estimates beside chance, maps of effects, experts by domain, looks by layer."""

from __future__ import annotations

import math

import numpy as np
import plotly.io
import pytest
import torch

from jambascope.hooks.intervals import bootstrap_interval
from jambascope.studies.figures import attention, patching, routing, theme
from jambascope.studies.figures.estimates import Estimate, estimates

TOKENS = ["<bos>", "the", "plot", "was"]
NAN = math.nan
POINTS = [
    Estimate("1", "own", 0.5, 0.4, 0.7, (0.1, 0.2)),
    Estimate("1", "other", 0.3),
    Estimate("3", "own", 0.6, -math.inf, math.inf, (0.1, 0.1)),
]


def figures() -> dict:
    shares = np.array([[1.0, 0.5, 0.5, 0.0], [0.2, 0.8, 0.6, 0.4]])
    return {
        "estimates": estimates("Estimates", "", POINTS, "layer", "load"),
        "logarithmic": estimates("Estimates", "below", POINTS[:2], "layer", "tokens", log=True),
        "effect_map": patching.effect_map("Stream", "", np.array([[0, 1, -1, 0.5], [NAN] * 4]), [0, 4], TOKENS),
        "groups": patching.effect_map("Stream", "", np.eye(2), [0, 1], ["keys", "values"], numbered=False),
        "specialization": routing.specialization(shares, ["story", "<copy>"], 0.5, 3),
        "use_and_need": routing.use_and_need({1: shares, 3: shares}, {1: -shares, 3: shares}, ["story", "copy"]),
        "looks_by_layer": attention.looks_by_layer(
            {0: np.full(4, 0.25), 4: np.eye(4)[2]}, {0: "mamba", 4: "attention"}, TOKENS, 2
        ),
    }


@pytest.mark.parametrize("name", figures())
def test_every_figure_is_titled_named_and_transparent(name):
    fig = figures()[name]
    assert fig.layout.title.text and fig.layout.paper_bgcolor == "rgba(0,0,0,0)"
    assert all(axis.title.text for axis in (*fig.select_xaxes(), *fig.select_yaxes()))
    assert all(trace.colorbar.title.text for trace in fig.data if trace.type == "heatmap")
    fig.to_json()


def test_estimates_stand_side_by_side_with_intervals_and_chance():
    fig = figures()["estimates"]
    chance, own, none, other = fig.data
    assert list(fig.layout.xaxis.ticktext) == ["1", "3"]
    assert list(own.y) == [0.5, 0.6] and list(other.y) == [0.3]
    assert own.x[0] < 0 < other.x[0] < 0.5 < own.x[1] < 1  # each beside its place
    np.testing.assert_allclose(own.error_y.array, [0.2, 0])  # an interval without bounds is not drawn
    np.testing.assert_allclose(own.error_y.arrayminus, [0.1, 0])
    assert min(y for y in chance.y if y is not None) == 0.1 and max(y for y in chance.y if y is not None) == 0.2
    assert chance.showlegend and not none.showlegend and not none.x
    assert "[0.4, 0.7]" in own.text[0] and "[" not in own.text[1]


def test_an_estimate_of_samples_is_their_mean_and_interval():
    samples = torch.tensor([1.0, 2.0, 3.0, 6.0])
    estimate = Estimate.of("1", "own", samples)
    assert estimate.value == 3 and 1 <= estimate.low < 3 < estimate.high <= 6
    assert (estimate.low, estimate.high) == tuple(map(float, bootstrap_interval(samples)))
    assert str(Estimate("1", "own", -1e-9, -0.5, 0.25)) == "+0.00 [-0.50, +0.25]"


def test_a_logarithmic_axis_marks_decades():
    axis = figures()["logarithmic"].layout.yaxis
    assert axis.type == "log" and axis.dtick == 1


def test_effects_are_centred_on_zero_and_missing_layers_blank():
    heat = figures()["effect_map"].data[0]
    assert (heat.zmin, heat.zmax) == (-1, 1) and np.isnan(np.array(heat.z)[1]).all()
    assert heat.text[1][2] == "layer 4, 2 plot"
    divergence = patching.effect_map("KL", "", np.ones((1, 4)), [0], TOKENS, limit=2.0, signed=False).data[0]
    assert (divergence.zmin, divergence.zmax) == (0, 2) and divergence.colorscale != heat.colorscale


def test_groups_of_positions_have_no_numbers():
    fig = figures()["groups"]
    assert list(fig.layout.xaxis.ticktext) == ["keys", "values"]
    assert fig.data[0].text[0][1] == "layer 0, values"


def test_an_even_share_is_the_middle_of_the_colours():
    fig = figures()["specialization"]
    heat = fig.data[0]
    assert [place for place, _ in heat.colorscale] == [0, 0.5, 1] and (heat.zmin, heat.zmax) == (0, 1)
    assert list(fig.layout.yaxis.ticktext) == ["story", "&lt;copy&gt;"]


def test_use_and_need_has_a_point_for_each_domain_and_expert():
    first, second = figures()["use_and_need"].data
    assert (first.name, second.name) == ("layer 1", "layer 3") and len(first.x) == 8
    place = list(second.text).index("layer 3, expert 1<br>copy")
    assert (second.x[place], second.y[place], first.y[place]) == (0.8, 0.8, -0.8)


def test_looks_end_at_the_query_and_name_the_layers():
    fig = figures()["looks_by_layer"]
    assert np.array(fig.data[0].z).shape == (2, 3)
    assert list(fig.layout.yaxis.ticktext) == ["Mamba 0", "attention 4"]


def test_text_in_a_notebook_can_be_read_on_white_and_on_black(monkeypatch):
    monkeypatch.setattr(plotly.io.templates, "_default", plotly.io.templates.default)
    monkeypatch.setattr(plotly.io.renderers, "_default_name", plotly.io.renderers.default)
    theme.in_notebook()
    color = figures()["estimates"].layout.template.layout.font.color
    levels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]  # WCAG 2.2
    assert 1.05 / (luminance + 0.05) > 4.5 and (luminance + 0.05) / 0.05 > 4.5
