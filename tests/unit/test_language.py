"""The packaged models' language: documents whose answers an independent reader finds, splits that share nothing."""

from __future__ import annotations

from itertools import combinations, islice

import numpy as np
import pytest

from jambascope.errors import InputError
from jambascope.zoo import documents, reviews
from jambascope.zoo.language import DOMAINS, SHARES, Row, document, ids_of, mixture
from jambascope.zoo.words import (
    BLAME,
    BOS,
    COLORS,
    DIGITS,
    EOS,
    FAMILIAR_LABELS,
    KEYS,
    LABELS,
    MOODS,
    NAMES,
    PAD,
    PLACES,
    PLURALS,
    PRAISE,
    SENTIMENTS,
    SPECIAL,
    THINGS,
    UNSEEN_LABELS,
    VALUES,
    VERDICTS,
    VOCABULARY,
    WORDS,
)

SPLITS = ("train", "held_out")
GENERATORS = {
    "repeat": documents.repeat,
    "story": documents.story,
    "recall": documents.recall,
    "phones": documents.phones,
    "copy": documents.copy,
    "secret": documents.secret,
    "review": reviews.review,
    "verdict": reviews.verdict,
}


def drawn(domain: str, split: str = "train", number: int = 40, **options) -> list[documents.Document]:
    return [document(domain, np.random.default_rng([seed, 9]), split, **options) for seed in range(number)]


# -- words -------------------------------------------------------------------------------------------------------


def test_the_vocabulary_is_readable_and_of_moderate_size():
    assert 512 <= len(VOCABULARY) <= 1024
    assert [VOCABULARY[token] for token in SPECIAL] == [PAD, BOS, EOS, 3]
    assert list(VOCABULARY.values()) == list(range(len(VOCABULARY)))
    assert all(len(word.split()) == 1 and word == word.strip() for word in VOCABULARY)


@pytest.mark.parametrize("words", [KEYS, VALUES, FAMILIAR_LABELS, UNSEEN_LABELS, NAMES, PRAISE + BLAME, LABELS])
def test_lists_hold_each_word_once(words):
    assert len(set(words)) == len(words)
    assert set(words) <= VOCABULARY.keys()


@pytest.mark.parametrize(
    ("one", "other"),
    [(KEYS, VALUES), (FAMILIAR_LABELS, UNSEEN_LABELS), (PRAISE, BLAME), (LABELS, PRAISE + BLAME)],
    ids=["keys and values", "familiar and unseen labels", "praise and blame", "labels and adjectives"],
)
def test_lists_that_must_differ_share_nothing(one, other):
    assert not set(one) & set(other)


def test_the_first_word_of_most_verdicts_tells_the_class():
    first = [{verdict.split()[0] for verdict in verdicts} for verdicts in VERDICTS]
    assert first[0] & first[1] == {"Very", "Must", "A", "Thumbs"}
    assert all(len({v.split()[0] for v in verdicts}) == len(verdicts) for verdicts in VERDICTS)


def test_every_word_occurs_in_training_documents():
    """Untrained embeddings would make a held-out word a random one."""
    seen = {word for domain in DOMAINS for doc in drawn(domain, number=400) for word in doc.words}
    assert seen == set(WORDS)


def test_what_is_held_out_as_label_is_read_elsewhere_than_in_repetitions():
    others = [domain for domain in DOMAINS if domain != "repeat"]
    seen = {word for domain in others for doc in drawn(domain, number=400) for word in doc.words}
    assert set(UNSEEN_LABELS) <= seen


# -- answers -----------------------------------------------------------------------------------------------------
# Each reader is given the words before an answer, and says what must follow.


def read_repetition(before: list[str]) -> str:
    earlier = len(before) - 2 - before[-2::-1].index(before[-1])
    return before[earlier + 1]


def read_table(before: list[str]) -> str:
    table = before[2 : before.index(";")]
    return dict(zip(table[::3], table[1::3], strict=True))[before[-2]]


def read_phone_book(before: list[str]) -> str:
    entries = " ".join(before[2 : before.index(";")]).split(" , ")
    book = {name: number for name, *number in map(str.split, entries)}
    arrow = len(before) - 1 - before[::-1].index("->")
    return book[before[arrow - 1]][len(before) - 1 - arrow]


def read_words_among_noise(before: list[str]) -> str:
    arrow = before.index("->")
    return [word for word in before[2:arrow] if word != "."][len(before) - 1 - arrow]


