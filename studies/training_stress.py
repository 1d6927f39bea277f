"""What training logs show of instability, and small models trained at high rates: rows of ``stability``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch

from jambascope import training
from jambascope.config import JambaConfig
from jambascope.errors import ConfigError, InputError
from jambascope.hook_point import At
from jambascope.model import HookedJamba
from jambascope.training import LOG, TrainingSpec
from jambascope.zoo.recipes import JAMBA, Recipe, Stage
from jambascope.zoo.train import RECORD, batches, new_model

SPIKES, DIPS = "loss spikes", "loss dips as deep (control)"
GRADIENT, CLIPPED = "largest gradient norm", "share of steps clipped"
DIVERGED, END_LOSS, LARGEST = "diverged", "loss at the end", "largest activation inside Mamba"
WINDOW, FAR = 50, 6.0
"""A spike lies so many robust standard deviations from the median of the steps before it."""
EVERY = 10
"""Steps between looks at the activations of a training here, and at its log."""


def excursions(
    losses: Sequence[float], starts: Sequence[int] = (), window: int = WINDOW, far: float = FAR
) -> list[int]:
    """Steps whose loss lies above the median of the ``window`` steps before by more than ``far`` times their spread
    (1.4826 times the median absolute deviation, which is the standard deviation of normal noise).

    Args:
        starts: steps at which the data change, which moves the loss by itself: ``window`` steps from each do not count.
            Steps right after an excursion belong to it.
    """
    values, found, last = np.asarray(losses, dtype=np.float64), [], -window
    skipped = {step for start in (0, *starts) for step in range(start, start + window)}
    for step in range(window, len(values)):
        if step in skipped:
            continue
        before = values[step - window : step]
        middle = np.median(before)
        spread = 1.4826 * np.median(np.abs(before - middle))
        if not values[step] - middle <= far * spread:  # NaN is one, too
            if step - last > window // 5:
                found.append(step)
            last = step
    return found


# -- logs ----------------------------------------------------------------------------------------------------


def log_rows(directory: Path) -> list[dict[str, Any]]:
    """Spikes and gradients of the training log beside a checkpoint, as ``zoo train`` writes it; none without a log.

    Raises:
        InputError: a log that cannot be read.
    """
    path = directory / "training" / LOG
    if not path.exists():
        return []
    try:
        log = pq.read_table(path).to_pandas().sort_values("step")
        losses, norms, steps = log["lm"].to_numpy(), log["gradient_norm"].to_numpy(), log["step"].to_numpy()
    except (OSError, ValueError, KeyError) as e:
        raise InputError(f"{path} is no training log ({e}); move it away, or train the model anew") from None
    record = directory / RECORD
    known = json.loads(record.read_text()) if record.exists() else {}
    starts = [stage["until"] for stage in known.get("stages", ()) if stage.get("until")]
    clip = known.get("spec", {}).get("clip_norm")
    values = {
        SPIKES: len(excursions(losses, starts)),
        DIPS: len(excursions(-losses, starts)),
        GRADIENT: float(norms.max()),
    }
    if clip:
        values[CLIPPED] = float((norms > clip).mean())
    rows = [
        {"measure": m, "condition": "training log", "sample": 0, "value": v, "n": len(log)} for m, v in values.items()
    ]
    return rows + _curve_rows(steps, losses, norms)


def _curve_rows(steps: np.ndarray, losses: np.ndarray, norms: np.ndarray) -> list[dict[str, Any]]:
    """The log in 60 pieces: the median loss and the largest gradient norm of each."""
    rows = []
    for part in np.array_split(np.arange(len(steps)), min(60, len(steps))):
        at = {"x": float(steps[part[-1]] + 1), "sample": 0}
        rows.append({"measure": "log: loss (nats)", **at, "value": float(np.median(losses[part]))})
        rows.append({"measure": "log: largest gradient norm", **at, "value": float(norms[part].max())})
    return rows


# -- trainings here ------------------------------------------------------------------------------------------


def stress_recipe(inner_norms: bool, learning_rate: float, steps: int, seed: int) -> Recipe:
    """Four small layers, one of them attention, on the language's mixture."""
    small = JambaConfig.jamba(
        n_layers=4, d_model=32, attn_layer_period=4, attn_layer_offset=2, d_vocab=JAMBA.d_vocab, n_heads=2,
        n_key_value_heads=1, d_head=16, d_mlp=32, num_experts=1, d_state=8, n_ctx=128, inner_norms=inner_norms,
        bos_token_id=JAMBA.bos_token_id, eos_token_ids=JAMBA.eos_token_ids, pad_token_id=JAMBA.pad_token_id,
    )  # fmt: skip
    spec = TrainingSpec(
        steps=steps, seed=seed, learning_rate=learning_rate, warmup_steps=min(EVERY, steps), final_fraction=1.0,
        evaluate_every=EVERY, checkpoint_every=EVERY,
    )  # fmt: skip
    return Recipe(
        about="small", config=small, spec=spec, stages=(Stage(until=None, batch_size=16, sequence_length=64),)
    )


