"""Positions: the study counts what the model says, tells planted differences from none, and refuses what cannot be."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from jambascope import HookedJamba
from jambascope.errors import ConfigError, InputError
from jambascope.studies import positional, positional_reading
from jambascope.studies.corpus import losses_and_hits
from jambascope.studies.runner import run as running
from jambascope.studies.runner.directory import table_of
from jambascope.studies.runner.spec import make_spec
from jambascope.studies.runner.summary import one, summarize
from jambascope.zoo.documents import secret

SMALL = {
    "prompts": 4,
    "trained": 32,
    "factors": "1,2",
    "repeats": "4,8",
    "distances": "4,16",
    "shifts": "16,32",
    "shifted_length": 6,
}


def spec_of(**values) -> positional.PositionalSpec:
    return make_spec("positional", positional.PositionalSpec, SMALL | values)


@pytest.fixture(scope="module")
def micro() -> HookedJamba:
    return HookedJamba.from_pretrained("jamba-micro", dtype="float32")


@pytest.fixture(scope="module")
def asked(micro):
    spec = spec_of()
    cell = {"model": "jamba-micro", "seed": 0}
    return spec, table_of("positional", cell, "jamba-micro", positional.measure(spec, cell, micro)).to_pandas()


# -- what is measured ----------------------------------------------------------------------------------------


def test_losses_and_hits_are_the_models_own(micro):
    tokens = torch.randint(5, 200, (3, 9), generator=torch.Generator().manual_seed(0))
    losses, hits = losses_and_hits(micro, tokens, batch_size=2)
    with torch.no_grad():
        logits = micro(tokens)[:, :-1]
    expected = -logits.double().log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(hits.bool(), logits.argmax(-1) == tokens[:, 1:])


def test_windows_are_quarters_of_the_trained_length_then_its_multiples():
    spec = spec_of(trained=64, factors="1,2,4")
    assert positional_reading.windows(spec) == [
        (0, 16, 0.25), (16, 32, 0.5), (32, 48, 0.75), (48, 64, 1.0), (64, 128, 2.0), (128, 256, 4.0)
    ]  # fmt: skip
    ends = [0, *(last for _, last, _ in positional_reading.windows(spec_of(trained=250, factors="1,2")))]
    assert ends == [0, 62, 125, 187, 250, 500]  # the last quarter ends where training did, also of odd lengths


def test_the_built_induction_head_repeats_and_nothing_else_does(built):
    model, vocab = HookedJamba(built.config), built.config.d_vocab
    model.load_state_dict(built.state_dict())
    with torch.no_grad():  # louder than the current token, which the unembedding says otherwise; other heads silent
        model.blocks[1].attn.o_proj.weight[:vocab] = torch.cat(
            (10 * torch.eye(vocab), torch.zeros(vocab, 3 * vocab)), 1
        )
    rows = positional._repeat_rows(spec_of(), model.eval(), 0)
    frame = pd.DataFrame(rows).assign(model="built", recipe="built", seed=0)
    summary = summarize(frame, [positional.REPEATED, positional.FIRST_TIME, positional.OTHER_ORDER], ("x",))
    repeated = one(summary, measure=positional.REPEATED, x=8)
    controls = [one(summary, measure=m, x=8) for m in (positional.FIRST_TIME, positional.OTHER_ORDER)]
    assert repeated.n == 4 and repeated.low > 0.9
    assert all(control.high < 0.5 for control in controls)


def test_jamba_micro_repeats_and_recalls(asked):
    _, rows = asked
    summary = summarize(rows, positional.CURVES, positional.BY)
    repeated, before, other = (
        one(summary, measure=m, x=8) for m in (positional.REPEATED, positional.FIRST_TIME, positional.OTHER_ORDER)
    )
    assert repeated.low > max(before.high, other.high) and repeated.n == 4
    recalled = one(summary, measure=positional.RECALL, x=16)
    assert recalled["mean"] > 0.7 and recalled.low < recalled["mean"]  # of hits alone no certainty
    assert set(summary[summary.measure == positional.LOSS].x) == {8, 16, 24, 32, 64}
    drawn = {secret(np.random.default_rng(i), distance=0).words[-1] for i in range(600)}
    assert drawn <= set(positional.SECRETS) and len(drawn) > 0.9 * len(positional.SECRETS)
    assert positional_reading.chance_of_recall(rows) == 1 / len(positional.SECRETS)


def test_the_report_is_whole(asked):
    spec, rows = asked
    text = positional.reading(spec, rows)
    never = rows.assign(value=rows["value"].mask(rows.measure == positional.RECALL, 0.0))
    assert "Chance is 0.010, not clearly above it at 4, 16." in positional.reading(spec, never)
    recall = next(f for f in positional.figures(spec, rows) if "Recall" in f.layout.title.text)
    assert any(trace.name == "chance" and set(trace.y) == {1 / len(positional.SECRETS)} for trace in recall.data)
    for part in ("loss less that at positions 24-32, 4 prompts", "Accuracy of recalling one word", "One model alone"):
        assert part in text
    assert "nan" not in text
    assert [len(f.data) > 0 for f in positional.figures(spec, rows)] == [True] * 4
    ((_, table),) = positional.tables(spec, rows)
    assert table.empty


# -- planted -------------------------------------------------------------------------------------------------


def planted(recipes: dict[str, dict[tuple[str, int], float]], prompts: int = 16) -> pd.DataFrame:
    noise = torch.randn(prompts, generator=torch.Generator().manual_seed(0)).tolist()
    return pd.DataFrame(
        [
            {
                "model": name,
                "recipe": name,
                "seed": 0,
                "measure": m,
                "x": x,
                "sample": i,
                "value": value + 0.2 * noise[i],
            }
            for name, values in recipes.items()
            for (m, x), value in values.items()
            for i in range(prompts)
        ]
    )


def test_a_planted_difference_is_told_from_none():
    base = {(positional.LOSS, 64): 2.0, (positional.LOSS, 32): 2.0}
    rows = planted({"a": base, "b": base | {(positional.LOSS, 64): 2.5}})
    jitter = torch.randn(len(rows), generator=torch.Generator().manual_seed(1)).numpy()
    table = positional.differences(rows.assign(value=rows.value + 0.01 * jitter)).set_index("x")
    assert table.loc[64, "p"] < 0.01 and table.loc[64, "mean"] == pytest.approx(0.5, abs=0.02)
    assert table.loc[32, "p"] > 0.05 and table.loc[32, "low"] < 0 < table.loc[32, "high"]
    text = positional_reading._compared(table.reset_index(), "b", "a")
    assert "b less a" in text and "loss by position at 64 (+0.5" in text and "(1 of 2)" in text


@pytest.mark.parametrize(
    "beyond, said", [(2.6, "reads worse from position 32 on"), (2.0, "does not read clearly worse beyond")]
)
def test_the_reading_says_whether_it_reads_worse(beyond, said):
    values = {(positional.LOSS, 32): 2.0, (positional.LOSS, 64): beyond}
    values |= {(m, x): 0.5 for m in (positional.REPEATED, positional.FIRST_TIME) for x in (4, 8)}
    values |= {(m, x): 0.0 for m in (positional.SHIFTED, positional.OTHER_FILLER) for x in (16, 32)}
    rows = planted({"a": values})
    jitter = torch.randn(len(rows), generator=torch.Generator().manual_seed(2)).numpy()
    assert said in positional.reading(spec_of(), rows.assign(value=rows.value + 0.01 * jitter))


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, message",
    [
        ({"factors": "2,4"}, "factors=.* must begin with 1"),
        ({"factors": "1"}, r"factors=\(1,\) do not go beyond the trained length; add 2"),
        ({"repeats": "8,4"}, "whole numbers from 1 on that rise"),
        ({"shifts": "0,4"}, "whole numbers from 1 on that rise"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        spec_of(**values)


@pytest.mark.parametrize(
    "values, error, message",
    [
        ({"factors": "1,9"}, ConfigError, "factors=9 times trained=32 needs 288 positions, and its context has 64"),
        ({"distances": "60"}, ConfigError, "distances=60 needs 76 positions"),
        ({"repeats": "28"}, ConfigError, "repeats=28 different tokens cannot be drawn from its 25"),
        ({"repeats": "1,8"}, ConfigError, "repeats=1 must be at least 2"),
        ({}, InputError, "it has no tokenizer"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_the_work(model_of_kind, tmp_path, values, error, message):
    model_of_kind("hybrid").float().save_pretrained(tmp_path / "model")
    spec = spec_of(models=str(tmp_path / "model"), **values)
    with pytest.raises(error, match=f"positional of .*: {message}"):
        running.run("positional", spec, tmp_path / "runs")
