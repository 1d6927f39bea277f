"""The table behind a figure: every number that is drawn, under the names of its axes."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.subplots import make_subplots

from jambascope.studies.figures.attention import head_pattern
from jambascope.studies.figures.data import table_of
from jambascope.studies.figures.looks import attended_keys
from jambascope.studies.figures.patching import effect_map
from jambascope.studies.figures.predictions import expectation
from jambascope.studies.figures.theme import click_targets

TOKENS = ["the", "<unk>", "a & b"]


def test_a_pattern_is_a_row_for_each_cell_that_is_drawn():
    pattern = np.tril(np.arange(1.0, 10.0).reshape(3, 3))
    found = table_of(head_pattern(pattern, TOKENS, TOKENS, layer=4, head=1))
    value = next(column for column in found if "attention weight" in column)
    assert len(found) == 6, "the future is left blank"
    assert sorted(found[value]) == sorted(pattern[np.tril_indices(3)])
    assert {"<unk> 1", "a␣&␣b 2"} <= set(found["x name"])


def test_an_effect_map_keeps_layers_and_positions():
    effects = np.array([[0.0, 0.5], [np.nan, -1.0]])
    found = table_of(effect_map("title", "", effects, layers=[2, 6], positions=["a", "b"]))
    assert found["effect (1: all of the difference)"].tolist() == [0.0, 0.5, -1.0]
    assert found["layer (index)"].tolist() == [0, 0, 1] and found["y name"].tolist() == ["2", "2", "6"]


def test_bars_and_lines_have_their_names():
    found = table_of(attended_keys(np.array([0.2, 0.3, 0.5]), TOKENS, query=2))
    assert found.select_dtypes("object").astype(str).stack().str.contains("<unk>").any()
    lines = table_of(expectation(TOKENS, np.array([1.0, 2.0]), np.array([0.5, 0.6, 0.7]), position=1))
    assert set(lines["series"]) == {"surprisal of the token", "entropy of the prediction"}
    assert sorted(lines.filter(like="nats").to_numpy().ravel()) == [0.5, 0.6, 1.0, 2.0]


def test_whiskers_panels_and_targets():
    fig = make_subplots(1, 2, subplot_titles=("left <b>one</b>", "right"))
    fig.add_trace(go.Bar(x=["a"], y=[1.0], error_y={"array": [0.2], "arrayminus": [0.1]}, name="m"), 1, 1)
    fig.add_trace(go.Scatter(x=[0.0], y=[2.0], text=["hover<br>text"], name="n"), 1, 2)
    fig.add_trace(click_targets([0], [0], [0], ["no number"], size=9), 1, 2)
    found = table_of(fig)
    assert found["panel"].tolist() == ["left one", "right"] and found["series"].tolist() == ["m", "n"]
    assert found["y above"].tolist()[0] == 0.2 and found["y below"].tolist()[0] == 0.1
    assert found["text"].tolist()[1] == "hover; text"


@pytest.mark.parametrize("fig", [go.Figure(), go.Figure(go.Scatter())])
def test_a_figure_without_numbers_has_none(fig):
    assert table_of(fig).empty
