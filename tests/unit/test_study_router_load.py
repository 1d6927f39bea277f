"""Router load finds what was planted in a router, sees nothing where nothing is, and refuses what has no routers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from jambascope import HookedJamba
from jambascope.errors import ConfigError, InputError
from jambascope.studies import corpus, expert_ablation, router_load, router_reading
from jambascope.studies.runner import run as running
from jambascope.studies.runner.directory import table_of
from jambascope.studies.runner.spec import make_spec
from jambascope.studies.runner.summary import summarize
from jambascope.zoo.language import DOMAINS


@pytest.fixture(scope="module")
def micro() -> HookedJamba:
    return HookedJamba.from_pretrained("jamba-micro", dtype="float32")


def spec_of(**values) -> router_load.RouterSpec:
    small = {"prompts": 2, "length": 48, "draws": 2, "shuffles": 3, "trainings": 0}
    return make_spec("router_load", router_load.RouterSpec, small | values)


def rows_of(spec, model):
    (cell,) = router_load.cells(spec)
    return table_of("router_load", cell, "built", router_load.measure(spec, cell, model)).to_pandas()


# -- on jamba-micro ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(micro):
    spec = spec_of()
    return spec, rows_of(spec, micro)


def test_rows_have_n_and_intervals_and_the_parts_agree(asked, micro):
    spec, rows = asked
    summary = summarize(rows, router_load.study.headline, router_load.BY)
    changes = summary[summary.measure == router_load.CHANGE]
    assert set(changes.n) == {8} and (changes.low < changes["mean"]).all() and (changes.high > changes["mean"]).all()
    assert sorted(set(changes.layer)) == list(micro.config.moe_layers)
    means = {(line.layer, line.condition): line["mean"] for _, line in changes.iterrows()}
    for layer in micro.config.moe_layers:
        for form in expert_ablation.FORMS:
            difference = means[layer, f"busiest, {form}"] - means[layer, f"random, {form}"]
            assert means[layer, f"busiest less random, {form}"] == pytest.approx(difference)
    table = router_reading.balance_table(rows)
    retained = table[table.measure == "retained mass"].set_index("layer")["mean"]
    of_prompts = rows[rows.measure == router_load.RETAINED].groupby("layer")["value"].mean()
    assert dict(retained) == pytest.approx(dict(of_prompts))
    loads = rows[rows.measure == "load"].groupby("layer")["value"]
    assert np.allclose(loads.sum(), 1)
    cv = table[table.measure == "CV"].set_index("layer")["mean"]
    assert dict(cv) == pytest.approx(dict(loads.std(ddof=0) / loads.mean()))
    assert (table[table.measure == "CV"]["multinomial"] > table[table.measure == "CV"]["by chance"]).all()


def test_the_report_is_whole(asked):
    spec, rows = asked
    text = router_load.reading(spec, rows)
    for part in (
        "built: the load is more uneven than chance in 4 of 4",
        "the token tells",
        "straggler factor, 2 devices",
    ):
        assert part in text
    assert "nan" not in text
    figures = router_load.figures(spec, rows)
    assert [bool(len(f.data)) for f in figures] == [True] * 4
    assert np.asarray(figures[1].data[0].z).shape == (8, 8)
    titles = [title for title, frame in router_load.tables(spec, rows) if len(frame)]
    assert len(titles) == 3


# -- planted -------------------------------------------------------------------------------------------------


class Planted:
    """Whose loss rises by 1 without expert 2, only on prompts of domain 0, and by 0.1 without expert 1 on all."""

    changes = {
        0: torch.zeros(6),
        1: torch.full((6,), 0.1),
        2: torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]),
    }
    domains = torch.tensor([0, 0, 0, 1, 1, 1])


def test_a_favourite_that_its_domain_needs_is_told_from_the_others():
    rows = expert_ablation.ablation_rows(5, "zeroed", Planted.changes, 1, [0, 2], [2, 0], Planted.domains, 10)
    own = [row["value"] for row in rows if row["measure"] == router_load.SPECIFIC]
    assert own == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    less = [row["value"] for row in rows if row.get("condition") == "busiest less random, zeroed"]
    assert less == pytest.approx([-0.4] * 3 + [0.1] * 3)
    assert {row["sample"] for row in rows} == set(range(10, 16))


def test_favourites_are_what_a_domain_has_beyond_the_others():
    share = torch.tensor([[0.9, 0.1, 0.0], [0.6, 0.0, 0.4]])
    assert expert_ablation.favourites_of(share, torch.tensor([0.75, 0.05, 0.2])) == [0, 2]


def test_the_busiest_expert_is_no_random_one():
    load = torch.tensor([0.1, 0.6, 0.2, 0.1])
    busiest, others = expert_ablation.chosen_for_ablation(load, 9, np.random.default_rng(0))
    assert busiest == 1 and others == [0, 2, 3]


def test_an_expert_that_adds_nothing_is_missed_by_nobody(micro):
    """Zeroed weights of one expert: without it, zeroed, no loss moves, and the rest moves as before."""
    torch.manual_seed(0)
    model = HookedJamba(micro.config)
    model.load_state_dict(micro.state_dict())
    layer = micro.config.moe_layers[1]
    before, after = ({k: v.clone() for k, v in m.state_dict().items()} for m in (micro, model))
    down = [name for name in after if name.startswith(f"blocks.{layer}.mlp") and "down" in name]
    with torch.no_grad():
        for name in down:
            dict(model.named_parameters())[name][3].zero_()
    assert any(not torch.equal(before[n], dict(model.named_parameters())[n]) for n in down)
    tokens = corpus.corpus(model, (), 1, 40, 0).tokens
    whole = expert_ablation.prompt_losses(model, tokens)
    found = expert_ablation.layer_changes(model, tokens, layer, [3, 4], "zeroed", whole)
    torch.testing.assert_close(found[3], torch.zeros_like(whole), atol=1e-6, rtol=0)
    assert found[4].abs().max() > 1e-3


def test_the_balancing_loss_evens_small_models_out(micro):
    rows = expert_ablation.balancing_rows(micro.config, 1.0, 8, 1, 0)
    cv = {row["condition"]: row["value"] for row in rows if row["measure"] == expert_ablation.TRAINED_CV}
    assert cv["with less without"] == pytest.approx(cv["coefficient 1"] - cv["coefficient 0"])
    assert cv["coefficient 1"] < cv["coefficient 0"]


# -- text and refusals ---------------------------------------------------------------------------------------


def test_prompts_are_of_one_domain_each_and_alike_for_every_model(micro):
    texts = corpus.corpus(micro, (), 3, 32, 7)
    assert texts.tokens.shape == (24, 32) and (texts.tokens[:, 0] == micro.config.bos_token_id).all()
    assert texts.names == tuple(DOMAINS) and texts.domains.bincount().tolist() == [3] * 8
    assert torch.equal(texts.tokens, corpus.corpus(micro, (), 3, 32, 7).tokens)
    assert not torch.equal(texts.tokens, corpus.corpus(micro, (), 3, 32, 8).tokens)
    copies = texts.tokens[texts.domains == list(DOMAINS).index("copy")]
    assert all("copy" in micro.tokenizer.decode(row) for row in copies)


def test_text_files_are_cut_into_windows(micro, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("the whale gave the lamp to Bob . " * 40)
    files = tuple(str(tmp_path / f"{name}.txt") for name in ("a", "b"))
    texts = corpus.corpus(micro, files, 4, 11, 0)
    assert texts.names == ("a", "b") and texts.tokens.shape == (8, 11)
    assert (texts.tokens[:, 0] == micro.config.bos_token_id).all()
    with pytest.raises(InputError, match="a.txt' has .* tokens, and 99 windows of 11"):
        corpus.corpus(micro, files, 99, 11, 0)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as UTF-8"):
        corpus.corpus(micro, files, 1, 11, 0)


@pytest.mark.parametrize(
    "kind, values, error, message",
    [
        ("no-moe", {}, ConfigError, "it has no mixture-of-experts layer"),
        ("hybrid", {"devices": "2,9"}, ConfigError, "devices=9 must lie in 1..3"),
        ("hybrid", {"length": "48"}, InputError, "it has no tokenizer"),
        ("hybrid", {"length": "200"}, ConfigError, "length=200 exceeds its context of 64"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_work(model_of_kind, tmp_path, kind, values, error, message):
    model_of_kind(kind).float().save_pretrained(tmp_path / "model")
    spec = spec_of(**({"models": str(tmp_path / "model"), "devices": "2"} | values))
    with pytest.raises(error, match=f"router_load of .*: {message}"):
        running.run("router_load", spec, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_another_language_needs_text(model_of_kind, tmp_path, monkeypatch):
    model_of_kind("hybrid").float().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(corpus.checkpoint, "load_tokenizer", lambda directory: SimpleNamespace(get_vocab=dict))
    with pytest.raises(ConfigError, match="reads another language than the packaged models; give --set text=FILE"):
        running.run("router_load", spec_of(models=str(tmp_path / "model"), devices="2"), tmp_path / "runs")


def test_a_text_that_is_no_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="text='nowhere.txt' is no file"):
        running.run("router_load", spec_of(text="nowhere.txt"), tmp_path)
