"""What states hold is read where it is, and what carries a memory adds up: states, keys and values are all there is."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch

from jambascope.errors import ConfigError
from jambascope.hooks.sweep import Node, logit_difference, patch_sweep
from jambascope.studies import state_memory, state_pairs, state_probes
from jambascope.studies.comparisons import PROMPTS
from jambascope.studies.runner import run as running
from jambascope.studies.runner.spec import make_spec
from jambascope.studies.runner.study import load
from jambascope.studies.runner.summary import one, summarize
from jambascope.zoo.words import BLAME, PAD, PRAISE, VOCABULARY

WORDS = {number: word for word, number in VOCABULARY.items()}


# -- pairs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [state_pairs.label_pairs, state_pairs.query_pairs], ids=["labels", "query"])
def test_review_pairs_differ_up_to_the_border_and_ask_for_the_other_label(draw):
    pairs = draw(6, 4, seed=0)
    assert pairs.clean.shape == pairs.corrupted.shape == pairs.others.shape and len(pairs.clean) >= 6
    assert torch.equal(pairs.clean[:, pairs.border + 1 :], pairs.corrupted[:, pairs.border + 1 :])
    assert (pairs.clean[:, pairs.border] != pairs.corrupted[:, pairs.border]).all()
    assert PAD not in pairs.clean and {WORDS[i] for i in pairs.clean[:, -1].tolist()} == {":"}
    for clean, correct, wrong in zip(pairs.clean.tolist(), pairs.correct, pairs.wrong, strict=True):
        assert correct != wrong and correct in clean and wrong in clean
    again = draw(6, 4, seed=0)
    assert torch.equal(again.clean, pairs.clean) and not torch.equal(draw(6, 4, seed=1).clean, pairs.clean)


def test_the_label_of_a_pair_is_that_of_the_examples_of_its_class():
    """Read off the text alone: the verdict that is asked about has the class of those labelled by the answer."""
    for pairs in (state_pairs.label_pairs(4, 4, 0), state_pairs.query_pairs(4, 4, 0)):
        for tokens, answers in ((pairs.clean, pairs.correct), (pairs.corrupted, pairs.wrong)):
            for row, answer in zip(tokens.tolist(), answers, strict=True):
                words = [WORDS[i] for i in row]
                verdicts = [word in PRAISE for word in words if word in PRAISE or word in BLAME]
                colons = [i for i in range(len(words)) if words[i - 1 : i + 1] == ["Sentiment", ":"]]
                labels = [words[i + 1] for i in colons[:-1]]
                told = {label for verdict, label in zip(verdicts, labels, strict=False) if verdict == verdicts[-1]}
                assert told == {WORDS[answer]}


def test_a_repetition_asks_for_what_followed(model_of_kind):
    model = model_of_kind("hybrid")
    pairs = state_pairs.repetition_pairs(model, 3, 8, seed=0)
    start = pairs.clean.shape[1] - 12
    assert pairs.border == start + 7
    for row, corrupted, correct, wrong in zip(
        pairs.clean.tolist(), pairs.corrupted.tolist(), pairs.correct, pairs.wrong, strict=True
    ):
        said, again = row[start : start + 8], row[start + 8 :]
        assert said[:4] == again and said[4] == correct and corrupted[start + 4] == wrong
        assert wrong not in row and [i for i in range(len(row)) if row[i] != corrupted[i]] == [start + 4]


# -- patches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hybrid", "mamba2", "no-attention", "one-slot"])
def test_states_keys_and_values_are_all_that_is_remembered(model_of_kind, kind):
    model = model_of_kind(kind)
    pairs = state_pairs.repetition_pairs(model, 5, 8, seed=0)
    patched, clean, corrupted = state_pairs.patched_together(model, pairs, [2, 99], batch=3)
    assert (clean - corrupted).abs().min() > 1e-6
    whole = state_pairs.PERSISTENT if kind == "no-attention" else state_pairs.BOTH
    torch.testing.assert_close(patched[whole], clean, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(patched[state_pairs.NONE], corrupted, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(patched[state_pairs.windowed(99)], patched[state_pairs.PERSISTENT], atol=1e-9, rtol=1e-9)
    for other in (state_pairs.windowed(2), state_pairs.OTHER):
        assert (patched[other] - clean).abs().max() > 1e-6
    assert (state_pairs.KEYS in patched) == (kind != "no-attention")


def test_of_one_mamba_layer_all_together_is_that_layer(model_of_kind, monkeypatch):
    monkeypatch.setattr(state_pairs, "LEAST_DIFFERENCE", 1e-9)
    model = model_of_kind("one-slot")
    pairs = state_pairs.repetition_pairs(model, 4, 8, seed=0)
    together = {
        (row["what"], row["sample"]): row["value"]
        for row in state_pairs.together_rows(model, pairs, [2], batch=4)
        if row["measure"] == "share"
    }
    alone = {(row["what"], row["sample"]): row["value"] for row in state_pairs.layer_rows(model, pairs, [2])}
    assert set(alone) == {(what, i) for what in ("states", "states, 2 read-outs", "states, one read-out", "states, "
                          "read-out of the query") for i in range(4)}  # fmt: skip
    for key, value in alone.items():
        assert value == pytest.approx(together[key], abs=1e-4), key


@pytest.mark.parametrize("kind", ["hybrid", "mamba2", "no-attention"])
def test_random_channels_that_are_all_of_a_layer_are_that_layer(model_of_kind, kind, monkeypatch):
    """As the sweep has them, by other means; and all of all layers are what all layers together do."""
    model = model_of_kind(kind)
    pairs = state_pairs.repetition_pairs(model, 5, 8, seed=0)
    every = tuple(range(model.config.d_inner))
    sets = [((layer, every),) for layer in model.config.ssm_layers]
    sets.append(tuple((layer, every) for layer in model.config.ssm_layers))
    monkeypatch.setattr(state_pairs, "random_channels", lambda config, count, draws, seed: sets)
    found = state_pairs.random_channel_changes(model, pairs, 1, batch=3, seed=0)
    node = Node("ssm_state", conv=True)
    metric = logit_difference(list(pairs.correct), list(pairs.wrong))
    sweep = patch_sweep(model, pairs.clean, pairs.corrupted, metric, node, positions=[pairs.border], progress=False)
    changes = sweep.changes()[node.name].values[0, :, list(model.config.ssm_layers), 0]
    if kind != "mamba2":  # there the last inputs of B and C, which are no channels, stay
        np.testing.assert_allclose(found[:-1].numpy(), changes, atol=1e-9)
        patched, _, corrupted = state_pairs.patched_together(model, pairs, [2], batch=5)
        torch.testing.assert_close(found[-1], patched[state_pairs.PERSISTENT] - corrupted, atol=1e-9, rtol=1e-9)
    assert found.shape == (len(sets), 5) and found.abs().max() > 1e-6


def test_the_best_layer_is_chosen_on_one_half_and_measured_on_the_other(model_of_kind, monkeypatch):
    model = model_of_kind("hybrid")
    pairs = state_pairs.repetition_pairs(model, 4, 8, seed=0)
    asked = []
    monkeypatch.setattr(
        state_pairs, "random_channel_changes", lambda _, part, *rest: asked.append(part) or torch.ones(3, 2)
    )
    changes = pd.DataFrame({0: [0.0, 0.0, 5.0, 5.0], 2: [-3.0, -1.0, -0.5, -0.25], 3: [1.0, 1.0, 5.0, 5.0]})
    whole = np.array([-4.0, -4.0, -2.0, -0.1])
    rows = state_pairs._best_layer_rows(model, pairs, changes, whole, 3, 8, 0)
    assert torch.equal(asked[0].clean, pairs.clean[2:])
    of = {(r["measure"], r["what"], r["sample"]): (r["value"], r.get("layer")) for r in rows}
    assert of["share", state_pairs.BEST, 2] == (0.25, 2) and ("share", state_pairs.BEST, 3) not in of
    assert of["change, logits", state_pairs.BEST, 3] == (-0.25, 2)
    assert of["change, logits", state_pairs.CHANNELS, 2] == (1.0, None)


# -- probes --------------------------------------------------------------------------------------------------


def test_few_shot_targets_are_what_the_prompts_say():
    probed = state_probes.few_shot(12, 4, seed=0)
    sets: dict[int, set[str]] = {}
    for row, (at,), which, last, asked in zip(probed.tokens.tolist(), probed.positions.tolist(),
                                              *(t.tolist() for t in probed.targets.values()), strict=True):  # fmt: skip
        words = [WORDS[i] for i in row]
        assert words[at] == ":" and set(words[at + 1 :]) <= {"<pad>"}
        verdicts = [word in PRAISE for word in words if word in PRAISE or word in BLAME]
        assert [verdicts[-2], verdicts[-1]] == [last == 0, asked == 0]
        colons = [i for i in range(at) if words[i - 1 : i + 1] == ["Sentiment", ":"]]
        assert sets.setdefault(which, {words[i + 1] for i in colons}) == {words[i + 1] for i in colons}
    assert len(set(map(frozenset, sets.values()))) == len(sets) > 1


def test_random_words_are_probed_for_the_word_so_far_back(model_of_kind):
    probed = state_probes.random_words(model_of_kind("hybrid"), 20, (1, 5), seed=0)
    last = probed.tokens.shape[1] - 1
    for distance in (1, 5):
        tokens, target = probed.tokens[:, last - distance], probed.targets[f"word {distance} before"]
        assert len(set(zip(tokens.tolist(), target.tolist(), strict=True))) == len(set(tokens.tolist())) > 4


def test_a_state_tells_the_last_words_and_shuffled_labels_do_not(model_of_kind):
    """Of a model that forgets at once by construction: a state holds what its convolution reads, and no more."""
    model = model_of_kind("no-attention").float()
    for block in model.blocks:
        block.mixer.A_log.data += 4
    probed = state_probes.random_words(model, 240, (1, 24), seed=0)
    rows = state_probes.probe_rows(model, probed, True, 60, seed=0)
    of = {}
    for row in rows:
        of.setdefault((row["measure"], row.get("what")), []).append(row["value"])
    mean = {key: sum(values) / len(values) for key, values in of.items()}
    hits, control = (mean[name, "state: word 1 before"] for name in ("accuracy", "accuracy, shuffled labels"))
    assert hits > 0.45 > 0.25 > control
    assert mean["accuracy", "state: word 24 before"] < 0.35
    assert len(of["accuracy", "state: word 1 before"]) == 120 and 1 / 8 <= mean["chance", "state: word 1 before"] < 0.3
    assert len(of["by layer: accuracy", "state, untrained: word 1 before"]) == 480
    assert mean["selectivity", "state: word 1 before"] == pytest.approx(hits - control)


def test_half_lives_are_those_of_the_definition(model_of_kind):
    model = model_of_kind("no-attention")
    tokens = torch.randint(3, 29, (2, 9), generator=torch.Generator().manual_seed(0))
    rows = state_probes.half_life_rows(model, tokens)
    A, dt = -model.blocks[1].mixer.A_log.exp(), model.run_with_cache(tokens[1:])[1]["blocks.1.mixer.hook_dt"]
    expected = math.log(2) / (A.abs() * dt[0].mean(0)[:, None])
    (value,) = (r["value"] for r in rows if r["measure"].startswith("median") and (r["layer"], r["sample"]) == (1, 1))
    assert value == pytest.approx(expected.flatten().quantile(0.5).item(), rel=1e-5)


# -- the study -----------------------------------------------------------------------------------------------


def test_in_jamba_micro_labels_go_through_attention_and_the_review_through_states(tmp_path):
    settings = {"models": "jamba-micro", "asked": "labels,query", "pairs": 8}
    run = running.run("state_memory", make_spec("state_memory", state_memory.MemorySpec, settings), tmp_path)
    _, study, spec, rows = running.read(run.path)
    summary = summarize(rows, study.headline, study.by)

    def share(asked, what):
        return one(summary, measure="share", asked=asked, what=what)

    assert share("labels", "keys and values").low > 0.9 and share("labels", "states").high < 0.1
    assert share("query", "states").low > 0.9 and share("query", "keys and values").high < 0.1
    for asked in ("labels", "query"):
        assert share(asked, "states, keys and values")["mean"] == pytest.approx(1, abs=1e-3)
        assert share(asked, "its own states")["mean"] == pytest.approx(0, abs=1e-3)
        assert share(asked, "states of another pair").high < 0.3 and share(asked, "states").n >= 8
    assert share("query", "states of the best layer").n == share("query", "states of as many random channels").n <= 8
    text = study.reading(spec, rows)
    labels, query = text.split("Pairs that differ in ")[1:]
    assert re.search(
        r"chosen on one half of the pairs .*: states of the best layer .*; states of as many random", query
    )
    assert re.search(r"states carry less than keys and values", labels)
    assert re.search(r"states carry more than states of another pair .* carry more than keys and values", query)
    none = rows.assign(value=rows["value"].where(rows.measure != state_memory.WHOLE, rows["sample"] % 2 - 0.5))
    assert "so the right one is not remembered" in study.reading(spec, none)
    assert (run.path / "report.html").read_text().count("plotly-graph-div") >= 2


def test_any_model_with_states_is_asked_what_needs_no_words(model_of_kind, tmp_path):
    """Without a tokenizer, and of random weights: nothing is remembered far, and it says so."""
    model_of_kind("hybrid").float().save_pretrained(tmp_path / "model")
    settings = {"models": str(tmp_path / "model"), "prompts": 60, "pairs": 4, "distances": "1,24", "length": 8}
    spec = make_spec("state_memory", state_memory.MemorySpec, settings)
    with pytest.raises(ConfigError, match=r"asked=episodes,labels,query: .*; or set asked=words,half-life,repetition"):
        running.run("state_memory", spec, tmp_path / "runs")
    spec = make_spec("state_memory", state_memory.MemorySpec, settings | {"asked": "words,half-life,repetition"})
    run = running.run("state_memory", spec, tmp_path / "runs")
    _, study, spec, rows = running.read(run.path)
    text = study.reading(spec, rows)
    assert re.search(r"word 24 before: [^;]*, not there to be read", text)
    assert "Median half-life" in text and "a word of a random sequence" in text
    assert (run.path / "report.html").read_text().count("plotly-graph-div") >= 2


def planted(share: float, half_life: float, recipe: str, prompts: float = 7.0, n: int = 12) -> list[dict]:
    own = {"model": recipe, "recipe": recipe, "seed": 0}
    rows = [own | {"asked": asked, "measure": PROMPTS, "sample": 0, "value": prompts}
            for asked in ("labels", "half-life")]  # fmt: skip
    for i in range(n):
        same, noise = own | {"sample": i}, 0.01 * (-1) ** i * (recipe == "hybrid")
        rows.append(same | {"asked": "labels", "measure": "share", "what": "states", "value": share + noise})
        rows += [
            same | {"asked": "half-life", "measure": state_memory.MEDIAN, "layer": layer, "value": value + noise}
            for layer, value in ((0, half_life), (1, 4 * half_life))
        ]
    return rows


def test_models_are_compared_on_the_pairs_that_both_read():
    """The hybrid's share less the pure one's; half-lives as ratios, whatever their number of layers."""
    rows = pd.DataFrame(planted(0.2, 3.0, "hybrid") + planted(1.0, 6.0, "pure"))
    (text,) = state_memory._between(rows)
    assert "hybrid less pure, on the same prompts" in text
    assert re.search(r"through states: labels -0\.80 \[-0\.81, -0\.79\] \(p = 0\.00\d+, n = 12\)", text)
    assert re.search(r"times as long: of all layers 0\.50 \[0\.50, 0\.50\] \(p = 0\.00\d+, n = 12\)", text)
    alike = pd.DataFrame(planted(0.2, 3.0, "hybrid") + planted(0.2, 3.0, "pure"))
    assert state_memory._between(alike)[0].count("no difference told") == 2
    assert state_memory._between(pd.DataFrame(planted(0.2, 3.0, "a") + planted(0.9, 3.0, "b", prompts=8.0))) == []


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"distances": "0,1"}, "distances=.*at least 1"),
        ({"windows": "2,2"}, "windows="),
        ({"asked": ""}, "at least one"),
        ({"length": 2000}, "exceed its context"),
    ],
)
def test_settings_that_ask_nothing_are_refused(setting, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        running.run("state_memory", make_spec("state_memory", state_memory.MemorySpec, setting), tmp_path)


def test_a_model_without_states_is_refused(model_of_kind, tmp_path):
    model_of_kind("attention").float().save_pretrained(tmp_path / "attention")
    spec = make_spec("state_memory", load("state_memory").spec, {"models": str(tmp_path / "attention")})
    with pytest.raises(ConfigError, match="no Mamba layers, so it has no states"):
        running.run("state_memory", spec, tmp_path / "runs")
