"""Intervals over documents and seeds, differences between models, and the figures that show them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from jambascope.hooks.intervals import percentiles
from jambascope.studies.figures.zoo import Panel, Point, bars, lines, looks
from jambascope.studies.zoo import differences, summary
from jambascope.studies.zoo.evaluation import UNKNOWN_SEED, Run
from jambascope.studies.zoo.measures import Cell, statistic
from jambascope.zoo.recipes import RECIPES


def test_draws_over_seeds_as_a_loop_makes_them():
    generator = torch.Generator().manual_seed(3)
    samples = torch.rand(3, 5, 2, 1, generator=generator, dtype=torch.float64)
    samples[:, 1, 0] = torch.nan
    drawn = summary.hierarchical_draws(samples, seed=7, resamples=40)
    documents = torch.randint(5, (40, 5), generator=torch.Generator().manual_seed(7))
    chosen = torch.randint(3, (40, 3, 1), generator=torch.Generator().manual_seed(8))[:, :, 0]
    for r in range(40):
        for cell in range(2):
            of_seeds = []
            for seed in chosen[r].tolist():
                values = [samples[seed, d, cell, 0].item() for d in documents[r].tolist()]
                of_seeds.append(np.mean([v for v in values if v == v]))
            assert drawn[r, cell].item() == pytest.approx(np.mean(of_seeds))


@pytest.mark.parametrize(
    ("count", "of_seeds", "of_documents", "least", "most"),
    [(10, 0.2, 0.0, 0.88, 0.98), (3, 0.2, 0.0, 0.7, 0.9), (3, 0.0, 0.5, 0.92, 0.99)],
    ids=["ten-seeds-differ", "three-seeds-differ", "documents-differ"],
)
def test_intervals_over_seeds_hold_the_truth_as_often_as_said(count, of_seeds, of_documents, least, most):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, 400, 1, generator=generator, dtype=torch.float64)  # noqa: E731
    samples = of_seeds * normal(count, 1) + of_documents * normal(1, 40) + 0.2 * normal(count, 40)
    low, high = percentiles(summary.hierarchical_draws(samples, resamples=500))
    held = ((low <= 0) & (high >= 0)).double().mean().item()
    assert least <= held <= most


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (50, 96)])
def test_wilsons_ends_are_where_the_score_test_turns(hits, n):
    low, high = (end.item() for end in summary.wilson(torch.tensor(float(hits)), torch.tensor(n)))
    assert 0 <= low <= hits / n <= high <= 1
    for end in {low, high} - {0.0, 1.0}:
        assert abs(hits / n - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(1.96)


def test_hits_alone_do_not_look_certain_and_losses_are_left_as_they_are():
    hits, loss = torch.ones(1, 20, 1, 1), torch.full((1, 20, 1, 1), 1.5)
    mean, low, high, n = (t.item() for t in summary.estimate(hits.double()))
    assert (mean, high, n) == (1, 1, 20) and low == pytest.approx(20 / (20 + 1.96**2))
    assert [t.item() for t in summary.estimate(loss.double())] == [1.5, 1.5, 1.5, 20]
    _, low_seeds, *_ = summary.estimate(hits.double().expand(3, -1, -1, -1))
    assert low_seeds.item() == pytest.approx(low)  # the same documents, read three times


def test_a_bootstrap_over_documents_leaves_out_what_has_no_value():
    values = torch.tensor([0.2, 0.4, torch.nan, 0.9, 0.7]).double().reshape(1, 5, 1, 1)
    mean, low, high, n = (t.item() for t in summary.estimate(values))
    assert mean == pytest.approx(0.55) and n == 4 and 0.2 <= low < mean < high <= 0.9
    alone = torch.tensor([0.2, torch.nan]).double().reshape(1, 2, 1, 1)
    assert [t.item() for t in summary.estimate(alone)][1:] == [-math.inf, math.inf, 1]
    assert [t.item() for t in summary.estimate(alone.expand(3, -1, -1, -1))][1:] == [-math.inf, math.inf, 3]


def test_the_calibration_error_of_a_calibrated_model_is_not_certain():
    generator = torch.Generator().manual_seed(1)
    parts = torch.zeros(1, 60, 1, 11, dtype=torch.float64)
    parts[..., :10] = torch.randn(1, 60, 1, 10, generator=generator)
    parts[..., 10] = 30
    mean, low, high, n = (t.item() for t in summary.estimate(parts))
    assert mean == pytest.approx(statistic(parts[0, :, 0].mean(0)).item()) and n == 60
    assert 0 <= low <= mean <= high < 0.1


def test_rows_of_seeds_and_over_them():
    cell = Cell("recall", "c", "pairs", 2.0, "accuracy")
    own = [Run(m, s, Path(f"{m}/{s}"), "", 1, 1) for m, s in (("a", 0), ("a", 1), ("b", 0), ("c", UNKNOWN_SEED))]
    values = [{cell: np.array([[v], [v], [v + 0.1]])} for v in (0.2, 0.4, 0.6, 0.8)]
    rows = summary.rows_of(own, values)
    assert [(r.model, r.seed, r.run, r.seeds, r.n) for r in rows] == [
        ("a", 0, "a/0", 1, 3),
        ("a", 1, "a/1", 1, 3),
        ("a", None, None, 2, 6),
        ("b", 0, "b/0", 1, 3),
        ("c", UNKNOWN_SEED, "c/-1", 1, 3),
    ]
    assert rows[2].mean == pytest.approx((rows[0].mean + rows[1].mean) / 2)
    assert rows[2].high - rows[2].low > rows[0].high - rows[0].low
    assert summary.table(rows).column_names == [*summary.Row.__dataclass_fields__]


def crossed(seeds: int, shift: float, generator: torch.Generator) -> torch.Tensor:
    """[S D C P]: seeds with their own mean, documents with a difficulty that the caller adds."""
    of_seeds = 0.1 * torch.randn(seeds, 1, 100, 1, generator=generator, dtype=torch.float64)
    return shift + of_seeds + 0.05 * torch.randn(seeds, 30, 100, 1, generator=generator, dtype=torch.float64)


def test_what_is_hard_about_a_document_leaves_a_difference_alone():
    generator = torch.Generator().manual_seed(0)
    hard = 2.0 * torch.randn(1, 30, 100, 1, generator=generator, dtype=torch.float64)
    a, b = crossed(10, 0.3, generator), crossed(10, 0.0, generator)
    mean, low, high, n = differences.difference(a + hard, b + hard)
    alone = differences.difference(a, b)
    torch.testing.assert_close((mean, low, high), alone[:3])
    assert ((low <= 0.3) & (high >= 0.3)).double().mean() > 0.88 and (n == 30).all()
    assert (high - low).mean() < 0.25 < 1 < (summary.estimate(a + hard)[2] - summary.estimate(a + hard)[1]).mean()


def test_a_difference_of_all_hits_and_all_misses_is_not_certain():
    ones, zeros = torch.ones(1, 20, 1, 1).double(), torch.zeros(2, 20, 1, 1).double()
    mean, low, high, n = (t.item() for t in differences.difference(ones, zeros))
    assert mean == 1 and n == 20 and 0.7 < low < 0.9 and high == 1
    mean, low, high, _ = (t.item() for t in differences.difference(ones, ones))
    assert mean == 0 and -0.2 < low < 0 < high < 0.2


def test_differences_are_taken_from_the_reference_over_known_seeds():
    cell = Cell("recall", "c", "pairs", 2.0, "accuracy")
    names = [("jamba-micro", 0), ("jamba-micro", 1), ("b", 0), ("c", UNKNOWN_SEED)]
    own = [Run(model, seed, Path("."), "", 1, 1) for model, seed in names]
    values = [{cell: np.array([[v], [v], [v + 0.1]])} for v in (0.2, 0.4, 0.6, 0.8)]
    rows = differences.differences_of(own, values)
    assert [(r.model, r.seeds, r.reference, r.reference_seeds) for r in rows] == [
        ("b", 1, "jamba-micro", 2),
        ("c", 1, "jamba-micro", 2),
    ]
    assert rows[0].mean == pytest.approx(0.3) and rows[0].low < rows[0].mean < rows[0].high
    assert differences.table(rows).column("measure").to_pylist() == ["accuracy"] * 2
    assert differences.differences_of(own[2:], values[2:]) == []


# -- figures -------------------------------------------------------------------------------------------------


def test_models_look_the_same_everywhere_and_differ_from_each_other():
    names = [*RECIPES, *(f"other/{i}" for i in range(7))]
    assert len(set(looks(names).values())) == len(names)
    assert all(looks([name])[name] == look for name, look in looks(list(RECIPES)).items())


def points(models, x=(0, 1, 4)):
    each = [(model, seed) for model in models for seed in (None, 0, 1)]
    return [Point(model, seed, at, 0.5, 0.25, 0.75) for model, seed in each for at in x]


def test_lines_have_an_interval_a_mean_and_marks_for_seeds():
    fig = lines("t", "s", [("q", [Panel("p", points(["a", "b"]), (0, 2), {"chance": [(1, 0.5), (4, 0.5)]})])], "shots")
    band, line, marks = (t for t in fig.data if t.name == "a")
    assert list(line.x) == [0, 1, 3] and list(line.y) == [0.5] * 3  # 0, 1 and 4 stand two doublings apart
    assert list(band.y) == [0.75] * 3 + [0.25] * 3
    assert len(marks.x) == 6 and [t.name for t in fig.data if t.showlegend] == ["a", "b", "chance"]
    assert fig.layout.shapes[0].x1 == pytest.approx(2.3) and list(fig.layout.xaxis.ticktext) == ["0", "1", "4"]


def test_of_many_models_the_first_are_shown():
    names = [f"m{i}" for i in range(8)]
    fig = lines("t", "s", [("q", [Panel("p", points(names))])], "shots")
    assert {t.name for t in fig.data if t.visible == "legendonly"} == set(names[4:])


def test_a_model_of_one_seed_is_its_own_bar_and_infinite_whiskers_are_none():
    own = [Point("a", 3, None, 0.5, -math.inf, math.inf), *points(["b"], [None])]
    fig = bars("t", "s", [Panel("p", own)], "nats")
    a, no_marks, _, marks = fig.data
    assert list(a.x) == [0.5] and list(a.error_x.array) == [0] and not no_marks.x and len(marks.x) == 2
