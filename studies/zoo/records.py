"""What is known of a recipe's runs: those at the chosen rate, the search before them, and what `zoo eval` measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jambascope.errors import ConfigError
from jambascope.studies.zoo import jobs
from jambascope.studies.zoo.evaluation import find_runs
from jambascope.studies.zoo.family import SEARCH
from jambascope.studies.zoo.jobs import FAILED, Job, State
from jambascope.studies.zoo.summary import Row
from jambascope.zoo.train import RECORD


@dataclass(frozen=True)
class Training:
    """A whole run of a recipe, finished or failed."""

    job: Job
    state: State
    record: dict[str, Any]
    """``training.json``; of a failed run ``failed.json``."""


def trainings(name: str, runs: Path) -> list[Training]:
    """The runs of ``RUNS/NAME/seed-*`` that are over, by seed.

    Raises:
        ConfigError: none is finished, one is of another spec than the recipe's, or not all are of the same learning
            rate, the one that the search chose.
    """
    found = []
    for directory in (runs / name).glob("seed-*"):
        path = next((path for path in (directory / RECORD, directory / FAILED) if path.exists()), None)
        if path is None:
            continue
        record = json.loads(path.read_text())
        spec = record["spec"]
        job = Job(name=name, directory=directory, seed=spec["seed"], learning_rate=spec["learning_rate"])
        found.append(Training(job, jobs.state(job), record))
    if not any(training.state.kind == "finished" for training in found):
        raise ConfigError(f"{runs / name} holds no finished seed; train it with: jambascope zoo family {name}")
    outcome = search(name, runs)
    rates = {training.job.learning_rate for training in found} | ({outcome["chosen"]} if outcome else set())
    if len(rates) > 1:
        raise ConfigError(
            f"the search and the seeds of {runs / name} are not of one learning rate, but of "
            f"{', '.join(sorted(map(str, rates)))}; move the odd ones away, and train them with: "
            f"jambascope zoo family {name}"
        )
    return sorted(found, key=lambda training: training.job.seed)


def typical(found: Sequence[Training]) -> Training:
    """The finished run of median held-out loss, of an even number the worse of the two in the middle: what ships is
    not the best of its seeds."""
    finished = [training for training in found if training.state.kind == "finished"]
    return sorted(finished, key=lambda training: (training.state.held_out, training.job.seed))[len(finished) // 2]


def search(name: str, runs: Path) -> dict[str, Any] | None:
    """What the learning-rate search found, as :meth:`Family.write_search` wrote it; None when there was none."""
    path = runs / name / SEARCH
    return json.loads(path.read_text()) if path.exists() else None


def results(evaluation: Path, found: Sequence[Training]) -> list[Row]:
    """The numbers that `zoo eval` wrote about these runs, and over them.

    Raises:
        ConfigError: no results, or of other weights than the finished runs hold.
    """
    finished = [training for training in found if training.state.kind == "finished"]
    name, runs = finished[0].job.name, finished[0].job.directory.parent.parent
    remedy = f"evaluate again, all of them, with: jambascope zoo eval --runs {runs} --out {evaluation}"
    try:
        rows = [Row(**row) for row in pq.read_table(evaluation / "results.parquet").to_pylist()]
        models = json.loads((evaluation / "spec.json").read_text())["models"]
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"evaluation={str(evaluation)!r} holds no results of `zoo eval` ({e}); {remedy}") from None
    measured = {model["seed"]: model["identity"] for model in models if model["model"] == name}
    now = {training.job.seed: find_runs([str(training.job.directory)])[0].identity for training in finished}
    if measured != now:
        differing = sorted(seed for seed in {*measured, *now} if measured.get(seed) != now.get(seed))
        raise ConfigError(
            f"evaluation={str(evaluation)!r} is of other weights of {name} than {runs / name} holds "
            f"(seed {', '.join(map(str, differing))}); {remedy}"
        )
    return [row for row in rows if row.model == name]
