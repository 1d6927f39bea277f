"""The packaged models: tokenizer, files, transformers' opinion, and what jamba-micro can do."""

from __future__ import annotations

import socket
import time
from itertools import islice

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jambascope.hf_format import config_from_hf, config_to_hf
from jambascope.model import HookedJamba
from jambascope.zoo import packaged_models, progress
from jambascope.zoo.language import DOMAINS, document, mixture
from jambascope.zoo.recipes import RECIPES
from jambascope.zoo.reviews import review, verdict
from jambascope.zoo.scoring import answer_scores, label_scores, verdict_scores
from jambascope.zoo.tokenizer import build_tokenizer
from jambascope.zoo.words import SPECIAL, VOCABULARY

NAME = "jamba-micro"
SEED = 77  # of no training run and no evaluation
SHIPPED = sorted(packaged_models())
READ_BY_TRANSFORMERS = [
    name for name in SHIPPED if config_to_hf(RECIPES[name].config, torch.bfloat16)["model_type"] == "jamba"
]


@pytest.fixture(scope="module")
def model() -> HookedJamba:
    return HookedJamba.from_pretrained(NAME, dtype=torch.float32)


def drawn(domain: str, number: int = 64, **options) -> list:
    rng = np.random.default_rng([SEED, list(DOMAINS).index(domain)])
    return [document(domain, rng, "held_out", **options) for _ in range(number)]


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


# -- the package ---------------------------------------------------------------------------------------------


def test_the_package_is_small_and_complete():
    """No control ships, and what ships is whole."""
    assert SHIPPED == sorted(name for name, recipe in RECIPES.items() if recipe.packaged)
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    for directory in packaged_models().values():
        assert expected <= {path.name for path in directory.iterdir()}
    files = [path for directory in packaged_models().values() for path in directory.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 30_000_000


@pytest.mark.parametrize("name", SHIPPED)
def test_a_packaged_model_is_that_of_its_recipe(name):
    """Packed in bfloat16, computed in float32 unless asked otherwise."""
    model = HookedJamba.from_pretrained(name)
    # What a file says of a model without experts is that it has one.
    assert model.config == config_from_hf(config_to_hf(RECIPES[name].config, torch.bfloat16))
    assert model.tokenizer.get_vocab() == VOCABULARY
    assert model.dtype == torch.float32
    assert HookedJamba.from_pretrained(name, dtype="bfloat16").dtype == torch.bfloat16
    assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_packaged_model_loads_quickly_and_without_a_network(name, monkeypatch):
    def no_network(*_, **__):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    took = []
    for _ in range(2):  # the first call imports what it needs
        start = time.process_time()
        HookedJamba.from_pretrained(name)
        took.append(time.process_time() - start)
    assert min(took) < 2


@pytest.mark.parametrize("name", SHIPPED)
def test_a_packaged_model_opens_without_a_word(name, caplog, capfd):
    """Those that transformers cannot describe, too."""
    HookedJamba.from_pretrained(name)
    assert caplog.records == [] and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", SHIPPED)
def test_what_transformers_can_describe_it_opens_and_agrees_with(name):
    directory = packaged_models()[name]
    if name not in READ_BY_TRANSFORMERS:
        with pytest.raises(ValueError, match="jambascope"):
            AutoModelForCausalLM.from_pretrained(directory)
        return
    model, theirs = HookedJamba.from_pretrained(name), AutoModelForCausalLM.from_pretrained(directory)
    rows = islice(mixture(np.random.default_rng(SEED), 48, "held_out"), 4)
    tokens = torch.as_tensor(np.stack([row.ids for row in rows]))
    with torch.no_grad():
        expected, found = theirs.float()(tokens, use_cache=False).logits, model(tokens)
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("name", SHIPPED)
def test_every_packaged_model_has_learned_the_language(name):
    """A word by chance is log 571 = 6.3 nats; most of what a secret stands among is noise of log 64 = 4.2."""
    losses = progress.held_out_losses(HookedJamba.from_pretrained(name))
    del losses["repeat"]  # whose words are drawn from all, so that only reading the context makes it easier
    assert max(losses.values()) < 5 and np.mean(list(losses.values())) < 3.5, losses


# -- what jamba-micro can do ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["{0} {1}", "{0} {0} {1}"], ids=["first repetition", "second repetition"])
def test_it_continues_a_repetition(model, prompt):
    words = "whale Clara lamp winter golden Sam river seven".split()
    text = prompt.format(" ".join(words), " ".join(words[:4]))
    assert model.generate(text, max_new_tokens=4) == f"{text} golden Sam river seven"


@pytest.mark.parametrize(
    ("domain", "options", "least"),
    [
        ("repeat", dict(length=24, times=2), 0.9),
        ("repeat", dict(length=8, times=2), 0.9),
        ("recall", dict(entries=4), 0.85),
        ("recall", dict(entries=12), 0.7),
        ("phones", dict(entries=3), 0.8),
        ("copy", dict(count=4, noise=2), 0.5),
        ("secret", dict(distance=16), 0.8),
        ("story", {}, 0.7),
    ],
    ids=lambda value: " ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value),
)
def test_it_reads_answers_off_the_context(model, domain, options, least):
    assert answer_scores(model, drawn(domain, **options)).hits.nanmean() > least


@pytest.mark.parametrize(
    ("kind", "mass", "accuracy"),
    [("natural", 0.6, 0.85), ("arbitrary", 0.4, 0.65)],
    ids=["natural labels", "labels of training in new pairs"],
)
def test_it_reads_labels_off_the_context(model, kind, mass, accuracy):
    """After four shots; chance is 0.5 of the two labels, and a word in 570 of all."""
    found = label_scores(model, drawn("review", 128, shots=9, classes=2, kind=kind))
    assert found.mass[:, 4:].mean() > mass
    assert found.acc_restricted[:, 4:].nanmean() > accuracy


def test_it_follows_labels_that_contradict_each_other(model):
    """With labels by chance it still says one of the two; its guess is no better than chance."""
    rng = np.random.default_rng(SEED)
    shuffled = [review(rng, "held_out", 9, 2, "natural", shuffled=True) for _ in range(64)]
    found = label_scores(model, shuffled)
    assert found.mass[:, 4:].mean() > 0.4 and found.acc_free.isnan().all()


def test_it_knows_a_sentiment_without_examples(model):
    rng = np.random.default_rng(SEED)
    found = verdict_scores(model, [verdict(rng, "held_out", reviews=2) for _ in range(128)])
    assert found["mass"].mean() > 0.5
    assert found["class_known"].mean() > 0.8


@pytest.mark.parametrize("domain", ["all", *DOMAINS])
def test_router_shares_add_up_and_no_expert_is_dead(model, domain):
    shares = {} if domain == "all" else {"shares": {domain: 1.0}}
    rows = islice(mixture(np.random.default_rng(SEED), 128, "held_out", **shares), 8)
    tokens = torch.as_tensor(np.stack([row.ids for row in rows]))
    layers = model.config.moe_layers
    names = [f"blocks.{layer}.mlp.router.hook_expert_indices" for layer in layers]
    with torch.no_grad():
        cache = model.run_with_cache(tokens, names_filter=names)[1]
    assert layers == (1, 3, 5, 7)
    for name in names:
        load = cache[name].flatten().bincount(minlength=model.config.num_experts) / cache[name].numel()
        assert load.sum().item() == pytest.approx(1) and len(load) == model.config.num_experts
        assert domain != "all" or load.min() > 0.01
