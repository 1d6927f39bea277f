"""The checkpoints that a training left behind, and at which of them something emerged."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float

from jambascope import checkpoint
from jambascope.config import JambaConfig
from jambascope.errors import CheckpointError, ConfigError
from jambascope.hooks.intervals import resampled_means
from jambascope.zoo import recipes
from jambascope.zoo.train import RECORD

LEAST = 3
"""Fewer snapshots have no course."""
PACKAGED = "jamba-micro"


def snapshots(directory: Path) -> dict[int, Path]:
    """Step -> checkpoint directory, in the order of steps; with the finished weights, where ``training.json`` says that
    they have more steps behind them.

    Raises:
        ConfigError: fewer than three.
        CheckpointError: a damaged ``training.json``.
    """
    found = {}
    for path in (directory / "snapshots").glob("step-*"):
        if (match := re.fullmatch(r"step-(\d+)", path.name)) and (path / "config.json").exists():
            found[int(match.group(1))] = path
    steps = record(directory).get("steps")
    if found and steps is not None and steps > max(found):
        found[steps] = directory
    if len(found) < LEAST:
        raise ConfigError(
            f"it has {len(found)} snapshots/step-* of its training, and {LEAST} are needed; {_remedy(directory)}"
        )
    return dict(sorted(found.items()))


def _remedy(directory: Path) -> str:
    """What trains the model anew with snapshots, and what then asks for it; of an unknown recipe, the packaged one."""
    name = record(directory).get("name")
    name = name if name in recipes.RECIPES else PACKAGED
    seed = recipes.recipe(name).spec.seed
    return f"keep them: jambascope zoo train {name} --snapshots, then --model runs/zoo/{name}/seed-{seed}"


def record(directory: Path) -> dict:
    """``training.json``; empty without one."""
    path = directory / RECORD
    return checkpoint.read_json(path, "remove it, or train the model anew") if path.exists() else {}


def check_snapshots(directory: Path, config: JambaConfig) -> None:
    """
    Raises:
        ConfigError: too few snapshots.
        CheckpointError: one of another model.
    """
    for path in snapshots(directory).values():
        if checkpoint.read_config(path)[0] != config:
            raise CheckpointError(f"{path} is of another model than {directory}; move one of them away")


class Half(NamedTuple):
    """When something came to half of its way from the first checkpoint to the last, to stay."""

    step: float
    low: float
    high: float
    """Ends of the 95 % interval; infinite above where some draws never come to it."""
    before: int
    after: int
    """The checkpoints that the step lies between: it cannot be known better than that."""


def half_way(steps: Sequence[int], values: Float[torch.Tensor, "samples steps"]) -> Half:
    """Step from which on the mean over samples stays beyond half of its way, interpolated between checkpoints linearly
    in the logarithm of the step (and from step 0, in the step); the interval resamples samples."""
    drawn = resampled_means(values)
    found = torch.tensor([_crossing(steps, means)[0] for means in drawn.tolist()], dtype=torch.float64)
    low, high = _ends(found)
    step, i = _crossing(steps, values.double().mean(0).tolist())
    return Half(step, low, high, steps[max(0, i - 1)], steps[i])


def _ends(found: Float[torch.Tensor, " draws"]) -> tuple[float, float]:
    ordered = found.sort().values
    n = len(ordered)
    return ordered[int(0.025 * (n - 1))].item(), ordered[math.ceil(0.975 * (n - 1))].item()


def _crossing(steps: Sequence[int], means: Sequence[float]) -> tuple[float, int]:
    """The step, and the index of the first checkpoint from which on all are beyond half."""
    first, last = means[0], means[-1]
    sign = 1 if last >= first else -1
    half = first + (last - first) / 2
    beyond = [sign * (value - half) > 0 for value in means]
    if not beyond[-1]:  # no way at all: first and last are the same
        return math.inf, len(steps) - 1
    i = len(steps) - 1
    while i > 0 and beyond[i - 1]:
        i -= 1
    a, b = means[i - 1], means[i]
    share = (half - a) / (b - a)
    if steps[i - 1] == 0:
        return share * steps[i], i
    return math.exp(math.log(steps[i - 1]) + share * math.log(steps[i] / steps[i - 1])), i
