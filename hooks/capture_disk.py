"""Captures kept in a directory: one ``.npy`` file per hook point, mapped into memory, and an index.

``index.json`` says what the files hold and how many positions of each are written. It is replaced, never changed in
place, whenever a piece of the run is done; so a run that is killed leaves a directory that opens with its whole
pieces. bfloat16, which ``.npy`` has no name for, is stored as uint16.

What is read is checked before it is believed: a directory may come from elsewhere.
"""

from __future__ import annotations

import json
import os
import re
from collections import UserDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jambascope.config import JambaConfig
from jambascope.errors import InputError, JambascopeError
from jambascope.files import write_json
from jambascope.hook_table import HOOK_TABLE
from jambascope.hooks.capture_size import Entry
from jambascope.hooks.capture_store import Captured, Store

if TYPE_CHECKING:
    from jambascope.model import HookedJamba

FORMAT, VERSION = "jambascope-capture", 1
INDEX = "index.json"
STORED = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int64": np.int64,
}
"""Name of the dtype of a tensor -> what stands in the file."""


class DiskStore(Store):
    """Tensors that are files."""

    def __init__(self, entries: Sequence[Entry], directory: Path, model: HookedJamba, overwrite: bool) -> None:
        super().__init__(entries, torch.device("cpu"))
        self.directory, self.model = directory, model
        self._since_index: set[str] = set()
        _claim(directory, overwrite)
        self._write_index()
        try:
            self._maps = {e.name: _create(directory / f"{e.name}.npy", e) for e in entries}
        except OSError as e:
            raise InputError(f"device={str(directory)!r} cannot hold this capture ({e.strerror}); give another") from e
        for entry in entries:
            self.targets[entry.name] = entry.as_named(torch.from_numpy(self._maps[entry.name]).view(entry.dtype))

    def write(self, name: str, part: torch.Tensor, positions: Sequence[int], ours: bool = False) -> None:
        if name in self._since_index:  # a new piece has begun
            self._write_index()
        super().write(name, part, positions, ours)
        self._since_index.add(name)

    def finish(self) -> Mapping[str, torch.Tensor]:
        super().finish()
        for array in self._maps.values():
            array.flush()
        self._write_index()
        return _open_files(self.directory, _read_index(self.directory)["entries"])

    def _write_index(self) -> None:
        self._since_index.clear()
        index = {
            "format": FORMAT,
            "version": VERSION,
            "model": {"name": self.model.name_or_path, "config": self.model.config.to_dict()},
            "entries": {e.name: _described(e, self.written[e.name]) for e in self.entries},
        }
        write_json(self.directory / INDEX, index)


def open_capture(directory: str | Path, model: HookedJamba | None = None) -> Captured:
    """What a capture wrote to a directory, also of a run that was killed; files are mapped when they are asked for.

    Args:
        model: the model it was made with, for the methods of ActivationCache that need one (a cache without reads
            activations only).

    Returns:
        Name -> tensor on the CPU. Writing to one changes the copy in memory, not the file.

    Raises:
        InputError: no capture, a damaged one, one of another format version or of a model of another shape.
    """
    directory = Path(directory)
    index = _read_index(directory)
    if model is not None and index["model"]["config"] != model.config:
        raise InputError(f"the capture in {directory} is of another model, {index['model']['name']!r}")
    entries = index["entries"]
    positions = {name: e["positions"][: e["written"]] for name, e in entries.items()}
    return Captured(_open_files(directory, entries), model, positions, {n: e["kept"] for n, e in entries.items()})


class _Files(UserDict):
    """Name -> tensor, opened when it is first asked for."""

    def __getitem__(self, name: str) -> torch.Tensor:
        value = super().__getitem__(name)
        if not isinstance(value, torch.Tensor):
            value = self.data[name] = value()
        return value


def _open_files(directory: Path, entries: Mapping[str, dict]) -> _Files:
    def opener(name: str, entry: dict):
        return lambda: _open(directory / f"{name}.npy", entry)

    return _Files({name: opener(name, entry) for name, entry in entries.items()})


def _open(path: Path, entry: dict) -> torch.Tensor:
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, SyntaxError, EOFError) as e:
        raise InputError(f"{path} cannot be read as part of a capture ({str(e)[:80] or type(e).__name__})") from None
    if array.shape != tuple(entry["shape"]) or array.dtype != STORED[entry["dtype"]] or not array.flags.c_contiguous:
        raise InputError(
            f"{path} holds {array.dtype} {array.shape}, not the {entry['dtype']} {entry['shape']} of the index"
        )
    tensor = torch.from_numpy(array).view(getattr(torch, entry["dtype"]))
    written = tensor.narrow(entry["axes"].index("T"), 0, entry["written"])
    return written.permute([entry["axes"].index(axis) for axis in AXES[frozenset(entry["axes"])]])


