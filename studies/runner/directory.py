"""A run's directory: written whole or not at all, gone on with after any end, used by one process at a time.

    spec.json             what was asked: study, version, spec, command, models and what their weights are, and what was
                          in the files that the answer depends on (sha256): texts, and the study where it is yours
    cells/                while it runs: a file of rows for each finished cell, and one of tensors where there are any
    results.parquet       when done: all rows; their order is that of the cells
    tensors.safetensors   all tensors, as CELL/NAME
    environment.json      machine and versions of the process that ended it
    report.html           the page

A cell counts as finished when its file of rows is there; that is written last, under its name only when complete. The
same holds for ``results.parquet`` and the run. ``.lock`` is locked by the process that works on the run, and free as
soon as that has ended, however it ended.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import file_digest, sha256
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from jambascope.errors import RunError
from jambascope.files import read_table, write_json, write_table, write_tensors
from jambascope.studies.runner.study import Cell, Found

if TYPE_CHECKING:
    import torch

FORMAT = 1
"""Of the directory, for readers to come."""
SPEC, RESULTS, TENSORS = "spec.json", "results.parquet", "tensors.safetensors"
ENVIRONMENT, REPORT, CELLS, LOCK = "environment.json", "report.html", "cells", ".lock"
KEY = b"jambascope"
"""Of what a parquet file says about its rows."""
NEEDED = {"format", "study", "source", "version", "spec", "models", "package", "command"}


def address(
    study: str,
    version: int,
    spec: dict[str, Any],
    models: Sequence[dict[str, Any]],
    contents: Mapping[str, str] = {},
) -> str:
    """Name of the directory of a question: the same for the same study, version, spec, weights and files' contents,
    wherever weights and the study's own file lie.

    Args:
        contents: path -> sha256, as ``runner.contents`` gives them.
    """
    asked = {key: value for key, value in spec.items() if key != "models"}
    weights = [[model["recipe"], model["identity"]] for model in models]
    parts: list[Any] = [study, version, asked, weights]
    if contents:
        parts.append(list(contents.values()))
    text = json.dumps(parts, sort_keys=True)
    return f"{study}-{sha256(text.encode()).hexdigest()[:10]}"


def said(cell: Cell) -> str:
    """A cell in words."""
    return ", ".join(f"{key} {value}" for key, value in cell.items())


class RunDirectory:
    """One run on the disk; make it by :meth:`create` or :meth:`open`."""

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path, self.record = path, record

    @classmethod
    def create(cls, path: Path, record: dict[str, Any]) -> RunDirectory:
        """A directory that appears with its ``spec.json`` in it; one that is there already is opened.

        Raises:
            RunError: it cannot be written, or what is there is no run.
        """
        if path.exists():
            return cls.open(path)
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
            try:
                made.chmod(0o755)
                (made / CELLS).mkdir()
                write_json(made / SPEC, record | {"format": FORMAT})
                os.rename(made, path)
            except FileExistsError:  # another process was quicker
                pass
            except OSError:
                if not path.exists():
                    raise
            finally:
                shutil.rmtree(made, ignore_errors=True)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """
        Raises:
            RunError: no directory, or without a ``spec.json`` that can be read, or of another format.
        """
        if not path.is_dir():
            raise RunError(f"{str(path)!r} is no directory; give the directory of a run, such as runs/studies/NAME-...")
        try:
            record = json.loads((path / SPEC).read_text(encoding="utf-8"))
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except FileNotFoundError:
            raise RunError(f"{path} has no {SPEC}, so it is no run, or half deleted; move it away") from None
        except (OSError, ValueError) as e:
            raise RunError(f"{path / SPEC} cannot be read ({e}); move {path} away and run the study anew") from None
        if record.get("format") != FORMAT:
            raise RunError(
                f"{path} is a run of format={record.get('format')!r}, and this jambascope reads {FORMAT}; it was "
                f"written by jambascope {record.get('package', 'unknown')}"
            )
        if missing := sorted(NEEDED - record.keys()):
            raise RunError(f"{path / SPEC} lacks {', '.join(missing)}; move {path} away and run the study anew")
        return cls(path, record)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held while a process works on the run.

        Raises:
            RunError: another one does, or the directory cannot be written.
        """
        with _writing(self.path):
            file = (self.path / LOCK).open("a+")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                who = file.read().strip() or "unknown"
                raise RunError(f"{self.path} is in use by process {who}; wait for it, or end it first") from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    # -- cells -------------------------------------------------------------------------------------------------

    def finished(self, cells: Sequence[Cell]) -> list[bool]:
        """Which cells are measured and kept."""
        return [self._rows_of(i, cell).exists() for i, cell in enumerate(cells)]

    def write_cell(self, cells: Sequence[Cell], i: int, table: pa.Table, found: Found, seconds: float) -> None:
        """Keep what cell ``i`` gave: tensors first, so that rows never stand without theirs."""
        rows = self._rows_of(i, cells[i])
        with _writing(self.path):
            rows.parent.mkdir(exist_ok=True)
            about = {"cell": cells[i], "seconds": seconds} | _kept(rows.with_suffix(".safetensors"), found.tensors)
            write_table(rows, table.replace_schema_metadata({KEY: json.dumps(about)}))

    def read_cell(self, i: int, cell: Cell) -> tuple[pa.Table, dict[str, Any], dict[str, torch.Tensor]]:
        """Rows, what is said about them, and tensors.

        Raises:
            RunError: a damaged file.
        """
        path = self._rows_of(i, cell)
        remedy = f"remove {path} to measure that cell anew, then: jambascope study resume {self.path}"
        table, about = _read(path, remedy)
        if about.get("cell") != cell:
            raise RunError(f"{path} holds another cell ({about.get('cell')}) than {cell}; {remedy}")
        return table, about, _read_tensors(path.with_suffix(".safetensors"), about, remedy)

    def _rows_of(self, i: int, cell: Cell) -> Path:
        digest = sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:12]
        return self.path / CELLS / f"{i:05d}-{digest}.parquet"

    # -- results -----------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        return (self.path / RESULTS).exists()

    @property
    def whole(self) -> bool:
        """Done, reported and cleared up."""
        return self.done and (self.path / REPORT).exists() and not (self.path / CELLS).exists()

    def gather(self, cells: Sequence[Cell]) -> None:
        """Make the results of the cells, all of which are finished."""
        found = [self.read_cell(i, cell) for i, cell in enumerate(cells)]
        tensors = {f"{i}/{name}": tensor for i, (_, _, own) in enumerate(found) for name, tensor in own.items()}
        cells_about = [about for _, about, _ in found]
        table = pa.concat_tables([table for table, _, _ in found], promote_options="permissive")
        with _writing(self.path):
            about = {"cells": cells_about} | _kept(self.path / TENSORS, tensors)
            write_table(self.path / RESULTS, table.replace_schema_metadata({KEY: json.dumps(about)}))

    def discard_cells(self) -> None:
        """Once the results hold them."""
        shutil.rmtree(self.path / CELLS, ignore_errors=True)

    def results(self) -> tuple[pa.Table, list[dict[str, Any]]]:
        """All rows; and of each cell itself, its seconds and the names of its tensors.

        Raises:
            RunError: an unfinished run, or a damaged one.
        """
        table, about = self._results()
        if about["tensors"] and not (self.path / TENSORS).exists():
            raise RunError(f"{self.path} has no {TENSORS}, though its results have tensors; {self._remedy}")
        return table, about["cells"]

    @property
    def _remedy(self) -> str:
        return f"move {self.path} away and run it anew with: {self.record['command']}"

    def _results(self) -> tuple[pa.Table, dict[str, Any]]:
        if not self.done:
            raise RunError(f"{self.path} is not finished; go on with: jambascope study resume {self.path}")
        return _read(self.path / RESULTS, self._remedy)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors, as CELL/NAME; errors as :meth:`results`."""
        return _read_tensors(self.path / TENSORS, self._results()[1], self._remedy)

    def write(self, name: str, writer: Any, value: Any) -> None:
        """Another file of the directory, by a function of ``jambascope.files``."""
        with _writing(self.path):
            writer(self.path / name, value)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What goes wrong on the disk, said as what to do."""
    try:
        yield
    except OSError as e:
        where = e.filename or path
        raise RunError(f"{where} cannot be written: {e.strerror or e}; make room, or permit writing") from e


