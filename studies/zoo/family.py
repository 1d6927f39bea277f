"""The whole family of the zoo, trained: an equal search for the learning rate of every recipe, then the seeds.

The search trains every recipe from the first of ``SEEDS``, over all of its steps, at the rates of ``START``, and goes
on through ``RATES`` on the side of the better one until the best has a worse one on either side. The run of the lowest
held-out loss at the end is chosen, and is the recipe's first seed. A run that diverges is recorded and never chosen.
Each run has a directory, and what is finished is not trained again:

    RUNS/NAME/lr-RATE/     a run of the search
    RUNS/NAME/search.json  its outcome
    RUNS/NAME/seed-0       a link to the chosen one
    RUNS/NAME/seed-S/      a run from another seed at the chosen rate
"""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jambascope.errors import ConfigError
from jambascope.files import write_json
from jambascope.studies.zoo import jobs
from jambascope.studies.zoo.jobs import Job, State
from jambascope.zoo import recipes

RATES = (2e-4, 3.5e-4, 7e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2)
START = (1.5e-3, 3e-3)
"""The first of ``RATES`` that are tried, neighbours."""
SEEDED = ("jamba-micro", "jamba-micro-1to3", "mamba-micro", "attention-micro")
"""Recipes that are trained from all ``SEEDS``; the others from the first of them."""
SEEDS = (0, 1, 2)
KEEPING = ("jamba-micro", "mamba-micro")
"""Recipes whose runs keep snapshots on the way."""
SEARCH = "search.json"
POLL_SECONDS = 1.0
TRIES = 2
"""How often a run is begun in one call, when its process ends without having diverged: it may have been killed."""


def search_job(name: str, runs: Path, rate: float) -> Job:
    """The run from the first seed at a learning rate."""
    directory = runs / name / f"lr-{rate:g}"
    return Job(name=name, directory=directory, seed=SEEDS[0], learning_rate=rate, snapshots=name in KEEPING)


def seed_jobs(name: str, runs: Path, learning_rate: float | None) -> list[Job]:
    """The runs from the other seeds, at the rate that the search has chosen."""
    seeds = SEEDS[1:] if name in SEEDED else ()
    return [
        Job(
            name=name,
            directory=runs / name / f"seed-{seed}",
            seed=seed,
            learning_rate=learning_rate,
            snapshots=name in KEEPING,
        )
        for seed in seeds
    ]


def first_seed(name: str, runs: Path) -> Path:
    """Where the run that the search chose is linked."""
    return runs / name / f"seed-{SEEDS[0]}"


