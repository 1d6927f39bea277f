"""``jambascope zoo eval``: which weights it finds, intervals over documents and seeds, resuming, files and report."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from jambascope import HookedJamba, JambaConfig
from jambascope.errors import CheckpointError, ConfigError
from jambascope.hooks.intervals import percentiles
from jambascope.model import initialize
from jambascope.studies.figures.zoo import Panel, Point, bars, lines, looks
from jambascope.studies.zoo import evaluation, report, summary, tasks
from jambascope.studies.zoo.evaluation import UNKNOWN_SEED, Run, find_runs, read_values
from jambascope.studies.zoo.measures import Cell, statistic
from jambascope.zoo.tokenizer import build_tokenizer
from jambascope.zoo.words import VOCABULARY


def save(directory: Path, seed: int, record: bool = True, tokenizer: bool = True, name: str = "jamba-micro") -> Path:
    """Tiny random weights, as a training leaves them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = JambaConfig(
            mixers=("mamba", "attention"), feed_forwards=("none", "none"), d_model=8, d_vocab=len(VOCABULARY),
            n_heads=1, n_key_value_heads=1, d_head=8, d_mlp=8, d_inner=8, dt_rank=1, d_state=2, n_ctx=2048,
        )  # fmt: skip
        model = HookedJamba(config)
        initialize(model, std=0.6)
    model.tokenizer = build_tokenizer() if tokenizer else None
    model.to(torch.bfloat16).save_pretrained(directory)
    if record:
        told = {"name": name, "spec": {"seed": seed}, "steps": 7, "tokens": 99}
        (directory / "training.json").write_text(json.dumps(told))
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two seeds of a hybrid and one of a pure Mamba; a search and an unfinished run, which are no seeds."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        save(root / "jamba-micro" / f"seed-{seed}", seed)
    save(root / "mamba-micro" / "seed-4", 4)
    save(root / "jamba-micro" / "lr-1e-3", 8)
    save(root / "jamba-micro" / "seed-9", 9, record=False)
    return root


@pytest.fixture(autouse=True)
def nothing_packaged(monkeypatch):
    packaged: dict[str, Path] = {}
    monkeypatch.setattr(evaluation, "packaged_models", lambda: packaged)
    return packaged


@pytest.fixture
def small_grid(monkeypatch) -> tuple[tasks.Task, ...]:
    grid = tuple(task for task in tasks.grid() if (task.task, task.x) in (("recall", 2), ("secret", 4)))
    monkeypatch.setattr(tasks, "grid", lambda: grid)
    return grid


# -- which weights -------------------------------------------------------------------------------------------


def seeds(found: list[Run]) -> list[tuple[str, int]]:
    return [(run.model, run.seed) for run in found]


def test_names_stand_for_their_finished_seeds(runs):
    assert seeds(find_runs(["mamba-micro", "jamba-micro"], runs)) == [
        ("jamba-micro", 0), ("jamba-micro", 1), ("mamba-micro", 4),
    ]  # fmt: skip
    assert seeds(find_runs((), runs)) == seeds(find_runs(["jamba-micro", "mamba-micro", "jamba-micro"], runs))
    (first, *_) = find_runs((), runs)
    assert (first.steps, first.tokens, first.directory) == (7, 99, runs / "jamba-micro" / "seed-0")


def test_packaged_weights_are_a_seed_unless_a_run_has_it(runs, nothing_packaged, tmp_path):
    nothing_packaged["jamba-micro"] = save(tmp_path / "packaged", 1)
    assert seeds(find_runs(["jamba-micro"])) == [("jamba-micro", 1)]
    found = find_runs(["jamba-micro"], runs)
    assert [(run.seed, run.directory.parent.parent) for run in found] == [(0, runs), (1, runs)]
    nothing_packaged["jamba-micro"] = save(tmp_path / "other", 2)
    assert seeds(find_runs(["jamba-micro"], runs)) == [("jamba-micro", seed) for seed in (0, 1, 2)]


def test_a_checkpoint_directory_is_a_model_of_its_own(runs):
    directory = str(runs / "jamba-micro" / "lr-1e-3")
    assert seeds(find_runs([directory, "mamba-micro"], runs)) == [("mamba-micro", 4), (directory, 8)]
    unfinished = str(runs / "jamba-micro" / "seed-9")
    (found,) = find_runs([unfinished])
    assert (found.seed, found.steps, found.title) == (UNKNOWN_SEED, None, unfinished)


