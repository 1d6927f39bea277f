"""Few-shot episodes and verdicts: labels, classes and what the held-out split keeps from training."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from jambascope.zoo.documents import is_held_out
from jambascope.zoo.reviews import HELD_OUT_KINDS, TRAINED_KINDS, Episode, review, verdict
from jambascope.zoo.words import (
    BLAME,
    FAMILIAR_LABELS,
    HELD_OUT_PAIRS,
    LABEL_PAIRS,
    LABELS,
    MOODS,
    PRAISE,
    SENTIMENTS,
    TOPICS,
    UNSEEN_LABELS,
    VERDICTS,
)

SPLITS = ("train", "held_out")
NEW_PAIRS = set(LABEL_PAIRS[-HELD_OUT_PAIRS:])


def episodes(split: str = "train", number: int = 100, **options) -> list[Episode]:
    return [review(np.random.default_rng([seed, 4]), split, **options) for seed in range(number)]


def texts(words: tuple[str, ...]) -> list[list[str]]:
    """The words of each review with its label or verdict."""
    return [text.split() for text in " ".join(words).split("Review : ")[1:]]


# -- episodes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    "options",
    [{}, dict(shots=20), dict(classes=4), dict(classes=8, shots=30), dict(filler=6, shots=3), dict(kind="unseen")],
    ids=lambda options: ", ".join(f"{k} {v}" for k, v in options.items()) or "drawn",
)
def test_labels_stand_where_the_episode_says(options, split):
    for episode in episodes(split, 25, **options):
        header = "Sentiment" if len(episode.labels) == 2 else "Mood"
        assert len(set(episode.labels)) == len(episode.labels)
        assert len(episode.label_positions) == len(episode.classes) == episode.words.count("Review")
        for position, class_ in zip(episode.label_positions, episode.classes, strict=True):
            assert episode.words[position - 2 : position] == (header, ":")
            assert episode.words[position] == episode.labels[class_]
        assert len(episode.classes) == options.get("shots", len(episode.classes))
        assert len(episode.labels) == options.get("classes", len(episode.labels))


@pytest.mark.parametrize("classes", [2, 3, 8])
def test_a_class_has_its_own_adjectives(classes):
    """Sentiments when two, else moods: a class is one group of adjectives, and no two classes share one."""
    groups = list(SENTIMENTS) if classes == 2 else list(MOODS.values())
    for episode in episodes(number=25, classes=classes, shots=16, filler=1):
        group_of = {}
        for words, class_ in zip(texts(episode.words), episode.classes, strict=True):
            (group,) = [i for i, group in enumerate(groups) if set(group) & set(words[:-3])]
            assert group_of.setdefault(class_, group) == group
        assert len(set(group_of.values())) == len(group_of)


@pytest.mark.parametrize("kind", ["natural", "new_natural", "flipped"])
def test_natural_labels_mean_what_they_say_unless_flipped(kind):
    for episode in episodes(number=25, kind=kind):
        praise, blame = reversed(episode.labels) if kind == "flipped" else episode.labels
        assert (praise, blame) in LABEL_PAIRS
        assert ((praise, blame) in NEW_PAIRS) == (kind == "new_natural")
        for words in texts(episode.words):
            said_praise = (words[-1] == praise) == (kind != "flipped")
            assert bool(set(words) & set(PRAISE)) == said_praise


def test_answers_are_labels_whose_class_was_shown():
    for episode in episodes(classes=3, shots=6):
        shown = [c in episode.classes[:i] for i, c in enumerate(episode.classes)]
        assert episode.answers == tuple(p for p, known in zip(episode.label_positions, shown, strict=True) if known)


def test_shuffled_labels_know_nothing_of_the_class():
    found = episodes(number=60, shots=12, classes=2, shuffled=True)
    agree = [e.words[p] == e.labels[c] for e in found for p, c in zip(e.label_positions, e.classes, strict=True)]
    assert np.mean(agree) == pytest.approx(0.5, abs=0.06)
    assert all(episode.words[p] in episode.labels for episode in found for p in episode.label_positions)
    assert all(episode.answers == () for episode in found)


def test_fillers_say_nothing_of_the_class():
    for episode in episodes(number=10, shots=4, classes=2, filler=5):
        for words in texts(episode.words):
            assert words.count(".") >= 6
            assert len(set(words) & {*PRAISE, *BLAME}) == 1


@pytest.mark.parametrize("split", SPLITS)
def test_drawn_episodes_show_every_kind_and_number_of_classes(split):
    found = episodes(split, 300)
    assert {len(episode.labels) for episode in found} == {2, 3, 4}
    assert all(len(e.classes) >= max(4, 2 * len(e.labels)) and len(e.classes) <= 9 for e in found)
    pairs = [episode.labels for episode in found if len(episode.labels) == 2]
    natural = [labels for labels in pairs if labels in LABEL_PAIRS]
    flipped = [labels for labels in pairs if labels[::-1] in LABEL_PAIRS]
    arbitrary = [labels for labels in pairs if not set(labels) & set(LABELS)]
    assert len(natural) > 20 and len(arbitrary) > 60
    assert bool(flipped) == (split == "train") and len(flipped) < len(natural)


# -- splits ------------------------------------------------------------------------------------------------------


def pairs_of(found: list[Episode]) -> set[frozenset[str]]:
    """Labels that stand side by side in an episode."""
    return {frozenset(pair) for episode in found for pair in combinations(episode.labels, 2)}


@pytest.mark.parametrize("classes", [None, 2, 3, 4, 5, 8])
def test_training_never_combines_labels_of_the_held_out_split(classes):
    trained = pairs_of(episodes(number=500, classes=classes, shots=1))
    held_out = pairs_of(episodes("held_out", 300, classes=2, shots=1))
    assert len(trained) > 100 and len(held_out) > 60
    assert not trained & held_out


@pytest.mark.parametrize("classes", [2, 3, 4, 8])
@pytest.mark.parametrize(("kind", "pool"), [("arbitrary", FAMILIAR_LABELS), ("unseen", UNSEEN_LABELS)])
def test_every_held_out_episode_combines_labels_anew(kind, pool, classes):
    for episode in episodes("held_out", 50, classes=classes, kind=kind, shots=1):
        places = [pool.index(word) for word in episode.labels]
        assert any(is_held_out(i, j) for i, j in combinations(places, 2))


def test_training_draws_no_label_that_is_held_out():
    words = {word for episode in episodes(number=1000, shots=1) for word in episode.labels}
    assert words == {*FAMILIAR_LABELS, *LABELS[: -2 * HELD_OUT_PAIRS]}
    assert not set(TRAINED_KINDS) & {"unseen", "new_natural"}


def test_training_judges_by_no_held_out_label():
    judged = {words[-1] for seed in range(300) for words in texts(verdict(np.random.default_rng(seed)).words)}
    assert not judged & {*UNSEEN_LABELS, *LABELS[-2 * HELD_OUT_PAIRS :]}


def test_held_out_kinds_are_those_asked_for_by_name():
    found = {
        "arbitrary": FAMILIAR_LABELS,
        "new_natural": [word for pair in NEW_PAIRS for word in pair],
        "unseen": UNSEEN_LABELS,
    }
    assert found.keys() == set(HELD_OUT_KINDS)
    for kind, pool in found.items():
        words = {word for episode in episodes("held_out", 300, kind=kind, classes=2) for word in episode.labels}
        assert words == set(pool)


def judged_pairs(documents) -> set[tuple[str, str]]:
    """Topic and adjective of each review."""
    found = set()
    for doc in documents:
        for words in texts(doc.words):
            (topic,), (adjective,) = ([w for w in words[:-2] if w in group] for group in (TOPICS, PRAISE + BLAME))
            found.add((topic, adjective))
    return found


@pytest.mark.parametrize("other", ["verdicts", "sentiments", "moods"])
def test_the_splits_share_no_topic_and_adjective(other):
    def draw(split, seed):
        rng = np.random.default_rng(seed)
        return verdict(rng, split) if other == "verdicts" else review(rng, split, 12, 2 if other == "sentiments" else 8)

    trained = judged_pairs(episodes(number=300))
    held_out = judged_pairs(draw("held_out", seed) for seed in range(100))
    assert len(trained) > 500 and len(held_out) > 80
    assert not trained & held_out
    assert not judged_pairs(draw("train", seed) for seed in range(100)) & held_out


# -- verdicts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_verdicts_judge_by_synonyms_of_the_class(split):
    said = ([], [])
    for seed in range(150):
        doc = verdict(np.random.default_rng(seed), split, reviews=3)
        found = texts(doc.words)
        assert len(found) == 3
        later = 0
        for words in found:
            class_ = 0 if set(words[: words.index("Sentiment")]) & set(PRAISE) else 1
            judged = " ".join(words[words.index("Sentiment") + 2 :])
            said[class_].append(judged)
            later += len(judged.split()) - 1
        assert len(doc.answers) == later
    for found, verdicts in zip(said, VERDICTS, strict=True):
        assert set(found) == set(verdicts)
        assert max(map(found.count, verdicts)) < len(found) / 4  # many compete: no single one can be foretold
