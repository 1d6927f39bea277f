"""The Attention and Induction pages: their figures, the code that they show, and models that lack a part."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from jambascope import HookedJamba, JambaConfig
from jambascope.dashboards import session, widgets
from jambascope.dashboards.pages import induction as induction_page
from jambascope.dashboards.results import attention, induction
from jambascope.dashboards.results.attention import Extent
from jambascope.dashboards.results.induction import Drawn
from jambascope.studies.figures import attention as figures
from jambascope.studies.figures import heads, looks, theme

TOKENS = ["<bos>", "the", "<b>plot", "was", "dull"]
RNG = np.random.default_rng(0)
SIZES = dict(d_model=16, d_vocab=20, d_inner=32, d_state=4, d_mlp=8, n_heads=2, n_key_value_heads=1, d_head=8)
CONFIGS = {
    "mamba": JambaConfig(mixers=("mamba",) * 2, feed_forwards=("none",) * 2, **SIZES),
    "mamba2": JambaConfig(mixers=("mamba2", "attention"), feed_forwards=("none", "none"), mamba_d_head=8, **SIZES),
    "attention": JambaConfig(mixers=("attention",) * 2, feed_forwards=("dense",) * 2, **SIZES),
    "one head": JambaConfig(
        mixers=("mamba", "attention"), feed_forwards=("none",) * 2, **SIZES | {"n_heads": 1, "d_vocab": 10}
    ),
}


def always(*told) -> bool:
    return True


def view_of(model: HookedJamba, prompt: str, name: str = "model") -> session.View:
    ids = tuple(model.to_tokens(prompt)[0].tolist())
    checkpoint = session.Checkpoint(f"{name} {id(model)}", 0, None, None)
    return session.View(model, checkpoint, prompt, ids, tuple(map(str, ids)), name, name)


# -- figures ---------------------------------------------------------------------------------------------------


def test_badges_stand_in_the_empty_corner_and_are_numbers_where_there_is_no_room():
    patterns = {2: np.ones((3, 5, 5)), 6: np.ones((3, 5, 5))}
    badges = {layer: [("induction", 0.1 * layer), ("duplicate", 0.25), ("induction", 0)] for layer in patterns}
    notes = {layer: ["first", "second", "third"] for layer in patterns}
    fig = figures.head_grid(patterns, (6, 1), badges, notes)
    targets, shown = fig.data[1], fig.data[2]
    assert shown.text[1] == "duplicate<br><b>0.25</b>" and len(shown.text) == 6 and shown.hoverinfo == "skip"
    assert (shown.x[1], shown.y[1]) == (6 + 4.5, 4.5)  # pitch 6
    at = [list(c) for c in targets.customdata].index([6, 1])
    assert targets.text[at] == "layer 6, head 1<br>second"
    many = figures.head_grid({0: np.ones((32, 5, 5))}, None, {0: [("induction", 0.5)] * 32})
    assert many.data[2].text[0] == "0.50"
    assert len(figures.head_grid(patterns).data) == 2


def test_a_click_finds_the_query_of_a_weight_and_the_key_of_the_empty_half():
    pattern = np.tril(RNG.uniform(0.1, 1, (5, 5)))
    fig = figures.token_pattern(pattern, figures.of_head(4, 1), TOKENS, TOKENS, position=2, clickable=True)
    cells = fig.data[1]
    targets = {(x, y): (c, t) for x, y, c, t in zip(cells.x, cells.y, cells.customdata, cells.text, strict=True)}
    assert targets[1, 3][0] == 3 and f"weight {pattern[3, 1]:.4f}" in targets[1, 3][1]
    assert targets[4, 1] == (4, "follow key   4 dull")
    assert "&lt;b&gt;plot" in targets[2, 2][1] and len(targets) == 25
    assert fig.data[0].hoverinfo == "skip"
    row, column = fig.layout.shapes
    assert (row.x0, row.x1, row.y0, row.y1) == (-0.5, 2.5, 1.5, 2.5)
    assert (column.x0, column.x1, column.y0, column.y1) == (1.5, 2.5, 1.5, 4.5)
    window = figures.token_pattern(np.ones((2, 2)), figures.of_head(0, 0), ["a", "b"], ["c", "d"], 5, 5, 6)
    assert [s.y0 for s in window.layout.shapes] == [5.5, 5.5]


def test_differences_are_centred_on_zero_and_pooled_by_what_is_farthest_from_it():
    difference = np.tril(RNG.normal(size=(5, 5)))
    fig = figures.token_pattern(difference, figures.of_difference(4, 1), TOKENS, TOKENS, limit=0.7)
    assert (fig.data[0].zmin, fig.data[0].zmax) == (-0.7, 0.7) and "sums to 0" in fig.layout.title.subtitle.text
    pooled = figures.pool_signed(np.array([[1.0, -3, 0, 0], [2, 0, 0, 0], [0, 0, 0.5, 0], [0, 1, -0.2, 0.1]]), 2)
    assert pooled.tolist() == [[-3, 0], [1, 0.5]]
    shown = figures.pooled(pooled, figures.of_difference(4, 1), TOKENS[:4])
    assert "farthest from zero over about 2 x 2 tokens" in shown.layout.title.subtitle.text
    assert "in the block" in shown.data[0].colorbar.title.text
    exact = figures.pooled(np.eye(4), figures.of_head(4, 1), TOKENS[:4])
    assert exact.layout.title.subtitle.text.startswith("each row sums to 1")
    marked = figures.mark_targets(exact, [2, 3], [0, 1])
    assert list(marked.data[-1].x) == [0, 1] and list(marked.data[-1].y) == [2, 3]


def test_who_looks_at_a_token_and_what_it_looks_at():
    column = np.array([9.0, 9.0, 0.1, 0.5, 0.2])
    fig = looks.attending_queries(column, TOKENS, 2, top=2, height=330)
    assert list(fig.data[0].x) == [0.5, 0.2] and list(fig.data[0].customdata) == [3, 4]
    assert fig.layout.title.text == "Who looks at “&lt;b&gt;plot” (2)"
    assert fig.layout.title.subtitle.text == f"2 of 3 queries; mean weight of all {0.8 / 3:.3f}"
    row = np.array([0.1, -0.4, 0.3, 9.0, 9.0])
    changed = looks.attention_changes(row[:3], TOKENS, 2)
    assert list(changed.data[0].x) == [-0.4, 0.3, 0.1] and list(changed.data[0].text) == ["-0.400", "+0.300", "+0.100"]
    assert changed.layout.title.subtitle.text == "40.0% of the weight has moved"
    low, high = changed.layout.xaxis.range
    assert low == -high < -0.4
    assert list(changed.data[0].marker.color) == [theme.SELECTED, theme.FIRST, theme.FIRST]


def test_score_maps_can_be_signed_and_clicked():
    scores = np.array([[-0.9, 0.1], [np.nan, 0.8]])
    hover = [["a", "b"], ["c", "d"]]
    fig = heads.score_map("Copying", "", [2, 6], scores, hover, signed=True, clickable=True)
    assert (fig.data[0].zmin, fig.data[0].zmax) == (-1, 1) and fig.data[0].hoverinfo == "skip"
    texts = [text for trace in fig.data[1:3] for text in trace.text]
    assert sorted(texts) == ["-0.90", "0.10", "0.80"]  # none for what has no score
    targets = fig.data[3]
    assert [list(c) for c in targets.customdata] == [[2, 0], [2, 1], [6, 0], [6, 1]] and list(targets.text) == [*"abcd"]


# -- results ---------------------------------------------------------------------------------------------------


def test_badges_are_the_scores_of_the_kind_or_the_highest(built):
    view = view_of(built, "1 5 6 7 5 6 7")
    found = attention.scores(view)
    assert set(found) == {"previous_token", "duplicate_token", "induction"}
    corners, notes = attention.badges(view, None)
    assert [word for word, _ in corners[1]] == [
        attention.KIND_WORDS[max(found, key=lambda kind: found[kind][0][0, head])] for head in range(4)
    ]
    assert corners[1][0][0] == "induction" and corners[1][2][0] == "duplicate" and corners[1][3][0] == "previous token"
    assert "even attention" in notes[1][0]
    assert [n for _, n in attention.badges(view, "induction")[0][1]] == found["induction"][0][0].tolist()
    once = view_of(built, "1 5 6 7")
    assert attention.badges(once, "induction") == ({}, {}) and attention.badges(once, None)[0][1][3][1] > 0.9
    assert attention.badges(view_of(built, "1"), None) == ({}, {})


def test_hidden_attention_in_blocks_and_in_windows_is_that_of_all_queries(built):
    view = view_of(built, " ".join(str(3 + i % 20) for i in range(30)))
    whole = attention.hidden(view, 0, "conv", Extent(False, 0, 0, 30), always)
    np.testing.assert_allclose(whole[1:].sum(1), 1, atol=1e-5)
    window = attention.hidden(view, 0, "conv", Extent(False, 12, 7, 10), always)
    np.testing.assert_allclose(window, whole[12:22, 7:17], atol=1e-6)
    many = view_of(built, " ".join(str(3 + i % 20) for i in range(230)))
    pooled = attention.hidden(many, 0, "alpha", Extent(True, 0, 0, 230), always)
    exact = attention.hidden(many, 0, "alpha", Extent(False, 0, 0, 230), always)
    np.testing.assert_allclose(pooled, figures.pool(exact, figures.LARGE_CELLS), atol=1e-6)
    assert attention.hidden(view, 0, "alpha", Extent(False, 0, 0, 30), lambda *told: False) is None


def test_scores_of_random_tokens_can_be_stopped_and_ranked(built):
    found = induction.on_random_tokens(built, Drawn(4, 8, 0), always)
    assert tuple(found) == induction.ALL
    assert induction.ranked((1,), found["induction"])[0] == (1, 0)
    assert induction.ranked((1,), found["previous token"])[0] == (1, 3)
    rows = induction.rows((1,), induction.ranked((1,), found["induction"]), found, {})
    assert rows[0]["head"] == 0 and rows[0]["induction"] == pytest.approx(found["induction"].values[0, 0])
    own = induction.rows_of((1,), (1, 0), found, {"induction": found["induction"]})
    assert [row["score"] for row in own] == [*induction.ALL] and own[0]["prompt"] == own[0]["random"]
    assert own[3]["interval"] == "" and " to " in own[3]["chance"]  # of weights there is one score
    assert induction.on_random_tokens(built, Drawn(4, 8, 0), lambda *told: False) == {}
    some = induction.on_random_tokens(built, Drawn(4, 8, 0), lambda share, *rest: share < 0.5)
    assert set(some) == set(induction.NAMES.values())


def test_lengths_fit_the_vocabulary_and_the_context(built):
    assert induction.lengths(built) == [10, 20]
    tiny = HookedJamba(JambaConfig(mixers=("attention",), feed_forwards=("none",), **SIZES | {"d_vocab": 9}))
    assert induction.lengths(tiny) == [len(induction.drawable_tokens(tiny))]


# -- the code that is shown --------------------------------------------------------------------------------------


def executed(view: session.View, lines: str, model: HookedJamba) -> dict:
    """What the lines that a page shows leave behind, with this model instead of one that is loaded."""
    source = widgets.source(view, lines)
    found: dict = {}
    loaded = SimpleNamespace(from_pretrained=lambda *arguments, **options: model)
    source = source.replace("from jambascope import HookedJamba\n", "")
    exec(source, {"HookedJamba": loaded}, found)
    return found


def test_the_code_of_the_attention_page_computes_what_it_shows(built):
    view, other = view_of(built, "1 5 6 7 5 6"), view_of(built, "1 5 8 7 5 6")
    found = executed(view, attention.code_of_head(1, 2, 4, tuple(attention.scores(view))), built)
    np.testing.assert_allclose(found["pattern"], attention.pattern(view, 1, 2), atol=1e-6)
    np.testing.assert_allclose(found["badges"]["induction"], attention.scores(view)["induction"][0])
    assert found["looks_at"].shape == (6,)
    found = executed(view, attention.code_of_mixer(0, "gate", 4), built)
    shown = attention.hidden(view, 0, "gate", attention.everything(6), always)
    np.testing.assert_allclose(found["hidden"], shown, atol=1e-6)
    for layer, row in attention.looks(view, 4, "gate").items():
        np.testing.assert_allclose(found["rows"][layer], row, atol=1e-6)
    found = executed(view, attention.code_of_difference(1, 2, other.prompt), built)
    shown = attention.difference(view, other, 1, 2)
    np.testing.assert_allclose(found["difference"], shown.pattern)
    np.testing.assert_allclose(found["variation"][0], shown.variation[1])


def test_the_code_of_the_induction_page_computes_what_it_shows(built):
    view, drawn = view_of(built, "1 5 6 7 5 6"), Drawn(4, 8, 1)
    random, prompt = induction.on_random_tokens(built, drawn, always), induction.on_prompt(view, always)
    lines = induction.code(drawn, 1, 0, tuple(prompt)) + induction.code_of_ablation(drawn, [(1, 0)], "mean", 2)
    found = executed(view, lines, built)
    for kind, name in induction.NAMES.items():
        np.testing.assert_allclose(found["scores"][kind].mean, random[name].values)
        np.testing.assert_allclose(found["on_prompt"][kind].mean, prompt[name].values)
    np.testing.assert_allclose(found["by_weights"], random[induction.OV].values)
    np.testing.assert_allclose(found["by_logits"], random[induction.LOGIT].values)
    np.testing.assert_allclose(found["pattern"], induction.example(view, drawn, 1, 0).pattern, atol=1e-6)
    shown = induction.ablate(built, drawn, ((1, 0),), "mean", 2, always)
    torch.testing.assert_close(found["found"]["loss"].ablated, shown["loss"].ablated)
    assert "p = " in induction_page._sentence("loss", shown["loss"], "nats")


# -- models that lack a part -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("shown", [attention.ONE_HEAD, attention.MAMBA])
def test_the_attention_page_takes_any_model(run_page, kind, shown):
    app = run_page(CONFIGS[kind], "attention", "5 7 3 5 7", attention_view=shown)
    assert not app.exception
    if kind == "mamba":
        assert "no attention layers" in app.info[0].value
    if kind == "attention" and shown == attention.MAMBA:
        assert "no Mamba layers" in app.info[0].value


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("prompt", ["5", "5 7 3 5 7"])
def test_the_induction_page_takes_any_model(run_page, kind, prompt):
    app = run_page(CONFIGS[kind], "induction", prompt)
    assert not app.exception
    if kind == "mamba":
        assert "no attention layers" in app.info[0].value and "SSM state page" in app.info[0].value
        return
    assert [one.value for one in app.subheader] == ["One head", "Does repetition depend on them?"]
    if kind == "one head":
        assert "one head" in app.info[0].value


def test_a_second_prompt_of_another_length_is_told_in_one_line(run_page):
    app = run_page(CONFIGS["mamba2"], "attention", "5 7 3", attention_view=attention.DIFFERENCE, other_prompt="5 7")
    assert "the second prompt has 2 tokens and the first 3" in app.exception[0].message
