"""Which weights a study is asked of: found, told apart by what they are, and opened."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jambascope import checkpoint
from jambascope.errors import ConfigError, RunError
from jambascope.model import HookedJamba
from jambascope.zoo.train import RECORD


@dataclass(frozen=True)
class ModelOfRun:
    """Weights of a run."""

    model: str
    """As the spec names it."""
    recipe: str
    """Under which trainings are pooled: the zoo's name for it, where that is known, else ``model``."""
    training_seed: int | None
    directory: str
    identity: str
    """sha256 of configuration and weights."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_models(names: Sequence[str]) -> tuple[ModelOfRun, ...]:
    """The weights that names stand for.

    Trainings are pooled where their ``training.json`` agree in all but the seed, and each has its own.

    Raises:
        CheckpointError: a name without weights, or damaged ones.
        ConfigError: two names of the same weights, which would count twice.
    """
    found: dict[str, ModelOfRun] = {}
    records: dict[str, dict[str, Any]] = {}
    for name in names:
        directory = checkpoint.find_directory(name)
        checkpoint.read_config(directory)
        identity = checkpoint.identity(directory)
        if identity in found:
            raise ConfigError(f"models: {found[identity].model!r} and {name!r} are the same weights; leave one out")
        records[name] = _record(directory)
        seed = records[name].get("spec", {}).get("seed")
        recipe = records[name].get("name", name)
        found[identity] = ModelOfRun(name, recipe, seed, str(directory.absolute()), identity)
    models = tuple(found.values())
    pooled = {model.recipe: [m for m in models if m.recipe == model.recipe] for model in models}
    alone = {recipe for recipe, own in pooled.items() if not _poolable([records[m.model] for m in own])}
    return tuple(replace(m, recipe=m.model) if m.recipe in alone else m for m in models)


def _record(directory: Path) -> dict[str, Any]:
    path = directory / RECORD
    return checkpoint.read_json(path, "remove it, or train the model anew") if path.exists() else {}


def _poolable(records: Sequence[dict[str, Any]]) -> bool:
    seeds = [record.get("spec", {}).get("seed") for record in records]
    rest = {
        json.dumps([{**record.get("spec", {}), "seed": None}, record.get("stages")], sort_keys=True)
        for record in records
    }
    return len(set(seeds)) == len(seeds) and len(rest) == 1


def check_unchanged(model: ModelOfRun) -> Path:
    """The directory of a run's model, which still holds the weights that the run began with.

    Raises:
        RunError: it holds others.
        CheckpointError: it is gone.
    """
    directory = Path(model.directory)
    directory = directory if directory.is_dir() else checkpoint.find_directory(model.model)
    if (identity := checkpoint.identity(directory)) != model.identity:
        raise RunError(
            f"{directory} holds other weights ({identity[:10]}) than this run began with ({model.identity[:10]}); put "
            "those back, or run the study anew"
        )
    return directory


def open_model(directory: Path | str, device: str | None) -> HookedJamba:
    """In float32: weights are stored as bfloat16 and meant to be computed in more."""
    return HookedJamba.from_pretrained(directory, device=device, dtype="float32")
