"""The studies of heads find what was built in, tell it from chance and controls, and say so when there is nothing."""

from __future__ import annotations

import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jambascope import HookedJamba
from jambascope.errors import ConfigError, InputError
from jambascope.hooks.labels import review_prompts
from jambascope.studies import head_ablation, induction_heads, label_heads, prompts
from jambascope.studies.runner import run as running
from jambascope.studies.runner.directory import table_of
from jambascope.studies.runner.spec import make_spec
from jambascope.studies.runner.study import load
from jambascope.studies.runner.summary import one, summarize

ENDS = ["mean", "low", "high"]


def rows_of(study, spec, model, name="built"):
    """The rows of a study of one model, without a directory."""
    tables = [
        table_of(study.name, cell, name, study.measure(spec, cell, model)).to_pandas() for cell in study.cells(spec)
    ]
    (table,) = tables
    return table


@pytest.fixture(scope="module")
def micro() -> HookedJamba:
    return HookedJamba.from_pretrained("jamba-micro")


@pytest.fixture(scope="module")
def built_rows(built):
    spec = make_spec(
        "induction_heads", induction_heads.InductionSpec, {"models": "built", "sequences": 12, "length": 8, "k": "1"}
    )
    return spec, rows_of(induction_heads.study, spec, built)


# -- induction -----------------------------------------------------------------------------------------------


def test_the_built_induction_head_is_found_and_matters(built_rows):
    """Head 0 attends by induction and copies; the three others do not, and taking them away does nothing like it."""
    spec, rows = built_rows
    heads = rows[(rows.measure == "head: prefix matching") & (rows.half == "confirming")]
    assert heads.groupby("head")["value"].mean().round(2).idxmax() == 0
    assert set(heads[heads["head"] == 0]["rank"]) == {1}
    summary = summarize(rows, induction_heads.study.headline, head_ablation.BY)
    score = one(summary, measure=induction_heads.SCORE, heads="found")
    assert score.low > 0.99 and score.n == 6
    assert one(summary, measure=induction_heads.SHUFFLED).high < 0.5
    assert one(summary, measure=induction_heads.EVEN)["mean"] < 0.2
    effect = one(summary, measure=induction_heads.SECOND, heads="found")
    less = one(summary, measure=induction_heads.SECOND, heads="found less random")
    assert effect.low > 0.05 and less.low > 0.05
    before = one(summary, measure=induction_heads.FIRST, heads="found less random")
    assert abs(before["mean"]) < less["mean"] / 4


def test_the_reading_says_what_was_found_and_with_what_certainty(built_rows):
    spec, rows = built_rows
    text = induction_heads.reading(spec, rows)
    assert "built: the top head of the finding half attends by induction" in text and "n = 6" in text
    assert re.search(r"p = 0\.25 against 3 random sets, the least that so few can give", text)
    nothing = rows.assign(value=rows["value"].where(rows.measure != induction_heads.SCORE, 0.01))
    assert "does not attend by induction" in induction_heads.reading(spec, nothing)


@pytest.mark.parametrize("k, message", [((3,), "k=3 must lie in 1..2: as many of its 4 heads"), ((0,), "k=0 must lie")])
def test_more_heads_than_can_be_compared_are_refused(built, k, message):
    with pytest.raises(ConfigError, match=message):
        head_ablation.check_counts(built.config, k)