def _read(path: Path, remedy: str) -> tuple[pa.Table, dict[str, Any]]:
    try:
        table = read_table(path)
        return table, json.loads(table.schema.metadata[KEY])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as e:
        raise RunError(f"{path} is damaged ({str(e).splitlines()[0] if str(e) else type(e).__name__}); {remedy}") from e


def _kept(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Write tensors, where there are any; what is said about them beside the rows."""
    if not tensors:
        return {"tensors": [], "sha256": None}
    # Cloned: safetensors takes no two tensors that share memory.
    write_tensors(path, {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()})
    return {"tensors": sorted(tensors), "sha256": _digest(path)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _read_tensors(path: Path, about: dict[str, Any], remedy: str) -> dict[str, torch.Tensor]:
    if not about["tensors"]:
        return {}
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if _digest(path) != about["sha256"]:
            raise RunError(f"{path} is damaged (its sha256 is not what was written); {remedy}")
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise RunError(f"{path} is damaged ({e}); {remedy}") from e


def table_of(study: str, cell: Cell, recipe: str, found: Found) -> pa.Table:
    """The rows of a cell with what the cell says, checked.

    Raises:
        RunError: no rows; a row without measure, value or sample, or with a label of the cell's; a value that is no
            finite number.
    """
    labels = {**cell, "recipe": recipe}
    if not found.rows:
        raise RunError(f"{study} gave no rows for the cell of {said(cell)}")
    for row in found.rows:
        if missing := {"measure", "value", "sample"} - row.keys():
            raise RunError(
                f"{study} gave a row without {', '.join(sorted(missing))} for the cell of {said(cell)}: {row}"
            )
        if double := labels.keys() & row.keys():
            raise RunError(f"{study} gave a row with {', '.join(sorted(double))}, which the cell says: {row}")
        if not isinstance(row["value"], Real) or not math.isfinite(row["value"]):
            rest = said({key: value for key, value in row.items() if key != "value"})
            raise RunError(
                f"{study} gave value={row['value']!r}, no finite number, in the cell of {said(cell)}: {rest}"
            )
    rows = [{**labels, **row, "value": float(row["value"])} for row in found.rows]
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        return pa.table({name: [row.get(name) for row in rows] for name in names})
    except pa.ArrowException as e:
        raise RunError(f"{study} gave labels of mixed types for the cell of {said(cell)}: {e}") from e
