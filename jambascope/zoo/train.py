"""The run that makes a packaged model: recipe, batches, checkpoints, snapshots and the finished directory."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from jambascope import training
from jambascope.errors import CheckpointError, ConfigError
from jambascope.files import write_json
from jambascope.initialization import initialize, mimetic
from jambascope.model import HookedJamba
from jambascope.zoo import progress
from jambascope.zoo.language import mixture
from jambascope.zoo.recipes import SNAPSHOTS, Recipe, recipe
from jambascope.zoo.tokenizer import build_tokenizer

RECORD = "training.json"
"""Beside the weights: name, spec, steps, tokens, seconds, threads and the last quick evaluation."""


def train(
    name: str,
    out: str | Path | None = None,
    steps: int | None = None,
    seed: int | None = None,
    learning_rate: float | None = None,
    resume: bool = False,
    snapshots: bool = False,
) -> Path:
    """Train a model of the zoo anew; returns the directory of the finished weights, in bfloat16.

    The same recipe, steps and seed give the same weights on the same machine with the same number of threads.

    Args:
        name: one of ``recipes.RECIPES``.
        out: directory of the model, ``runs/zoo/NAME/seed-SEED`` when None; what a killed run needs to continue, and
            the log, lie in its folder ``training``.
        steps, seed, learning_rate: other than the recipe's.
        resume: continue a run that was killed; a finished one stays as it is.
        snapshots: keep the weights at ``recipes.SNAPSHOTS`` too, in ``snapshots/step-NNNNN``.

    Raises:
        ConfigError: an unknown recipe, numbers out of range, ``out`` a file.
        CheckpointError: resuming a run of another recipe, curriculum, steps, seed or learning rate.
    """
    chosen = recipe(name, steps=steps, seed=seed, learning_rate=learning_rate)
    out = Path("runs/zoo", name, f"seed-{chosen.spec.seed}") if out is None else Path(out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={str(out)!r} is a file; give a directory for the model")
    if resume and _is_finished(out, name, chosen):
        return out
    if not resume:
        if out.is_symlink():
            raise ConfigError(
                f"out={str(out)!r} is a link to {out.resolve()}, whose run would be lost; give another out"
            )
        _forget(out)
    model = new_model(chosen)

    def keep(step: int) -> None:
        if snapshots and step in SNAPSHOTS:
            _save(model, out / "snapshots" / f"step-{step:05d}")

    log = training.fit(
        model,
        chosen.spec,
        batches(chosen),
        out / "training",
        progress.summary,
        resume,
        progress=True,
        after_step=keep,
        data=curriculum(chosen),
    )
    _save(model, out)
    _write_record(out / RECORD, name, chosen, log)
    return out


def _is_finished(out: Path, name: str, chosen: Recipe) -> bool:
    """Whether the directory holds this very run, finished.

    Raises:
        CheckpointError: it holds another one, finished.
    """
    if not (out / RECORD).exists():
        return False
    found = json.loads((out / RECORD).read_text())
    for part, now in json.loads(json.dumps(_identity(name, chosen))).items():
        if found.get(part) != now:
            raise CheckpointError(
                f"{out} holds a finished run of another {part}: {found.get(part)}, not {now}; "
                "give that one, or another directory"
            )
    return True


def curriculum(chosen: Recipe) -> str:
    """What a recipe's batches are told by, as JSON."""
    return json.dumps([dataclasses.asdict(stage) for stage in chosen.stages])


def _identity(name: str, chosen: Recipe) -> dict[str, Any]:
    """What a run is told by."""
    return {"name": name, "spec": dataclasses.asdict(chosen.spec), "stages": json.loads(curriculum(chosen))}


def _forget(out: Path) -> None:
    """Remove what an earlier run left and would pass for this one's."""
    for path in (out / RECORD, out / "training" / training.CHECKPOINT):
        path.unlink(missing_ok=True)
    for directory in (out / "snapshots").glob("step-*"):
        shutil.rmtree(directory)


def _write_record(path: Path, name: str, chosen: Recipe, log: list[dict[str, float]]) -> None:
    """What a reader of the weights must know of the run: written last, so that it marks a finished directory."""
    record = {
        **_identity(name, chosen),
        "steps": len(log),
        "tokens": chosen.tokens(len(log)),
        "seconds": log[-1]["seconds"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "evaluation": {key: value for key, value in log[-1].items() if key in ("lm", *progress.MEASURES)},
    }
    write_json(path, record)


def new_model(chosen: Recipe) -> HookedJamba:
    """The untrained model of a recipe and its seed; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.spec.seed)
        model = HookedJamba(chosen.config)
        initialize(model, chosen.initial_std)
        if chosen.mimetic:
            mimetic(model)
    with torch.no_grad():
        model.unembed.weight.copy_(model.embed.weight)
    model.tokenizer = build_tokenizer()
    return model


def batches(chosen: Recipe) -> Callable[[int], Int[torch.Tensor, "batch pos"]]:
    """Step -> ids [B T], by the recipe's seed and the step alone."""

    def batch(step: int) -> torch.Tensor:
        stage, rng = chosen.stage(step), np.random.default_rng([chosen.spec.seed, step])
        rows = mixture(rng, stage.sequence_length, "train", stage.shares, stage.options)
        return torch.as_tensor(np.stack([row.ids for row in islice(rows, stage.batch_size)]))

    return batch


def _save(model: HookedJamba, directory: Path) -> None:
    """The weights as bfloat16, as they ship; the model itself stays in float32."""
    shipped = HookedJamba(model.config)
    shipped.load_state_dict(model.state_dict())
    shipped.tokenizer = model.tokenizer
    shipped.to(torch.bfloat16).save_pretrained(directory)
