"""The models that are asked, and what each said: measured once for the same weights and grid, and kept."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jambascope import checkpoint, losses
from jambascope.errors import CheckpointError, ConfigError
from jambascope.files import write_table
from jambascope.model import HookedJamba
from jambascope.studies.zoo import measures, tasks
from jambascope.studies.zoo.measures import Cell, Values
from jambascope.zoo import documents, language, packaged_models, reviews, scoring, words
from jambascope.zoo.recipes import RECIPES
from jambascope.zoo.train import RECORD

UNKNOWN_SEED = -1
"""Of weights without a ``training.json``: they are not pooled with others of their name."""
Told = Callable[[int, str], None]


@dataclass(frozen=True)
class Run:
    """Weights to evaluate."""

    model: str
    """The recipe's name; of a checkpoint that was named by its directory, the directory."""
    seed: int
    directory: Path
    identity: str
    """sha256 of configuration and weights."""
    steps: int | None
    tokens: int | None

    @property
    def title(self) -> str:
        return self.model if self.seed == UNKNOWN_SEED else f"{self.model} seed {self.seed}"


# -- which models --------------------------------------------------------------------------------------------


def find_runs(names: Sequence[str] = (), runs: Path | None = None) -> list[Run]:
    """The weights that names stand for, in the order of the recipes.

    Args:
        names: recipes or packaged models, and checkpoint directories over the zoo's vocabulary, each of which is a
            model of its own; with none, all packaged models and what ``runs`` holds.
        runs: a directory of finished runs, ``NAME/seed-*/training.json``. They stand in for the packaged weights of
            their name, which may be of another recipe.

    Raises:
        ConfigError: a name that is neither, or has no weights; ``runs`` no directory, or with runs of one name that
            differ in more than their seeds, since their numbers are pooled.
        CheckpointError: weights that cannot be read, or that speak another vocabulary.
    """
    if runs is not None and not runs.is_dir():
        raise ConfigError(f"runs={str(runs)!r} is not a directory; give the one that holds NAME/seed-*/")
    packaged = packaged_models()
    if not names:
        trained = [] if runs is None else [name for name in RECIPES if _finished(runs, name)]
        names = [*packaged, *(name for name in trained if name not in packaged)]
    found: dict[tuple[str, int], Run] = {}
    for name in names:
        for run in _of_name(name, runs, packaged):
            found.setdefault((run.model, run.seed), run)
    order = list(RECIPES)
    return sorted(
        found.values(), key=lambda r: (order.index(r.model) if r.model in order else len(order), r.model, r.seed)
    )


def _of_name(name: str, runs: Path | None, packaged: dict[str, Path]) -> list[Run]:
    """Finished runs, else the packaged weights."""
    if name in packaged or name in RECIPES:
        trained = [] if runs is None else _finished(runs, name)
        if not trained and name not in packaged:
            where = "no --runs were given" if runs is None else f"{runs}/{name} holds no finished run"
            raise ConfigError(f"{name!r} is not packaged, and {where}; train it with: jambascope zoo train {name}")
        _check_poolable(trained)
        return [_open(directory, name) for directory in trained or [packaged[name]]]
    directory = Path(name).expanduser()
    if (directory / "config.json").is_file():
        return [_open(directory, str(Path(name)))]
    near = difflib.get_close_matches(name, [*RECIPES, *packaged], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"{name!r} is neither a model of the zoo nor a checkpoint directory; {hint}there are {', '.join(RECIPES)}"
    )


def _finished(runs: Path, name: str) -> list[Path]:
    """Directories of a name's seeds that a training has ended in, ``training.json`` being written last."""
    return sorted(path.parent for path in (runs / name).glob(f"seed-*/{RECORD}"))


def _check_poolable(directories: list[Path]) -> None:
    """Raise ConfigError unless the runs differ in their seeds alone, and each has its own."""
    seeds: dict[Any, Path] = {}
    for directory in directories:
        record = _record(directory)
        spec = record.get("spec", {}) | {"curriculum": record.get("stages")}
        if (seed := spec.pop("seed", None)) in seeds:
            raise ConfigError(f"{seeds[seed]} and {directory} are both of seed {seed}; move one of them away")
        seeds[seed] = directory
        first = spec if len(seeds) == 1 else first
        if differing := sorted(key for key in {*first, *spec} if first.get(key) != spec.get(key)):
            raise ConfigError(
                f"{directory} and {directories[0]} differ in {', '.join(differing)}, so their numbers cannot be "
                "pooled; move one of them away, or name each directory to see it alone"
            )


def _record(directory: Path) -> dict[str, Any]:
    """What ``training.json`` tells of a run; nothing where there is none."""
    path = directory / RECORD
    return checkpoint.read_json(path, "train the model anew") if path.exists() else {}


