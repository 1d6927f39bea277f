"""Figure builders: the data they show, and that every figure has a title, axis names and legible token axes."""

from __future__ import annotations

import numpy as np
import pytest

from jambascope import JambaConfig
from jambascope.studies.figures import anatomy, attention, bench, looks, predictions, routing, ssm, theme

TOKENS = ["<bos>", "the", "plot", "was", "dull"]
RNG = np.random.default_rng(0)
CONFIG = JambaConfig.jamba(
    n_layers=8, d_model=16, d_vocab=20, n_heads=4, n_key_value_heads=2, d_head=4, d_mlp=8, num_experts=16
)


def causal(*shape: int) -> np.ndarray:
    """Random attention patterns."""
    scores = np.tril(RNG.uniform(0.1, 1, shape))
    return scores / scores.sum(-1, keepdims=True)


def figures(tokens: list[str]) -> dict:
    """Every builder on a prompt of these tokens."""
    T, last = len(tokens), len(tokens) - 1
    S = min(T, theme.MAX_NAMED_TOKENS)  # pages show longer prompts in windows of this size
    states, half_lives = RNG.normal(size=(6, T, 3)), RNG.uniform(0.1, 900, (6, 3))
    routes = np.where(RNG.uniform(size=(T, 4)) > 0.5, 0.3, 0.0)
    norms = {0: RNG.uniform(size=T), 2: RNG.uniform(size=T)}
    lines = {"title": "Size", "subtitle": "", "unit": "state RMS", "position": last}
    return {
        "anatomy": anatomy.anatomy(CONFIG, [10] * 8, [20] * 8),
        "expectation": predictions.expectation(tokens, RNG.uniform(size=T - 1), RNG.uniform(size=T), last),
        "head_grid": attention.head_grid({4: attention.pool(causal(4, T, T), attention.GRID_CELLS)}, (4, 1)),
        "head_pattern": attention.head_pattern(causal(S, S), tokens[:S], tokens[:S], 4, 1, position=last),
        "pooled_pattern": attention.pooled_pattern(attention.pool(causal(T, T), 16), tokens, 4, 1),
        "attended_keys": looks.attended_keys(causal(T, T)[last], tokens, last),
        "layer_norms": ssm.layer_norms(norms, tokens, 2, last),
        "group_lines": ssm.group_lines(RNG.uniform(size=(2, T)), [(0.5, 1), (1, np.inf)], tokens, **lines),
        "half_lives": ssm.half_lives(half_lives, np.arange(6), [3]),
        "state_matrices": ssm.state_matrices(states, np.arange(6), tokens, 0),
        "token_routes": routing.token_routes(routes, tokens, 1, last),
        "token_path": routing.token_path({1: routes[last], 3: routes[0]}, tokens[last], last),
        "expert_loads": routing.expert_loads({1: np.full(4, 0.25), 3: np.eye(4)[0]}, 2 * T, 3),
        "certainty": routing.certainty(routes.sum(1), routes.max(1), tokens, 1, last),
    }


@pytest.mark.parametrize("length", [1, 5, 2048], ids=["one token", "short", "long"])
def test_every_figure_is_titled_named_and_transparent(length):
    tokens = [TOKENS[i % 5] for i in range(length)]
    for name, fig in figures(tokens).items():
        layout = fig.layout
        assert layout.title.text, name
        axes = [*fig.select_xaxes(), *fig.select_yaxes()]
        named = [axis.title.text for axis in axes]
        assert any(x.title.text for x in fig.select_xaxes()), name
        assert all(y.title.text for y in fig.select_yaxes()), (name, named)
        assert layout.paper_bgcolor == "rgba(0,0,0,0)", name
        assert layout.plot_bgcolor in ("rgba(0,0,0,0)", theme.BLANK), name
        for trace in fig.data:
            if trace.type == "heatmap":
                bar = trace.colorbar if trace.coloraxis is None else layout.coloraxis.colorbar
                assert bar.title.text, f"{name}: a colour bar needs its quantity"
        for axis in axes:
            assert len(axis.ticktext or ()) <= max(theme.MAX_NAMED_TOKENS, attention.GRID_CELLS), name
        fig.to_json()


def test_labels_show_blanks_and_are_not_markup():
    assert theme.label("<unk>") == "&lt;unk&gt;"
    assert theme.label(" a\n") == "␣a⏎"
    assert theme.label("") == "∅"
    assert theme.label("a" * 40) == "a" * 13 + "…"
    assert theme.label("a&b") == "a&amp;b"


def test_token_axis_names_repeated_tokens_at_each_position():
    axis = theme.token_axis(["a", "b", "a"], start=10)
    assert axis["tickvals"] == [10, 11, 12]
    assert axis["ticktext"] == ["a 10", "b 11", "a 12"]
    assert axis["range"] == [9.5, 12.5]
    assert theme.token_axis(["a"] * 50, room=40)["tickvals"] == list(range(0, 50, 2))
    assert "one in 2 named" in theme.token_axis(["a"] * 50, room=40)["title"]["text"]
    long = theme.token_axis(["a"] * (theme.MAX_NAMED_TOKENS + 1))
    assert "ticktext" not in long and "position" in long["title"]["text"]