def stress_rows(rates: Sequence[float], steps: int, trainings: int, seed: int) -> list[dict[str, Any]]:
    """Small models with inner norms and without, in pairs of equal seeds and batches, at each rate; a pair is a sample.

    Pairs of all rates have seeds of their own, so that they count as independent.
    """
    rows = []
    for r, rate in enumerate(rates):
        for i in range(trainings):
            for inner_norms in (True, False):
                found = stressed(stress_recipe(inner_norms, rate, steps, 1000 * seed + r * trainings + i))
                condition = f"{'with' if inner_norms else 'without'} inner norms, rate {rate:g}"
                rows += [
                    {
                        "measure": m,
                        "condition": condition,
                        "sample": i,
                        "value": v,
                        "kind": "hit" if m == DIVERGED else None,
                    }
                    for m, v in found.items()
                ]
    return rows


def stressed(recipe: Recipe) -> dict[str, float]:
    """What a training came to; what a diverged one has no number of is left out.

    It diverged where a loss was not finite, or where the last ``EVERY`` steps' loss is no lower than an even guess.
    """
    model = new_model(recipe)
    make = batches(recipe)
    look = make(recipe.spec.steps + 1)
    with tempfile.TemporaryDirectory() as directory:
        try:
            log = training.fit(model, recipe.spec, make, directory, lambda m: {"largest": largest_inside(m, look)})
            finite = True
        except ConfigError:  # a loss that is no longer finite; the log is that of the last checkpoint
            path, finite = Path(directory) / LOG, False
            log = pq.read_table(path).to_pylist() if path.exists() else []
    losses = [row["lm"] for row in log]
    end = float(np.mean(losses[-EVERY:])) if losses else np.nan
    guess = float(np.log(model.config.d_vocab))
    values = {
        DIVERGED: float(not finite or not end < guess),
        END_LOSS: end if finite else np.nan,
        SPIKES: float(len(excursions(losses, window=20))) if finite else np.nan,
        GRADIENT: max((row["gradient_norm"] for row in log), default=np.nan),
        LARGEST: max((row["largest"] for row in log if row.get("largest") is not None), default=np.nan),
    }
    return {name: value for name, value in values.items() if np.isfinite(value)}


@torch.no_grad()
def largest_inside(model: HookedJamba, tokens: torch.Tensor) -> float:
    """The largest magnitude of dt, B, C, state and output of any Mamba layer."""
    found: list[float] = []

    def look(value: torch.Tensor, hook: Any) -> None:
        found.append(value.abs().max().item())

    points = [f"blocks.{i}.mixer.hook_{name}" for i in model.config.ssm_layers for name in ("dt", "B", "C", "y")]
    state = At(range(tokens.shape[1] - 1, tokens.shape[1]), look)
    states = [(f"blocks.{i}.mixer.hook_ssm_state", state) for i in model.config.ssm_layers]
    with model.hooks([*((name, look) for name in points), *states]):
        model(tokens.to(model.device), return_type=None)
    return max(found)


def pairs_of(rows: pd.DataFrame, measure: str, rate: float) -> pd.DataFrame:
    """A line for each pair of trainings at a rate in which both have the number: columns ``without`` and ``with``."""
    own = rows[rows.measure == measure]
    parts = {
        word: own[own.condition == f"{word} inner norms, rate {rate:g}"].set_index(["seed", "sample"])["value"]
        for word in ("without", "with")
    }
    return pd.DataFrame(parts).dropna()
