"""The family of the zoo: search, seeds, what is finished and what goes on."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from jambascope.cli import app, zoo_app
from jambascope.config import JambaConfig
from jambascope.errors import CheckpointError, ConfigError
from jambascope.files import write_json
from jambascope.studies.zoo import family as zoo_family
from jambascope.studies.zoo import family_command, jobs
from jambascope.studies.zoo.family import SEEDS, Family
from jambascope.studies.zoo.jobs import Job
from jambascope.training import TrainingSpec, fit
from jambascope.zoo import progress, recipes
from jambascope.zoo.train import RECORD, batches, new_model
from jambascope.zoo.train import train as train_model
from jambascope.zoo.words import VOCABULARY


def two(steps: int = 40) -> dict[str, recipes.Recipe]:
    """Two recipes of models that a moment trains."""
    config = JambaConfig(
        d_model=16, d_vocab=len(VOCABULARY), mixers=("mamba", "attention"), feed_forwards=("moe", "dense"), n_heads=2,
        n_key_value_heads=1, d_head=8, d_mlp=16, d_inner=32, d_state=4, num_experts=3, experts_per_token=2, n_ctx=64,
        bos_token_id=1, eos_token_ids=(2,), pad_token_id=0,
    )  # fmt: skip
    spec = TrainingSpec(steps=steps, learning_rate=1e-3, warmup_steps=2, evaluate_every=1000, checkpoint_every=5)
    stages = (recipes.Stage(until=None, batch_size=2, sequence_length=16),)
    recipe = recipes.Recipe(about="tiny", config=config, spec=spec, stages=stages)
    return {"jamba-micro": recipe, "jamba-micro-rope": recipe}


@pytest.fixture
def tiny_recipes(monkeypatch):
    monkeypatch.setattr(recipes, "RECIPES", two())
    monkeypatch.setattr(zoo_family, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(zoo_family, "cores", lambda: 2)


class Ended:
    """A training process that is over as soon as it began."""

    def __init__(self, returncode: int) -> None:
        self.returncode, self.stdin = returncode, io.BytesIO()

    def poll(self) -> int:
        return self.returncode

    def wait(self, timeout: float) -> int:
        return self.returncode


@pytest.fixture
def started(tiny_recipes, monkeypatch) -> list[str]:
    """Titles of the runs that were begun; each ends at once, with the loss that LOSSES gives it."""
    titles = []

    def start(job: Job, threads: int) -> Ended:
        titles.append(job.title)
        job.directory.mkdir(parents=True, exist_ok=True)
        loss = LOSSES.get(job.title, 4.0 + job.seed)
        if isinstance(loss, str):
            (job.directory / jobs.OUTPUT).write_text(f"step 1/4\n{loss}\n")
            return Ended(1)
        spec, evaluation = job.recipe.spec, {"lm": 3.0, "held_out": loss}
        stages = [dataclasses.asdict(stage) for stage in job.recipe.stages]
        record = {"spec": dataclasses.asdict(spec), "stages": stages, "steps": spec.steps, "seconds": 60.0}
        record |= {"evaluation": evaluation}
        write_json(job.directory / RECORD, record)
        return Ended(0)

    monkeypatch.setattr(jobs, "start", start)
    return titles


DIVERGED = "jambascope: learning_rate=0.003: the loss became nan at step 7; lower it and start anew"
LOSSES = {
    "jamba-micro/lr-0.0007": 3.5,
    "jamba-micro/lr-0.0015": 3.2,
    "jamba-micro/lr-0.003": DIVERGED,
    "jamba-micro-rope/lr-0.0007": 3.1,
    "jamba-micro-rope/lr-0.0015": 3.1,
    "jamba-micro-rope/lr-0.003": float("nan"),
}


CHILD = """
import pickle
from pathlib import Path
from jambascope.studies.zoo.child import main
from jambascope.zoo import progress, recipes
progress.summary = lambda model: {"held_out": 1.5}
recipes.RECIPES = pickle.loads(Path(__file__).with_name("recipes.pickle").read_bytes())
main()
"""


def silent(*_) -> None:
    pass


def test_the_search_takes_the_lowest_loss_and_seeds_follow_at_that_rate(started, tmp_path):
    found = Family(list(recipes.RECIPES), tmp_path)
    assert zoo_family.train(found, 1, silent) == {}
    assert started == [
        *(f"jamba-micro/lr-{rate}" for rate in ("0.0015", "0.003", "0.0007")),
        *(f"jamba-micro-rope/lr-{rate}" for rate in ("0.0015", "0.003", "0.0007", "0.00035")),
        "jamba-micro/seed-1",
        "jamba-micro/seed-2",
    ]
    assert {name: found.chosen(name) for name in found.names} == {"jamba-micro": 1.5e-3, "jamba-micro-rope": 7e-4}
    outcome = json.loads((tmp_path / "jamba-micro" / "search.json").read_text())
    assert (outcome["chosen"], outcome["steps"]) == (1.5e-3, 40)
    assert [(r["learning_rate"], r["kind"], r["held_out"]) for r in outcome["results"]] == [
        (7e-4, "finished", 3.5),
        (1.5e-3, "finished", 3.2),
        (3e-3, "failed", None),
    ]
    assert outcome["results"][2]["error"] == DIVERGED.removeprefix("jambascope: ")
    for seed in SEEDS:
        spec = json.loads((tmp_path / "jamba-micro" / f"seed-{seed}" / RECORD).read_text())["spec"]
        assert (spec["seed"], spec["learning_rate"]) == (seed, 1.5e-3)
    assert (tmp_path / "jamba-micro-rope" / "seed-0").resolve() == tmp_path / "jamba-micro-rope" / "lr-0.0007"


@pytest.mark.parametrize(
    ("losses", "tried", "chosen"),
    [
        ([9, 9, 4, 3, 4, 9, 9], [7e-4, 1.5e-3, 3e-3], 1.5e-3),
        ([9, 9, 9, 4, 3, 4, 9], [1.5e-3, 3e-3, 6e-3], 3e-3),
        ([9, 9, 9, 4, 3, 2, 1], [1.5e-3, 3e-3, 6e-3, 1.2e-2], 1.2e-2),
        ([9, 3, 4, 5, 6, 9, 9], [2e-4, 3.5e-4, 7e-4, 1.5e-3, 3e-3], 3.5e-4),
        ([9, 9, 3, 3, 3, 9, 9], [3.5e-4, 7e-4, 1.5e-3, 3e-3], 7e-4),
        ([9, 9, 3, None, None, 9, 9], [3.5e-4, 7e-4, 1.5e-3, 3e-3], 7e-4),
        ([None] * 7, [2e-4, 3.5e-4, 7e-4, 1.5e-3, 3e-3], None),
    ],
    ids=["lower side", "upper side", "to the end", "far below", "equal", "both diverge", "all diverge"],
)
def test_the_search_goes_on_until_the_best_lies_between_worse_ones(tiny_recipes, tmp_path, losses, tried, chosen):
    found = Family(["jamba-micro"], tmp_path)
    for rate, loss in zip(zoo_family.RATES, losses, strict=True):
        job = zoo_family.search_job("jamba-micro", tmp_path, rate)
        kind = "failed" if loss is None else "finished"
        found.states[job.directory] = jobs.State(kind=kind, step=40, held_out=loss)
    assert [job.learning_rate for job in found.search("jamba-micro")] == tried
    assert found.searched("jamba-micro") and found.chosen("jamba-micro") == chosen


def test_what_is_over_is_not_trained_again(started, tmp_path):
    zoo_family.train(Family(["jamba-micro"], tmp_path), 1, silent)
    count = len(started)
    zoo_family.train(Family(["jamba-micro"], tmp_path), 1, silent)
    assert len(started) == count
    assert "--snapshots" in zoo_family.search_job("jamba-micro", tmp_path, 1e-3).arguments()
    assert "--snapshots" in zoo_family.seed_jobs("jamba-micro", tmp_path, 1e-3)[0].arguments()
    assert "--snapshots" not in zoo_family.seed_jobs("attention-micro", tmp_path, 1e-3)[0].arguments()


def test_a_run_of_another_curriculum_is_refused(started, tmp_path, monkeypatch):
    zoo_family.train(Family(["jamba-micro"], tmp_path), 1, silent)
    stages = (recipes.Stage(until=None, batch_size=1, sequence_length=16),)
    monkeypatch.setitem(recipes.RECIPES, "jamba-micro", dataclasses.replace(two()["jamba-micro"], stages=stages))
    with pytest.raises(ConfigError, match="lr-0.0007 holds a run of another curriculum; move it away"):
        Family(["jamba-micro"], tmp_path)


def test_a_run_begun_on_another_curriculum_is_refused(tiny_recipes, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "summary", lambda model: {})
    job = zoo_family.search_job("jamba-micro", tmp_path, 1.5e-3)
    train_model("jamba-micro", job.directory, steps=40, seed=0, learning_rate=1.5e-3)
    (job.directory / RECORD).unlink()
    assert jobs.state(job).step == 40
    stages = (recipes.Stage(until=None, batch_size=1, sequence_length=16),)
    monkeypatch.setitem(recipes.RECIPES, "jamba-micro", dataclasses.replace(two()["jamba-micro"], stages=stages))
    with pytest.raises(ConfigError, match="holds a run of another curriculum"):
        jobs.state(zoo_family.search_job("jamba-micro", tmp_path, 1.5e-3))
    with pytest.raises(CheckpointError, match="was written with another data"):
        train_model("jamba-micro", job.directory, steps=40, seed=0, learning_rate=1.5e-3, resume=True)


def test_a_run_that_lies_where_the_chosen_one_is_linked_is_kept(started, tmp_path):
    (tmp_path / "jamba-micro" / "seed-0").mkdir(parents=True)
    with pytest.raises(ConfigError, match="seed-0 is a run of its own, where the search's chosen one belongs"):
        Family(["jamba-micro"], tmp_path)
    assert started == []


def test_a_search_that_fails_throughout_trains_no_seed(started, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo_family, "RATES", (3e-3,))
    monkeypatch.setattr(zoo_family, "START", (3e-3,))
    found = Family(list(recipes.RECIPES), tmp_path)
    zoo_family.train(found, 2, silent)
    assert found.searched("jamba-micro") and found.chosen("jamba-micro") is None
    assert started == ["jamba-micro/lr-0.003", "jamba-micro-rope/lr-0.003"]


def test_a_run_that_ends_otherwise_is_named_and_tried_again(started, tmp_path, monkeypatch):
    monkeypatch.setitem(LOSSES, "jamba-micro/lr-0.0015", "jambascope: unexpected OSError: no space left on device")
    broken = zoo_family.train(Family(["jamba-micro"], tmp_path), 2, silent)
    assert [(job.title, error) for job, error in broken.items()] == [
        ("jamba-micro/lr-0.0015", f"ended with status 1; see {tmp_path / 'jamba-micro' / 'lr-0.0015' / 'train.log'}")
    ]
    assert started.count("jamba-micro/lr-0.0015") == 2
    assert (
        "jamba-micro/lr-0.003" in started
        and "jamba-micro/lr-0.0007" not in started
        and "jamba-micro/seed-1" not in started
    )
    monkeypatch.setitem(LOSSES, "jamba-micro/lr-0.0015", 3.2)
    assert zoo_family.train(Family(["jamba-micro"], tmp_path), 2, silent) == {}
    assert started[-1] == "jamba-micro/seed-2"


def test_recipes_named_first_come_first(started, tmp_path):
    zoo_family.train(Family(list(recipes.RECIPES), tmp_path, first=["jamba-micro-rope"]), 1, silent)
    assert [title.split("/")[0] for title in started[:3]] == ["jamba-micro-rope"] * 3


def test_time_left_goes_by_tokens(started, tmp_path):
    assert Family(["jamba-micro"], tmp_path).minutes_left(1) is None
    for rate in (7e-4, 1.5e-3):
        jobs.start(zoo_family.search_job("jamba-micro", tmp_path, rate), 1)  # 40 steps in a minute each
    # The third run of the search and two seeds are left.
    assert Family(["jamba-micro"], tmp_path).minutes_left(2) == pytest.approx(3 / 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda runs: Family(["jamba-mikro"], runs), "name='jamba-mikro' is no recipe; did you mean 'jamba-micro"),
        (lambda runs: Family(["jamba-micro"], runs, ["jamba-micro-rope"]), "first='jamba-micro-rope' is not among"),
        (lambda runs: zoo_family.train(Family(["jamba-micro"], runs), 3, silent), r"jobs=3 must lie in 1..2"),
    ],
    ids=["name", "first", "jobs"],
)
def test_what_cannot_be_is_refused(tiny_recipes, tmp_path, call, message):
    with pytest.raises(ConfigError, match=message):
        call(tmp_path)


def test_a_run_of_another_spec_is_not_taken_for_this_one(started, tmp_path, monkeypatch):
    zoo_family.train(Family(["jamba-micro"], tmp_path), 1, silent)
    monkeypatch.setattr(recipes, "RECIPES", two(50))
    with pytest.raises(ConfigError, match="another spec: steps 40 instead of 50; move it away, or give another --runs"):
        Family(["jamba-micro"], tmp_path)


def test_a_damaged_checkpoint_is_named(tiny_recipes, tmp_path):
    path = tmp_path / "jamba-micro" / "lr-0.0015" / "training" / "checkpoint.safetensors"
    path.parent.mkdir(parents=True)
    path.write_text("not one")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Family(["jamba-micro"], tmp_path)


def test_a_diverging_run_says_what_is_looked_for(tiny_recipes, tmp_path):
    wild = recipes.recipe("jamba-micro", learning_rate=1e30)
    with pytest.raises(ConfigError) as error:
        fit(new_model(wild), wild.spec, batches(wild), tmp_path)
    assert jobs.DIVERGED.search(str(error.value))


def test_the_command_lists_the_runs(started, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo_family, "train", lambda *_: pytest.fail("--dry-run trained"))
    if "family" not in {command.name for command in zoo_app.registered_commands}:
        zoo_app.command(name="family")(family_command.family)
    jobs.start(zoo_family.search_job("jamba-micro", tmp_path, 1.5e-3), 1)
    result = CliRunner().invoke(app, ["zoo", "family", "jamba-micro", "--runs", str(tmp_path), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert re.search(r"jamba-micro/lr-0.0015 +0.0015 +40 of 40 +3.200 +1.0", result.output)
    assert re.search(r"jamba-micro/lr-0.003 +0.003 +0 of 40", result.output)
    assert "1 of 4 runs are over" in result.output


def test_the_command_tells_what_it_did(started, tmp_path):
    command = typer.Typer()
    command.command()(family_command.family)
    result = CliRunner().invoke(command, ["--runs", str(tmp_path), "--jobs", "2"])
    assert result.exit_code == 0, result.output
    assert "jamba-micro/lr-0.0015: begins\n" in result.stderr
    assert "jamba-micro/lr-0.0015: held-out loss 3.200 after 40 steps, 1.0 min\n" in result.stderr
    assert "jamba-micro/lr-0.003: failed: learning_rate=0.003: the loss became nan at step 7" in result.stderr
    assert re.search(r"jamba-micro/seed-2 +0.0015 +40 of 40 +6.000 +1.0", result.stdout)
    assert re.search(r"jamba-micro/lr-0.0015 +0.0015 \* ", result.stdout)
    assert "9 of 9 runs are over" in result.stdout


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "file"])
def test_what_runs_is_shown(started, tmp_path, terminal, monkeypatch):
    monkeypatch.setattr(family_command, "LINE_SECONDS", 0.0)
    found = Family(["jamba-micro"], tmp_path)
    job = zoo_family.search_job("jamba-micro", tmp_path, 1.5e-3)
    jobs.start(job, 1)
    found.look(job)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=90, highlight=False)
    with family_command._shown(found, 2, console) as show:
        show([job], job, "begins")
        show([job], None, None)
    seen = console.file.getvalue()
    assert "jamba-micro/lr-0.0015: begins" in seen
    assert "1 of 4 runs over, 2 min left" in seen
    assert "40/40" in seen


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "RECIPES", two(steps=200))
    monkeypatch.setattr(zoo_family, "RATES", (1e-3,))
    monkeypatch.setattr(zoo_family, "START", (1e-3,))
    monkeypatch.setattr(zoo_family, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(zoo_family, "cores", lambda: 1)  # the threads decide the last bits
    child = tmp_path / "child.py"
    (tmp_path / "recipes.pickle").write_bytes(pickle.dumps(recipes.RECIPES))
    child.write_text(CHILD)
    monkeypatch.setattr(jobs, "COMMAND", [sys.executable, str(child)])
    job = zoo_family.search_job("jamba-micro-rope", tmp_path, 1e-3)

    def kill_later(running: list[Job], *_: object) -> None:
        if any(found.states[job.directory].step >= 5 for job in running):
            raise KeyboardInterrupt

    found = Family(["jamba-micro-rope"], tmp_path)
    with pytest.raises(KeyboardInterrupt):
        zoo_family.train(found, 1, kill_later)
    begun = jobs.state(job)
    assert begun.kind == "begun" and 5 <= begun.step < 200
    assert zoo_family.train(Family(["jamba-micro-rope"], tmp_path), 1, silent) == {}
    assert jobs.state(job).held_out == 1.5
    monkeypatch.setattr(progress, "summary", lambda model: {})
    straight = train_model("jamba-micro-rope", tmp_path / "straight", steps=200, seed=0, learning_rate=1e-3)
    expected, weights = (load_file(d / "model.safetensors") for d in (straight, job.directory))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert Path(job.directory, jobs.OUTPUT).exists()
