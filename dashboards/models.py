"""Which models the pages can open, and how many of them are kept in memory."""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import psutil
import streamlit as st
import torch

from jambascope import HookedJamba
from jambascope.checkpoint import find_directory, locate_tensors, read_config
from jambascope.devices import parse_device, parse_dtype
from jambascope.errors import CheckpointError, ConfigError
from jambascope.files import write_json
from jambascope.memory import readable_bytes, weight_bytes
from jambascope.zoo import packaged_models

MOST_RECENT = 8
"""Directories that are remembered."""
REST = 0.1
"""Share of the free memory that weights leave to what is computed with them."""


@dataclass(frozen=True)
class Checkpoint:
    """Which weights are open; changes when their files do."""

    directory: str
    modified: int
    device: str | None
    dtype: str | None


# -- what can be chosen ----------------------------------------------------------------------------------------


def recent_file() -> Path:
    """Where the directories that were opened are remembered; ``JAMBASCOPE_HOME`` sets another folder."""
    return Path(os.environ.get("JAMBASCOPE_HOME") or Path.home() / ".jambascope") / "recent.json"


def recent() -> list[str]:
    """Checkpoint directories that the command line opened, the latest first; those that are gone are left out."""
    try:
        found = json.loads(recent_file().read_text())
    except (OSError, ValueError):
        return []
    found = [name for name in found if isinstance(name, str)] if isinstance(found, list) else []
    return [name for name in found if (Path(name) / "config.json").is_file()]


def remember(directory: str) -> None:
    """Note a directory as the latest; a home that cannot be written to remembers nothing."""
    kept = list(dict.fromkeys([directory, *recent()]))[:MOST_RECENT]
    try:
        recent_file().parent.mkdir(parents=True, exist_ok=True)
        write_json(recent_file(), kept)
    except (OSError, CheckpointError):
        return


def choices(start: str) -> list[str]:
    """The model given at the start, the packaged ones, and recent directories. A link can name no others, so that it
    opens no other files."""
    return list(dict.fromkeys([start, *packaged_models(), *recent()]))


_directory = cache(find_directory)
"""Asked once per name: for a hub id it goes to the network."""


def checkpoint_of(name: str, device: str | None, dtype: str | None) -> Checkpoint:
    """The weights called ``name`` as they lie there now.

    Raises:
        CheckpointError: a directory that cannot be read.
    """
    directory = _directory(name)
    try:
        modified = max((p.stat().st_mtime_ns for p in directory.iterdir() if p.is_file()), default=0)
    except OSError as e:
        raise CheckpointError(f"{directory} cannot be read ({e.strerror}); restore it, or start again") from None
    return Checkpoint(str(directory), modified, device, dtype)


# -- what is kept ----------------------------------------------------------------------------------------------


def bytes_of(checkpoint: Checkpoint) -> int:
    """What its weights take in memory, before any of them is read."""
    directory = Path(checkpoint.directory)
    if checkpoint.dtype is None:  # as stored
        return sum(path.stat().st_size for path in set(locate_tensors(directory).values()))
    return weight_bytes(read_config(directory)[0], parse_dtype(checkpoint.dtype))


def free_bytes(device: str | None) -> int:
    """Memory of the device that nobody uses."""
    device = parse_device(device)
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


@dataclass
class Shelf:
    """Open models, shared by all browser sessions: the longest unused make room for others."""

    most_bytes: int
    """Of all their weights together."""
    free: Callable[[str | None], int] = free_bytes
    """Device -> bytes that nobody uses."""
    _open: OrderedDict[Checkpoint, HookedJamba] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, checkpoint: Checkpoint) -> HookedJamba:
        """The model of a checkpoint, loaded once for all sessions.

        Raises:
            ConfigError: before anything is read, when its weights do not fit.
        """
        with self._lock:
            if checkpoint not in self._open:
                self._make_room(checkpoint)
                self._open[checkpoint] = HookedJamba.from_pretrained(
                    checkpoint.directory, device=checkpoint.device, dtype=checkpoint.dtype
                )
            self._open.move_to_end(checkpoint)
            return self._open[checkpoint]

    def holds(self, checkpoint: Checkpoint) -> bool:
        """Whether it is open."""
        return checkpoint in self._open

    def sizes(self) -> dict[Checkpoint, int]:
        """Bytes of the weights that are open, the longest unused first."""
        return {
            checkpoint: sum(p.numel() * p.element_size() for p in model.parameters())
            for checkpoint, model in self._open.items()
        }

    def check(self, checkpoint: Checkpoint) -> int:
        """Bytes of its weights.

        Raises:
            ConfigError: they do not fit, whatever else is closed.
        """
        size, room = bytes_of(checkpoint), int(self.free(checkpoint.device) * (1 - REST)) + sum(self.sizes().values())
        needs = f"{checkpoint.directory} needs {readable_bytes(size)} for its weights"
        if size > self.most_bytes:
            raise ConfigError(
                f"{needs}, and the dashboard keeps at most {readable_bytes(self.most_bytes)}; start it with a larger "
                "--model-memory, or with --dtype bfloat16"
            )
        if size > room:
            raise ConfigError(
                f"{needs}, and {readable_bytes(room)} are free; close other programs, choose a smaller model, or start "
                "the dashboard with --dtype bfloat16"
            )
        return size

    def _make_room(self, checkpoint: Checkpoint) -> None:
        size, kept = self.check(checkpoint), self.sizes()
        for old in [c for c in kept if c.directory == checkpoint.directory]:
            del self._open[old], kept[old]  # its files have changed
        most = min(self.most_bytes, int(self.free(checkpoint.device) * (1 - REST)) + sum(kept.values()))
        while kept and sum(kept.values()) + size > most:
            kept.pop(self._open.popitem(last=False)[0])


def default_bytes(device: str | None) -> int:
    """Half of the device's memory."""
    device = parse_device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] // 2
    return psutil.virtual_memory().total // 2


@st.cache_resource(show_spinner=False)
def shelf(most_bytes: int) -> Shelf:
    """The server's only one."""
    return Shelf(most_bytes)
