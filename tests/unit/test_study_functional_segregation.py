"""Which function lives where is found where it was put, and told from as many random parts."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from jambascope import HookedJamba
from jambascope.errors import ConfigError, InputError
from jambascope.studies import functional_segregation as segregation
from jambascope.studies import segregation_prompts as asking
from jambascope.studies.figures.parts import Bar, grouped, layer_map
from jambascope.studies.runner import run as running
from jambascope.studies.runner.spec import make_spec
from jambascope.studies.runner.study import load
from jambascope.studies.runner.summary import one, summarize
from jambascope.studies.zoo.tasks import draw
from jambascope.zoo.documents import Document


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    settings = {"documents": 24, "tasks": "repeat,text", "k": "2", "draws": 2}
    spec = make_spec("functional_segregation", segregation.SegregationSpec, settings)
    return running.run("functional_segregation", spec, tmp_path_factory.mktemp("runs"))


def test_repetition_lives_in_the_attention_of_jamba_micro_and_text_does_not(finished):
    _, study, spec, rows = running.read(finished.path)
    summary = summarize(rows, study.headline, study.by)

    def change(task, taken):
        return one(summary, measure="change of loss", task=task, without=taken)

    attention, control = "all attention layers", "as many random layers as attention"
    assert change("repeat", attention).low > change("repeat", control).high + 1
    assert change("text", attention).high < 1 < change("repeat", attention).low
    assert change("repeat", attention).n == 12 and change("text", "all Mamba layers").low > 1
    kept, random = (change("repeat", w) for w in ("all heads but the top", "all heads but random ones"))
    assert kept.high < change("repeat", attention).low and kept["mean"] < random["mean"]


def test_the_reading_names_what_attention_is_for(finished):
    _, study, spec, rows = running.read(finished.path)
    text = study.reading(spec, rows)
    about = re.search(r"Without all attention layers.*?In sum: (.*?)\n\n", text, re.DOTALL)[1]
    assert re.search(r"needed more than as many random layers for [^;]*repeat", about)
    gone = (rows.measure == "less the control: change of loss") & (rows.task == "text")
    without = study.reading(spec, rows.assign(value=rows["value"].where(~gone, 0.0)))
    about = re.search(r"Without all attention layers.*?In sum: (.*?)\n\n", without, re.DOTALL)[1]
    assert re.search(r"needed more than as many random layers for [^;]*repeat", about)
    assert not re.search(r"needed more than as many random layers for [^;]*text", about)
    assert re.search(r"repeat .* nats, which keeps 0\.\d+ \[0\.\d+, \d\.\d+\] of what attention is worth", text)
    assert "too little is left either way" in text
    same = rows.assign(value=rows["value"].where(rows.measure != "less the control: change of loss", 0.0))
    again = study.reading(spec, same)
    assert "not told from as many random layers for" in again and "needed more" not in again
    page = (finished.path / "report.html").read_text()
    assert page.count("plotly-graph-div") >= 2


def test_the_layer_map_shows_the_attention_layer(finished):
    _, study, spec, rows = running.read(finished.path)
    bars, found = study.figures(spec, rows)
    values = found.data[0].z
    assert values.shape == (8, 2) and values[:, 0].argmin() == 4
    own = rows[rows.measure == "layer: change of accuracy"]
    assert values[4, 0] == pytest.approx(own[(own.layer == 4) & (own.task == "repeat")]["value"].mean())
    assert "attention" in found.layout.yaxis.ticktext[4] and "Mamba" in found.layout.yaxis.ticktext[3]
    assert {trace.name for trace in bars.data} == {"these", "random ones, as many"}


def test_the_layer_that_is_missed_most_is_chosen_on_the_finding_half(finished):
    """Of two planted layers the finding half shows one, and what is told is its number of the other half."""
    _, study, spec, rows = running.read(finished.path)
    finding = rows.measure == "finding half, layer: change of accuracy"
    confirming = rows.measure == "layer: change of accuracy"
    assert set(rows[finding]["sample"]) == set(range(12)) and set(rows[confirming]["sample"]) == set(range(12, 24))
    planted = rows.assign(value=rows["value"].mask(finding | confirming, 0.0))
    planted.loc[finding & (rows.layer == 2), "value"] = -0.9
    planted.loc[confirming & (rows.layer == 2), "value"] = -0.25
    planted.loc[confirming & (rows.layer == 5), "value"] = -0.9
    text = study.reading(spec, planted)
    assert re.search(r"measured on the other: repeat layer 2 \(mamba, -0\.25.*; text layer 2 \(mamba, -0\.25", text)


# -- chance --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, words, answers, expected",
    [
        ("recall", "map : a x , b x , c y , d z ; b -> x ; c -> y", (16, 20), (2 / 4 + 1 / 4) / 2),
        ("phones", "phones : A 1 2 3 , B 1 2 4 , C 1 2 3 ; call B -> 1 2 4 ; call A -> 1 2 3",
         (20, 21, 22, 27, 28, 29), (1 / 3 + 2 / 3) / 2),
        ("repeat", "a b c d a b c d", (5, 6, 7), 1 / 4),
        ("copy", "copy : . a . . b . c -> a b c", (10, 11, 12), 1 / 3),
        ("text", "the a saw the b .", (0, 1, 3, 4), 1 / 2),
    ],
)  # fmt: skip
def test_chance_is_an_even_draw_of_what_stands_in_the_document(name, words, answers, expected):
    task = asking.documents_of(name, 2, seed=0).task
    doc = Document(task.domain, tuple(words.split()), answers)
    assert asking.chances(asking.Documents(task, [doc])).tolist() == pytest.approx([expected])


@pytest.mark.parametrize("name, entries", [("recall", 12), ("phones", 8), ("repeat", 32), ("copy", 6)])
def test_chance_of_documents_is_at_least_one_in_their_entries(name, entries):
    found = asking.chances(asking.documents_of(name, 16, seed=0))
    times = found * entries  # entries that hold what is asked for: one, more where values come twice
    assert len(found) == 16 and (times >= 1 - 1e-9).all() and times.mean() < 1.5
    assert (times > 1 + 1e-9).any() == (name == "recall")


@pytest.mark.parametrize(
    "tasks, length, accuracies, expected",
    [
        (("repeat",), 24, [3 / 31, 1.0], 1 / 32),  # documents of the packaged models' language
        (("repeat",), 24, [3 / 11, 0.0], 1 / 12),
        (("repeat",), 24, [0.0, 1.0], 1 / 12),  # either: the higher
        (("repeat", "copy"), 24, [0.0, 1.0], 1 / 32),
    ],
)
def test_chance_of_repeat_is_of_what_the_model_was_asked(tasks, length, accuracies, expected):
    assert asking.chance_of_repeat(tasks, length, np.array(accuracies)) == expected


def test_accuracies_stand_beside_chance(finished):
    _, study, spec, rows = running.read(finished.path)
    text, ((_, table),) = study.reading(spec, rows), study.tables(spec, rows)
    stories = asking.chances(asking.documents_of("text", 24, seed=0))[12:].mean()  # those of the confirming half
    assert re.search(rf"repeat 0\.\d+ .*\(above chance, 0\.031\), text .*chance, {stories:.3f}\)", text)
    assert table.groupby("task").chance.unique().map(list).to_dict() == {"repeat": [1 / 32], "text": [stories]}
    left = table[table.task == "repeat"].set_index("taken away")
    assert left["above chance"][["nothing", "all attention layers"]].tolist() == ["yes", "no"]
    own = rows[(rows.task == "repeat") & (rows["without"].isin(["nothing", "all attention layers"]))]
    means = own.groupby("measure")["value"].mean()
    expected = means["accuracy"] + means["change of accuracy"]
    assert left.loc["all attention layers", "mean"] == pytest.approx(expected)
    assert left.loc["all attention layers", "n"] == 12
    alone = rows[rows.measure.isin(["accuracy", "loss"])]  # as of a model of one mixer
    assert study.tables(spec, alone)[0][1]["taken away"].tolist() == ["nothing"] * 2
    assert "beside chance" in (finished.path / "report.html").read_text()


def test_text_files_have_no_chance(finished):
    _, study, spec, rows = running.read(finished.path)
    given = spec.model_copy(update={"text": ("a.txt",)})
    assert segregation.chance(given, rows, rows.recipe.iloc[0], "text") is None
    assert "any token may come, so there is no chance level" in study.reading(given, rows)
    (_, table), *_ = study.tables(given, rows)
    assert table[table.task == "text"].chance.isna().all() and (table[table.task == "text"]["above chance"] == "").all()


# -- what is asked -------------------------------------------------------------------------------------------


def test_text_counts_only_words_that_nothing_determines():
    stories = asking.documents_of("text", 3, seed=0)
    for doc, drawn in zip(stories.drawn, draw(stories.task, 3, 0), strict=True):
        assert doc.words == drawn.words and not set(doc.answers) & set(drawn.answers)
        assert len(doc.answers) + len(drawn.answers) == len(doc.words)


@pytest.mark.parametrize("name", asking.DOMAINS)
def test_no_part_taken_away_changes_nothing(name):
    model = HookedJamba.from_pretrained("jamba-micro")
    prompts = asking.prompts_of(model, name, 2, (), 64, seed=0)
    whole = segregation._measured(model, prompts, {}, ())
    assert set(whole) == {"loss", "accuracy"} and all(len(values) == 2 for values in whole.values())
    changes = segregation._changes(segregation._measured(model, prompts, {}, ()), whole)
    assert all(np.all(values == 0) for values in changes.values())


# -- any model -----------------------------------------------------------------------------------------------


def test_of_tokens_the_last_so_many_count(model_of_kind):
    model = model_of_kind("hybrid")
    prompts = asking.prompts_of(model, "repeat", 5, (), 15, seed=3)
    assert prompts.ids.shape == (5, 14) and torch.equal(prompts.ids[:, :7], prompts.ids[:, 7:])
    found = prompts.part(slice(1, 4)).measured(model)
    with torch.no_grad():
        said = model(prompts.ids[1:4])[:, 7:-1].log_softmax(-1)  # what predicts tokens 8 to 13
    right = prompts.ids[1:4, 8:]
    losses = -said.gather(-1, right[..., None])[..., 0].mean(1)
    np.testing.assert_allclose(found["loss"], losses.numpy(), rtol=1e-6)
    np.testing.assert_allclose(found["accuracy"], (said.argmax(-1) == right).double().mean(1).numpy())


def test_text_files_are_read_where_they_are_given(tmp_path):
    model = HookedJamba.from_pretrained("jamba-micro")
    path = tmp_path / "a.txt"
    path.write_text("the whale gave the lamp to Bob . " * 40)
    prompts = asking.prompts_of(model, "text", 5, (str(path),), 11, seed=0)
    assert prompts.ids.shape == (5, 11) and prompts.counted == 10
    assert (prompts.ids[:, 0] == model.config.bos_token_id).all()
    assert asking.prompts_of(model, "repeat", 2, (str(path),), 11, seed=0).task.domain == "repeat"


def test_a_model_of_another_language_is_asked_to_repeat(model_of_kind, tmp_path):
    model_of_kind("hybrid").float().save_pretrained(tmp_path / "other")
    settings = {"models": str(tmp_path / "other"), "documents": 8, "k": "1", "draws": 2, "length": 24}
    spec = make_spec("functional_segregation", segregation.SegregationSpec, settings | {"tasks": "repeat"})
    run = running.run("functional_segregation", spec, tmp_path / "runs")
    _, study, spec, rows = running.read(run.path)
    summary = summarize(rows, study.headline, study.by)
    assert one(summary, measure="change of loss", without="all attention layers").n == 4
    text = study.reading(spec, rows)
    assert re.search(r"with all its parts is right in: repeat .*\(not clearly above chance, 0\.083\)", text)
    assert "nan" not in text


@pytest.mark.parametrize(
    "values, error, message",
    [
        ({}, ConfigError, "tasks=recall,phones,copy: these are documents of .* set tasks=repeat"),
        ({"tasks": "repeat,text"}, InputError, "it has no tokenizer, and this study reads text"),
        ({"tasks": "repeat", "length": "64"}, ConfigError, "length=64 and <bos> exceed its context of 64"),
        ({"tasks": "repeat", "length": "52"}, ConfigError, "length=52: half as many .* be drawn from its 25"),
    ],
)
def test_what_another_language_lacks_is_refused(model_of_kind, tmp_path, values, error, message):
    model_of_kind("attention").float().save_pretrained(tmp_path / "other")
    spec = make_spec(
        "functional_segregation", load("functional_segregation").spec, {"models": str(tmp_path / "other")} | values
    )
    with pytest.raises(error, match=message):
        running.run("functional_segregation", spec, tmp_path / "runs")


@pytest.mark.parametrize(
    "setting, message", [({"k": "4"}, r"k=4 must lie in 1\.\.3"), ({"tasks": "text,text"}, "each once")]
)
def test_settings_that_ask_nothing_are_refused(setting, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        spec = make_spec("functional_segregation", segregation.SegregationSpec, setting)
        running.run("functional_segregation", spec, tmp_path)


# -- figures -------------------------------------------------------------------------------------------------


def test_groups_stand_side_by_side_with_their_intervals():
    bars = [Bar("p", g, name, 0.5, 0.25, float("inf") if g == "b" else 1.0) for g in "ab" for name in ("x", "y")]
    first, second = grouped("t", "s", bars, "u").data
    assert list(np.round(np.array(second.x) - np.array(first.x), 6)) == [0.4, 0.4]
    assert list(first.error_y.array) == [0.5, 0] and list(first.error_y.arrayminus) == [0.25, 0]


def test_an_empty_cell_of_a_map_stays_empty():
    values = np.array([[0.5, np.nan], [-1.0, 0.0]])
    fig = layer_map("t", "s", ("mamba", "attention"), ["a", "b"], values, [["", ""]] * 2, "u")
    assert fig.data[0].zmin == -1 and sum(len(trace.text) for trace in fig.data[1:]) == 3
