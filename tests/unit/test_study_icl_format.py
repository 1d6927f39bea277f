"""Format following is measured as the zoo measures it, and what follows it in a hybrid is told from random parts."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jambascope import HookedJamba
from jambascope.config import JambaConfig
from jambascope.errors import ConfigError, InputError
from jambascope.hooks.interventions import hooks
from jambascope.model import initialize
from jambascope.studies import ablations, comparisons, icl_format
from jambascope.studies import episodes as episodes_of
from jambascope.studies.runner import run as running
from jambascope.studies.runner.spec import make_spec
from jambascope.studies.runner.study import load
from jambascope.studies.runner.summary import one, summarize
from jambascope.studies.zoo.tasks import draw
from jambascope.zoo.scoring import label_scores


@pytest.fixture(scope="module")
def micro() -> HookedJamba:
    return HookedJamba.from_pretrained("jamba-micro")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    settings = {"models": "jamba-micro", "episodes": 16, "shots": 4, "conditions": "familiar,shuffled", "draws": 2}
    spec = make_spec("icl_format", icl_format.FormatSpec, settings)
    return running.run("icl_format", spec, tmp_path_factory.mktemp("runs"))


def test_the_format_of_jamba_micro_is_carried_by_its_attention_layer(finished):
    _, study, spec, rows = running.read(finished.path)
    summary = summarize(rows, study.headline, study.by)
    mass, none = (one(summary, measure="label mass", condition="familiar", shots=s) for s in (4, 0))
    assert mass.low > 0.8 and none.high < 0.2 and mass.n == 16
    change = {
        taken: one(summary, measure="change of label mass", without=taken)
        for taken in (icl_format.ATTENTION, icl_format.LAYERS, icl_format.CHANNELS)
    }
    assert change[icl_format.ATTENTION].high < -0.6
    assert min(change[taken].low for taken in (icl_format.LAYERS, icl_format.CHANNELS)) > -0.4
    chance = one(summary, measure="accuracy restricted", condition="shuffled")
    assert chance.low <= 0.5 <= chance.high
    text = study.reading(spec, rows)
    assert re.search(r"familiar, label mass: .* loses more than both", text)
    assert "4 of 4 single random sets" in text and "as it must be" in text
    page = (finished.path / "report.html").read_text()
    assert page.count("plotly-graph-div") >= 2 and "each set by itself" in page


def test_the_reading_says_when_nothing_is_told_apart(finished):
    _, study, spec, rows = running.read(finished.path)
    nothing = rows.assign(value=rows["value"].where(~rows.measure.str.startswith(icl_format.LESS), rows["sample"] % 2))
    less = nothing.measure.str.startswith(icl_format.LESS)
    flipped = nothing.assign(value=nothing["value"].where(~less, nothing["value"] - 0.5))
    text = study.reading(spec, flipped)
    assert "cannot be told from both" in text and "loses more than both" not in text


def test_values_are_those_of_the_zoo(micro):
    spec = icl_format.FormatSpec(episodes=4, shots=4)
    task = icl_format.task_of(spec, "unseen")
    episodes = draw(task, 4, seed=3)
    assert episodes_of.draw_episodes(micro, task, 4, seed=3) == episodes
    values = icl_format._measured(micro, episodes)
    scores = label_scores(micro, episodes)
    np.testing.assert_allclose(values["label mass", 4], scores.mass[:, 4])
    np.testing.assert_array_equal(values["valid rate", 0], scores.valid[:, 0])
    assert draw(task, 4, seed=3) == episodes and draw(task, 4, seed=4) != episodes


def test_models_are_compared_on_the_same_episodes(finished):
    """A model that gives less mass to the labels is told from the first; equal ones are not."""
    _, study, spec, rows = running.read(finished.path)
    worse = rows.assign(recipe="worse", model="worse")
    lower = worse.assign(value=worse["value"].where(~worse.measure.str.contains("label mass"), worse["value"] * 0.5))
    text = study.reading(spec, pd.concat([rows, lower]))
    assert re.search(r"less worse, familiar, label mass: 0\.4\d \[0\.[34]\d, 0\.[45]\d\] \(p = ", text)
    assert re.search(r"less worse, familiar, accuracy free: 0\.00 \[-0\.\d\d, 0\.\d\d\] \(no difference told", text)
    trainings = [lower.assign(model=f"worse-{i}", value=lower["value"] * share) for i, share in enumerate((0.2, 1.0))]
    several = study.reading(spec, pd.concat([rows, *trainings]))  # of which one is hardly worse: the interval says so
    assert re.search(r"less worse, familiar, label mass: 0\.6\d \[0\.4\d, 0\.8\d\] \(p = .*, n = 16", several)


def test_differences_are_of_the_episodes_that_both_have():
    a, b = (
        pd.DataFrame({"recipe": m, "model": m, "measure": "m", "seed": 0, "sample": samples, "value": values})
        for m, samples, values in (("a", range(4), [0.5, 0.7, 0.9, 9.0]), ("b", range(-1, 3), [9.0, 0.1, 0.2, 0.3]))
    )
    common = pd.MultiIndex.from_tuples([(0, 0), (0, 1), (0, 2)], names=["seed", "sample"])
    mean, low, high = icl_format._difference([a, b], common)
    assert (mean, low, high) == pytest.approx((0.5, 0.4, 0.6))
    _, low, high = icl_format._difference([a, b], common[:1])
    assert not np.isfinite([low, high]).any()


@pytest.mark.parametrize("setting, message", [({"conditions": ""}, "at least one"), ({"shots": 99}, "shots=")])
def test_settings_that_ask_nothing_are_refused(setting, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        running.run("icl_format", make_spec("icl_format", icl_format.FormatSpec, setting), tmp_path)


def test_a_model_without_tokenizer_is_refused_before_it_is_opened(model_of_kind, tmp_path):
    model_of_kind("attention").float().save_pretrained(tmp_path / "other")
    spec = make_spec("icl_format", load("icl_format").spec, {"models": str(tmp_path / "other")})
    with pytest.raises(InputError, match="icl_format of .*: it has no tokenizer"):
        running.run("icl_format", spec, tmp_path / "runs")


# -- other tokenizers ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign() -> HookedJamba:
    """A hybrid of random weights with a byte-level tokenizer: most labels are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ["Review: the plot was gripping. Sentiment: Positive", "Review: the cast was dull. Sentiment: Negative"] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    torch.manual_seed(0)
    config = JambaConfig(
        mixers=("mamba", "attention"), feed_forwards=("dense", "none"), d_model=16, d_vocab=340, n_heads=4,
        n_key_value_heads=2, d_head=4, d_mlp=12, d_state=4, n_ctx=4096, d_inner=32, dt_rank=2,
    )  # fmt: skip
    model = HookedJamba(config)
    initialize(model, std=0.3)
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    return model.eval()