def _claim(directory: Path, overwrite: bool) -> None:
    """Make the directory, or take over that of an older capture."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        held = sorted(p.name for p in directory.iterdir())
        if held and not overwrite:
            raise InputError(
                f"device={str(directory)!r} is not empty ({', '.join(held[:3])}, ...); give another directory, or "
                "overwrite=True to replace the capture in it"
            )
        if held:
            names = [f"{name}.npy" for name in _read_index(directory)["entries"]]
            (directory / INDEX).unlink()
            for name in names:
                (directory / name).unlink(missing_ok=True)
        probe = directory / (INDEX + ".part")
        probe.write_text("")
        probe.unlink()
    except OSError as e:
        raise InputError(
            f"device={str(directory)!r} cannot be written ({e.strerror}); give another directory"
        ) from None


def _create(path: Path, entry: Entry) -> np.memmap:
    name = str(entry.dtype).removeprefix("torch.")
    array = np.lib.format.open_memmap(path, mode="w+", dtype=STORED[name], shape=entry.stored_shape)
    if hasattr(os, "posix_fallocate"):  # a full disk is then an error here, not a crash while it is written
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _described(entry: Entry, written: int) -> dict[str, Any]:
    p = entry.positions
    return {
        "axes": [entry.row.axes[i] for i in entry.order],
        "shape": list(entry.stored_shape),
        "dtype": str(entry.dtype).removeprefix("torch."),
        "positions": {"start": p.start, "stop": p.stop} if isinstance(p, range) else list(p),
        "kept": {field: list(chosen) for field, chosen in entry.kept.items()},
        "written": written,
    }


def _read_index(directory: Path) -> dict[str, Any]:
    """The checked index, with positions as a range or tuple and the model's configuration as one."""
    path = directory / INDEX
    try:
        index = json.loads(path.read_text())
    except OSError as e:
        raise InputError(f"{directory} holds no capture ({path.name}: {e.strerror})") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path} is damaged: {str(e)[:80]}") from None
    try:
        if index["format"] != FORMAT:
            raise InputError(f"{path} is not the index of a capture (format {str(index['format'])[:40]!r})")
        if index["version"] != VERSION:
            raise InputError(f"{path} has format version {index['version']!r}; this is version {VERSION}")
        config = JambaConfig(**index["model"]["config"])
        entries = {_name(name): _entry(entry) for name, entry in index["entries"].items()}
        return {"model": {"name": str(index["model"]["name"]), "config": config}, "entries": entries}
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, JambascopeError) as e:
        raise InputError(f"{path} is damaged: {type(e).__name__} {str(e)[:80]}") from None


POINTS = {re.sub(r"^blocks\.\{L\}\.", "", row.name) for row in HOOK_TABLE}
AXES = {frozenset(row.axes): row.axes for row in HOOK_TABLE}


def _name(name: str) -> str:
    """A name of the hook table, so that no index makes a path of another kind."""
    if re.sub(r"^blocks\.\d{1,6}\.", "", name) not in POINTS:
        raise ValueError(f"{name!r} is no hook point")
    return name


def _entry(entry: dict) -> dict[str, Any]:
    axes, shape, written = tuple(entry["axes"]), [_whole(n) for n in entry["shape"]], _whole(entry["written"])
    held = entry["positions"]
    if isinstance(held, dict):
        positions: Sequence[int] = range(_whole(held["start"]), _whole(held["stop"]))
    else:
        positions = tuple(_whole(p) for p in held)
    named = AXES.get(frozenset(axes), ())
    if len(named) != len(axes) or len(shape) != len(axes) or entry["dtype"] not in STORED:
        raise ValueError(f"axes {axes}, shape {shape}, dtype {entry['dtype']!r}")
    if len(positions) != shape[axes.index("T")] or written > len(positions):
        raise ValueError(f"{len(positions)} positions, {written} written, shape {shape}")
    kept = {str(field): tuple(_whole(i) for i in chosen) for field, chosen in entry["kept"].items()}
    return dict(axes=axes, shape=shape, dtype=entry["dtype"], positions=positions, kept=kept, written=written)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a whole number from 0")
    return value