def test_integer_axis_thins_out():
    assert theme.integer_axis([1, 3], "layer")["ticktext"] == ["1", "3"]
    assert len(theme.integer_axis(range(72), "layer")["ticktext"]) <= 32


def test_signed_scale_is_centred_and_never_zero():
    assert theme.signed_limit(np.array([-3.0, 1.0]), share=1) == 3.0
    assert theme.signed_limit(np.zeros((2, 2))) == 1.0
    assert theme.signed_limit(np.array([0.0] * 999 + [5.0])) == 5.0
    fig = ssm.state_matrices(RNG.normal(size=(6, 5, 3)), np.arange(6), TOKENS, 2)
    assert fig.layout.coloraxis.cmin == -fig.layout.coloraxis.cmax


def test_ordered_colors_differ():
    assert len(set(theme.ordered_colors(8))) == 8
    assert len(theme.ordered_colors(1)) == 1


def test_anatomy_has_one_box_per_part():
    fig = anatomy.anatomy(CONFIG, list(range(8)), list(range(8)))
    boxes = {trace.name: sorted(trace.x) for trace in fig.data}
    assert boxes["attention"] == [4]
    assert boxes["Mamba"] == [0, 1, 2, 3, 5, 6, 7]
    assert boxes["mixture of experts"] == [1, 3, 5, 7]
    assert boxes["dense SwiGLU"] == [0, 2, 4, 6]
    pure = JambaConfig(d_model=8, d_vocab=9, d_inner=16, mixers=("mamba",) * 2, feed_forwards=("none",) * 2)
    assert [trace.name for trace in anatomy.anatomy(pure, [1, 1], [0, 0]).data] == ["Mamba"]


def test_surprisal_stands_at_the_token_and_entropy_at_the_token_it_predicts():
    fig = predictions.expectation(TOKENS, np.array([1.0, 2, 3, 4]), np.array([10.0, 20, 30, 40, 50]), 4)
    bars, line = fig.data
    assert list(bars.x) == [1, 2, 3, 4] and list(bars.y) == [1, 2, 3, 4]
    assert list(line.y) == [10, 20, 30, 40]
    assert bars.customdata[0] == "1 the"


def test_pool_keeps_short_patterns_and_takes_maxima_of_long_ones():
    pattern = np.arange(16.0).reshape(4, 4)
    assert attention.pool(pattern, 4) is pattern
    assert attention.pool(pattern, 2).tolist() == [[5, 7], [13, 15]]
    assert attention.pool(causal(3, 100, 100), 24).shape == (3, 24, 24)
    assert attention.block_edges(5, 2) == [0, 2, 5]


def test_head_grid_places_tiles_and_click_targets():
    patterns = {2: causal(3, 5, 5), 7: causal(3, 5, 5)}
    fig = attention.head_grid(patterns, (7, 2))
    heat, targets = fig.data
    pitch = 6
    tile = np.array(heat.z)[pitch : pitch + 5, 2 * pitch : 2 * pitch + 5]
    shown = np.where(np.triu(np.ones((5, 5)), 1) > 0, np.nan, patterns[7][2])
    np.testing.assert_allclose(tile[::-1], shown, rtol=1e-6)
    assert {tuple(c) for c in targets.customdata} == {(layer, head) for layer in (2, 7) for head in range(3)}
    assert targets.marker.opacity == 0
    (frame,) = fig.layout.shapes
    assert (frame.x0, frame.y0) == (2 * pitch - 0.5, pitch - 0.5)


def test_head_pattern_hides_the_future_and_names_tokens():
    fig = attention.head_pattern(causal(5, 5), TOKENS, TOKENS, 4, 1, position=3)
    z = np.array(fig.data[0].z)
    assert np.isnan(z[0, 1:]).all() and not np.isnan(np.diag(z)).any()
    assert fig.layout.xaxis.ticktext == fig.layout.yaxis.ticktext
    assert fig.layout.xaxis.ticktext[2] == "plot 2"
    assert fig.data[0].text[3][2] == "query 3 was<br>key   2 plot"
    windowed = attention.head_pattern(np.ones((2, 2)), ["a", "b"], ["c", "d"], 0, 0, query_start=5, key_start=5)
    assert np.isnan(np.array(windowed.data[0].z)).tolist() == [[False, True], [False, False]]


def test_stretched_limit_ignores_queries_with_few_keys():
    pattern = np.zeros((10, 10))
    pattern[0, 0], pattern[9, 3] = 1.0, 0.25
    assert attention.stretched_limit(pattern) == 0.25
    assert attention.stretched_limit(pattern[:3, :3]) == 1.0


def test_attended_keys_are_sorted_and_causal():
    row = np.array([0.2, 0.5, 0.3, 9.0, 9.0])
    fig = looks.attended_keys(row, TOKENS, query=2)
    assert list(fig.data[0].x) == [0.5, 0.3, 0.2]
    assert list(fig.data[0].customdata) == [1, 2, 0]
    assert list(fig.data[0].hovertext) == ["the 1", "plot 2", "&lt;bos&gt; 0"]


