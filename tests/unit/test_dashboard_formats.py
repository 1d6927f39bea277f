"""Format following: episodes by hand, evaluations of many, figures, and models that lack a part."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from streamlit.testing.v1 import AppTest

from jambascope import HookedJamba, JambaConfig
from jambascope.dashboards import models, session
from jambascope.dashboards.results import formats as results
from jambascope.errors import InputError
from jambascope.hooks.hidden_attention import attention_map
from jambascope.hooks.labels import label_attention
from jambascope.hooks.looks import looks
from jambascope.hooks.mixer_terms import capture_terms
from jambascope.studies import format_evaluation as evaluation
from jambascope.studies.episodes import by_hand, few_shot
from jambascope.studies.figures import labels
from jambascope.studies.figures.zoo import lines
from jambascope.studies.zoo.measures import CALIBRATION
from jambascope.studies.zoo.tasks import draw
from jambascope.zoo import scoring
from jambascope.zoo.reviews import review
from jambascope.zoo.words import VOCABULARY

SIZES = dict(
    d_model=16, d_vocab=len(VOCABULARY), d_inner=32, d_state=4, d_mlp=8, n_heads=2, n_key_value_heads=1, d_head=8,
    bos_token_id=1, eos_token_ids=(2,), pad_token_id=0,
)  # fmt: skip
HYBRID = JambaConfig(mixers=("mamba", "attention"), feed_forwards=("dense", "none"), **SIZES)
PURE = JambaConfig(mixers=("mamba",) * 2, feed_forwards=("none",) * 2, **SIZES)
HOSTILE = "<script>x</script>"


@pytest.fixture(scope="module")
def tokenizer():
    return HookedJamba.from_pretrained("jamba-micro").tokenizer


@pytest.fixture
def small(tokenizer):
    """``small(config)``: a random model with the packaged vocabulary."""

    def make(config: JambaConfig, seed: int = 0) -> HookedJamba:
        torch.manual_seed(seed)
        model = HookedJamba(config)
        model.tokenizer = tokenizer
        return model.eval()

    return make


def episode(shots: int = 5, seed: int = 0):
    return review(np.random.default_rng(seed), "held_out", shots + 1, 2, "unseen", 0)


# -- episodes --------------------------------------------------------------------------------------------------


def test_an_episode_typed_by_hand_is_the_one_that_was_drawn():
    drawn = episode()
    typed = by_hand(" ".join(drawn.words[:-1]), drawn.labels, drawn.words[-1])
    assert typed == drawn


@pytest.mark.parametrize(
    ("text", "given", "answer", "message"),
    [
        ("the flumph was dull :", ("Good",), "Good", "'flumph' is not a word"),
        ("the plot :", ("Good", "Bad"), "Up", "answer='Up' must be one of"),
        (" ", ("Good",), "Good", "at least one word"),
    ],
)
def test_what_is_no_episode_says_why(text, given, answer, message):
    with pytest.raises(InputError, match=message):
        by_hand(text, given, answer)


def test_a_few_shot_prompt_ends_where_the_label_is_wanted():
    drawn = episode()
    prompt = few_shot(drawn, 3)
    words = list(VOCABULARY)
    assert [words[i] for i in prompt.tokens] == ["<bos>", *drawn.words[: drawn.label_positions[3]]]
    assert [words[prompt.tokens[i]] for i in prompt.label_positions] == [
        drawn.words[i] for i in drawn.label_positions[:3]
    ]
    assert words[prompt.tokens[prompt.query_position]] == ":"
    assert words[prompt.answer_id] == drawn.words[drawn.label_positions[3]]
    for shots in (0, 6):
        with pytest.raises(InputError, match="must lie in 1..5"):
            few_shot(drawn, shots)


def test_more_shots_of_a_seed_go_on_where_fewer_end():
    short, long = (results.Asked("unseen", 2, shots, 0, 3).draw() for shots in (4, 8))
    assert long.words[: len(short.words)] == short.words
    with pytest.raises(InputError, match="take at most 4,096"):
        results.Asked("arbitrary", 2, 64, 32, 0).draw()


# -- looks -----------------------------------------------------------------------------------------------------


def test_looks_are_rows_of_patterns_and_of_hidden_attention(small):
    model, tokens = small(HYBRID), torch.randint(4, 90, (1, 9))
    found = looks(model, tokens, 6)
    _, cache = model.run_with_cache(tokens, names_filter="blocks.1.attn.hook_pattern")
    torch.testing.assert_close(found[1], cache["pattern", 1][0, :, 6, :7])
    hidden = attention_map(capture_terms(model, tokens)[0], [6])[0]
    torch.testing.assert_close(found[0], hidden[:, :7])
    torch.testing.assert_close(found[0].sum(-1), torch.ones(1))
    with pytest.raises(InputError, match="must be a position"):
        looks(model, tokens, 9)
    drawn = few_shot(episode(), 5)
    rows = looks(model, torch.tensor([drawn.tokens]), drawn.query_position)
    attention = label_attention(model, [drawn]).mean[0]
    torch.testing.assert_close(rows[1][:, list(drawn.label_positions)].sum(-1).double(), attention, rtol=1e-5, atol=0)


# -- the evaluation --------------------------------------------------------------------------------------------


def test_evaluations_are_means_of_the_scores_with_intervals(small):
    model, seen = small(HYBRID), []
    options = dict(episodes=6, classes=2, shots=2, filler=0, seed=1)
    rows = evaluation.evaluate(
        [("a", lambda: model), ("b", lambda: small(PURE))], ["unseen", "shuffled"], **options,
        report=lambda share, text, value: seen.append((share, text)) or True,
    )  # fmt: skip
    assert seen[0] == (0, "a, unseen labels") and seen[-1] == (1, "b, shuffled labels")
    scores = scoring.label_scores(model, draw(evaluation.task_of("unseen", 2, 2, 0), 6, 1))
    own = {(r.measure, r.shots): r for r in rows if r.model == "a" and r.kind == "unseen"}
    for name, field in (("label mass", "mass"), ("format gap", "format_gap"), ("accuracy free", "acc_free")):
        values = getattr(scores, field)[:, 2]
        assert own[name, 2].mean == pytest.approx(float(values.nanmean()), abs=1e-6)
        assert own[name, 2].n == int((~values.isnan()).sum())
        assert own[name, 2].low <= own[name, 2].mean <= own[name, 2].high
    assert ("accuracy free", 0) not in own  # no label was shown
    assert own[CALIBRATION, None].n == 6
    panels = evaluation.panels(rows, 2)
    fig = lines("t", "s", panels, "shots")
    chance = [trace for trace in fig.data if trace.name == "chance"]
    assert {y for trace in chance for y in trace.y} == {0.5}
    assert [name for name, _ in panels] == list(evaluation.MEASURES)


def test_an_evaluation_that_is_stopped_keeps_what_it_has(small):
    rows = evaluation.evaluate(
        [("a", lambda: small(PURE))], ["unseen"], episodes=12, shots=1, report=lambda share, text, value: share < 0.3
    )
    assert {row.n for row in rows if row.measure == "label mass"} == {4}


def test_pairs_are_of_two_classes():
    assert set(evaluation.kinds_of(4)) == {"arbitrary", "unseen", "shuffled"}
    assert evaluation.kinds_of(2) == evaluation.KINDS


# -- figures ---------------------------------------------------------------------------------------------------


def figures(token: str = HOSTILE, length: int = 12) -> dict[str, go.Figure]:
    share = labels.Share(token, 0.4, labels.RIGHT)
    rest = labels.Share("9 other words", 0.6, labels.REST)
    look = labels.Look(HOSTILE, "attention", 4, 2, np.full(length, 1 / length), 0.2, 3.0)
    mass = {HOSTILE: np.array([0.0, 0.5]), "b": np.array([0.1, 0.9])}
    outcomes = {HOSTILE: [labels.UNSHOWN, labels.SAID], "b": [labels.UNSHOWN, labels.LOST]}
    return {
        "next_mass": labels.next_mass({HOSTILE: [share, rest]}, 2),
        "by_shots": labels.by_shots(mass, outcomes, 1),
        "label_rows": labels.label_rows([look, look._replace(kind="mamba", head=None)], [token] * length, [2, 5]),
    }


@pytest.mark.parametrize("length", [12, 200])
def test_every_figure_is_titled_named_and_shows_markup_as_text(length):
    for name, fig in figures(length=length).items():
        assert fig.layout.title.text and fig.layout.paper_bgcolor == "rgba(0,0,0,0)", name
        assert all(y.title.text for y in fig.select_yaxes()), name
        assert any(x.title.text for x in fig.select_xaxes()), name
        assert "<script" not in fig.to_json(), name
        for trace in fig.data:
            assert trace.type != "heatmap" or trace.colorbar.title.text, name


def test_bars_of_mass_stand_end_to_end():
    shares = [labels.Share("a", 0.5, labels.RIGHT), labels.Share("b", 0.2, labels.OTHER)]
    fig = labels.next_mass({"m": [*shares, labels.Share("rest", 0.3, labels.REST)]}, 0)
    bars = {trace.name: (trace.base, trace.x) for trace in fig.data}
    assert bars[labels.OTHER] == ((0.5,), (0.2,))
    assert bars[labels.REST] == ((0.7,), (0.3,))
    assert "before any label" in fig.layout.title.text


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [
        ((1, 1, 1), labels.SAID),
        ((0, 0, 1), labels.SWALLOWED),
        ((1, 0, 0), labels.WRONG),
        ((0, 0, 0), labels.LOST),
        ((0, math.nan, math.nan), labels.UNSHOWN),
    ],
)
def test_outcomes(scores, wanted):
    assert labels.outcome(*scores) == wanted


def test_of_long_prompts_the_labels_are_named():
    fig = figures("tok", 200)["label_rows"]
    assert fig.layout.xaxis.ticktext == ("tok 2", "tok 5", "tok 199")
    assert fig.layout.yaxis.ticktext[1].endswith("Mamba 4: 0.20")


# -- pages -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run_formats(tmp_path, monkeypatch, small):
    """``run_formats(configs)``: the page of the app, started on the first of random models that it offers."""

    def run(configs: dict[str, JambaConfig | None], **state) -> AppTest:
        for name, config in configs.items():
            model = small(config or dataclasses.replace(PURE, d_vocab=20))
            model.tokenizer = model.tokenizer if config else None
            model.save_pretrained(tmp_path / name)
            models.remember(str(tmp_path / name))
        start = str(tmp_path / next(iter(configs)))
        monkeypatch.setattr(sys, "argv", ["app.py", "--model", start])
        monkeypatch.setattr(models, "packaged_models", lambda: {})
        session.start.cache_clear()
        text = "from jambascope.dashboards.pages import formats\nformats.page()"
        app = AppTest.from_string(text, default_timeout=60)
        for key, value in state.items():
            app.session_state[key] = value(tmp_path) if callable(value) else value
        return app.run()

    monkeypatch.setenv("JAMBASCOPE_HOME", str(tmp_path / "home"))
    yield run
    session.start.cache_clear()


def test_only_models_of_the_vocabulary_are_offered(run_formats, tmp_path):
    app = run_formats({"other": None, "hybrid": HYBRID, "pure": PURE})
    assert not app.exception and not app.error
    assert {Path(name).name for name in app.multiselect(key="format_models").options} == {"hybrid", "pure"}


def test_models_stand_side_by_side_and_heads_have_links(run_formats):
    both = {"format_models": lambda folder: [str(folder / "hybrid"), str(folder / "pure")]}
    app = run_formats({"hybrid": HYBRID, "pure": PURE}, **both)
    assert not app.exception and not app.error
    written = [m.value for m in app.markdown]
    assert any("**hybrid**" in text and "attention_layer=1&head=" in text for text in written)
    assert any("**pure**: no attention heads" in text for text in written)
    app.slider(key="after_shots").set_value(0).run()
    assert not app.exception
    assert any("no label to look at" in box.value for box in app.info)


def test_without_models_or_with_unknown_words_the_page_says_so(run_formats):
    app = run_formats({"other": None})
    assert not app.exception
    assert "Choose one model" in app.info[0].value


def test_names_of_models_are_short_unless_two_are_the_same():
    assert results.titles(["jamba-micro", "/a/b"]) == {"jamba-micro": "jamba-micro", "/a/b": "b"}
    assert results.titles(["/x/b", "/a/b"]) == {"/x/b": "/x/b", "/a/b": "/a/b"}


@pytest.mark.parametrize("by_hand_too", [False, True])
def test_the_code_of_the_page_computes_what_it_shows(small, tmp_path, monkeypatch, by_hand_too):
    monkeypatch.setattr(sys, "argv", ["app.py"])
    session.start.cache_clear()
    model = small(HYBRID)
    model.save_pretrained(tmp_path)
    name, drawn = str(tmp_path), results.Asked("unseen", 2, 4, 0, 1).draw()
    typed = (" ".join(drawn.words[:-1]), drawn.labels, drawn.words[-1])
    found: dict = {}
    exec(results.code([name], typed if by_hand_too else results.Asked("unseen", 2, 4, 0, 1), 3), found)
    reading = results.read(session.checkpoint_of(name), drawn)
    torch.testing.assert_close(found["scores"][name].mass, reading.scores.mass)
    shown = results.label_looks(session.checkpoint_of(name), "m", drawn, 3)
    assert [row["head"] for row in found["heads"][name]] == [look.head for look in shown if look.head is not None]
    np.testing.assert_allclose(found["rows"][name][1][shown[0].head], shown[0].row, atol=1e-6)
    batch: dict = {}
    options = dict(episodes=4, classes=2, shots=1, filler=0, seed=0)
    exec(results.batch_code([name], ["unseen"], options), batch)
    assert batch["rows"] == evaluation.evaluate([(name, lambda: model)], ["unseen"], **options)
    session.start.cache_clear()