def _open(directory: Path, model: str) -> Run:
    """A run by what its directory holds; the weights are hashed, not loaded."""
    tokenizer = checkpoint.load_tokenizer(directory)
    if tokenizer is None or tokenizer.get_vocab() != words.VOCABULARY:
        has = "has no tokenizer" if tokenizer is None else f"speaks another vocabulary ({len(tokenizer)} tokens)"
        raise CheckpointError(
            f"{directory} {has}; the tasks need weights over the zoo's {len(words.VOCABULARY)} words, "
            "as `jambascope zoo train` makes them"
        )
    record = _record(directory)
    return Run(
        model=model,
        seed=int(record.get("spec", {}).get("seed", UNKNOWN_SEED)),
        directory=directory,
        identity=checkpoint.identity(directory),
        steps=record.get("steps"),
        tokens=record.get("tokens"),
    )


# -- what they say -------------------------------------------------------------------------------------------


def fingerprint(episodes: int) -> str:
    """Of what decides the values besides the weights: grid, language and measures, as they are written. The model's
    own code is not in it: after a change there, remove the values that are kept."""
    modules = (tasks, measures, scoring, losses, words, documents, reviews, language)
    sources = [inspect.getsource(module) for module in modules]
    return sha256("\0".join([*sources, str(tasks.TRAINED_LENGTH), str(episodes), np.__version__]).encode()).hexdigest()


def evaluate(runs: Sequence[Run], kept: Path, episodes: int, tell: Told = lambda done, doing: None) -> list[Values]:
    """The values of every run over the whole grid, float32 weights on the CPU.

    Args:
        kept: directory of finished runs' values, one file for the same weights and grid: what lies there is read.
        episodes: documents of a task of share 1.
        tell: called with the number of finished runs, and what is being measured.

    Raises:
        ConfigError: fewer than two episodes.
    """
    if episodes < 2:
        raise ConfigError(f"episodes={episodes} must be at least 2: an interval needs two documents")
    kept.mkdir(parents=True, exist_ok=True)
    grid = fingerprint(episodes)
    drawn = functools.cache(lambda task: tasks.draw(task, episodes))
    found = []
    for done, run in enumerate(runs):
        path = kept / f"{run.identity[:16]}-{grid[:16]}.parquet"
        if not path.exists():
            _write_values(path, _measured(run, drawn, lambda doing, done=done: tell(done, doing)))
        found.append(read_values(path))
    return found


def _measured(run: Run, drawn: Callable[[tasks.Task], list], tell: Callable[[str], None]) -> Values:
    tell(run.title)
    # Weights are stored as bfloat16 and meant to be computed in float32.
    model = HookedJamba.from_pretrained(run.directory, dtype="float32")
    values: Values = {}
    for task in tasks.grid():
        size = "" if task.x is None else f" {task.x}"
        tell(f"{run.title}: {task.task}, {task.condition}{size}")
        new = measures.measure(model, task, drawn(task))
        assert not new.keys() & values.keys(), "two tasks measure the same"
        values |= new
    return values


def _write_values(path: Path, values: Values) -> None:
    """One row per document and part, under its name only when complete."""
    columns: dict[str, list] = {name: [] for name in (*Cell._fields, "document", "part", "value")}
    for cell, array in values.items():
        count = array.size
        for name, value in zip(Cell._fields, cell, strict=True):
            columns[name] += [value] * count
        documents, parts = np.indices(array.shape)
        columns["document"] += documents.ravel().tolist()
        columns["part"] += parts.ravel().tolist()
        columns["value"] += array.ravel().tolist()
    numbers = {"x": pa.float64(), "document": pa.int32(), "part": pa.int8(), "value": pa.float64()}
    types = {name: numbers.get(name, pa.string()) for name in columns}
    write_table(path, pa.table({name: pa.array(values, types[name]) for name, values in columns.items()}))


def read_values(path: Path) -> Values:
    """What :func:`_write_values` wrote.

    Raises:
        CheckpointError: a damaged file.
    """
    try:
        columns = pq.read_table(path).to_pydict()
    except (pa.ArrowException, OSError) as e:
        raise CheckpointError(f"{path} cannot be read ({e}); remove it to measure these weights anew") from None
    gathered: dict[Cell, list[float]] = {}
    last: dict[Cell, int] = {}
    cells = map(Cell, *(columns[name] for name in Cell._fields))
    for cell, part, value in zip(cells, columns["part"], columns["value"], strict=True):
        gathered.setdefault(cell, []).append(value)
        last[cell] = max(last.get(cell, 0), part)
    return {cell: np.array(values).reshape(-1, last[cell] + 1) for cell, values in gathered.items()}