def test_other_tokenizers_read_the_same_text(foreign):
    task = icl_format.task_of(icl_format.FormatSpec(shots=4), "familiar")
    episodes = episodes_of.draw_episodes(foreign, task, 5, seed=0)
    assert len(episodes) == 5 and episodes == episodes_of.draw_episodes(foreign, task, 5, seed=0)
    for episode in episodes:
        assert len(set(episode.labels)) == 2 and {episode.tokens[p] for p in episode.label_positions} == {
            *episode.labels
        }
        for at in episode.label_positions:
            assert foreign.tokenizer.decode(episode.tokens[:at]).rstrip().endswith("Sentiment:")
    assert not episodes[0].known[0] and all(sum(episode.known) == 3 for episode in episodes)


def test_their_scores_are_those_of_each_episode_alone(foreign):
    task = icl_format.task_of(icl_format.FormatSpec(shots=4), "familiar")
    episodes = episodes_of.draw_episodes(foreign, task, 3, seed=0)
    scores = episodes_of.label_scores(foreign, episodes)
    for i, episode in enumerate(episodes):
        with torch.no_grad():
            p = foreign(torch.tensor([episode.tokens]))[0].double().softmax(-1)
        for shot, at in enumerate(episode.label_positions):
            assert scores.mass[i, shot].item() == pytest.approx(p[at - 1, list(episode.labels)].sum().item(), rel=1e-4)
            best = max(episode.labels, key=lambda label: p[at - 1, label])  # noqa: B023
            right = float(best == episode.tokens[at])
            assert scores.acc_restricted[i, shot].isnan() if not episode.known[shot] else (
                scores.acc_restricted[i, shot] == right
            )  # fmt: skip


