"""The recipes of the packaged models, and the run that makes one: training, evaluation, model card."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from jambascope import training
from jambascope.config import JambaConfig
from jambascope.errors import ConfigError
from jambascope.model import HookedJamba, initialize
from jambascope.training import TrainingSpec
from jambascope.zoo import card, evaluation
from jambascope.zoo.language import BOS, EOS, PAD, SHARES, VOCABULARY, mixture
from jambascope.zoo.tokenizer import build_tokenizer


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What the batches hold up to a step."""

    until: int | None
    """The step at which the next stage begins; None for the last."""
    batch_size: int
    """Rows of a batch."""
    sequence_length: int
    """Ids of a row."""
    shares: Mapping[str, float] = field(default_factory=lambda: dict(SHARES))
    """How often each domain is drawn."""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What the domains' generators are given."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides what a packaged model becomes, but for the language itself."""

    config: JambaConfig
    spec: TrainingSpec
    stages: tuple[Stage, ...]
    """The curriculum; the last stage has no end."""
    initial_std: float
    """Standard deviation of the matrices before training; the unembedding begins as a copy of the embedding."""

    def stage(self, step: int) -> Stage:
        """The stage that a step belongs to."""
        return next(stage for stage in self.stages if stage.until is None or step < stage.until)

    @property
    def tokens(self) -> int:
        """Tokens seen over all steps."""
        stages = map(self.stage, range(self.spec.steps))
        return sum(stage.batch_size * stage.sequence_length for stage in stages)


RECIPES = {
    "jamba-micro": Recipe(
        config=JambaConfig.jamba(
            n_layers=8,
            d_model=96,
            d_vocab=len(VOCABULARY),
            n_heads=4,
            n_key_value_heads=2,
            d_head=24,
            d_mlp=96,
            num_experts=8,
            d_state=16,
            n_ctx=2048,
            bos_token_id=BOS,
            eos_token_ids=(EOS,),
            pad_token_id=PAD,
            load_balancing_coef=0.01,
        ),
        spec=TrainingSpec(steps=2300, learning_rate=1.5e-3, warmup_steps=20, evaluate_every=100, checkpoint_every=100),
        # On the mixture from the first step, at twice this learning rate, nothing had read the context after 600 steps.
        # After short repetitions of few words it does, and labels and tables follow within 200 steps of the mixture.
        stages=(
            Stage(
                until=250,
                batch_size=32,
                sequence_length=34,
                shares={"repeat": 1.0},
                options={"repeat": {"length": 8, "times": 4, "pool": 100}},
            ),
            Stage(
                until=450,
                batch_size=16,
                sequence_length=66,
                shares={"repeat": 1.0},
                options={"repeat": {"longest": 16}},
            ),
            Stage(until=None, batch_size=16, sequence_length=128),
        ),
        initial_std=0.05,
    ),
}


def train(name: str, out: str | Path, steps: int | None = None, seed: int | None = None, resume: bool = False) -> Path:
    """Train a packaged model anew, evaluate the weights that ship, write its card; returns the directory.

    The same recipe, steps and seed give the same weights on the same machine with the same number of threads.

    Args:
        name: one of ``RECIPES``.
        out: directory of the model; what a killed run needs to continue lies in its folder ``training``.
        steps, seed: other than the recipe's.
        resume: continue a run that was killed.

    Raises:
        ConfigError: an unknown recipe, steps or seed out of range, ``out`` a file.
        CheckpointError: resuming from a checkpoint of another recipe, steps or seed.
    """
    recipe, out = _recipe(name, steps, seed), Path(out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={str(out)!r} is a file; give a directory for the model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.spec.seed)
        model = HookedJamba(recipe.config)
        initialize(model, recipe.initial_std)
    with torch.no_grad():
        model.unembed.weight.copy_(model.embed.weight)
    batch = batches(recipe)
    log = training.fit(model, recipe.spec, batch, out / "training", evaluation.summary, resume, progress=True)
    model.tokenizer = build_tokenizer()
    model.to(torch.bfloat16).save_pretrained(out)
    write_card(name, out, recipe, log[-1]["seconds"])
    return out


def write_card(name: str, out: Path, recipe: Recipe, seconds: float) -> None:
    """Evaluate the saved weights, as rounded to bfloat16, in float32, and write ``README.md`` beside them."""
    shipped = HookedJamba.from_pretrained(out, dtype=torch.float32)
    size = sum(path.stat().st_size for path in out.iterdir() if path.is_file())
    card.write(out / "README.md", card.model_card(name, recipe, shipped, evaluation.evaluate(shipped), seconds, size))


def batches(recipe: Recipe) -> Callable[[int], Int[torch.Tensor, "batch pos"]]:
    """Step -> ids [B T], by the recipe's seed and the step alone."""

    def batch(step: int) -> torch.Tensor:
        stage, rng = recipe.stage(step), np.random.default_rng([recipe.spec.seed, step])
        rows = mixture(rng, stage.sequence_length, "train", stage.shares, stage.options)
        return torch.as_tensor(np.stack([row.ids for row in islice(rows, stage.batch_size)]))

    return batch


def _recipe(name: str, steps: int | None, seed: int | None) -> Recipe:
    if name not in RECIPES:
        near = difflib.get_close_matches(str(name), RECIPES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"name={name!r} is no recipe; {hint}there are {', '.join(RECIPES)}")
    changes = {key: value for key, value in (("steps", steps), ("seed", seed)) if value is not None}
    return dataclasses.replace(RECIPES[name], spec=dataclasses.replace(RECIPES[name].spec, **changes))
