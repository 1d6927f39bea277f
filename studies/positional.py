"""What happens beyond the trained length, and with distance: with rotary positions, and with none at all?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from pydantic import Field, field_validator, model_validator

from jambascope.config import JambaConfig
from jambascope.errors import ConfigError
from jambascope.hooks.heads import repeated_random_tokens, shuffled
from jambascope.model import HookedJamba
from jambascope.studies.corpus import TEXT, check_corpus, losses_and_hits, mixed, speaks_zoo
from jambascope.studies.figures.zoo import Panel, Point, lines
from jambascope.studies.positional_reading import (
    ACCURACY,
    CHANCE,
    FIRST_TIME,
    LOSS,
    OTHER_FILLER,
    OTHER_ORDER,
    RECALL,
    REPEATED,
    SHIFTED,
    chance_of_recall,
    differences,
    reading,
    windows,
)
from jambascope.studies.runner.spec import Files, Spec, models_of
from jambascope.studies.runner.study import Cell, Found, Study
from jambascope.studies.runner.summary import summarize
from jambascope.zoo import scoring
from jambascope.zoo.documents import secret
from jambascope.zoo.words import KEYS

CURVES = (LOSS, ACCURACY, REPEATED, FIRST_TIME, OTHER_ORDER, RECALL, SHIFTED, OTHER_FILLER)
BY = ("x",)
SECRETS = KEYS[32:]
"""The words of which ``secret`` announces one."""


class PositionalSpec(Spec):
    """Settings of the study."""

    models: tuple[str, ...] = models_of("jamba-micro", "jamba-micro-rope")
    prompts: int = Field(32, ge=2, description="Of a seed, at every length, distance and shift.")
    trained: int = Field(256, ge=16, description="Length of the training's sequences.")
    factors: tuple[int, ...] = Field((1, 2, 4), description="Lengths, as multiples of the trained one.")
    repeats: tuple[int, ...] = Field((8, 32, 64, 128, 256, 384), description="Random tokens that are said twice.")
    distances: tuple[int, ...] = Field((4, 20, 80, 160, 320, 640), description="Words between a secret and its recall.")
    shifts: tuple[int, ...] = Field((64, 128, 256, 512, 768), description="Tokens of filler before a prompt.")
    shifted_length: int = Field(24, ge=4, description="Random tokens, said twice, that are shifted.")
    text: Files = Field((), description=TEXT)
    batch_size: int = Field(4, ge=1, description="Prompts run at a time.")

    @field_validator("factors", "repeats", "distances", "shifts")
    @classmethod
    def _rising(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if not values or min(values) < 1 or list(values) != sorted(set(values)):
            raise ValueError("give whole numbers from 1 on that rise")
        return values

    @model_validator(mode="after")
    def _trained_first(self) -> PositionalSpec:
        if self.factors[0] != 1:
            raise ValueError(f"factors={self.factors} must begin with 1, the trained length, and go on beyond it")
        if len(self.factors) < 2:
            raise ValueError(f"factors={self.factors} do not go beyond the trained length; add 2, or more")
        return self


def check(spec: PositionalSpec, config: JambaConfig, directory: Path) -> None:
    longest = {
        f"factors={spec.factors[-1]} times trained={spec.trained}": spec.trained * spec.factors[-1],
        f"repeats={spec.repeats[-1]}": 1 + 2 * spec.repeats[-1],
        f"distances={spec.distances[-1]}": 16 + spec.distances[-1],
        f"shifts={spec.shifts[-1]}": 1 + spec.shifts[-1] + 2 * spec.shifted_length,
    }
    for setting, length in longest.items():
        if length > config.n_ctx:
            raise ConfigError(
                f"{setting} needs {length} positions, and its context has {config.n_ctx}; make it smaller"
            )
    if spec.repeats[0] < 2:
        raise ConfigError(f"repeats={spec.repeats[0]} must be at least 2: the second token is the first that is known")
    usable = config.d_vocab - 4
    for name, most in (("repeats", spec.repeats[-1]), ("shifted_length", spec.shifted_length)):
        if most > usable:
            raise ConfigError(f"{name}={most} different tokens cannot be drawn from its {usable}; make it smaller")
    check_corpus(directory, config, spec.text, spec.trained * spec.factors[-1])


def measure(spec: PositionalSpec, cell: Cell, model: HookedJamba) -> Found:
    seed = cell["seed"]
    rows = _position_rows(spec, model, seed) + _repeat_rows(spec, model, seed) + _shift_rows(spec, model, seed)
    return Found(rows + (_recall_rows(spec, model, seed) if speaks_zoo(model.tokenizer) else []))


def _position_rows(spec: PositionalSpec, model: HookedJamba, seed: int) -> list[dict[str, Any]]:
    tokens = mixed(model, spec.text, spec.prompts, spec.trained * spec.factors[-1], seed)
    losses, hits = losses_and_hits(model, tokens, spec.batch_size)
    rows = []
    for start, end, _ in windows(spec):
        at = slice(max(0, start - 1), end - 1)  # the loss of position p stands at p - 1
        rows += _samples(LOSS, end, losses[:, at].mean(1)) + _samples(ACCURACY, end, hits[:, at].mean(1))
    return rows


def _repeat_rows(spec: PositionalSpec, model: HookedJamba, seed: int) -> list[dict[str, Any]]:
    """Random tokens said twice; the first time, and the second time in another order, are what cannot be known."""
    rows = []
    for length in spec.repeats:
        tokens = repeated_random_tokens(model, spec.prompts, length, seed=1000 * seed + length)
        _, hits = losses_and_hits(model, tokens, spec.batch_size)
        rows += _samples(REPEATED, length, hits[:, 1 - length :].mean(1))
        rows += _samples(FIRST_TIME, length, hits[:, : hits.shape[1] - length].mean(1))
        other = torch.cat([tokens[:, :-length], shuffled(tokens[:, -length:], seed=seed)], 1)
        _, hits = losses_and_hits(model, other, spec.batch_size)
        rows += _samples(OTHER_ORDER, length, hits[:, 1 - length :].mean(1))
    return rows


def _recall_rows(spec: PositionalSpec, model: HookedJamba, seed: int) -> list[dict[str, Any]]:
    """One word, asked for after so many others (the packaged models' language alone); a hit or a miss."""
    rows = []
    for distance in spec.distances:
        rng = torch.Generator().manual_seed(1000 * seed + distance)
        numbers = torch.randint(2**31, (spec.prompts,), generator=rng).tolist()
        drawn = [secret(np.random.default_rng([n, distance, 3]), "held_out", distance=distance) for n in numbers]
        hits = scoring.answer_scores(model, drawn).hits[:, 0]
        rows += [row | {"kind": "hit"} for row in _samples(RECALL, distance, hits)]
    return [*rows, {"measure": CHANCE, "sample": 0, "value": 1 / len(SECRETS)}]


def _shift_rows(spec: PositionalSpec, model: HookedJamba, seed: int) -> list[dict[str, Any]]:
    """The same tokens behind filler: the change of the loss on their repetition. Other filler of the same length shows
    how much of a change is the filler's and not the position's."""
    bos = 0 if model.config.bos_token_id is None else 1
    length = spec.shifted_length
    prompt = repeated_random_tokens(model, spec.prompts, length, seed=1000 * seed + 7)
    own = losses_and_hits(model, prompt, spec.batch_size)[0][:, 1 - length :].mean(1)
    rows = []
    for shift in spec.shifts:
        changes = []
        for which in (0, 1):
            filler = mixed(model, spec.text, 2 * spec.prompts, shift + bos, seed)[which::2]
            moved = torch.cat([filler, prompt[:, bos:]], 1)
            changes.append(losses_and_hits(model, moved, spec.batch_size)[0][:, 1 - length :].mean(1) - own)
        rows += _samples(SHIFTED, shift, changes[0]) + _samples(OTHER_FILLER, shift, changes[1] - changes[0])
    return rows


def _samples(name: str, x: int, values: Float[torch.Tensor, " prompts"]) -> list[dict[str, Any]]:
    return [{"measure": name, "x": x, "sample": i, "value": value} for i, value in enumerate(values.tolist())]


# -- the report ----------------------------------------------------------------------------------------------


def _points(summary: pd.DataFrame, measure_: str) -> list[Point]:
    own = summary[summary.measure == measure_]
    return [Point(r.recipe, None, float(r.x), r["mean"], r.low, r.high) for _, r in own.iterrows()]


def figures(spec: PositionalSpec, rows: pd.DataFrame) -> list[go.Figure]:
    summary = summarize(rows, CURVES, BY)
    trained = (1.0, float(spec.trained))

    def panel(title: str, measure_: str, until: float) -> Panel:
        return Panel(title, _points(summary, measure_), (1.0, until))

    of_text = [("loss (nats)", [panel("", LOSS, trained[1])]), ("accuracy", [panel("", ACCURACY, trained[1])])]
    half = spec.trained / 2
    made = [
        lines("Loss and accuracy by position", "windows by their last position; shaded: trained length", of_text,
              "position (tokens)", unit_range=False),
        lines("Repetition of random tokens", "accuracy; shaded: fits into the trained length",
              [("accuracy", [panel("second time", REPEATED, half), panel("first time (control)", FIRST_TIME, half),
                             panel("other order (control)", OTHER_ORDER, half)])], "tokens said twice"),
    ]  # fmt: skip
    if (summary.measure == RECALL).any():
        chance = {"chance": [(float(x), chance_of_recall(rows)) for x in (spec.distances[0], spec.distances[-1])]}
        recalled = [("accuracy", [Panel("", _points(summary, RECALL), trained, chance)])]
        made.append(lines("Recall of one word", "shaded: fits into the trained length", recalled, "words between"))
    moved = [
        ("change (nats)", [panel("shifted", SHIFTED, trained[1]), panel("other filler", OTHER_FILLER, trained[1])])
    ]
    title = "The same tokens behind filler: loss on their repetition"
    made.append(lines(title, "change by the shift, and by other filler of its length (control)", moved,
                      "tokens of filler", unit_range=False))  # fmt: skip
    return made


def tables(spec: PositionalSpec, rows: pd.DataFrame) -> Sequence[tuple[str, pd.DataFrame]]:
    """Models against the first, on the same prompts."""
    return [("Differences to the first model, on the same prompts; p after Holm", differences(rows))]


study = Study(
    name="positional",
    version=2,
    spec=PositionalSpec,
    question=__doc__,
    method="By position: loss and accuracy on held-out rows of the training's mixture (or text files) several times "
    "as long as training's. Repetition: random tokens, none of which comes twice, are said twice; accuracy on the "
    "second time but for its first token. Recall: a word is announced, others follow, and it is asked for (the "
    "packaged models' language alone). Shift: the same random tokens said twice, behind more and more filler of the "
    "mixture, which is no padding: the change of the loss on the repetition. Models read the same prompts, and "
    "differences are paired.\n\n"
    "No components are selected, so no half of the prompts is held out.",
    controls="Within the trained length, the same measure. Repetition: accuracy the first time, and on the same "
    "tokens said again in another order, which nothing tells. Shift: other filler of the same length. p-values of "
    "paired differences by random signs, corrected after Holm. Chance of recall: a random word of those that are "
    "ever announced.",
    measure=measure,
    headline=CURVES,
    by=BY,
    figures=figures,
    reading=reading,
    tables=tables,
    check=check,
)
