"""What ``jambascope zoo eval`` asks and measures: against loops over single documents, and answerers that know."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jambascope import HookedJamba, JambaConfig
from jambascope.model import initialize
from jambascope.studies.zoo import measures, tasks
from jambascope.studies.zoo.measures import CALIBRATION, EARLY, LATE, statistic
from jambascope.zoo.language import document
from jambascope.zoo.words import BOS, VERDICTS, VOCABULARY

GRID = tasks.grid()


def find(task: str, condition: str | None = None, x: float | None = None, measured: str | None = None) -> tasks.Task:
    return next(
        t
        for t in GRID
        if t.task == task and condition in (None, t.condition) and x in (None, t.x) and measured in (None, t.measured)
    )


@pytest.fixture(scope="module")
def model() -> HookedJamba:
    torch.manual_seed(0)
    config = JambaConfig(
        mixers=("mamba", "attention"), feed_forwards=("moe", "none"), d_model=16, d_vocab=len(VOCABULARY), n_heads=2,
        n_key_value_heads=1, d_head=8, d_mlp=8, num_experts=3, d_inner=32, dt_rank=2, d_state=2, n_ctx=2048,
    )  # fmt: skip
    made = HookedJamba(config)
    initialize(made, std=0.6)
    return made.eval()


class Knows:
    """Says the next word, or what ``instead`` puts in its place, with certainty."""

    device = torch.device("cpu")

    def __init__(self, instead=lambda word: word):
        table = {VOCABULARY[word]: VOCABULARY[instead(word)] for word in VOCABULARY}
        self.said = torch.tensor([table[i] for i in range(len(VOCABULARY))])

    def __call__(self, ids):
        following = self.said[torch.cat((ids[:, 1:], ids[:, :1]), 1)]
        return 50.0 * torch.nn.functional.one_hot(following, len(VOCABULARY))


def probabilities(model, words) -> np.ndarray:
    """[T V]: what follows <bos> and each word, in float64, of one document alone."""
    ids = torch.tensor([[BOS, *(VOCABULARY[word] for word in words)]])
    with torch.no_grad():
        logits = model(ids)[0].double().numpy()
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


# -- the grid ------------------------------------------------------------------------------------------------


def test_tasks_draw_the_same_documents_again_and_different_ones_from_each_other():
    firsts = []
    for task in GRID:
        drawn, again = tasks.draw(task, 2), tasks.draw(task, 2)
        assert len(drawn) == 2
        texts = [list(d.ids) if task.measured in ("rows", "positions") else d.words for d in (*drawn, *again)]
        assert texts[:2] == texts[2:]
        firsts.append((task.measured == "competitors", tuple(texts[0])))
    assert len(set(firsts)) == len(GRID)


def trained_sizes(task: tasks.Task) -> list[int]:
    """The sizes that 1500 training documents have."""
    sizes = []
    for seed in range(1500):
        doc = document(task.domain, np.random.default_rng(seed), "train")
        words, text = doc.words, " ".join(doc.words)
        sizes.append(
            {
                "repeat": lambda words=words: len(set(words)),
                "recall": lambda text=text: text.split(" ;")[0].count(",") + 1,
                "phones": lambda text=text: text.split(" ;")[0].count(",") + 1,
                "copy": lambda words=words: words[2:].count("."),
                "secret": lambda words=words: len(words) - 4 - words.index("secret"),
                "few-shot": lambda words=words: words.count("Review") - 1,
                "verdicts": lambda words=words: words.count("Review") - 1,
            }[task.task]()
        )
    return sizes


@pytest.mark.parametrize("name", ["repeat", "recall", "phones", "copy", "secret", "few-shot", "verdicts"])
def test_the_trained_range_is_what_training_draws(name):
    task, sizes = find(name), trained_sizes(find(name))
    assert max(sizes) == task.trained[1]
    if name != "few-shot":  # which is measured at every number of shots on the way
        assert min(sizes) == task.trained[0]


def test_sizes_reach_beyond_training():
    for name in ("repeat", "recall", "phones", "copy", "secret", "verdicts"):
        sizes = [task.x for task in GRID if task.task == name]
        assert min(sizes) >= find(name).trained[0] and max(sizes) >= 2 * find(name).trained[1]
    assert max(tasks.SHOTS) > 3 * tasks.TRAINED_SHOTS[1] and tasks.WINDOWS[-1] > tasks.TRAINED_LENGTH


# -- answerers that know -------------------------------------------------------------------------------------


def means(model, task, episodes=12):
    found = measures.measure(model, task, tasks.draw(task, episodes))
    return {(c.measure, c.x): statistic(torch.from_numpy(v).nanmean(0)).item() for c, v in found.items()}


@pytest.mark.parametrize("task", [t for t in GRID if t.measured == "answers"], ids=lambda t: f"{t.condition} {t.x}")
def test_who_knows_all_answers_is_always_right(task):
    found = means(Knows(), task, 3)
    assert found["accuracy", task.x] == 1 and found["loss", task.x] < 1e-6
    assert task.chance is None or found["chance", task.x] == pytest.approx(task.chance)


def test_who_knows_all_labels_has_no_gap_and_is_calibrated():
    found = means(Knows(), find("few-shot", "unseen arbitrary labels"))
    for s in (1, 2, 8, 32):
        assert found["accuracy free", s] == found["accuracy restricted", s] == found["valid rate", s] == 1
        assert found["format gap", s] == 0 and found["chance", s] == 0.5
    assert found[CALIBRATION, None] < 1e-6
    # Nothing says a label before the first shot.
    assert ("label mass", 0) in found and ("accuracy restricted", 0) not in found


def test_who_judges_freely_fills_the_gap_not_the_label_set():
    bravo, boo = "Bravo", "Boo"
    task = find("few-shot", "familiar arbitrary labels", measured="competitors")
    asked = (task, find("few-shot", "familiar arbitrary labels"))
    labels = {word for own in asked for doc in tasks.draw(own, 12) for word in doc.labels}
    judge = Knows(lambda word: bravo if word in labels else word)
    assert bravo in VERDICTS[0] and boo in VERDICTS[1]
    assert means(judge, task)["verdict mass", 8] == pytest.approx(1)
    assert means(judge, task)["mass of other labels", 8] < 1e-6
    found = means(judge, asked[1])
    assert found["label mass", 8] < 1e-6 and found["valid rate", 8] == found["accuracy free", 8] == 0
    assert found["format gap", 8] == found["accuracy restricted", 8]


@pytest.mark.parametrize("kind", ["unseen", "familiar"])
def test_filler_says_no_label(kind):
    task = find("few-shot", f"{kind} arbitrary labels, 16 filler sentences")
    for doc in tasks.draw(task, 8):
        assert len(doc.label_positions) == 9
        assert [i for i, word in enumerate(doc.words) if word in doc.labels] == list(doc.label_positions)


def test_accuracy_on_shuffled_labels_is_chance_for_who_answers_by_class():
    task = find("few-shot", "shuffled labels")
    drawn = tasks.draw(task, 200)
    by_class = [
        [
            doc.labels[c] == doc.words[i]
            for i, c in zip(doc.label_positions, doc.classes, strict=True)
            if i in doc.answers
        ]
        for doc in drawn
    ]
    assert np.mean([hit for doc in by_class for hit in doc]) == pytest.approx(0.5, abs=0.03)
    for doc in drawn:
        assert all({*doc.labels} <= {*doc.words[:i]} for i in doc.answers)
    found = means(Knows(), task)
    assert ("accuracy free", 1) not in found  # the one label so far would be right wherever it is asked
    assert found["accuracy free", 8] == 1  # who sees the answers; the measure itself would notice


def test_meaning_is_asked_without_a_shot_or_against_shuffled_ones():
    for condition, shots in (("familiar natural labels by meaning", 0), ("shuffled natural labels by meaning", 8)):
        task = find("few-shot", condition)
        for doc in tasks.draw(task, 20):
            assert doc.words[doc.label_positions[-1]] == doc.labels[doc.classes[-1]]
        assert means(Knows(), task)["accuracy restricted", shots] == 1


def test_the_commonest_label_so_far():
    task = find("few-shot", "familiar arbitrary labels, 4 classes")
    for doc in tasks.draw(task, 6):
        right, shown = [], []
        for i in doc.label_positions:
            counts = sorted(((shown.count(word), word) for word in set(shown)), reverse=True)
            best = [word for count, word in counts if count == counts[0][0]]
            word = doc.words[i]
            right.append((word in best) / len(best) if word in shown else np.nan)
            shown.append(word)
        np.testing.assert_array_equal(measures._commonest(doc), right)


# -- against loops -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "condition",
    [
        "familiar natural labels",
        "unseen arbitrary labels, 4 classes",
        "familiar arbitrary labels, 16 filler sentences",
    ],
)
def test_labels_as_a_loop_finds_them(model, condition):
    task = find("few-shot", condition)
    drawn = tasks.draw(task, 4)
    found = {(c.measure, c.x): v[:, 0] for c, v in measures.measure(model, task, drawn).items() if v.shape[1] == 1}
    shown_before = 0
    for d, doc in enumerate(drawn):
        p = probabilities(model, doc.words)
        labels = [VOCABULARY[word] for word in doc.labels]
        for s, i in enumerate(doc.label_positions):
            if s not in tasks.SHOTS:
                continue
            at, right = p[i], VOCABULARY[doc.words[i]]
            assert found["label mass", s][d] == pytest.approx(at[labels].sum(), rel=1e-4)
            assert found["valid rate", s][d] == (at.argmax() in labels)
            known = doc.words[i] in [doc.words[j] for j in doc.label_positions[:s]]
            shown_before += known
            free, best = at.argmax() == right, labels[at[labels].argmax()] == right
            expected = {"accuracy free": free, "accuracy restricted": best, "format gap": int(best) - int(free)}
            for name, value in expected.items():
                if (name, s) in found:
                    np.testing.assert_equal(found[name, s][d], float(value) if known else np.nan)
    assert shown_before > 5


def test_the_calibration_error_as_a_loop_finds_it():
    rng = np.random.default_rng(0)
    confidence, hits = rng.uniform(0.3, 1, (7, 9)), rng.integers(0, 2, (7, 9)).astype(float)
    confidence[2, 3:], hits[2, 3:] = np.nan, np.nan
    confidence[0, 0] = 1.0
    flat = [(c, h) for c, h in zip(confidence.ravel(), hits.ravel(), strict=True) if c == c]
    expected = 0.0
    for b in range(10):
        own = [(c, h) for c, h in flat if b / 10 <= c < (b + 1) / 10 or (b == 9 and c == 1)]
        if own:
            expected += len(own) / len(flat) * abs(np.mean([h for _, h in own]) - np.mean([c for c, _ in own]))
    parts = measures.calibration_parts(torch.from_numpy(confidence), torch.from_numpy(hits))
    assert statistic(torch.from_numpy(parts).mean(0)).item() == pytest.approx(expected)


@pytest.mark.parametrize("x", [2, 8])
def test_phone_numbers_as_a_loop_finds_them(model, x):
    task = find("phones", x=x)
    drawn = tasks.draw(task, 3)
    found = {c.measure: v[:, 0] for c, v in measures.measure(model, task, drawn).items()}
    for d, doc in enumerate(drawn):
        p = probabilities(model, doc.words)
        right = [VOCABULARY[doc.words[i]] for i in doc.answers]
        hits = [p[i].argmax() == word for i, word in zip(doc.answers, right, strict=True)]
        assert found["accuracy of digits"][d] == pytest.approx(np.mean(hits))
        assert found["accuracy"][d] == np.mean([all(hits[i : i + 3]) for i in range(0, len(hits), 3)])
        loss = -np.mean([np.log(p[i][word]) for i, word in zip(doc.answers, right, strict=True)])
        assert found["loss"][d] == pytest.approx(loss, rel=1e-4)


def test_row_losses_as_a_loop_finds_them(model):
    task = find("held-out rows", "mixture")
    rows = tasks.draw(task, 4)
    found = {c.measure: v[:, 0] for c, v in measures.measure(model, task, rows).items()}
    names = list(VOCABULARY)
    for r, row in enumerate(rows):
        p = probabilities(model, [names[i] for i in row.ids[1:]])
        losses = np.array([np.nan, *(-np.log(p[t - 1][row.ids[t]]) for t in range(1, len(row.ids)))])
        assert found["loss"][r] == pytest.approx(losses[1:].mean(), rel=1e-5)
        assert found["loss on answers"][r] == pytest.approx(losses[row.answers].mean(), rel=1e-5)
        late, early = losses[range(*LATE)].mean(), losses[range(*EARLY)].mean()
        assert found["ICL score"][r] == pytest.approx(late - early, rel=1e-3, abs=1e-4)


def test_the_loss_by_position_averages_windows(model):
    task = find("loss by position")
    rows = tasks.draw(task, 2)
    found = measures.measure(model, task, rows)
    losses = measures.row_losses(model, rows)
    assert [c.x for c in found] == [8.5, 40, 96, 192, 384, 768]
    np.testing.assert_allclose(list(found.values())[2][:, 0], losses[:, 64:128].mean(1))
    assert losses[:, 0].isnan().all() and losses[:, 1:].isfinite().all()