def test_half_lives_are_logarithmic_with_plain_ticks():
    values = np.array([[0.1, 1.0], [100.0, np.inf]])
    fig = ssm.half_lives(values, np.array([0, 1]), [1])
    np.testing.assert_allclose(np.array(fig.data[0].z), [[-1, 2], [0, 6]])
    assert "0.1" in fig.data[0].colorbar.ticktext and "100" in fig.data[0].colorbar.ticktext
    assert "∞" in fig.data[0].text[1][1]


def test_wide_layers_show_every_nth_channel():
    assert len(ssm.shown_channels(np.arange(8192))) == 512
    assert ssm.shown_channels(np.arange(5)).tolist() == [0, 1, 2, 3, 4]


def test_state_matrices_show_the_final_state_once():
    states = RNG.normal(size=(6, 5, 3))
    assert len(ssm.state_matrices(states, np.arange(6), TOKENS, 4).data) == 1
    earlier, final = ssm.state_matrices(states, np.arange(6)[::-1], TOKENS, 1).data
    np.testing.assert_allclose(np.array(earlier.z), states[::-1, 1].T)
    np.testing.assert_allclose(np.array(final.z), states[::-1, 4].T)


def test_routes_leave_unchosen_experts_blank():
    weights = np.array([[0.6, 0.0], [0.0, 0.7]])
    fig = routing.token_routes(weights, ["a", "b"], layer=3, position=1)
    z = np.array(fig.data[0].z)
    assert z[0, 0] == 0.6 and z[1, 1] == 0.7 and np.isnan(z[0, 1]) and np.isnan(z[1, 0])
    assert "layer 3" in fig.layout.title.text
    assert fig.data[0].zmax == 1
    assert routing.token_routes(weights, ["a", "b"], layer=3, stretched=True).data[0].zmax == 0.7


def test_loads_are_percentages_with_counts():
    fig = routing.expert_loads({1: np.array([0.75, 0.25])}, choices=8, layer=1)
    assert np.array(fig.data[0].z).tolist() == [[75, 25]]
    assert "6 of 8 choices" in fig.data[0].text[0][0]
    assert "50 %" in fig.layout.title.subtitle.text


RACE = [
    bench.Point(side, width, length, 2.0 * length, 1.5 * length, 4.0 * length)
    for side in ("jambascope", "peer", "products")
    for width in (128, 512)
    for length in (512, 64)
]


def test_costs_against_length_stand_on_logarithmic_axes_with_whiskers():
    fig = bench.cost_against_length("Forward", "batch 4", RACE, bounds=["products"])
    assert fig.layout.title.text == "Forward" and fig.layout.yaxis.title.text == "time (ms)"
    assert {axis.type for axis in [*fig.select_xaxes(), *fig.select_yaxes()]} == {"log"}
    assert [t.name for t in fig.data if t.showlegend] == ["jambascope", "peer", "products"]
    first = fig.data[0]
    assert first.x == (64, 512) and first.y == (128, 1024)
    assert first.error_y.array == (128, 1024) and first.error_y.arrayminus == (32, 256)
    looks = {t.name: (t.line.color, t.line.dash) for t in fig.data}
    assert looks["products"] == (theme.GUIDE, "dash") and looks["jambascope"] == (theme.FIRST, "solid")
    assert len(set(looks.values())) == 3
    from_zero = bench.cost_against_length("Tokens", "", RACE, "us", log_cost=False)
    assert from_zero.layout.yaxis.type is None and from_zero.layout.yaxis.rangemode == "tozero"


def test_costs_without_length_are_bars():
    fig = bench.costs("Loading", "", [p._replace(length=0) for p in RACE if p.length == 64], "GB")
    assert [bar.name for bar in fig.data] == ["jambascope", "peer", "products"]
    assert fig.data[0].y == ("d_model 128", "d_model 512") and fig.data[0].x == (128, 128)
    assert fig.layout.xaxis.title.text == "GB" and fig.layout.paper_bgcolor == "rgba(0,0,0,0)"


@pytest.mark.parametrize("factor", [1.0, 1.02, 1.3, 3.0, 9.9, 12.0, 150.0, 999.0, 1001.0])
@pytest.mark.parametrize("least", [0.0137, 1.0, 740.0])
def test_a_time_axis_has_at_least_three_numbers(least, factor):
    points = [bench.Point("jambascope", 128, t, v, v, v) for t, v in ((64, least), (128, least * factor))]
    axis = bench.cost_against_length("Forward", "", points).layout.yaxis
    if axis.tickvals:
        assert len(axis.tickvals) == len(set(axis.ticktext)) >= 3
        low, high = (10**end for end in axis.range)
        assert low < least and least * factor < high
        assert all(
            low <= t <= high and float(text) == pytest.approx(t)
            for t, text in zip(axis.tickvals, axis.ticktext, strict=True)
        )
    else:
        per_decade = {"D2": (1, 2, 5), 1: (1,)}[axis.dtick]
        numbers = [d * 10.0**k for k in range(-5, 9) for d in per_decade]
        assert sum(least <= n <= least * factor for n in numbers) >= 3
