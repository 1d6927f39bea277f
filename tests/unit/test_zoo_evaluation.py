"""``jambascope zoo eval``: which weights it finds, that it measures them once, its files and report."""

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
from jambascope.model import initialize
from jambascope.studies.zoo import differences, evaluation, report, summary, tasks
from jambascope.studies.zoo.evaluation import UNKNOWN_SEED, Run, find_runs, read_values
from jambascope.studies.zoo.measures import Cell
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


def test_runs_stand_in_for_packaged_weights_even_of_another_vocabulary(runs, nothing_packaged, tmp_path):
    nothing_packaged["jamba-micro"] = save(tmp_path / "packaged", 2)
    assert seeds(find_runs(["jamba-micro"])) == [("jamba-micro", 2)]
    assert seeds(find_runs(["jamba-micro"], runs)) == [("jamba-micro", 0), ("jamba-micro", 1)]
    nothing_packaged["jamba-micro"] = save(tmp_path / "old", 2, tokenizer=False)
    assert seeds(find_runs((), runs)) == [("jamba-micro", 0), ("jamba-micro", 1), ("mamba-micro", 4)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": {"seed": 1, "steps": 5}}, r"seed-1 and .*seed-0 differ in steps, so their numbers cannot be pooled"),
        ({"spec": {"seed": 1}, "stages": [{"until": None}]}, "differ in curriculum"),
        ({"spec": {"seed": 0}}, r"seed-0 and .*seed-1 are both of seed 0"),
    ],
    ids=["other steps", "other curriculum", "same seed"],
)
def test_runs_that_differ_in_more_than_their_seeds_are_not_pooled(tmp_path, change, message):
    for seed in (0, 1):
        save(tmp_path / "jamba-micro" / f"seed-{seed}", seed)
    (tmp_path / "jamba-micro" / "seed-1" / "training.json").write_text(json.dumps(change))
    with pytest.raises(ConfigError, match=message):
        find_runs(["jamba-micro"], tmp_path)
    assert len(find_runs([str(path) for path in (tmp_path / "jamba-micro").iterdir()])) == 2


def test_a_linked_seed_is_found_under_its_own_name(tmp_path):
    save(tmp_path / "jamba-micro" / "lr-0.001", 0)
    (tmp_path / "jamba-micro" / "seed-0").symlink_to("lr-0.001", target_is_directory=True)
    (found,) = find_runs(["jamba-micro"], tmp_path)
    assert (found.seed, found.directory) == (0, tmp_path / "jamba-micro" / "seed-0")


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
    compared = pq.read_table(out / "differences.parquet")
    assert set(compared["model"].to_pylist()) == {"mamba-micro"} and compared.schema.equals(differences.DIFFERENCES)
    assert not list(out.rglob("*.tmp")) and len(list((out / "values").iterdir())) == 3


def test_the_report_stands_alone_and_names_every_model(evaluated):
    text = (evaluated[0] / "report.html").read_text()
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    assert '<script src="' not in text and "<link" not in text
    body = text[text.index("<body>") :]
    for words in (
        "jamba-micro",
        "mamba-micro",
        "format gap",
        "Control: shuffled labels",
        "ICL score",
        "in training",
        "Less jamba-micro",
    ):
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