def test_the_study_is_asked_of_them_too(foreign, tmp_path):
    """Random weights follow no format, with or without attention."""
    foreign.save_pretrained(tmp_path / "model")
    foreign.tokenizer.save_pretrained(tmp_path / "model")
    settings = {"models": str(tmp_path / "model"), "episodes": 8, "shots": 4, "conditions": "familiar", "draws": 1}
    run = running.run("icl_format", make_spec("icl_format", icl_format.FormatSpec, settings), tmp_path / "runs")
    _, study, spec, rows = running.read(run.path)
    summary = summarize(rows, study.headline, study.by)
    assert one(summary, measure="label mass", shots=4).high < 0.1
    assert "cannot be told from both" in study.reading(spec, rows)


# -- parts and tests -----------------------------------------------------------------------------------------


def whole(*batches: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches without padding."""
    return [(ids, torch.ones_like(ids, dtype=torch.bool)) for ids in batches]


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_set_to_its_mean_writes_its_mean(model_of_kind, layer):
    model = model_of_kind("hybrid")
    tokens = torch.randint(4, 29, (3, 7), generator=torch.Generator().manual_seed(0))
    means = ablations.mean_outputs(model, whole(tokens[:1], tokens[1:]))
    out = f"blocks.{layer}.hook_{'attn' if layer == 1 else 'mixer'}_out"
    expected = model.run_with_cache(tokens, names_filter=out)[1][out].mean((0, 1))
    edits = ablations.without(model, means, ablations.layers_as_parts([layer]))
    with model.hooks(hooks(model, edits)):
        _, cache = model.run_with_cache(tokens, names_filter=out)
    torch.testing.assert_close(cache[out], expected.expand_as(cache[out]), atol=1e-8, rtol=1e-6)


def test_padding_is_no_part_of_a_mean(model_of_kind):
    model = model_of_kind("hybrid")
    tokens = torch.randint(4, 29, (2, 7), generator=torch.Generator().manual_seed(0))
    longer = torch.nn.functional.pad(tokens, (0, 3))
    plain, padded = (ablations.mean_outputs(model, [(t, t != 0)]) for t in (tokens, longer))
    for layer in plain:
        torch.testing.assert_close(plain[layer], padded[layer])


def test_heads_and_channels_are_set_alone(model_of_kind):
    model = model_of_kind("hybrid")
    tokens = torch.randint(4, 29, (2, 7), generator=torch.Generator().manual_seed(0))
    means = ablations.mean_outputs(model, whole(tokens))
    edits = ablations.without(model, means, ((0, (3, 5)), (1, (2,))))
    points = ["blocks.0.mixer.hook_z", "blocks.1.attn.hook_z"]
    with model.hooks(hooks(model, edits)):
        _, cache = model.run_with_cache(tokens, names_filter=points)
    moved = cache[points[0]].var((0, 1), unbiased=False) < 1e-20
    assert moved.nonzero().flatten().tolist() == [3, 5]
    same = cache[points[1]].var((0, 1), unbiased=False).sum(-1) < 1e-20
    assert same.nonzero().flatten().tolist() == [2]


def test_random_sets_are_others_and_as_many(model_of_kind):
    config = model_of_kind("hybrid").config
    sets = ablations.random_layers(config, [1], 9, seed=0)
    assert sorted(sets) == [((0, None),), ((2, None),), ((3, None),)]
    most = ablations.random_layers(config, [0, 2, 3], 9, seed=0)
    assert len(most) == 3 and ablations.layers_as_parts([0, 2, 3]) not in most
    channels = ablations.random_channels(config, 5, 3, seed=0)
    assert all(sum(len(own) for _, own in parts) == 5 for parts in channels) and len(set(channels)) == 3
    heads = ablations.random_heads(config, 1, 9, 0, [(1, 2)])
    assert sorted(heads) == [((1, 0),), ((1, 1),), ((1, 3),)]
    with pytest.raises(InputError, match="no other set of 4"):
        ablations.random_heads(config, 4, 1, 0, [(1, h) for h in range(4)])


def test_sign_flips_know_a_difference_from_none():
    assert comparisons.sign_flip_p(torch.ones(12)) < 0.002
    assert comparisons.sign_flip_p(torch.tensor([1.0, -1, 1, -1])) == 1
    assert comparisons.sign_flip_p(torch.zeros(5)) == 1 and comparisons.sign_flip_p(torch.empty(0)) == 1
    # Of 4 equal differences 2 of 16 assignments are as far from 0.
    assert comparisons.sign_flip_p(torch.ones(4)) == 0.125 and comparisons.least_p(4) == 0.125


def test_holm_corrects_by_rank():
    assert comparisons.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert comparisons.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
