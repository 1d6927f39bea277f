"""The study of activation patching finds the path that was built in, tells it from chance, and checks its prompts."""

from __future__ import annotations

import itertools
import re

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jambascope import HookedJamba
from jambascope.errors import ConfigError, InputError
from jambascope.hooks import run
from jambascope.hooks.sweep import interventions, logit_difference, patch_sweep, targets
from jambascope.studies import activation_patching as patching
from jambascope.studies import patching_report as report
from jambascope.studies.prompt_pairs import given_pairs, review_pairs
from jambascope.studies.runner import run as running
from jambascope.studies.runner.directory import table_of
from jambascope.studies.runner.spec import make_spec
from jambascope.studies.runner.summary import one, summarize
from jambascope.zoo.words import SENTIMENTS, VOCABULARY


def spec_of(**values) -> patching.PatchingSpec:
    return make_spec("activation_patching", patching.PatchingSpec, values)


def rows_of(spec, model, name="built"):
    """The rows of all cells of one model, without a directory."""
    tables = [
        table_of("activation_patching", cell, name, patching.measure(spec, cell, model)).to_pandas()
        for cell in patching.cells(spec)
    ]
    return pd.concat(tables, ignore_index=True)


@pytest.fixture(scope="module")
def micro() -> HookedJamba:
    return HookedJamba.from_pretrained("jamba-micro")


@pytest.fixture(scope="module")
def built_rows(built):
    """Pairs of "a b c a" whose b differs: head 0 of the built model says b."""
    texts = [(f"1 {a} {b} {c} {a}", f"1 {a} {d} {c} {a}", b, d) for a, b, c, d in
             ((4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15), (16, 17, 18, 19), (20, 21, 22, 23), (5, 7, 9, 11),
              (6, 8, 10, 12), (13, 16, 19, 22))]  # fmt: skip
    clean, corrupted, answer, wrong = ("|".join(map(str, column)) for column in zip(*texts, strict=True))
    spec = spec_of(clean=clean, corrupted=corrupted, answer=answer, wrong=wrong, k=1, draws=40, least_difference=0.01)
    return spec, rows_of(spec, built)


# -- what is found -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize(
    "component, layer, unit, position", [("resid_pre", 1, 0, 2), ("attn_out", 1, 0, 4), ("z", 1, 0, 4)]
)
def test_the_built_path_is_found_and_confirmed(built_rows, direction, component, layer, unit, position):
    """The swapped token's place carries it to the attention layer; there head 0 moves it to the end."""
    spec, rows = built_rows
    found = report._found(rows)
    (row,) = found[(found.direction == direction) & (found.component == component)].to_dict("records")
    assert (row["layer"], row["unit"], row["group"].split()[0]) == (layer, unit, str(position))
    assert row["confirmed"] == "no" and row["p"] == pytest.approx(2 / 2**4, abs=0.02)  # the least that four pairs give
    assert row["low"] > 0.5 and row["n"] == 4
    summary = summarize(rows, report.HEADLINE, report.BY)
    top, less = (
        one(summary, direction=direction, component=component, cells=c) for c in ("found", "found less random")
    )
    assert top.n == 4 and top.low > 0.5 and less.low > 0.3


def test_what_does_nothing_is_not_found(built_rows):
    """What the Mamba layer writes behind the swapped token is for queries that do not come."""
    _, rows = built_rows
    summary = summarize(rows, [report.EFFECT], report.BY)
    for component in ("mixer_out", "ssm_state"):
        assert abs(one(summary, direction="denoise", component=component, cells="found")["mean"]) < 0.2
    before = rows[(rows.measure == report.CELL) & rows.group.isin(["0 1", "1 4"])]
    assert len(before) and (before["value"] == 0).all()


def test_checks_stand_in_the_rows(built_rows):
    _, rows = built_rows
    nothing, everything = (rows[rows.measure == name]["value"] for name in (report.NOTHING, report.EVERYTHING))
    assert nothing.abs().max() < 1e-5 and (everything - 1).abs().max() < 1e-5
    assert set(rows[rows.measure == report.NOTHING].component) == {
        "resid_pre", "attn_out", "z", "mixer_out", "ssm_state"
    }  # fmt: skip