def test_weights_are_known_by_their_content(runs, tmp_path):
    a, b, _ = find_runs((), runs)
    (same,) = find_runs([str(save(tmp_path / "same", 0))])
    assert a.identity == same.identity != b.identity


@pytest.mark.parametrize(
    ("names", "with_runs", "message"),
    [
        (["jamba-mikro"], False, "did you mean 'jamba-micro'"),
        (["jamba-micro"], False, "not packaged, and no --runs were given; train it with: jambascope zoo train"),
        (["jamba-micro-rope"], True, "jamba-micro-rope holds no finished run"),
    ],
    ids=["unknown", "no-runs", "no-finished-run"],
)
def test_names_without_weights_are_refused(runs, names, with_runs, message):
    with pytest.raises(ConfigError, match=message):
        find_runs(names, runs if with_runs else None)


def test_runs_must_be_a_directory(tmp_path):
    with pytest.raises(ConfigError, match="is not a directory"):
        find_runs(["jamba-micro"], tmp_path / "absent")


def test_another_vocabulary_is_refused(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="has no tokenizer; the tasks need weights over the zoo's"):
        find_runs([str(save(tmp_path / "bare", 0, tokenizer=False))])
    directory = save(tmp_path / "other", 0)
    monkeypatch.setattr(evaluation.words, "VOCABULARY", VOCABULARY | {"extra": len(VOCABULARY)})
    with pytest.raises(CheckpointError, match="speaks another vocabulary"):
        find_runs([str(directory)])


# -- measuring once ------------------------------------------------------------------------------------------


def test_a_killed_evaluation_continues_and_a_changed_one_begins_anew(runs, small_grid, tmp_path, monkeypatch):
    found, measured = find_runs((), runs), []
    measure = evaluation.measures.measure

    def counting(model, task, drawn):
        if len(measured) == 3:
            measured.append("killed")
            raise KeyboardInterrupt
        measured.append(model.name_or_path)
        return measure(model, task, drawn)

    monkeypatch.setattr(evaluation.measures, "measure", counting)
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(found, tmp_path, 3)
    assert len(list(tmp_path.iterdir())) == 1  # the first model, whole; nothing of the second
    del measured[:]
    monkeypatch.setattr(evaluation.measures, "measure", lambda *a: measured.append(a[1]) or measure(*a))
    told = []
    values = evaluation.evaluate(found, tmp_path, 3, lambda done, doing: told.append((done, doing)))
    assert len(measured) == 2 * len(small_grid)
    assert {done for done, _ in told} == {1, 2} and "mamba-micro seed 4: secret, one word 4" in dict(told)[2]
    assert all(values[0][cell].shape == (3, 1) for cell in values[0])
    del measured[:]
    again = evaluation.evaluate(found, tmp_path, 3)
    assert measured == []
    for one, two in zip(values, again, strict=True):
        assert list(one) == list(two)
        assert all(np.array_equal(one[cell], two[cell], equal_nan=True) for cell in one)
    evaluation.evaluate(found, tmp_path, 4)
    assert len(measured) == 3 * len(small_grid)


def test_what_decides_the_numbers_decides_the_fingerprint(monkeypatch):
    before = evaluation.fingerprint(3)
    assert before == evaluation.fingerprint(3) != evaluation.fingerprint(4)
    monkeypatch.setattr(tasks, "TRAINED_LENGTH", 99)
    assert evaluation.fingerprint(3) != before


def test_values_survive_the_file(tmp_path):
    cells = {
        Cell("a", "b", None, None, "m"): np.array([[0.1], [np.nan]]),
        Cell("a", "b", "shots", 2.0, "m"): np.array([[1.0], [2.0], [3.0]]),
        Cell("a", "b", "shots", None, "bins"): np.arange(22.0).reshape(2, 11),
    }
    evaluation._write_values(tmp_path / "v.parquet", cells)
    found = read_values(tmp_path / "v.parquet")
    assert list(found) == list(cells)
    for cell, values in cells.items():
        np.testing.assert_array_equal(found[cell], values)
    assert [p.name for p in tmp_path.iterdir()] == ["v.parquet"]


