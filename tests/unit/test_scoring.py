"""Scores of the language against loops over single documents in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from jambascope import HookedJamba, JambaConfig
from jambascope.errors import InputError
from jambascope.initialization import initialize
from jambascope.zoo import progress, scoring
from jambascope.zoo.documents import Document, phones, recall, story
from jambascope.zoo.language import DOMAINS, document
from jambascope.zoo.reviews import review, verdict
from jambascope.zoo.scoring import answer_scores, label_scores, verdict_scores
from jambascope.zoo.words import BOS, LABELS, VERDICTS, VOCABULARY

FIRST = [{text.split()[0] for text in verdicts} for verdicts in VERDICTS]
LOUD = [*LABELS[:4], *sorted(FIRST[0] ^ FIRST[1])]
"""What the random model says."""


@pytest.fixture(scope="module")
def model() -> HookedJamba:
    """Random, but with few words that it ever says, so that some of them are right."""
    torch.manual_seed(0)
    config = JambaConfig.jamba(
        n_layers=3, attn_layer_period=3, attn_layer_offset=1, d_model=16, d_vocab=len(VOCABULARY), n_heads=2,
        n_key_value_heads=1, d_head=8, d_mlp=8, num_experts=4, d_state=4, pad_token_id=0,
    )  # fmt: skip
    model = HookedJamba(config)
    initialize(model, std=0.6)
    with torch.no_grad():
        model.unembed.weight.mul_(0.1)
        model.unembed.weight[[VOCABULARY[word] for word in LOUD]] *= 30
    return model.eval()


@pytest.fixture(scope="module")
def exact(model) -> HookedJamba:
    exact = HookedJamba(model.config, dtype="float64")
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    return exact.eval()


@torch.no_grad()
def before(exact: HookedJamba, doc: Document, i: int) -> dict[str, float]:
    """Word -> probability of standing at i, of a document cut there, alone."""
    ids = [BOS, *(VOCABULARY[word] for word in doc.words[:i])]
    p = exact(torch.tensor([ids]))[0, -1].softmax(-1).tolist()
    return dict(zip(VOCABULARY, p, strict=True))


def reviews(number: int, **options) -> list:
    """Two of three label their reviews by words of ``LOUD``."""
    found, seed = [], 0
    while len(found) < number:
        kind = ("natural", "flipped", "arbitrary")[len(found) % 3]
        episode = review(np.random.default_rng(seed), shots=6, classes=2, kind=kind, **options)
        seed += 1
        if kind == "arbitrary" or set(episode.labels) <= set(LOUD):
            found.append(episode)
    return found


def same(found: torch.Tensor, expected: list[list[float]], rel: float = 1e-4, tiny: float = 1e-6) -> None:
    assert found.shape == (len(expected), max(map(len, expected), default=0))
    for row, numbers in zip(found.tolist(), expected, strict=True):
        assert row == pytest.approx(numbers + [np.nan] * (len(row) - len(numbers)), rel=rel, abs=tiny, nan_ok=True)


@pytest.fixture(params=[scoring.TOKENS, 100], ids=["one batch", "several batches"])
def batch_tokens(request, monkeypatch) -> int:
    monkeypatch.setattr(scoring, "TOKENS", request.param)
    return request.param


def test_answers_are_those_of_single_documents(model, exact, batch_tokens):
    rng = np.random.default_rng(0)
    docs = [*reviews(8), recall(rng, entries=3), story(rng), phones(rng, questions=0), recall(rng, entries=2)]
    found = answer_scores(model, docs)
    hits, losses = [], []
    for doc in docs:
        said = [before(exact, doc, i) for i in doc.answers]
        hits.append([float(max(p, key=p.get) == doc.words[i]) for p, i in zip(said, doc.answers, strict=True)])
        losses.append([-np.log(p[doc.words[i]]) for p, i in zip(said, doc.answers, strict=True)])
    assert {0.0, 1.0} <= {hit for row in hits for hit in row}  # else a test of hits would test nothing
    assert hits[10] == []
    same(found.hits, hits)
    same(found.losses, losses)


def test_labels_are_those_of_single_documents(exact, batch_tokens):
    """Of logits in float64: a few of these documents amplify float32 to errors of 5e-4, whatever computes the scan."""
    episodes = reviews(12, filler=0) + reviews(3, filler=2)
    found = label_scores(exact, episodes)
    expected = {field.name: [] for field in dataclasses.fields(found)}
    for episode in episodes:
        rows = {name: [] for name in expected}
        for i, (position, class_) in enumerate(zip(episode.label_positions, episode.classes, strict=True)):
            p = before(exact, episode, position)
            free = max(p, key=p.get)
            of_labels = {word: p[word] for word in episode.labels}
            best = max(of_labels, key=of_labels.get)
            known = class_ in episode.classes[:i]
            right = episode.labels[class_]
            rows["mass"].append(sum(of_labels.values()))
            rows["valid"].append(float(free in episode.labels))
            rows["acc_free"].append(float(free == right) if known else np.nan)
            rows["acc_restricted"].append(float(best == right) if known else np.nan)
            rows["confidence"].append(of_labels[best] / sum(of_labels.values()) if known else np.nan)
        for name, row in rows.items():
            expected[name].append(row)
    for name in ("valid", "acc_free", "acc_restricted"):
        assert {0.0, 1.0} <= {number for row in expected[name] for number in row}, name
    for name, numbers in expected.items():
        same(getattr(found, name), numbers, 1e-6, 1e-9)
    gap = np.array(expected["acc_restricted"]) - np.array(expected["acc_free"])
    same(found.format_gap, gap.tolist())
    assert (gap[~np.isnan(gap)] > 0).any()


def test_shuffled_labels_have_mass_but_no_accuracy(model):
    found = label_scores(model, reviews(4, shuffled=True))
    assert not found.mass.isnan().any() and not found.valid.isnan().any()
    assert found.acc_free.isnan().all() and found.format_gap.isnan().all()


def test_verdicts_are_those_of_single_documents(model, exact, batch_tokens):
    docs = [verdict(np.random.default_rng(i)) for i in range(16)]
    found = verdict_scores(model, docs)
    mass, known = [], []
    for doc in docs:
        header = len(doc.words) - 1 - doc.words[::-1].index("Sentiment")
        p = before(exact, doc, header + 2)
        class_ = 0 if " ".join(doc.words[header + 2 :]) in VERDICTS[0] else 1
        own, other = FIRST[class_] - FIRST[1 - class_], FIRST[1 - class_] - FIRST[class_]
        mass.append([sum(p[word] for word in FIRST[0] | FIRST[1])])
        known.append([float(sum(p[w] for w in own) > sum(p[w] for w in other))])
    assert {number for row in known for number in row} == {0.0, 1.0}
    same(found["mass"][:, None], mass)
    same(found["class_known"][:, None], known)


def test_gradients_are_not_kept(model):
    assert not answer_scores(model, [document("copy", np.random.default_rng(0))]).losses.requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: answer_scores(m, []), "at least one document"),
        (lambda m: label_scores(m, []), "at least one document"),
        (lambda m: verdict_scores(m, []), "at least one document"),
        (lambda m: label_scores(m, [*reviews(1), review(np.random.default_rng(0), shots=3)]), r"have \[3, 6\] reviews"),
        (lambda m: verdict_scores(m, [story(np.random.default_rng(0))]), r"documents\[0\] does not end in a verdict"),
        (lambda m: verdict_scores(m, reviews(1)), r"a verdict, but in '\w+'; draw it with reviews\.verdict"),
    ],
    ids=["answers", "labels", "verdicts", "lengths", "a story", "an episode"],
)
def test_documents_that_cannot_be_scored(model, call, message):
    with pytest.raises(InputError, match=message):
        call(model)


# -- what a training run is followed by -----------------------------------------------------------------------------


def test_the_summary_of_a_run(model):
    found = progress.summary(model)
    assert tuple(found) == progress.MEASURES
    assert found.pop("held_out") > np.log(len(VOCABULARY)) / 2
    assert all(0 <= value <= 1 for value in found.values())
    assert progress.summary(model) == {**progress.summary(model), **found}


def test_held_out_losses_of_domains(model, exact):
    found = progress.held_out_losses(model, rows=2, length=60)
    assert found.keys() == DOMAINS.keys()
    again = progress.held_out_losses(exact, rows=2, length=60)
    assert list(found.values()) == pytest.approx(list(again.values()), rel=1e-4)
    assert len(set(found.values())) == len(DOMAINS)