def test_the_reading_says_where_and_also_that_nothing_was_found(built_rows):
    spec, rows = built_rows
    text = report.reading(spec, rows)
    assert "The stream that enters a layer matters most at 2 5 (layers 0-1" in text and "Checks:" in text
    assert "4 of them are too few to confirm any" in text
    many = pd.concat([rows.assign(sample=rows["sample"] + 100 * i, value=0.0) for i in range(3)])
    assert "0 of 5 found cells are confirmed" in report.reading(spec, many) and "nothing was found" in report.reading(
        spec, many
    )
    few = rows[~rows.measure.isin([report.CELL, report.EFFECT, report.SET])]
    assert "No pair is told apart" in report.reading(spec, few)
    assert report.figures(spec, few) == []


def test_the_place_of_the_stream_is_chosen_on_one_half_and_told_of_the_other(built_rows):
    """Of two planted places the finding half shows one, and what is told is its number of the other half."""
    _, rows = built_rows
    stream = (rows.measure == report.CELL) & (rows.component == "resid_pre") & (rows.direction == "denoise")
    first, other = (rows.group.astype(str).str.startswith(at) for at in ("3 ", "4 "))
    finding, upper = rows.half == "finding", rows.layer == 1
    planted = rows.assign(value=rows["value"].mask(stream, 0.0))
    planted.loc[stream & first, "value"] = 0.9
    planted.loc[stream & upper & first & ~finding, "value"] = [0.1, 0.3, 0.2, 0.4]
    planted.loc[stream & upper & other & ~finding, "value"] = 0.7
    text = report._stream(planted[planted.direction == "denoise"])
    assert re.search(
        r"matters most at 3 \d+ \(layers 0-1, effect 0\.90 \[0\.90, 0\.90\] to 0\.25 \[0\.1\d, 0\.3\d\]\)", text
    )
    assert "the other (n = 4), which would choose the same in 1 of 2 layers" in text


def test_one_pair_has_maps_and_nothing_confirmed(built):
    spec = spec_of(clean="1 4 5 6 4", corrupted="1 4 7 6 4", answer="5", wrong="7", least_difference=0.01)
    rows = rows_of(spec, built)
    assert not (rows.measure == report.EFFECT).any() and report.tables(spec, rows) == []
    text = report.reading(spec, rows)
    assert "chosen and measured on the same pairs (n = 1), so that nothing is confirmed" in text
    assert "n = 1 pairs" in text and text.count("Too few pairs are left to confirm any cell.") == 2
    figures = report.figures(spec, rows)
    assert len(figures) == 2 and "denoise" in figures[0].layout.title.text


@pytest.mark.parametrize(
    "component, units, kind",
    [("q", 4, "hybrid"), ("k", 2, "hybrid"), ("pattern", 4, "attention"), ("dt", 1, "hybrid"), ("B", 1, "mamba2"),
     ("ssm_read", 1, "hybrid"), ("expert_out", 3, "hybrid"), ("router_logits", 1, "one-slot"),
     ("hook_conv", 1, "hybrid")],
)  # fmt: skip
def test_any_component_is_patched_as_the_loop_does(model_of_kind, component, units, kind):
    """Each cell of a pair is a run of its own with that cell's interventions."""
    model, few = model_of_kind(kind), torch.randint(3, 29, (2, 1, 5), generator=torch.Generator().manual_seed(0))
    clean, corrupted = (" ".join(map(str, tokens[0].tolist())) for tokens in few)
    spec = spec_of(clean=clean, corrupted=corrupted, answer="5", wrong="7", least_difference=1e-9, k=1, draws=2,
                   components=component, directions="denoise")  # fmt: skip
    rows = rows_of(spec, model)
    cells = rows[rows.measure == report.CELL].set_index(["layer", "unit", "group"])["value"]
    names = [n for n, row in model.hook_rows.items() if n.startswith("blocks.")]
    caches = [model.run_with_cache(tokens, names_filter=names)[1] for tokens in few]

    def difference(logits):
        return (logits[0, -1, 5] - logits[0, -1, 7]).item()

    high, low = (difference(model(tokens)) for tokens in few)
    found = targets(model, component)
    assert {t.units for t in found} == {units} and len(cells) == 5 * units * len(found)
    for target, unit, at in ((found[0], 0, 3), (found[-1], units - 1, 4)):
        patched = run(model, few[1], interventions(model, target, (at,), unit, *caches)).logits
        effect = (difference(patched) - low) / (high - low)
        (value,) = (
            v for (i, u, group), v in cells.items() if (i, u, group.split()[0]) == (target.layer, unit, str(at))
        )
        assert value == pytest.approx(effect, abs=1e-6)