def test_a_damaged_file_says_what_to_do(tmp_path):
    (tmp_path / "v.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(CheckpointError, match="remove it to measure these weights anew"):
        read_values(tmp_path / "v.parquet")


def test_one_document_has_no_interval(runs, tmp_path):
    with pytest.raises(ConfigError, match="episodes=1 must be at least 2"):
        evaluation.evaluate(find_runs((), runs), tmp_path, 1)


# -- intervals -----------------------------------------------------------------------------------------------


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
    assert low < low_seeds.item() < 1


def test_a_bootstrap_over_documents_leaves_out_what_has_no_value():
    values = torch.tensor([0.2, 0.4, torch.nan, 0.9, 0.7]).double().reshape(1, 5, 1, 1)
    mean, low, high, n = (t.item() for t in summary.estimate(values))
    assert mean == pytest.approx(0.55) and n == 4 and 0.2 <= low < mean < high <= 0.9
    alone = torch.tensor([0.2, torch.nan]).double().reshape(1, 2, 1, 1)
    assert [t.item() for t in summary.estimate(alone)][1:] == [-math.inf, math.inf, 1]


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


# -- figures -------------------------------------------------------------------------------------------------


def test_models_look_the_same_everywhere_and_differ_from_each_other():
    from jambascope.zoo.recipes import RECIPES

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


# -- the command ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(runs, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The whole grid, two documents of each task, by the command itself."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    program = """
from jambascope.studies.zoo import evaluation
evaluation.packaged_models = lambda: {}
from jambascope.cli import main
main()
"""
    options = ["zoo", "eval", "--runs", str(runs), "--out", str(out), "--episodes", "2"]
    done = subprocess.run([sys.executable, "-c", program, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out, done


def test_the_command_prints_a_table_and_its_progress(evaluated):
    _, done = evaluated
    for text in ("jamba-micro", "0, 1", "mamba-micro", "label mass", "ICL score", "results.parquet"):
        assert text in done.stdout
    assert "[1 of 3] jamba-micro seed 0" in done.stderr and "[3 of 3] mamba-micro seed 4" in done.stderr


def test_results_hold_every_task_for_every_run(evaluated):
    out, _ = evaluated
    found = pq.read_table(out / "results.parquet")
    assert found.schema.equals(summary.SCHEMA)
    rows = found.to_pylist()
    own = {(row["model"], row["seed"]) for row in rows}
    assert own == {("jamba-micro", 0), ("jamba-micro", 1), ("jamba-micro", None), ("mamba-micro", 4)}
    for key in own:
        asked = {(row["task"], row["condition"]) for row in rows if (row["model"], row["seed"]) == key}
        assert asked == {(task.task, task.condition) for task in tasks.grid()}
    for row in rows:
        assert (row["seeds"], row["run"] is None) == ((2, True) if row["seed"] is None else (1, False))
        assert math.isnan(row["mean"]) or row["low"] <= row["mean"] + 1e-12 and row["mean"] <= row["high"] + 1e-12


def test_what_was_asked_and_where_is_kept(evaluated):
    out, _ = evaluated
    spec = json.loads((out / "spec.json").read_text())
    assert spec["episodes"] == 2 and len(spec["tasks"]) == len(tasks.grid()) and len(spec["models"]) == 3
    assert spec["command"].startswith("jambascope zoo eval --runs") and len(spec["fingerprint"]) == 64
    assert {"torch", "processor", "threads"} <= json.loads((out / "environment.json").read_text()).keys()
    assert not list(out.rglob("*.tmp")) and len(list((out / "values").iterdir())) == 3


def test_the_report_stands_alone_and_names_every_model(evaluated):
    text = (evaluated[0] / "report.html").read_text()
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    assert '<script src="' not in text and "<link" not in text
    body = text[text.index("<body>") :]
    for words in ("jamba-micro", "mamba-micro", "format gap", "Control: shuffled labels", "ICL score", "in training"):
        assert words in body
    for title, *_ in report.HEADLINE:
        assert f"<th>{title}</th>" in body
    assert body.count('class="plot"') == 13


def test_headline_numbers_exist_in_the_grid(evaluated):
    rows = [summary.Row(**row) for row in pq.read_table(evaluated[0] / "results.parquet").to_pylist()]
    (hybrid, told, numbers), (pure, _, others) = report.headline(rows)
    assert (hybrid, told, pure) == ("jamba-micro", "0, 1", "mamba-micro")
    assert None not in numbers and None not in others
    assert {row.seed for row in numbers} == {None} and {row.seed for row in others} == {4}


def test_a_file_in_the_way_is_said_before_anything_runs(tmp_path, runs):
    (tmp_path / "file").write_text("")
    program = "from jambascope.cli import main; main()"
    options = ["zoo", "eval", "jamba-micro", "--out", str(tmp_path / "file")]
    done = subprocess.run([sys.executable, "-c", program, *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "is a file; give a directory for the results" in done.stderr