@dataclass
class Family:
    """The runs of some recipes, and how far each has come.

    Raises:
        ConfigError: an unknown recipe, or a directory that holds a run of another spec or of nobody's search.
    """

    names: Sequence[str]
    runs: Path
    first: Sequence[str] = ()
    """Recipes whose runs all come before those of the others."""
    states: dict[Path, State] = field(default_factory=dict, init=False)
    """Directory -> how far its run has come."""
    _tokens: dict[tuple[str, int], int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for name in (*self.names, *self.first):
            recipes.recipe(name)
        if missing := [name for name in self.first if name not in self.names]:
            raise ConfigError(f"first={missing[0]!r} is not among the recipes to train: {', '.join(self.names)}")
        for name in self.names:
            link = first_seed(name, self.runs)
            if link.exists() and not link.is_symlink():
                raise ConfigError(f"{link} is a run of its own, where the search's chosen one belongs; {jobs.AWAY}")
            for rate in RATES:
                self.look(search_job(name, self.runs, rate))
            for job in seed_jobs(name, self.runs, self.chosen(name)):
                self.look(job)

    def look(self, job: Job) -> State:
        """Read a job's directory anew."""
        self.states[job.directory] = jobs.state(job)
        return self.states[job.directory]

    def state(self, job: Job) -> State:
        """As it was last read."""
        return self.states[job.directory]

    def jobs(self) -> list[Job]:
        """All runs in the order in which they are to be made: searches, then the other seeds; within each the recipes
        in turn. The rate of a run is None while the search for it is not over."""
        found = [
            job for name in self.names for job in (*self.search(name), *seed_jobs(name, self.runs, self.chosen(name)))
        ]
        return sorted(found, key=lambda job: (job.name not in self.first, job.seed != SEEDS[0]))

    def search(self, name: str) -> list[Job]:
        """The runs of a recipe's search as far as it is known, by rate: the best so far ends it, or names the next."""
        runs = [search_job(name, self.runs, rate) for rate in RATES]
        first, last = RATES.index(START[0]), RATES.index(START[-1])
        while all(self.state(job).over for job in runs[first : last + 1]):
            best = min(range(first, last + 1), key=lambda i: _loss(self.state(runs[i])))
            if best == first > 0:
                first -= 1
            elif best == last < len(runs) - 1:
                last += 1
            else:
                break
        return runs[first : last + 1]

    def searched(self, name: str) -> bool:
        """Whether the search of a recipe is over."""
        return all(self.state(job).over for job in self.search(name))

    def chosen(self, name: str) -> float | None:
        """The learning rate of the lowest held-out loss; None while the search goes on, or when every run failed."""
        if not self.searched(name):
            return None
        best = min(self.search(name), key=lambda job: _loss(self.state(job)))
        return best.learning_rate if self.state(best).held_out is not None else None

    def write_search(self, name: str) -> None:
        """Write what a search that is over has found to ``search.json``, and link the chosen run as the first seed."""
        searched, chosen = self.search(name), self.chosen(name)
        results = [{"learning_rate": job.learning_rate, **dataclasses.asdict(self.state(job))} for job in searched]
        outcome = {"name": name, "seed": SEEDS[0], "steps": searched[0].total_steps, "chosen": chosen}
        write_json(self.runs / name / SEARCH, outcome | {"results": results})
        link = first_seed(name, self.runs)
        link.unlink(missing_ok=True)
        if chosen is not None:
            link.symlink_to(f"lr-{chosen:g}", target_is_directory=True)

    def tokens(self, job: Job, steps: int) -> int:
        """Tokens of a job's first steps; counted once, since a display asks every second."""
        key = job.name, steps
        if key not in self._tokens:
            self._tokens[key] = job.recipe.tokens(steps)
        return self._tokens[key]

    def minutes_left(self, at_a_time: int) -> float | None:
        """Of all runs together, from what each recipe's tokens (or any's) took until now; None before the first."""
        spent = {name: [0.0, 0] for name in self.names}
        for job in self.jobs():
            now = self.state(job)
            spent[job.name][0] += now.seconds
            spent[job.name][1] += self.tokens(job, now.step)
        total = [sum(numbers) for numbers in zip(*spent.values(), strict=True)]
        if not total[1]:
            return None
        left = 0.0
        for job in self.jobs():
            now = self.state(job)
            if not now.over:
                seconds, tokens = spent[job.name] if spent[job.name][1] else total
                left += seconds / tokens * (self.tokens(job, job.total_steps) - self.tokens(job, now.step))
        return left / at_a_time / 60


def _loss(state: State) -> float:
    return math.inf if state.held_out is None else state.held_out


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


Show = Callable[[Sequence[Job], Job | None, str | None], None]
"""Given the running jobs and, when one began or ended, that one and what is to be said of it."""


def train(family: Family, at_a_time: int, show: Show) -> dict[Job, str]:
    """Train what is not finished, ``at_a_time`` runs at once, each with as many threads as cores are left for it.

    Args:
        show: called about every second, and when a run begins or ends.

    Returns:
        Job -> why it ended, of runs that ended neither finished nor diverged; a further call goes on with them.

    Raises:
        ConfigError: more runs at once than cores.
    """
    if not 1 <= at_a_time <= cores():
        raise ConfigError(f"jobs={at_a_time} must lie in 1..{cores()}: every run needs a core of its own")
    running: dict[Job, subprocess.Popen] = {}
    broken: dict[Job, str] = {}
    tries: Counter[Job] = Counter()
    for name in family.names:
        _conclude_search(family, name)
    try:
        while True:
            for job in [job for job, process in running.items() if process.poll() is not None]:
                status = running.pop(job).returncode
                if error := _conclude(family, job, status):
                    broken[job] = error
                show(list(running), job, error or _ended(family.state(job)))
            ready = (job for job in family.jobs() if job not in running and tries[job] < TRIES)
            ready = (job for job in ready if job.learning_rate is not None and not family.state(job).over)
            while len(running) < at_a_time and (job := next(ready, None)) is not None:
                tries[job] += 1
                broken.pop(job, None)
                running[job] = jobs.start(job, cores() // at_a_time)
                step = family.state(job).step
                show(list(running), job, f"goes on at step {step}" if step else "begins")
            if not running:
                return broken
            for job in running:
                family.look(job)
            show(list(running), None, None)
            time.sleep(POLL_SECONDS)
    finally:
        jobs.stop(list(running.values()))


def _conclude(family: Family, job: Job, status: int) -> str | None:
    """Record how a run ended; what went wrong when it neither finished nor diverged."""
    if status and jobs.record_failure(job):
        status = 0
    over = family.look(job).over
    if over and not status:
        _conclude_search(family, job.name)
        return None
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return f"ended with {how}; see {job.directory / jobs.OUTPUT}"


def _ended(state: State) -> str:
    if state.kind == "failed":
        return f"failed: {state.error}"
    return f"held-out loss {state.held_out:.3f} after {state.step} steps, {state.seconds / 60:.1f} min"


def _conclude_search(family: Family, name: str) -> None:
    """Write a search's outcome as soon as it is over, and see how far the runs at its rate are."""
    if family.searched(name):
        family.write_search(name)
        for job in seed_jobs(name, family.runs, family.chosen(name)):
            family.look(job)
