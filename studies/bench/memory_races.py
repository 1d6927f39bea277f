"""Races about memory as well as time: loading a checkpoint, and contexts up to 262,144 tokens."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from jambascope.studies.bench import children
from jambascope.studies.bench.models import VOCABULARY, Lab
from jambascope.studies.bench.race import OURS, Race, Setting
from jambascope.studies.bench.timing import Side

LONG_LENGTHS = (1024, 4096, 16384, 65536, 262_144)
TOKENS_TO_TIME = 16384
"""Short sequences are run so often that this many tokens make one timing."""
PACKAGED = "jamba-micro"
PEAK, DEVICE_PEAK, BEYOND = "peak GB", "peak GB on the device", "peak GB beyond the libraries"


def load_sides(lab: Lab, at: Setting) -> dict[str, Side | str]:
    """Opening the checkpoint, warm in the system's file cache, until every weight has been touched."""
    where = str(lab.directory(at.d_model)), str(lab.device)
    size = 3 * _weight_bytes(lab, at)
    return {
        OURS: Side(partial(children.load_ours, *where), size),
        "transformers": Side(partial(children.load_theirs, *where), size),
    }


def load_peaks(lab: Lab, at: Setting) -> Iterator[tuple[str, str, float] | tuple[str, str]]:
    """Peak memory of one load of each side, in a process of its own."""
    for side, task in ((OURS, "load-ours"), ("transformers", "load-theirs")):
        yield from _child_rows(side, children.in_child(task, lab.directory(at.d_model), lab.device))
    yield "the weights", "GB on disk", _weight_bytes(lab, at) / 1e9


def _weight_bytes(lab: Lab, at: Setting) -> int:
    return sum(p.stat().st_size for p in lab.directory(at.d_model).glob("*.safetensors"))


def _child_rows(side: str, found: dict[str, float] | str) -> Iterator[tuple[str, str, float] | tuple[str, str]]:
    if isinstance(found, str):
        yield side, found
        return
    yield side, PEAK, found["peak_bytes"] / 1e9
    yield side, BEYOND, (found["peak_bytes"] - found["before_bytes"]) / 1e9
    if "device_peak_bytes" in found:
        yield side, DEVICE_PEAK, found["device_peak_bytes"] / 1e9


def long_sides(lab: Lab, at: Setting) -> dict[str, Side | str]:
    """One sequence through four Mamba layers, at every length in every round."""
    model = lab.pure_mamba(at.d_model)

    def side(length: int) -> Side:
        tokens = lab.tokens(1, length)
        need = 4 * length * (12 * 2 * at.d_model + 2 * VOCABULARY)
        return Side(torch.no_grad()(lambda: model(tokens)), need, max(1, TOKENS_TO_TIME // length), length, length)

    return {f"pure Mamba, {length:,} tokens": side(length) for length in lab.lengths or LONG_LENGTHS}


def long_pass(lab: Lab, at: Setting) -> Iterator[tuple[str, str, float] | tuple[str, str]]:
    """The packaged hybrid once over the longest length, in a process of its own."""
    length = max(lab.lengths or LONG_LENGTHS)
    side = f"{PACKAGED}, one pass over {length:,} tokens"
    found = children.in_child("one-pass", PACKAGED, lab.device, length)
    yield from _child_rows(side, found)
    if not isinstance(found, str):
        yield side, "s", found["seconds"]


LOAD = Race("load", "Loading a checkpoint", load_sides, by_length=False, extra=load_peaks, patience=4)
LONG = Race(
    "long", "Long contexts", long_sides, by_length=False, one_row=True, extra=long_pass,
    quantity="us per token", patience=10, opt_in=True, all_ours=True,
)  # fmt: skip
