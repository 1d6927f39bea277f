"""The inside of the Overview: logit lens, logit attribution and memory, on every kind of model."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from streamlit.testing.v1 import AppTest

from jambascope import HookedJamba
from jambascope.dashboards import session, widgets
from jambascope.dashboards.results import overview as results
from jambascope.hooks.attribution import direct_logit_attribution, place_of
from jambascope.hooks.logit_lens import logit_lens
from jambascope.memory import kv_cache_bytes_per_token, mamba_state_bytes
from jambascope.studies.figures import anatomy, predictions

HOSTILE = "<script>x</script>"


@pytest.fixture
def saved(any_model, tmp_path, monkeypatch) -> HookedJamba:
    """Each kind of model, saved where the app opens it."""
    yield from opened(any_model, tmp_path, monkeypatch)


@pytest.fixture
def hybrid(model_of_kind, tmp_path, monkeypatch) -> HookedJamba:
    """One that has every kind of layer."""
    yield from opened(model_of_kind("hybrid"), tmp_path, monkeypatch)


def opened(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["app.py", "--model", str(tmp_path)])
    session.start.cache_clear()
    yield model
    session.start.cache_clear()


# -- the page --------------------------------------------------------------------------------------------------


def test_every_kind_of_model_can_be_looked_into(saved, tmp_path):
    lines = [
        "from jambascope.dashboards import session",
        "from jambascope.dashboards.pages import overview",
        f"overview.page(session.view({str(tmp_path)!r}, '5'))",
    ]
    app = AppTest.from_string("\n".join(lines), default_timeout=60)
    for inside in ("memory", "logit lens", "logit attribution"):
        app.session_state["inside"] = inside
        app.run()
        assert not app.exception and not app.error


def test_a_token_is_compared_with_another_one(hybrid, tmp_path):
    lines = [
        "from jambascope.dashboards import session",
        "from jambascope.dashboards.pages import overview",
        f"overview.page(session.view({str(tmp_path)!r}, '5 17 3'))",
    ]
    app = AppTest.from_string("\n".join(lines), default_timeout=60)
    app.session_state["inside"] = "logit attribution"
    app.run()
    app.text_input(key="target").set_value("7")
    app.text_input(key="against").set_value("7").run()
    assert "two different tokens" in app.exception[0].message


def test_the_code_of_the_page_computes_what_it_shows(hybrid, tmp_path):
    view = session.view(str(tmp_path), "5 17 3 9")

    def ran(part: str, tokens=None) -> dict:
        found: dict = {}
        exec(widgets.source(view, results.code(2, 3, part, 0, tokens)), found)
        return found

    seen = results.predict(view, 2, 3)
    found = ran("memory")
    np.testing.assert_allclose(found["surprisal"], seen.surprisal, rtol=1e-6)
    assert found["candidates"] == seen.candidates
    memory = results.memory(view)
    assert (found["weights"], found["kv_cache"][1024]) == (memory.weights, memory.kv(1024))
    assert memory.state in (0, found["state"])
    lens = results.lens(view, 0, results.predict(view, 0, 1).likeliest)
    np.testing.assert_allclose(ran("logit lens")["lens"].target_probabilities[:, 0], lens.probability, rtol=1e-5)
    attributed = results.attribute(view, 2, 4, 9)
    torch.testing.assert_close(ran("logit attribution", (4, 9))["found"].values.float(), attributed.values)


# -- what it shows ---------------------------------------------------------------------------------------------


def test_the_lens_follows_the_next_token_and_its_own_choice_at_the_end(hybrid, tmp_path):
    view = session.view(str(tmp_path), "5 17 3 9")
    lens = results.lens(view, 0, results.predict(view, 0, 1).likeliest)
    own = int(view.model(view.tokens)[0, -1].argmax())
    assert lens.targets == ("17", "3", "9", str(own))
    assert lens.rows[0] == "embedding" and len(set(lens.rows)) == len(lens.rows)
    found = logit_lens(view.model, view.tokens, targets=torch.tensor([[17, 3, 9, own]]), incl_mid=True, top_k=1)
    np.testing.assert_allclose(lens.probability, found.target_probabilities[:, 0], rtol=1e-5)
    assert (lens.rank[-1, -1], lens.kl[-1].max()) == (0, pytest.approx(0, abs=1e-6))


def test_long_prompts_are_seen_through_a_window(hybrid, tmp_path):
    view = session.view(str(tmp_path), " ".join(str(i % 29) for i in range(100)))
    lens = results.lens(view, 15, results.predict(view, 0, 1).likeliest)
    assert lens.probability.shape[1] == results.WINDOW and lens.targets[:2] == ("16", "17")


def test_memory_is_that_of_the_open_model(saved, tmp_path):
    view = session.view(str(tmp_path), "5")
    memory, config = results.memory(view), view.model.config
    assert memory.weights == sum(p.numel() * p.element_size() for p in view.model.parameters())
    assert memory.kv(10) == 10 * kv_cache_bytes_per_token(config, view.model.dtype)
    assert memory.state == (mamba_state_bytes(config, view.model.dtype) if config.ssm_layers else 0)
    mixed = bool(config.attention_layers and config.ssm_layers)
    assert (memory.kv_if_all_attention is not None) == mixed
    if mixed:
        assert memory.kv_if_all_attention * len(config.attention_layers) == memory.kv(1) * config.n_layers


def test_contributions_are_named_by_their_parts(hybrid, tmp_path):
    view = session.view(str(tmp_path), "5 17 3")
    found = results.attribute(view, 2, 4, 9)
    parts = results.contributions(view, found)
    assert len({part.name for part in parts}) == len(parts)
    assert parts[0].name == "embedding"
    assert sum(part.value for part in parts) == pytest.approx(float(found.logits), abs=1e-5)


def test_sums_by_layer_and_embedding_are_the_logit(any_model):
    found = direct_logit_attribution(any_model, torch.randint(0, 29, (2, 5)), 3, 7)
    n = any_model.config.n_layers
    total = found.by_layer(n).sum((0, 1)) + found["embed"]
    torch.testing.assert_close(total, found.values.sum(0))
    kinds = any_model.config.mixers, any_model.config.feed_forwards
    for label in found.labels:
        if label != "embed":
            layer, part = place_of(label)
            assert kinds[part][layer] in {"H": ("attention",), "S": ("moe",)}.get(
                label[2], ("mamba", "mamba2", "dense")
            )


# -- figures ---------------------------------------------------------------------------------------------------


def lens_of(rows: int, width: int, token: str = "a") -> predictions.Lens:
    fields = [np.random.default_rng(0).uniform(size=(rows, width)) for _ in range(5)]
    fields[2] = np.arange(rows * width).reshape(rows, width).astype(float)
    names = tuple(f"Mamba {i}" for i in range(rows))
    return predictions.Lens(names, 5, (token,) * width, ((token,) * width,) * rows, *fields)


def test_tokens_that_look_like_markup_are_text():
    parts = [predictions.Contribution("L4H1", "attention", -0.5), predictions.Contribution("embedding", "embed", 0.1)]
    for length in (12, 80):
        for fig in (
            predictions.logit_lens(lens_of(3, length, HOSTILE), [HOSTILE] * length, "top", 6),
            predictions.contributions(parts * 10, HOSTILE, "b", -4.0, HOSTILE, 3),
        ):
            assert fig.layout.title.text and fig.layout.xaxis.title.text and fig.layout.yaxis.title.text
            assert fig.layout.paper_bgcolor == "rgba(0,0,0,0)"
            assert "<script" not in fig.to_json()


@pytest.mark.parametrize("quantity", ["target", "rank", "top", "entropy", "kl"])
def test_the_lens_shows_its_quantity_and_can_be_clicked(quantity):
    lens = lens_of(3, 4)
    fig = predictions.logit_lens(lens, list("abcd"), quantity, 6, "80 of 200 positions; ")
    field = {"target": "probability", "top": "top_probability"}.get(quantity, quantity)
    wanted = getattr(lens, field)
    shown = 10 ** fig.data[0].z - 1 if quantity == "rank" else fig.data[0].z
    np.testing.assert_allclose(shown, wanted, atol=1e-9)
    targets = fig.data[-1]
    assert sorted(set(targets.customdata)) == [5, 6, 7, 8] and len(targets.x) == 12
    assert fig.layout.shapes[0].x0 == 5.5
    assert fig.layout.title.subtitle.text.startswith("80 of 200")
    written = [text for trace in fig.data[1:] if trace.mode == "text" for text in trace.text]
    assert written == ["a"] * 12


def test_contributions_are_signed_and_sum_to_the_total():
    rng = np.random.default_rng(0)
    parts = [predictions.Contribution(f"{i}", "mamba", float(v)) for i, v in enumerate(rng.normal(size=20))]
    total = sum(part.value for part in parts)
    fig = predictions.contributions(parts, "a", "b", total, "c", 3, top=5)
    assert sum(sum(trace.x) for trace in fig.data) == pytest.approx(total)
    assert fig.layout.yaxis.ticktext[-1] == "15 others"
    low, high = fig.layout.xaxis.range
    assert low == -high


def test_memory_grows_with_the_length_in_attention_alone():
    lengths = (1024, 1 << 18)
    held = {"weights": (10**6, 10**6), "KV cache": (10**5, 10**8), "SSM and convolution state": (0, 0)}
    fig = anatomy.memory_by_length(lengths, held)
    assert [trace.name for trace in fig.data] == ["weights", "KV cache"]
    assert fig.layout.xaxis.ticktext == ("1K", "256K")
    assert anatomy.readable_length(1500) == "1,500"
