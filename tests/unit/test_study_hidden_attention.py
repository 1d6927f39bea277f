"""The study of hidden attention: its truth is a true knock-out, and what must predict it does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jambascope import HookedJamba
from jambascope.config import JambaConfig
from jambascope.errors import ConfigError, InputError
from jambascope.hooks.hidden_attention import hidden_attention, inputs
from jambascope.hooks.mixer_terms import capture_terms
from jambascope.hooks.sweep import kl_divergence, knock_out_sweep, logit_difference
from jambascope.model import initialize
from jambascope.studies import hidden_attention as study_module
from jambascope.studies import hidden_attention_report as report
from jambascope.studies.rank_correlation import partial_spearman, spearman
from jambascope.studies.runner import run as running
from jambascope.studies.runner.directory import table_of
from jambascope.studies.runner.spec import make_spec
from jambascope.studies.runner.summary import one, summarize


def spec_of(**values) -> study_module.HiddenAttentionSpec:
    return make_spec("hidden_attention", study_module.HiddenAttentionSpec, values)


def rows_of(spec, model, name="tiny"):
    (cell,) = study_module.study.cells(spec)
    return table_of("hidden_attention", cell, name, study_module.measure(spec, cell, model)).to_pandas()


@pytest.fixture(scope="module")
def one_layer() -> HookedJamba:
    """A Mamba layer and nothing after it but the last norm: what an edge adds to the stream is all that it does."""
    torch.manual_seed(3)
    model = HookedJamba(
        JambaConfig(
            mixers=("mamba",), feed_forwards=("none",), d_model=16, d_vocab=60, d_inner=32, d_state=4, dt_rank=2,
            n_heads=2, n_key_value_heads=1, d_head=8, n_ctx=64, bos_token_id=1,
        )
    )  # fmt: skip
    initialize(model, std=0.4)
    torch.nn.init.orthogonal_(model.unembed.weight.data)
    return model.eval()


@pytest.fixture(scope="module")
def one_layer_rows(one_layer):
    spec = spec_of(prompts=8, text="repeated", length=30, queries=8, keys=6)
    return spec, rows_of(spec, one_layer)


# -- the truth -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hybrid", "mamba2"])
@pytest.mark.parametrize("form", ["alpha", "conv"])
def test_a_knock_out_is_a_run_without_the_edge(model_of_kind, kind, form, tokens):
    model, tokens, edges = model_of_kind(kind), tokens % 29, [(6, 2), (6, 6), (9, 0)]
    layer = model.config.ssm_layers[-1]
    found = knock_out_sweep(
        model, tokens, logit_difference(3, 4), edges, layers=[layer], form=form, progress=False
    )  # fmt: skip
    terms = capture_terms(model, tokens, [layer])[layer]
    for i, (query, key) in enumerate(edges):
        weights = hidden_attention(terms, [query], form).weights[:, :, 0, key]
        gone = weights * inputs(terms, form)[:, key]

        def without(y, hook, query=query, gone=gone):
            y = y.clone()
            y[:, query] -= gone
            return y

        with torch.no_grad(), model.hooks([(f"blocks.{layer}.mixer.hook_y", without)]):
            logits = model(tokens)[:, -1]
        expected = (logits[:, 3] - logits[:, 4]).numpy()
        np.testing.assert_allclose(found.values["mamba"].values[0, :, layer, i], expected, atol=1e-9)


def test_an_unknown_form_is_refused(model_of_kind, tokens):
    with pytest.raises(InputError, match="form='gate' must be 'alpha'"):
        knock_out_sweep(model_of_kind("hybrid"), tokens % 29, kl_divergence(), form="gate")


def test_everything_out_by_input_leaves_no_more_than_bias_and_state(model_of_kind, tokens):
    """Conv edges of one query together are its whole read-out, but for what comes from the convolution's bias."""
    model, tokens = model_of_kind("hybrid"), tokens % 29
    terms = capture_terms(model, tokens, [0])[0]
    rows = hidden_attention(terms, [8], "conv")
    whole = rows.apply(inputs(terms, "conv"))
    gone = (rows.weights[:, :, 0] * inputs(terms, "conv").transpose(1, 2)).sum(-1)
    torch.testing.assert_close(whole[:, 0] - gone, (rows.bias + rows.state + rows.past)[..., 0])