def read_story(before: list[str]) -> str | None:
    """None where the sentence could go on in another way."""
    start = len(before) - before[::-1].index(".") if "." in before else 0
    now, last = before[start:], before[-1]
    people = [word for word in before if word in NAMES]
    if last in PLURALS + THINGS and "near" in now and now[-3:-1] == ["near", "the"]:
        return "is" if now[1] in THINGS else "are"
    if last == "thanked" or now[-1:] in (["to"], ["with"]):
        return next(name for name in people if name != people[-1])
    groups = {"found the": THINGS, "left the": PLACES, "wants the": COLORS}
    for ending, group in groups.items():
        if " ".join(now).endswith(ending):
            return [word for word in before if word in group][-1]
    if last in COLORS or now == ["the"]:
        said = THINGS if last in COLORS else COLORS
        return [word for word in before if word in said][-1]
    return None


def class_of(words: list[str]) -> str:
    """The adjective's mood."""
    return next(mood for mood, adjectives in MOODS.items() if set(adjectives) & set(words))


def read_label(before: list[str]) -> str:
    """The label of the last review of the same class."""
    header = before[-2]
    texts = " ".join(before).split("Review : ")[1:]
    classes = [class_of(text.split()) for text in texts]
    if header == "Sentiment":
        classes = ["praise" if mood in list(MOODS)[:4] else "blame" for mood in classes]
    same = [text for text, class_ in zip(texts[:-1], classes, strict=False) if class_ == classes[-1]]
    return same[-1].split()[-1]


def read_verdict(before: list[str]) -> str:
    header = len(before) - 1 - before[::-1].index("Sentiment")
    review = before[len(before) - 1 - before[::-1].index("Review") :]
    verdicts = VERDICTS[0 if set(review) & set(PRAISE) else 1]
    said = before[header + 2 :]
    (found,) = [v.split() for v in verdicts if v.split()[: len(said)] == said]
    return found[len(said)]


READERS = {
    "repeat": read_repetition,
    "review": read_label,
    "verdict": read_verdict,
    "story": read_story,
    "recall": read_table,
    "phones": read_phone_book,
    "copy": read_words_among_noise,
    "secret": read_repetition,
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("domain", DOMAINS)
def test_the_context_determines_the_answers(domain, split):
    answers = 0
    for doc in drawn(domain, split):
        assert doc.domain == domain
        assert set(doc.words) <= VOCABULARY.keys()
        assert list(doc.answers) == sorted(set(doc.answers))
        for answer in doc.answers:
            before = list(doc.words[:answer])
            assert READERS[domain](before) == doc.words[answer], " ".join(before)
            assert domain in ("story", "verdict") or doc.words[answer] in before
            answers += 1
    assert answers >= 40


@pytest.mark.parametrize("index", range(len(documents.SENTENCES)))
def test_every_sentence_has_answers(index):
    doc = document("story", np.random.default_rng(0), index=index)
    marked = documents.SENTENCES[index].split()
    assert doc.answers == tuple(i for i, word in enumerate(marked) if "=" in word) != ()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("domain", DOMAINS)
def test_the_same_seed_draws_the_same_document(domain, split):
    found = drawn(domain, split, 10)
    assert found == drawn(domain, split, 10)
    assert len({doc.words for doc in found}) == 10


# -- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    ("domain", "options", "length", "answers"),
    [
        ("repeat", dict(length=5, times=3, pool=50), 15, 8),  # all but the first word of a repetition
        ("repeat", dict(length=1, times=4), 4, 0),
        ("recall", dict(entries=40, questions=3), 2 + 40 * 3 - 1 + 3 * 4, 3),
        ("recall", dict(entries=2, questions=8), 2 + 2 * 3 - 1 + 2 * 4, 2),
        ("phones", dict(entries=20, questions=2), 2 + 20 * 5 - 1 + 2 * 7, 6),
        ("phones", dict(entries=1, questions=0), 2 + 4, 0),
        ("copy", dict(count=12, noise=50), 2 + 62 + 1 + 12, 12),
        ("copy", dict(count=1, noise=0), 2 + 1 + 1 + 1, 1),
    ],
    ids=lambda value: ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value),
)
def test_options_are_counts(domain, options, length, answers, split):
    for doc in drawn(domain, split, 5, **options):
        assert (len(doc.words), len(doc.answers)) == (length, answers)


