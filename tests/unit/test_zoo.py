"""The packaged model: its language, its tokenizer, its weights, what it can do."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jambascope.errors import CheckpointError, ConfigError, InputError
from jambascope.model import HookedJamba
from jambascope.zoo import evaluation, language, packaged_models
from jambascope.zoo.language import BOS, DOMAINS, EOS, SPECIAL, VOCABULARY, document, mixture
from jambascope.zoo.tokenizer import build_tokenizer
from jambascope.zoo.train import RECIPES, batches, train

NAME = "jamba-micro"
SEED = 77  # of no training run and no model card


@pytest.fixture(scope="module")
def model() -> HookedJamba:
    return HookedJamba.from_pretrained(NAME, dtype=torch.float32)


# -- language ------------------------------------------------------------------------------------------------


def test_the_vocabulary_is_readable_and_of_moderate_size():
    assert 512 <= len(VOCABULARY) <= 768
    assert [VOCABULARY[token] for token in SPECIAL] == [0, 1, 2, 3]
    assert all(word == word.strip() and len(word.split()) == 1 for word in VOCABULARY)


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("domain", DOMAINS)
def test_documents_use_the_vocabulary_and_have_answers(domain, split):
    for seed in range(50):
        doc = document(domain, np.random.default_rng(seed), split)
        assert doc.domain == domain
        assert set(doc.words) <= VOCABULARY.keys()
        assert all(0 < answer < len(doc.words) for answer in doc.answers)
        assert document(domain, np.random.default_rng(seed), split) == doc


@pytest.mark.parametrize("domain", ["repeat", "review", "recall"])
def test_answers_stood_in_the_context_before(domain):
    for seed in range(50):
        doc = document(domain, np.random.default_rng(seed))
        assert all(doc.words[answer] in doc.words[:answer] for answer in doc.answers)


def combinations(domain: str, split: str) -> set[tuple[str, ...]]:
    """The combinations in documents of a domain that could be learned by heart."""
    found = set()
    for seed in range(300):
        words = document(domain, np.random.default_rng(seed), split).words
        if domain == "recall":
            table = words[2 : words.index(";")]
            found |= set(zip(table[::3], table[1::3], strict=True))
        elif domain == "story":
            found.add(tuple(sorted({word for word in words if word in language.NAMES})))
        else:
            ends = [i for i, word in enumerate(words) if word == "Sentiment"]
            found.add(tuple(sorted({words[i + 2] for i in ends})))
            for i in ends:
                topic = next(word for word in words[i - 3 :: -1] if word in language.TOPICS)
                found.add((topic, words[i - 2]))
    return {combination for combination in found if len(combination) == 2}


@pytest.mark.parametrize("domain", ["review", "story", "recall"])
def test_the_held_out_split_shares_no_combination_with_training(domain):
    trained, held_out = combinations(domain, "train"), combinations(domain, "held_out")
    assert len(trained) > 50 and len(held_out) > 20
    assert not trained & held_out


def test_rows_are_packed_and_marked():
    rows = list(islice(mixture(np.random.default_rng(0), 128), 40))
    for row in rows:
        assert row.ids.shape == row.answers.shape == row.domains.shape == (128,)
        assert row.ids[0] == BOS and row.domains[0] == -1
        assert not row.answers[row.ids == EOS].any()
        assert BOS not in row.ids[1:]
    assert set(np.concatenate([row.domains for row in rows])) == {-1, 0, 1, 2, 3}


def test_batches_depend_on_seed_and_step_alone():
    recipe = RECIPES[NAME]
    assert torch.equal(batches(recipe)(700), batches(recipe)(700))
    assert not torch.equal(batches(recipe)(700), batches(recipe)(701))
    assert [tuple(batches(recipe)(step).shape) for step in (0, 700)] == [(32, 34), (16, 128)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rng: document("poem", rng), "domain='poem' must be one of repeat, review, story, recall"),
        (lambda rng: document("story", rng, "test"), "split='test' must be 'train' or 'held_out'"),
        (lambda rng: next(mixture(rng, 1)), "length=1 must be at least 2"),
    ],
    ids=["domain", "split", "length"],
)
def test_what_does_not_exist_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(np.random.default_rng(0))


# -- tokenizer -----------------------------------------------------------------------------------------------


def test_every_word_is_one_token_and_comes_back():
    tokenizer = build_tokenizer()
    for word, i in VOCABULARY.items():
        assert tokenizer(word)["input_ids"] == [i]
        assert tokenizer.decode([i]) == word


def test_text_comes_back_with_single_spaces(tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    for tokenizer in (build_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        text = "Review : the plot , was gripping .\nSentiment : Positive"
        ids = tokenizer(text)["input_ids"]
        assert ids == [VOCABULARY[word] for word in text.split()]  # no special tokens
        assert tokenizer.decode(ids) == " ".join(text.split())
        assert tokenizer("alice Alice zebroid")["input_ids"] == [3, VOCABULARY["Alice"], 3]
        special = (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
        assert special == SPECIAL


# -- the packaged model --------------------------------------------------------------------------------------


def test_the_package_is_small_and_complete():
    directory = packaged_models()[NAME]
    names = {path.name for path in directory.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    assert sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) <= 8_000_000


def test_it_has_the_proportions_of_jamba(model):
    c = model.config
    assert (c.n_layers, c.attention_layers, c.moe_layers, c.experts_per_token) == (8, (4,), (1, 3, 5, 7), 2)
    assert c == RECIPES[NAME].config
    assert model.tokenizer.get_vocab() == VOCABULARY
    # Packed in bfloat16, computed in float32 unless asked otherwise.
    assert HookedJamba.from_pretrained(NAME).dtype == torch.float32
    assert HookedJamba.from_pretrained(NAME, dtype="bfloat16").dtype == torch.bfloat16
    assert HookedJamba.from_pretrained(packaged_models()[NAME]).dtype == torch.float32


def test_transformers_opens_it_and_agrees(model):
    theirs = AutoModelForCausalLM.from_pretrained(packaged_models()[NAME], dtype=torch.float32)
    rows = islice(mixture(np.random.default_rng(SEED), 48, "held_out"), 4)
    tokens = torch.as_tensor(np.stack([row.ids for row in rows]))
    with torch.no_grad():
        expected, found = theirs(tokens).logits, model(tokens)
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("prompt", ["{0}", "{0} {1}"], ids=["one word on", "second repetition"])
def test_it_continues_a_repetition(model, prompt):
    words = "whale Clara lamp winter golden Sam".split()
    once, twice = " ".join(words), " ".join(words[:3])
    text = f"{once} {twice}" if prompt == "{0}" else f"{once} {once} {twice}"
    assert model.generate(text, max_new_tokens=3) == f"{text} winter golden Sam"


def test_repeating_makes_random_words_predictable(model):
    found = evaluation.induction(model, sequences=64, length=30, seed=SEED)
    assert found["gain"].mean > 5  # measured: 6.26
    assert found["accuracy"].mean > 0.95  # measured: 0.998


def test_an_attention_head_looks_at_what_followed_before(model):
    scores = evaluation.induction_heads(model, sequences=32, seed=SEED)
    assert list(scores) == ["4.0", "4.1", "4.2", "4.3"]
    assert min(score.mean for score in scores.values()) > 0.7  # measured: 0.875 to 0.938


def test_it_reads_labels_off_the_context(model):
    found = evaluation.few_shot(model, episodes=100, seed=SEED)
    for kind in ("natural", "arbitrary"):
        assert found[f"{kind}, choice"].mean > 0.95  # measured: 1.0
        assert found[f"{kind}, mass"].mean > 0.9  # measured: 0.991 and 0.996


def test_it_looks_up_what_it_was_told(model):
    assert evaluation.recall_accuracy(model, documents=100, entries=4, seed=SEED).mean > 0.95  # measured: 1.0


def test_router_shares_add_up_and_no_expert_is_dead(model):
    load = evaluation.router_load(model, rows=16, seed=SEED)
    assert load.keys() == {"all", *DOMAINS}
    for domain, layers in load.items():
        assert list(layers) == [1, 3, 5, 7]
        for shares in layers.values():
            assert sum(shares) == pytest.approx(1)
            assert domain != "all" or min(shares) > 0.01  # measured: 0.037


@pytest.mark.parametrize(
    ("samples", "low", "high"),
    [
        (np.linspace(0, 2, 201), 1 - 1.96 * 0.0411, 1 + 1.96 * 0.0411),  # standard error: 2 / sqrt(12) / sqrt(201)
        ([3.5], -np.inf, np.inf),
        ([1.0] * 100, 0.963, 1.0),  # Wilson: a hundred hits leave room for a few misses in a hundred
        ([0.0, 1.0] * 50, 0.404, 0.596),
    ],
    ids=["numbers", "one number", "all hits", "half"],
)
def test_intervals_of_a_measure(samples, low, high):
    measure = evaluation.Measure.of(samples)
    assert (measure.mean, measure.n) == (np.mean(samples), len(samples))
    assert (measure.low, measure.high) == (pytest.approx(low, abs=5e-3), pytest.approx(high, abs=5e-3))


# -- making one ----------------------------------------------------------------------------------------------


def test_a_short_run_makes_a_whole_directory_with_a_card(tmp_path, monkeypatch):
    quick = lambda model: evaluation.Evaluation(  # noqa: E731
        held_out=evaluation.held_out_loss(model, 2),
        induction={10: evaluation.induction(model, 2, 10)},
        heads=evaluation.induction_heads(model, 2),
        few_shot={4: evaluation.few_shot(model, 20, 4)},
        recall={3: evaluation.recall_accuracy(model, 2, 3)},
        router=evaluation.router_load(model, 2),
    )
    monkeypatch.setattr(evaluation, "evaluate", quick)
    out = train(NAME, tmp_path / "model", steps=2, seed=5)
    card = (out / "README.md").read_text()
    assert f"jambascope zoo train {NAME} --out DIR --steps 2 --seed 5" in card
    assert "2 steps, 2,176 tokens, seed 5" in card
    assert "{" not in card
    assert "parameters | 1,6" in card
    assert HookedJamba.from_pretrained(out).dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="another spec"):
        train(NAME, out, steps=3, seed=5, resume=True)


def test_the_card_reports_the_shipped_recipe():
    card = (packaged_models()[NAME] / "README.md").read_text()
    spec = RECIPES[NAME].spec
    assert f"jambascope zoo train {NAME} --out DIR\n" in card
    assert f"{spec.steps} steps, {RECIPES[NAME].tokens:,} tokens, seed {spec.seed}" in card


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("jamba-mikro", {}, "did you mean 'jamba-micro'"),
        (NAME, {"steps": 0}, "steps=0: must be a whole number of at least 1"),
        (NAME, {"seed": -1}, "seed=-1: must be a whole number of at least 0"),
    ],
    ids=["name", "steps", "seed"],
)
def test_what_cannot_be_trained_is_refused(tmp_path, name, options, message):
    with pytest.raises(ConfigError, match=message):
        train(name, tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()


def test_a_file_is_no_place_for_a_model(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file; give a directory"):
        train(NAME, tmp_path / "file", steps=1)