# -- the study -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [report.WRITE, report.INPUT])
def test_where_an_edge_adds_to_the_stream_alone_its_norm_predicts_the_knock_out(one_layer_rows, of):
    _, rows = one_layer_rows
    summary = summarize(rows[rows.of == of], report.HEADLINE, ("form",))
    norm = one(summary, measure=report.RHO, form=report.OWN[of])
    others = summary[(summary.measure == report.RHO) & (summary.form != report.OWN[of])]
    assert norm.n == 8 and norm["mean"] > max(0.85, others["mean"].max())
    assert one(summary, measure=report.RHO, form=report.DISTANCE)["mean"] < norm.low
    shuffled = one(summary, measure=report.SHUFFLED, form=report.OWN[of])
    assert shuffled.high < 0.6 * norm["mean"]


def test_shuffled_keys_leave_nothing_within_queries():
    spec = spec_of(prompts=16, text="repeated", length=30, queries=10, keys=8)
    edges = study_module.draw_edges(spec, 0)
    rng = np.random.default_rng(0)
    real, values = rng.random((16, len(edges))), rng.random((16, len(edges)))
    assert abs(study_module._within(values, real, spec.keys).mean()) < 0.1
    np.testing.assert_allclose(study_module._within(real, real, spec.keys), 1)


def test_edges_are_earlier_keys_in_even_numbers():
    spec = spec_of(length=40, queries=12, keys=8)
    edges = study_module.draw_edges(spec, 3)
    assert len(edges) == len(set(edges)) == 96 and edges == study_module.draw_edges(spec, 3)
    assert all(0 <= key < query < 40 for query, key in edges)
    assert all(len({q for q, _ in edges[i : i + 8]}) == 1 for i in range(0, 96, 8))


def test_the_best_form_is_found_on_one_half_and_compared_on_the_other(one_layer_rows):
    spec, rows = one_layer_rows
    for of in report.OWN:
        finding, held_out = report._halves(rows, of)
        assert len(finding) == len(held_out) == 4
        best = report._best(rows, of)
        assert best in report.CANDIDATES
        against = report._against(rows, of)
        assert best not in set(against.form) and (against.n == 4).all() and (against["p"] > 0.1).all()
    text = report.reading(spec, rows)
    assert text.count("predicts best on the finding half") == 2 and "Yardsticks" in text
    nothing = rows.assign(value=rows["value"].where(rows.measure == report.SIZE, 0.0))
    assert report.reading(spec, nothing).count("none of them predicts what a knock-out does") == 2


def test_a_run_on_jamba_micro(tmp_path):
    spec = spec_of(prompts=4, length=16, queries=4, keys=4)
    run = running.run("hidden_attention", spec, tmp_path)
    _, study, spec, rows = running.read(run.path)
    summary = summarize(rows[rows.of == report.WRITE], study.headline, ("form",))
    assert one(summary, measure=report.RHO, form="alpha").low > 0.4
    assert one(summary, measure=report.RHO, form=report.PATTERN).low > 0.8
    sizes = rows[rows.measure == report.SIZE]
    assert set(sizes[sizes.of == report.WRITE].layer) == set(range(8)) and (sizes["value"] >= 0).all()
    page = (run.path / "report.html").read_text()
    assert page.count("plotly-graph-div") >= 3 and "The best form less each other" in page


@pytest.mark.parametrize(
    "kind, values, error, message",
    [
        ("attention", {}, ConfigError, "it has no Mamba layers"),
        ("hybrid", {"length": 100}, ConfigError, "length=100 exceeds its context of 64"),
        ("hybrid", {"length": 12}, ConfigError, "queries=12 with keys=8 cannot be drawn from length=12"),
        ("hybrid", {}, InputError, "no tokenizer"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(model_of_kind, tmp_path, kind, values, error, message):
    with pytest.raises(error, match=message):
        study_module.check(spec_of(**values), model_of_kind(kind).config, tmp_path)


# -- rank correlation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "a, b, expected",
    [
        ([1, 2, 3], [10, 20, 90], 1),
        ([1, 2, 3], [3, 2, 1], -1),
        ([1, 1, 2], [1, 2, 3], 0.75**0.5),
        ([1, 1, 1], [1, 2, 3], np.nan),
    ],
    ids=["rising", "falling", "ties", "constant"],
)
def test_spearman(a, b, expected):
    np.testing.assert_allclose(spearman(np.array([a], float), np.array([b], float)), [expected])


def test_partial_spearman_takes_out_what_both_share():
    rng = np.random.default_rng(0)
    shared, a, b = rng.normal(size=(3, 40, 300))
    mixed = spearman(shared + 0.3 * a, shared + 0.3 * b)
    assert mixed.mean() > 0.8
    assert abs(partial_spearman(shared + 0.3 * a, shared + 0.3 * b, shared).mean()) < 0.05
    np.testing.assert_allclose(partial_spearman(a, b, shared).mean(), spearman(a, b).mean(), atol=0.02)
    assert np.isnan(partial_spearman(a, b, a)).all()