def test_a_secret_is_asked_for_after_a_distance():
    for doc in drawn("secret", number=10, distance=100):
        first = doc.words.index("secret")
        assert doc.words[first + 102] == "secret" and doc.words[first + 1] == doc.words[-1]
        assert doc.words.count(doc.words[-1]) == 2  # the noise never says it


def test_a_pool_limits_repetitions():
    words = {word for doc in drawn("repeat", length=8, times=2, pool=10) for word in doc.words}
    assert words == set(WORDS[:10])


@pytest.mark.parametrize(
    ("domain", "options", "message"),
    [
        ("repeat", dict(length=0), r"length=0 must lie in 1\.\."),
        ("repeat", dict(length=11, pool=10), r"length=11 must lie in 1\.\.10"),
        ("repeat", dict(times=0), "times=0 must be at least 1"),
        ("story", dict(index=99), r"index=99 must lie in 0\.\.8"),
        ("recall", dict(entries=0), "entries=0 must lie in"),
        ("recall", dict(entries=9999), "entries=9999 must lie in"),
        ("recall", dict(questions=-1), "questions=-1 must be at least 0"),
        ("phones", dict(entries=33), r"entries=33 must lie in 1\.\.32"),
        ("phones", dict(questions=-1), "questions=-1"),
        ("copy", dict(count=0), r"count=0 must lie in 1\.\.64"),
        ("copy", dict(noise=-1), "noise=-1 must be at least 0"),
        ("secret", dict(distance=-1), "distance=-1 must be at least 0"),
        ("review", dict(shots=0), "shots=0 must be at least 1"),
        ("review", dict(classes=1), r"classes=1 must lie in 2\.\.8"),
        ("review", dict(classes=9), "classes=9"),
        ("review", dict(filler=-1), "filler=-1"),
        ("review", dict(kind="odd"), "kind='odd' must be one of natural, flipped"),
        ("review", dict(kind="natural", classes=3), "kind='natural' has two classes, not classes=3"),
        ("verdict", dict(reviews=0), "reviews=0 must be at least 1"),
        ("poem", {}, "domain='poem' must be one of repeat, review"),
    ],
    ids=lambda value: ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_options_that_make_no_sense(domain, options, message):
    with pytest.raises(InputError, match=message):
        document(domain, np.random.default_rng(0), **options)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_mistyped_split_is_refused(domain):
    for call in (DOMAINS[domain], GENERATORS[domain]):
        with pytest.raises(InputError, match="split='heldout' must be 'train' or 'held_out'"):
            call(np.random.default_rng(0), "heldout")


# -- splits ------------------------------------------------------------------------------------------------------


def table_entries(doc: documents.Document) -> set[tuple[str, str]]:
    """Key and value, or name and first digit."""
    body = doc.words[2 : doc.words.index(";")]
    period = 3 if doc.domain == "recall" else 5
    return set(zip(body[::period], body[1::period], strict=True))


def people(doc: documents.Document) -> set[tuple[str, ...]]:
    """Who meets whom in a sentence, or in a story's two."""
    text = " ".join(doc.words)
    found = [text] if doc.domain == "story" else text.split("Review : ")
    names = [{word for word in part.split() if word in NAMES} for part in found]
    return {tuple(sorted(both)) for both in names if len(both) == 2}


def near(doc: documents.Document) -> set[tuple[str, str]]:
    """Things and plurals, in either order, that stand near one another."""
    found = zip(doc.words, doc.words[1:], doc.words[2:], doc.words[3:], strict=False)
    pairs = {(a, b) for a, word, the, b in found if (word, the) == ("near", "the")}
    return {tuple(sorted(pair, key=PLURALS.__contains__)) for pair in pairs if set(pair) & set(PLURALS)}


@pytest.mark.parametrize(
    ("domain", "options", "combinations_of", "least"),
    [
        ("recall", {}, table_entries, 300),
        ("phones", {}, table_entries, 60),
        ("story", {}, people, 60),
        ("story", {}, near, 60),
        ("verdict", {}, near, 20),
        ("review", dict(filler=1), people, 60),
    ],
    ids=["keys and values", "names and digits", "people", "things", "things of fillers", "people of fillers"],
)
def test_the_splits_share_no_combination(domain, options, combinations_of, least):
    trained, held_out = (set().union(*map(combinations_of, drawn(domain, split, 400, **options))) for split in SPLITS)
    assert len(trained) >= least and len(held_out) >= least // 4
    assert not trained & held_out


def test_a_fifth_is_held_out_of_every_list():
    for length in (len(KEYS), len(DIGITS), len(NAMES)):
        held_out = np.array([[documents.is_held_out(i, j) for j in range(length)] for i in range(length)])
        assert held_out.mean() == pytest.approx(0.2, abs=0.01)
        assert held_out.any(0).all() and not held_out.all(0).any()  # no word is held out as such


# -- rows --------------------------------------------------------------------------------------------------------


def segments(row: Row) -> list[tuple[str, list[str], list[int]]]:
    """Domain, words and answers of each whole document of a row."""
    words = list(VOCABULARY)
    found, start = [], 1
    for end in np.flatnonzero(row.ids == EOS):
        assert len(set(row.domains[start : end + 1])) == 1
        answers = np.flatnonzero(row.answers[start:end]).tolist()
        found.append((list(DOMAINS)[row.domains[end]], [words[i] for i in row.ids[start:end]], answers))
        start = end + 1
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_packed_documents(split):
    rows = list(islice(mixture(np.random.default_rng(0), 200, split), 40))
    seen = []
    for row in rows:
        assert row.ids.shape == row.answers.shape == row.domains.shape == (200,)
        assert row.ids[0] == BOS and row.domains[0] == -1 and BOS not in row.ids[1:] and PAD not in row.ids
        assert not row.answers[row.ids == EOS].any()
        for domain, words, answers in segments(row):
            for answer in answers:
                assert READERS[domain](words[:answer]) == words[answer]
            seen.append(domain)
    assert set(seen) == set(DOMAINS)


def test_a_document_keeps_its_answers_when_packed():
    rng = np.random.default_rng(0)
    row = next(mixture(rng, 40, shares={"secret": 1}, options={"secret": {"distance": 4}}))
    for _, words, answers in segments(row):
        assert answers == [len(words) - 1] and len(words) in range(8, 14)


def test_shares_say_how_often_a_domain_is_drawn():
    rows = islice(mixture(np.random.default_rng(0), 3000, shares={"copy": 3, "secret": 1, "story": 0}), 4)
    counted = [domain for row in rows for domain, *_ in segments(row)]
    assert len(counted) > 300
    assert counted.count("copy") / len(counted) == pytest.approx(0.75, abs=0.06)
    assert set(counted) == {"copy", "secret"}


def test_the_mixture_draws_every_domain():
    assert SHARES.keys() == DOMAINS.keys()
    assert sum(SHARES.values()) == pytest.approx(1)


def test_documents_side_by_side_are_padded_on_the_right():
    docs = [document("copy", np.random.default_rng(0), count=n, noise=2) for n in (2, 5)]
    ids = ids_of(docs)
    assert ids.shape == (2, 1 + len(docs[1].words)) and (ids[:, 0] == BOS).all()
    for row, doc in zip(ids, docs, strict=True):
        assert [list(VOCABULARY)[i] for i in row[1 : 1 + len(doc.words)]] == list(doc.words)
        assert (row[1 + len(doc.words) :] == PAD).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(length=1), "length=1 must be at least 2"),
        (dict(shares={}), "shares={} must not be negative"),
        (dict(shares={"copy": -1}), "must not be negative"),
        (dict(shares={"copy": 0}), "not all of them 0"),
        (dict(shares={"poem": 1}), "domain='poem'"),
        (dict(shares={"copy": 1}, options={"recall": {"entries": 3}}), r"options=\['recall'\]: no such documents"),
        (dict(options={"poem": {}}), r"options=\['poem'\]"),
        (dict(split="test"), "split='test'"),
    ],
    ids=[
        "length",
        "no shares",
        "negative share",
        "zero shares",
        "domain",
        "unused options",
        "unknown options",
        "split",
    ],
)
def test_mixtures_that_make_no_sense(options, message):
    with pytest.raises(InputError, match=message):
        next(mixture(np.random.default_rng(0), **{"length": 40, **options}))


def test_classes_of_two_are_sentiments():
    assert [set(words) for words in SENTIMENTS] == [set(PRAISE), set(BLAME)]
    assert all(not set(a) & set(b) for a, b in combinations(MOODS.values(), 2))
    assert all(len(words) % 5 == 0 for words in MOODS.values())  # so that praise and moods hold out the same pairs