def test_single_positions_are_a_map_of_layers_by_positions(micro):
    spec = spec_of(pairs=4, shots=2, filler=0, k=1, draws=2, components="resid_pre,k", directions="denoise",
                   positions="single", swap="labels")  # fmt: skip
    rows = rows_of(spec, micro)
    pairs = review_pairs(micro, 4, 2, 0, "labels", seed=0)
    length = pairs.clean.shape[1]
    names = list(pairs.by_position().groups)
    assert [name.split(" ", 1)[0] for name in names] == list(map(str, range(length)))
    assert [names[p] for p in pairs.groups["examples: label"]] == ["10 examples: label", "20 examples: label"]
    cells = rows[rows.measure == report.CELL]
    stream = cells[cells.component == "resid_pre"].groupby(["layer", "group"])["value"].mean().unstack()[names]
    assert stream.shape == (8, length) and (stream.iloc[:, :10] == 0).all(axis=None)
    sweep = patch_sweep(
        micro, pairs.clean, pairs.corrupted, logit_difference(list(pairs.answers), list(pairs.wrong)), progress=False
    )
    expected = sweep.effects(spec.least_difference)["resid_pre"].mean("pair").values[0]
    assert stream.to_numpy() == pytest.approx(expected, abs=1e-5)
    figure, *_ = report.figures(spec, rows)
    assert figure.data[0].z.shape == (8, length) and figure.data[1].z.shape == (2, length)
    assert "layer 4, KV head 1" in figure.layout.yaxis2.ticktext


def test_what_a_model_lacks_is_left_out_of_the_default_and_said(model_of_kind):
    model = model_of_kind("no-attention")
    spec = spec_of(clean="1 4 5 6", corrupted="1 4 7 6", answer="5", wrong="7", least_difference=1e-9, k=1, draws=2)
    text = report.reading(spec, rows_of(spec, model))
    assert text.endswith("It has no attn_out, mlp_out, z.")


def test_pairs_that_the_model_does_not_tell_apart_are_said_to_be_so(micro):
    spec = spec_of(pairs=4, shots=2, filler=0, least_difference=1e6, components="resid_pre")
    rows = rows_of(spec, micro)
    assert set(rows.direction) == {"denoise", "noise"} and (rows[rows.measure == report.ALIKE]["value"] == 1).all()
    assert "100% are too alike" in report.reading(spec, rows) and "nothing was found" in report.reading(spec, rows)


def test_a_run_on_jamba_micro(tmp_path):
    spec = spec_of(pairs=8, shots=2, k=1, draws=3, filler=0, swap="labels", directions="denoise")
    done = running.run("activation_patching", spec, tmp_path)
    _, study, spec, rows = running.read(done.path)
    summary = summarize(rows, study.headline, study.by)
    attention = one(summary, direction="denoise", component="attn_out", cells="found")
    assert (
        attention.n == 4
        and attention.low > one(summary, direction="denoise", component="attn_out", cells="random").high
    )
    assert rows[rows.measure == report.EVERYTHING]["value"].between(0.999, 1.001).all()
    assert set(rows.group.dropna()) >= {"examples: label", "examples: separator", "last: sentiment word", "query"}
    text = study.reading(spec, rows)
    assert "are confirmed on held-out pairs" in text and "n = 8 pairs" in text
    page = (done.path / "report.html").read_text()
    assert page.count("plotly-graph-div") >= 2 and "Found cells, on held-out pairs" in page