def test_a_model_without_heads_or_text_is_refused_before_it_is_opened(model_of_kind, tmp_path):
    model_of_kind("no-attention").float().save_pretrained(tmp_path / "mamba")
    for name in ("induction_heads", "label_heads"):
        spec = make_spec(name, load(name).spec, {"models": str(tmp_path / "mamba")})
        with pytest.raises(ConfigError, match=f"{name} of .*: it has no attention layers"):
            running.run(name, spec, tmp_path / "runs")
    model_of_kind("attention").float().save_pretrained(tmp_path / "attention")
    spec = make_spec("label_heads", label_heads.LabelSpec, {"models": str(tmp_path / "attention")})
    with pytest.raises(InputError, match="label_heads of .*: it has no tokenizer"):
        running.run("label_heads", spec, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


# -- labels --------------------------------------------------------------------------------------------------


def test_jamba_micro_has_label_heads_that_carry_the_format(micro, tmp_path):
    spec = make_spec("label_heads", label_heads.LabelSpec, {"prompts": 16, "draws": 3, "k": "1"})
    run = running.run("label_heads", spec, tmp_path)
    _, study, spec, rows = running.read(run.path)
    summary = summarize(rows, study.headline, study.by)
    labels = one(summary, measure=label_heads.LABELS, heads="found")
    matched, even, untrained = (
        one(summary, measure=m) for m in (label_heads.MATCHED, label_heads.EVEN, label_heads.UNTRAINED)
    )
    assert labels.n == 8 and labels.low > 0.8
    assert matched.high < 0.1 and even.high < 0.1 and untrained.high < 0.2
    everyone = one(summary, measure=label_heads.CHANGE_MASS, heads="all")
    assert everyone.k == 4 and everyone.high < -0.3
    found = one(summary, measure=label_heads.CHANGE_MASS, heads="found")
    assert everyone["mean"] < found["mean"] < 0
    assert rows[rows.measure == label_heads.HITS]["value"].isin([0, 1]).all()
    text = study.reading(spec, rows)
    assert "4 of 4 heads" in text and "So there are label heads." in text and "With random weights" in text
    page = (run.path / "report.html").read_text()
    assert page.count("plotly-graph-div") >= 3 and "Heads, attention to labels on held-out prompts" in page
    figures = study.figures(spec, rows)
    assert [len(f.data) > 0 for f in figures] == [True] * 3
    held_out = rows[(rows.measure == "head: attention to labels") & (rows.half == "confirming")]
    grid = held_out.groupby("head")["value"].mean()
    assert list(figures[0].data[0].z[0]) == pytest.approx(list(grid))
    shown = {trace.name: list(trace.y) for trace in figures[1].data}
    assert shown["found"] == pytest.approx([found["mean"]]) and len(shown["random, single sets"]) == 3


def test_without_a_preference_the_reading_says_so(built):
    """The built heads know nothing of labels."""
    few = review_prompts(8, 4)
    vocabulary = {token: i % 20 + 3 for i, token in enumerate(sorted({t for p in few for t in p.tokens}))}
    from jambascope.hooks.labels import FewShotPrompt, label_attention

    own = [
        FewShotPrompt(tuple(vocabulary[t] for t in p.tokens), p.label_positions, p.query_position, (3, 4), 3)
        for p in few
    ]
    found = label_attention(built, own)
    rows = label_heads._attention_rows(found, [(1, 1), (1, 0), (1, 2), (1, 3)], 1, 0)
    values = {row["measure"]: row["value"] for row in rows if row["heads"] == "found"}
    assert values[label_heads.LABELS] == pytest.approx(
        values[label_heads.EVEN], rel=0.2
    )  # head 1 looks everywhere alike


def test_right_among_labels_is_the_likeliest_of_the_set():
    from jambascope.hooks.labels import FewShotPrompt

    few = [FewShotPrompt((1, 2, 3), (1,), 2, (4, 5), answer) for answer in (4, 5)]
    logits = torch.tensor([[9.0, 0, 0, 0, 2, 1], [9.0, 0, 0, 0, 2, 1]])
    assert label_heads.right_among_labels(logits, few).tolist() == [1, 0]


# -- prompts -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as most checkpoints have it: labels it has not seen are several tokens, a blank before them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ["Review: the plot was gripping. Sentiment: Positive", "Review: the cast was dull. Sentiment: Negative"] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_any_tokenizer_gives_reviews_whose_labels_stand_where_they_are_said(byte_tokenizer, micro):
    model = type("Model", (), {"tokenizer": byte_tokenizer})
    few = prompts.few_shot_reviews(model, 6, 4, seed=0)
    assert len(few) == 6 and few == prompts.few_shot_reviews(model, 6, 4, seed=0)
    for prompt in few:
        text = byte_tokenizer.decode(prompt.tokens)
        assert text.startswith("Review: the") or text.startswith("Review: I")
        assert text.rstrip().endswith("Sentiment:") and text.count("Sentiment:") == 5
        assert prompt.query_position == len(prompt.tokens) - 1 and prompt.answer_id in prompt.label_ids
        for position in prompt.label_positions:
            assert byte_tokenizer.decode(prompt.tokens[:position]).rstrip().endswith("Sentiment:")
            assert prompt.tokens[position] in prompt.label_ids


def test_packaged_models_get_their_own_language(micro):
    assert prompts.few_shot_reviews(micro, 3, 4, seed=5) == review_prompts(3, 4, seed=5)


def test_a_model_without_tokenizer_is_refused(small_model):
    with pytest.raises(InputError, match="no tokenizer"):
        prompts.few_shot_reviews(small_model, 3, 4, seed=0)
