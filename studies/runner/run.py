"""A study run: what is not yet measured is measured, what is all measured is put together and reported."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from jambascope import checkpoint
from jambascope.errors import JambascopeError, RunError
from jambascope.files import write_json, write_text
from jambascope.studies.bench.peers import versions
from jambascope.studies.environment import machine
from jambascope.studies.runner import cluster, report
from jambascope.studies.runner.contents import check_contents, contents_of
from jambascope.studies.runner.directory import ENVIRONMENT, REPORT, RunDirectory, address, said, table_of
from jambascope.studies.runner.models import ModelOfRun, check_unchanged, find_models, open_model
from jambascope.studies.runner.spec import Spec, changed, files_of, make_spec
from jambascope.studies.runner.study import Cell, Found, Study, load

Told = Callable[[int, str], None]
"""Called with the number of finished cells, and what is being measured."""


@dataclass(frozen=True)
class Workers:
    """Where cells are measured."""

    device: str | None = None
    """Of the model; the CPU when None."""
    ray: str | None = None
    """None: in this process. ``"local"``: on a Ray cluster of this machine, which ends with the run. Else the address
    of one that runs."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    study: Study
    spec: Spec
    measured: int
    """Cells that were measured now; 0 when the run was finished before."""
    cells: int


def run(
    source: str,
    spec: Spec,
    runs: Path,
    workers: Workers = Workers(),  # noqa: B008 (frozen)
    tell: Callable[[int], Told] | None = None,
) -> Run:
    """Ask a study; what lies in ``runs`` of the same question is gone on with, or answers at once.

    Args:
        source: name of the study, or path of its file.
        tell: given the number of cells, returns what is told of them.

    Raises:
        ConfigError, CheckpointError: a model that is not there or cannot be asked, before anything is measured.
        RunError: a directory that is damaged, in use or cannot be written; a value that is no number. Finished cells
            are kept.
    """
    study = load(source)
    models = find_models(spec.models)
    _check(study, spec, models)
    own = (_absolute(source),) if source.endswith(".py") else ()
    contents = contents_of((*own, *files_of(spec)))
    asked = spec.model_dump(mode="json")
    stored = [model.as_dict() for model in models]
    record = {
        "study": study.name,
        "source": _absolute(source),
        "version": study.version,
        "package": version("jambascope"),
        "command": command(source, spec),
        "spec": asked,
        "models": stored,
        "contents": contents,
    }
    path = runs / address(study.name, study.version, asked, stored, contents)
    directory = RunDirectory.create(path, record)
    return _go_on(directory, *_opened(directory), workers, tell)


def resume(path: Path, workers: Workers = Workers(), tell: Callable[[int], Told] | None = None) -> Run:  # noqa: B008
    """Go on with an unfinished run; of a finished one nothing is measured. Errors as :func:`run`."""
    directory = RunDirectory.open(path)
    return _go_on(directory, *_opened(directory), workers, tell)


def rewrite_report(path: Path) -> Path:
    """Write ``report.html`` of a finished run anew from what it stored; needs no model.

    Raises:
        RunError: an unfinished, damaged or used run, or one of another version of the study.
    """
    directory = RunDirectory.open(path)
    study, spec, _ = _opened(directory)
    with directory.lock():
        _write_report(directory, study, spec)
    return path / REPORT


def read(path: Path) -> tuple[RunDirectory, Study, Spec, pd.DataFrame]:
    """A finished run: its directory, study, spec and rows. Errors as :func:`rewrite_report`."""
    directory = RunDirectory.open(path)
    study, spec, _ = _opened(directory)
    return directory, study, spec, directory.results()[0].to_pandas()


def command(source: str, spec: Spec) -> str:
    """What reproduces a run on the command line."""
    words = ["jambascope", "study", "run", source]
    settings = changed(spec)
    for model in spec.models if settings.pop("models", None) is not None else ():
        words += ["--model", model]
    if (seeds := settings.pop("seeds", None)) is not None:
        words += ["--seeds", seeds]
    for name, value in settings.items():
        words += ["--set", f"{name}={value}"]
    return shlex.join(words)


def _absolute(source: str) -> str:
    return str(Path(source).expanduser().absolute()) if source.endswith(".py") else source


def _opened(directory: RunDirectory) -> tuple[Study, Spec, tuple[ModelOfRun, ...]]:
    """Study, spec and models of a run, which the study of today can go on with.

    Raises:
        RunError: it is of another version of the study, or says what that does not know.
    """
    record = directory.record
    study = load(record["source"])
    if (study.name, study.version) != (record["study"], record["version"]):
        raise RunError(
            f"{directory.path} is of version={record['version']} of {record['study']}, and this is version "
            f"{study.version} of {study.name}; run it anew with: {record['command']}"
        )
    try:
        models = tuple(ModelOfRun(**model) for model in record["models"])
        return study, make_spec(study.name, study.spec, record["spec"]), models
    except (JambascopeError, TypeError) as e:
        raise RunError(f"{directory.path}: its spec.json does not fit {study.name} ({e}); move it away") from e