# -- prompts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swap, filler", itertools.product(["word", "labels"], [0, 2]))
def test_pairs_agree_but_for_what_is_swapped(micro, swap, filler):
    pairs = review_pairs(micro, 6, 4, filler, swap, seed=1)
    assert pairs.clean.shape == (6, 1 + 4 * (10 + 7 * filler) + 9 + 7 * filler)
    place = {"word": "last: sentiment word", "labels": "examples: label"}[swap]
    differ = (pairs.clean != pairs.corrupted).any(0).nonzero()[:, 0].tolist()
    assert tuple(differ) == pairs.groups[place] and pairs.changed_from == differ[0]
    assert sorted(p for own in pairs.groups.values() for p in own) == list(range(pairs.clean.shape[1]))
    words = {i: word for word, i in VOCABULARY.items()}
    for clean, corrupted, answer, wrong in zip(
        *(t.tolist() for t in (pairs.clean, pairs.corrupted)), pairs.answers, pairs.wrong, strict=True
    ):
        (at,) = pairs.groups["last: sentiment word"]
        labels = {}
        for ids, right in ((clean, answer), (corrupted, wrong)):
            class_ = words[ids[at]] in SENTIMENTS[1]
            shown = [words[ids[p]] in SENTIMENTS[1] for p in pairs.groups["examples: sentiment word"]]
            of_class = {c: ids[p] for c, p in zip(shown, pairs.groups["examples: label"], strict=True)}
            assert of_class[class_] == right and words[ids[-1]] == ":"
            labels[right] = of_class
        assert len(labels) == 2
    again = review_pairs(micro, 6, 4, filler, swap, seed=1)
    assert torch.equal(again.clean, pairs.clean)


def test_any_tokenizer_gives_pairs_of_one_layout(micro):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ["Review: the plot was great. Tom gave the key to Paul.\nSentiment: Good", "Sentiment: Bad"] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    model = type("Model", (), {"tokenizer": fast, "config": micro.config})
    pairs = review_pairs(model, 6, 3, 1, "word", seed=0)
    assert pairs.clean.shape == pairs.corrupted.shape and len(pairs.clean) == 6
    for row, answer in zip(pairs.clean, pairs.answers, strict=True):
        text = fast.decode(row[1:])  # behind <bos>
        assert text.startswith("Review: the") and text.endswith("Sentiment:") and text.count("gave the") == 4
        assert answer != row[-1]
    (start,) = pairs.groups["start"]
    assert start == 0 and pairs.groups["query"][-1] == pairs.clean.shape[1] - 1


@pytest.mark.parametrize(
    "values, message",
    [
        (("1 4 5|1 6", "1 4 7", "5", "6"), "clean has 2 prompts and corrupted 1"),
        (("1 4 5", "1 4 5", "5", "6"), "a patch of it can change nothing"),
        (("1 4 5", "1 4 5 6", "5", "6"), "correspond token by token"),
        (("1 4 5", "1 4 7", "5", "5"), "are the same token"),
        (("1 4 5", "1 4 7", "5|6|7", "8"), "one for each of the 1 pairs"),
        (("1 4 5", "1 4 7", "5", "99"), "wrong='99'"),
    ],
)  # fmt: skip
def test_pairs_of_a_user_are_checked(built, values, message):
    with pytest.raises(InputError, match=message):
        given_pairs(built, *values)


def test_settings_and_models_are_checked_before_the_work(model_of_kind, tmp_path):
    with pytest.raises(ConfigError, match="only clean given; prompts of yours need"):
        spec_of(clean="a b")
    with pytest.raises(ConfigError, match="components='z,z': give at least one, each once"):
        spec_of(components="z,z")
    model_of_kind("no-attention").float().save_pretrained(tmp_path / "m")
    for values, error, message in (
        ({"components": "z"}, ConfigError, "it has none of components=z"),
        (
            {"components": "resid_pre,expert_out"},
            ConfigError,
            "components=expert_out: .* no layer of this model has it",
        ),
        ({"components": "resid_pr"}, ConfigError, "components=resid_pr: .* the nearest are resid_pre"),
        ({"components": "embed"}, ConfigError, "components=embed: embed belongs to no layer"),
        ({}, InputError, "it has no tokenizer"),
    ):
        with pytest.raises(error, match=f"activation_patching of .*: {message}"):
            running.run("activation_patching", spec_of(models=str(tmp_path / "m"), **values), tmp_path / "runs")
    given = dict(models=str(tmp_path / "m"), components="resid_pre", clean="1 4 5|1 4 7", answer="5", wrong="6")
    for corrupted, message in (
        ("1 4 5 6|1 4 8", "clean has prompts of 3, 3 tokens and corrupted of 4, 3; .* so give all of one length"),
        ("1 4 6", "clean has 2 prompts and corrupted 1"),
    ):
        with pytest.raises(InputError, match=message):
            running.run("activation_patching", spec_of(**given, corrupted=corrupted), tmp_path / "runs")
    with pytest.raises(ConfigError, match="shots=400 exceed its context of 2048"):
        running.run("activation_patching", spec_of(shots=400), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
