"""One training run of the family: what it is to be, how far its directory has come, and the process that makes it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from safetensors import safe_open

from jambascope.errors import CheckpointError, ConfigError
from jambascope.files import write_json
from jambascope.training import CHECKPOINT, LOG
from jambascope.zoo import recipes
from jambascope.zoo.train import RECORD, curriculum

COMMAND = [sys.executable, "-m", "jambascope.studies.zoo.child"]
FAILED, OUTPUT = "failed.json", "train.log"
AWAY = "move it away, or give another --runs"
DIVERGED = re.compile(r"the loss became \S+ at step (\d+)")
"""What ``training.fit`` says of a run whose loss is no longer finite."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run: recipe, seed, learning rate, and where it lies."""

    name: str
    directory: Path
    seed: int
    learning_rate: float | None
    """None while the search that chooses it is not over."""
    snapshots: bool = False

    @property
    def recipe(self) -> recipes.Recipe:
        return recipes.recipe(self.name, seed=self.seed, learning_rate=self.learning_rate)

    @property
    def title(self) -> str:
        return f"{self.name}/{self.directory.name}"

    @property
    def total_steps(self) -> int:
        return self.recipe.spec.steps

    def arguments(self) -> list[str]:
        """Of the ``jambascope`` command."""
        found = ["zoo", "train", self.name, "--out", str(self.directory), "--seed", str(self.seed), "--resume"]
        found += ["--learning-rate", repr(self.learning_rate)]
        return [*found, "--snapshots"] if self.snapshots else found


@dataclass(frozen=True, kw_only=True)
class State:
    """How far a run has come, by its directory."""

    kind: Literal["waiting", "begun", "finished", "failed"] = "waiting"
    step: int = 0
    """Steps in its last checkpoint, or in all."""
    seconds: float = 0.0
    """Spent on them."""
    loss: float | None = None
    """Language-model loss of the last of them, nats."""
    held_out: float | None = None
    """``progress.summary``'s held-out loss at the end, nats."""
    error: str | None = None
    """Why it failed."""

    @property
    def over(self) -> bool:
        """Nothing more will come of it."""
        return self.kind in ("finished", "failed")


def state(job: Job) -> State:
    """How far a job has come.

    Raises:
        ConfigError: its directory holds a run of another recipe, spec or curriculum.
        CheckpointError: its checkpoint cannot be read.
    """
    if job.learning_rate is None:
        return State()
    if (record := _read(job.directory / RECORD)) is not None:
        _same(job, "spec", record["spec"])
        _same_curriculum(job, record.get("stages"))
        _same_checkpoint(job)
        found = record["evaluation"]
        common: dict[str, Any] = dict(step=record["steps"], seconds=record["seconds"], loss=found["lm"])
        if not math.isfinite(found["held_out"]):
            return State(kind="failed", error=f"its held-out loss is {found['held_out']}", **common)
        return State(kind="finished", held_out=found["held_out"], **common)
    if (record := _read(job.directory / FAILED)) is not None:
        _same(job, "spec", record["spec"])
        return State(kind="failed", step=record["step"], error=record["error"])
    step = _same_checkpoint(job)
    if not step:
        return State()
    # Opened once: read_table opens a path twice, and the run may replace the file in between.
    with open(job.directory / "training" / LOG, "rb") as file:
        last = pq.ParquetFile(file).read(["lm", "seconds"]).slice(step - 1, 1).to_pylist()[0]
    return State(kind="begun", step=step, seconds=last["seconds"], loss=last["lm"])


def start(job: Job, threads: int) -> subprocess.Popen:
    """Train in a process of its own, from its last checkpoint on; what it prints goes to ``train.log``.

    It ends when its stdin is closed, so at the latest with this process.
    """
    job.directory.mkdir(parents=True, exist_ok=True)
    with open(job.directory / OUTPUT, "a") as output:
        return subprocess.Popen(
            [*COMMAND, *job.arguments()],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the others in order
        )


def stop(processes: list[subprocess.Popen]) -> None:
    """End training processes; the checkpoints that they wrote stay."""
    for process in processes:
        process.stdin.close()
    for process in processes:
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def record_failure(job: Job) -> bool:
    """Note in ``failed.json`` that a run diverged; False when its process ended for another reason."""
    said = (job.directory / OUTPUT).read_text(errors="replace").strip().splitlines()
    found = DIVERGED.search(said[-1]) if said else None
    if found is None:
        return False
    error = said[-1].removeprefix("jambascope: ")
    write_json(job.directory / FAILED, {"spec": _spec(job), "step": int(found[1]), "error": error})
    return True


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise ConfigError(f"{path} is not JSON ({e}); move {path.parent} away to train that run anew") from None


def _spec(job: Job) -> dict[str, Any]:
    return _as_stored(dataclasses.asdict(job.recipe.spec))


def _as_stored(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _same(job: Job, part: str, found: Any) -> None:
    wanted = _spec(job) if part == "spec" else _as_stored(job.recipe.config.to_dict())
    if found != wanted:
        keys = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        differing = ", ".join(f"{key} {found.get(key)} instead of {wanted.get(key)}" for key in keys)
        raise ConfigError(f"{job.directory} holds a run of another {part}: {differing}; {AWAY}")


def _same_curriculum(job: Job, found: Any) -> None:
    if found != json.loads(curriculum(job.recipe)):
        raise ConfigError(f"{job.directory} holds a run of another curriculum; {AWAY}")


def _same_checkpoint(job: Job) -> int:
    """Steps in the job's checkpoint, 0 when there is none."""
    path = job.directory / "training" / CHECKPOINT
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.metadata()
        spec, config, stages = (json.loads(stored.get(key, "null")) for key in ("spec", "config", "data"))
        step = int(stored["step"])
    except Exception as e:  # safetensors raises its own error, the system others
        raise CheckpointError(
            f"{path} cannot be read ({e}); move {job.directory} away to train that run anew"
        ) from None
    _same(job, "spec", spec)
    _same(job, "config", config)
    if stages is not None:  # training refuses to go on from one that does not say
        _same_curriculum(job, stages)
    return step