def _check(study: Study, spec: Spec, models: Sequence[ModelOfRun]) -> None:
    for model in models:
        try:
            directory = Path(model.directory)
            study.check(spec, checkpoint.read_config(directory)[0], directory)
        except JambascopeError as e:
            raise type(e)(f"{study.name} of {model.model}: {e}") from None


def _go_on(
    directory: RunDirectory,
    study: Study,
    spec: Spec,
    models: tuple[ModelOfRun, ...],
    workers: Workers,
    tell: Callable[[int], Told] | None,
) -> Run:
    cells, measured = study.cells(spec), 0
    if directory.whole:  # nothing to do, which takes no right to write
        return Run(directory.path, study, spec, 0, len(cells))
    with directory.lock():
        if not directory.done:
            measured = _measure_missing(directory, study, spec, models, workers, tell)
            directory.gather(cells)
        if not (directory.path / REPORT).exists():
            device = torch.device(workers.device or "cpu")
            where = {"cells measured by": f"Ray, {workers.ray}"} if workers.ray else {}
            directory.write(ENVIRONMENT, write_json, machine(device) | versions() | where)
            _write_report(directory, study, spec)
        directory.discard_cells()
    return Run(directory.path, study, spec, measured, len(cells))


def _measure_missing(
    directory: RunDirectory,
    study: Study,
    spec: Spec,
    models: tuple[ModelOfRun, ...],
    workers: Workers,
    tell: Callable[[int], Told] | None,
) -> int:
    """Measure and keep the cells that are not kept yet; how many they were."""
    check_contents(directory.record)
    cells, whose = study.cells(spec), {model.model: model for model in models}
    left = [i for i, done in enumerate(directory.finished(cells)) if not done]
    for i in set(range(len(cells))) - set(left):
        directory.read_cell(i, cells[i])  # a damaged one is better known before hours of work
    told = tell(len(cells)) if tell else lambda done, doing: None
    kept = len(cells) - len(left)
    try:
        for i, found, seconds in _measure(directory, study, spec, whose, left, workers, told):
            table = table_of(study.name, cells[i], whose[cells[i]["model"]].recipe, found)
            directory.write_cell(cells, i, table, found, seconds)
            kept += 1
    except BaseException as e:
        e.add_note(f"{kept} of {len(cells)} cells are kept; go on with: jambascope study resume {directory.path}")
        raise
    return len(left)


def _measure(
    directory: RunDirectory,
    study: Study,
    spec: Spec,
    whose: dict[str, ModelOfRun],
    left: Sequence[int],
    workers: Workers,
    told: Told,
) -> Iterator[tuple[int, Found, float]]:
    """What each of the cells that are left gives, as they are done."""
    cells = study.cells(spec)
    needed = {model: check_unchanged(whose[model]) for model in dict.fromkeys(cells[i]["model"] for i in left)}
    if workers.ray is not None:
        asked = spec.model_dump(mode="json")
        tasks = {i: (cells[i], whose[cells[i]["model"]].as_dict()) for i in left}
        told(len(cells) - len(left), f"{len(left)} cells on Ray")
        found = cluster.measure(workers.ray, directory.record["source"], asked, tasks, workers.device)
        for n, (i, *what) in enumerate(found, len(cells) - len(left)):
            told(n, f"{said(cells[i])} came from Ray")
            yield i, *what
        return
    opened: tuple[str, Any] = ("", None)
    for n, i in enumerate(left):
        told(len(cells) - len(left) + n, said(cells[i]))
        if opened[0] != (model := cells[i]["model"]):
            opened = ("", None)  # one model in memory at a time
            opened = (model, open_model(needed[model], workers.device))
        yield i, *measure_cell(study, spec, cells[i], opened[1])


def measure_cell(study: Study, spec: Spec, cell: Cell, model: Any) -> tuple[Found, float]:
    """What a cell gives, and how long it took in seconds; errors say which cell it was."""
    start = time.perf_counter()
    try:
        return study.measure(spec, cell, model), time.perf_counter() - start
    except Exception as e:
        e.add_note(f"in the cell of {said(cell)} of {study.name}")
        raise


def _write_report(directory: RunDirectory, study: Study, spec: Spec) -> None:
    table, cells = directory.results()
    environment = report.environment_of(directory)
    page = report.page_of(study, spec, table.to_pandas(), directory.record, cells, environment)
    directory.write(REPORT, write_text, page)
