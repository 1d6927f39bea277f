"""Figures of the studies: what is put in is what is drawn, ticks can be read, and nothing is lost at zero."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jambascope.studies.figures.course import courses, log_ticks
from jambascope.studies.figures.points import Dot, dots
from jambascope.studies.figures.routing import domain_shares
from jambascope.studies.figures.zoo import Point


@pytest.mark.parametrize("low, high", [(1, 2), (3, 4.2), (100, 3200), (0.03, 7), (1, 1e10), (2e-5, 3e5)])
def test_ticks_are_few_and_inside(low, high):
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 5 and ticks == sorted(ticks)
    assert low * 0.99 <= ticks[0] and ticks[-1] <= high * 1.01


def test_dots_stand_in_their_rows_with_their_intervals():
    points = [Dot("a", "x", 1.0, 0.5, 2.0), Dot("b", "x", 3.0, -math.inf, math.inf), Dot("a", "y", 2.0, 1.5, 2.5)]
    fig = dots("title", "", [("one", points), ("two", points[:1])], "nats", log=True)
    first = next(t for t in fig.data if t.name == "x" and t.xaxis == "x")
    assert (
        list(first.x) == [1.0, 3.0]
        and list(first.error_x.array) == [1.0, 0]
        and list(first.error_x.arrayminus)[0] == 0.5
    )
    assert [round(y) for y in first.y] == [0, 1]
    assert list(fig.layout.yaxis.ticktext) == ["a", "b"] and fig.layout.xaxis.type == fig.layout.xaxis2.type == "log"


def test_a_course_keeps_the_untrained_model_at_its_left_end():
    points = [Point("m", None, x, y, y - 0.1, y + 0.1) for x, y in ((400, 0.9), (0, 0.1), (100, 0.5))]
    fig = courses("title", "", [("score", points)], "share", unit_range=True)
    line = next(t for t in fig.data if t.mode == "lines+markers")
    assert list(line.x) == [50, 100, 400] and list(line.y) == [0.1, 0.5, 0.9]
    assert fig.layout.xaxis.ticktext[0] == "0" and fig.layout.xaxis.tickvals[0] == 50
    assert fig.layout.xaxis.range[0] < math.log10(50)


def test_domains_have_a_panel_for_each_layer():
    shares = {layer: np.full((3, 4), 0.25 * (layer + 1)) for layer in range(2)}
    fig = domain_shares("title", shares, ["a", "b", "<c>"], 0.5)
    assert [t.z.max() for t in fig.data] == [25, 50] and list(fig.data[0].y) == ["a", "b", "&lt;c&gt;"]
    assert [a.text for a in fig.layout.annotations] == ["layer 0", "layer 1"]
