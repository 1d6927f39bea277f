"""How large do activations in Mamba layers grow, beyond the trained length too, and what do inner norms change?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from pydantic import Field, field_validator, model_validator

from jambascope import checkpoint
from jambascope.config import JambaConfig
from jambascope.errors import ConfigError
from jambascope.hook_point import At
from jambascope.model import HookedJamba, initialize
from jambascope.studies import training_stress
from jambascope.studies.comparisons import fingerprint
from jambascope.studies.corpus import TEXT, check_corpus, mixed
from jambascope.studies.figures.course import courses
from jambascope.studies.figures.points import Dot, dots
from jambascope.studies.figures.zoo import Point
from jambascope.studies.runner.spec import Files, Spec, models_of
from jambascope.studies.runner.study import Cell, Found, Study, grid_and_once
from jambascope.studies.runner.summary import number, summarize
from jambascope.studies.stability_reading import BY, ENDS, GROWTH, MAX, NORMS, POINTS, RMS, UNTRAINED, names_of, reading
from jambascope.studies.training_stress import (
    CLIPPED,
    DIPS,
    DIVERGED,
    END_LOSS,
    GRADIENT,
    LARGEST,
    SPIKES,
)

APART = 16
"""States are looked at at every so many positions."""


class StabilitySpec(Spec):
    """Settings of the study."""

    models: tuple[str, ...] = models_of("jamba-micro", "jamba-micro-no-inner-norm")
    prompts: int = Field(12, ge=2, description="Prompts of a seed.")
    edges: tuple[int, ...] = Field(
        (0, 128, 256, 512, 1024), description="Positions that part the prompts into windows."
    )
    trained: int = Field(256, ge=1, description="Length of the training's sequences, one of the edges.")
    text: Files = Field((), description=TEXT)
    untrained: bool = Field(True, description="Also measure a model of the same shape with random weights (control).")
    rates: tuple[float, ...] = Field((0.003, 0.03, 0.1), description="Learning rates of the trainings here.")
    steps: int = Field(60, ge=1, description="Of each of those trainings.")
    trainings: int = Field(3, ge=0, description="Pairs with and without inner norms at each rate; 0 for none.")
    batch_size: int = Field(4, ge=1, description="Prompts run at a time.")

    @field_validator("rates")
    @classmethod
    def _rising(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if min(rates) <= 0 or list(rates) != sorted(rates):
            raise ValueError("give positive numbers that rise, the lowest an ordinary learning rate")
        return rates

    @model_validator(mode="after")
    def _windows(self) -> StabilitySpec:
        edges = self.edges
        if len(edges) < 3 or edges[0] < 0 or any(a + APART > b for a, b in zip(edges, edges[1:], strict=False)):
            raise ValueError(f"edges={edges} must be three or more positions that rise by {APART} or more")
        if self.trained not in edges[1:-1]:
            raise ValueError(f"trained={self.trained} must be one of the edges, but for the first and last")
        return self


def cells(spec: StabilitySpec) -> list[Cell]:
    """Every model and seed; and the trainings here, which no model says anything of, once."""
    return grid_and_once(spec, "activations", "learning-rate stress", wanted=spec.trainings > 0)


def check(spec: StabilitySpec, config: JambaConfig, directory: Path) -> None:
    if not config.ssm_layers:
        raise ConfigError("it has no Mamba layers, so nothing inside them can grow; leave it out")
    check_corpus(directory, config, spec.text, spec.edges[-1])


def measure(spec: StabilitySpec, cell: Cell, model: HookedJamba) -> Found:
    if cell["part"] == "learning-rate stress":
        return Found(training_stress.stress_rows(spec.rates, spec.steps, spec.trainings, cell["seed"]))
    tokens = mixed(model, spec.text, spec.prompts, spec.edges[-1], cell["seed"])
    rows = [fingerprint(tokens), {"measure": NORMS, "sample": 0, "value": float(model.config.inner_norms)}]
    rows += _rows(spec, model, tokens, "")
    if spec.untrained:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cell["seed"])
            other = HookedJamba(model.config)
            initialize(other)
        rows += _rows(spec, other.to(model.device).eval(), tokens, f", {UNTRAINED}")
    if cell["seed"] == spec.seeds[0]:
        rows += training_stress.log_rows(checkpoint.find_directory(cell["model"]))
    return Found(rows)


def _rows(spec: StabilitySpec, model: HookedJamba, tokens: Int[torch.Tensor, "prompts pos"], kind: str) -> list[dict]:
    """Of every prompt, window and layer; then the largest over layers, and the growth beyond the trained length."""
    rows, names = [], names_of(spec)
    within, beyond = (names.index(name) for name in compared_windows(spec))
    for quantity, layers in sizes(model, tokens, spec.edges, spec.batch_size).items():
        for layer, (rms, largest) in layers.items():
            for w, name in enumerate(names):
                where = {"quantity": quantity, "layer": layer, "condition": name + kind}
                for measure_, values in (("layer: RMS", rms), ("layer: largest", largest)):
                    rows += _samples(measure_, values[:, w], **where)
        stacked = [torch.stack([found[i] for found in layers.values()]) for i in (0, 1)]  # [layers prompts windows]
        for w, name in enumerate(names):
            rows += _samples(RMS + quantity, stacked[0][..., w].amax(0), condition=name + kind)
            rows += _samples(MAX + quantity, stacked[1][..., w].amax(0), condition=name + kind)
        ratio = (
            (stacked[0][..., beyond].clamp_min(1e-12) / stacked[0][..., within].clamp_min(1e-12)).log().mean(0).exp()
        )
        rows += _samples(GROWTH + quantity, ratio, condition=f"{names[beyond]} over {names[within]}{kind}")
    return rows


def _samples(name: str, values: Float[torch.Tensor, " prompts"], **labels: Any) -> list[dict[str, Any]]:
    return [{"measure": name, **labels, "sample": i, "value": value} for i, value in enumerate(values.tolist())]


@torch.no_grad()
def sizes(
    model: HookedJamba, tokens: Int[torch.Tensor, "prompts pos"], edges: Sequence[int], batch_size: int
) -> dict[str, dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """Quantity -> Mamba layer -> root mean square and largest magnitude in every window, each [prompts windows].

    States count at every ``APART``-th position.
    """
    layers, found = model.config.ssm_layers, {}
    windows = list(zip(edges, edges[1:], strict=False))

    def keep(quantity: str, layer: int, apart: int):
        def look(value: torch.Tensor, hook: Any) -> None:
            flat = value.movedim(hook.row.axes.index("T"), 1).float().flatten(2).cpu()
            parts = [flat[:, a // apart : b // apart] for a, b in windows]
            rms = torch.stack([p.square().mean((1, 2)).sqrt() for p in parts], 1)
            largest = torch.stack([p.abs().amax((1, 2)) for p in parts], 1)
            found.setdefault(quantity, {}).setdefault(layer, []).append((rms, largest))

        return At(range(apart - 1, tokens.shape[1], apart), look) if apart > 1 else look

    hooks = [
        (f"blocks.{layer}.{point}", keep(quantity, layer, APART if quantity == "state" else 1))
        for quantity, point in POINTS.items()
        for layer in layers
    ]
    for part in tokens.to(model.device).split(batch_size):
        with model.hooks(hooks):
            model(part, return_type=None)
    return {
        quantity: {i: (torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])) for i, parts in own.items()}
        for quantity, own in found.items()
    }


# -- the report ----------------------------------------------------------------------------------------------


def compared_windows(spec: StabilitySpec) -> tuple[str, str]:
    """The window that ends with the trained length, and the last."""
    names = names_of(spec)
    return next(name for name in names if name.endswith(f"-{spec.trained}")), names[-1]


def by_layer(spec: StabilitySpec, rows: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    """Every quantity of every layer in the two windows that are compared, of the weights as trained."""
    own = rows[rows.measure.isin(measures) & rows.condition.isin(compared_windows(spec))]
    return summarize(own.astype({"layer": int}), measures, ("quantity", "layer", "condition"))


def tables(spec: StabilitySpec, rows: pd.DataFrame) -> Sequence[tuple[str, pd.DataFrame]]:
    """A line for every layer and quantity, a column for every window."""
    found = by_layer(spec, rows, ("layer: RMS", "layer: largest"))
    words = [number(*line[ENDS], 3) for _, line in found.iterrows()]
    names = found.measure.str.removeprefix("layer: ") + " at " + found.condition
    found = found.assign(words=words, column=names, layer=found.layer.astype(str))
    keys = ["recipe", "quantity", "layer", "n"]
    table = found.pivot_table(index=keys, columns="column", values="words", aggfunc="first", sort=False).reset_index()
    return [("Layer by layer: means over prompts and 95 % intervals", table)]


def figures(spec: StabilitySpec, rows: pd.DataFrame) -> list[go.Figure]:
    found, made = by_layer(spec, rows, ("layer: largest",)), []
    for recipe, own in found.groupby("recipe", sort=False):
        panels = [
            (q, [Dot(f"layer {r.layer}", r.condition, r["mean"], r.low, r.high) for _, r in part.iterrows()])
            for q, part in own.groupby("quantity", sort=False)
        ]
        title = f"Largest magnitudes inside Mamba layers, {recipe}"
        subtitle = "means over prompts and 95 % intervals; colours: positions, the last of training and the last read"
        made.append(dots(title, subtitle, panels, "magnitude", log=True))
    return [*made, *_log_figure(rows), *_stress_figure(spec, rows)]


def _log_figure(rows: pd.DataFrame) -> list[go.Figure]:
    own = rows[rows.measure.str.startswith("log: ")]
    if own.empty:
        return []
    nan, panels = float("nan"), []
    for name, part in own.groupby("measure", sort=False):
        means = part.groupby(["recipe", "x"], sort=False)["value"].mean()
        points = [Point(recipe, None, x, value, nan, nan) for (recipe, x), value in means.items()]
        panels.append((name.removeprefix("log: "), points))
    return [courses("Training logs", "60 pieces of each training; the data may change on the way", panels, "")]


def _stress_figure(spec: StabilitySpec, rows: pd.DataFrame) -> list[go.Figure]:
    own = rows[rows.part == "learning-rate stress"]
    if own.empty:
        return []
    panels = []
    for name in (END_LOSS, GRADIENT, LARGEST):
        found = summarize(own, [name], BY)
        split = [condition.split(", ") for condition in found.condition]
        dotted = [
            Dot(rate, norms, r["mean"], r.low, r.high)
            for (norms, rate), (_, r) in zip(split, found.iterrows(), strict=True)
        ]
        panels.append((name, dotted))
    title, subtitle = "Small models trained at high rates", "means over trainings that did not diverge"
    return [dots(title, subtitle, panels, "", log=True)]


study = Study(
    name="stability",
    version=2,
    spec=StabilitySpec,
    question=__doc__,
    method="Held-out text of the training's mixture, longer than training's, is read once. In every Mamba layer the "
    "root mean square and the largest magnitude of dt (after softplus), B, C (after their norms, where there are "
    "any), state (at every 16th position), the mixer's output and the residual stream after the layer are taken in "
    "windows of positions. Growth is the geometric mean over layers of RMS in the last window over that in the one "
    "that ends with the trained length.\n\n"
    "Where training/log.parquet lies beside the weights, loss spikes are counted: steps above the median of the 50 "
    "before by six robust standard deviations, but for the 50 after a change of data.\n\n"
    "Learning-rate stress: small models (four layers of width 32) are trained here with inner norms (on dt, B and "
    "C) and without, in pairs of equal seeds and batches, at rates up to far beyond what is used; every pair has a "
    "seed of its own. A training diverged when a loss was not finite, or at the end no lower than that of an even "
    "guess. Pairs are compared by exact tests (all assignments of signs; of divergences that is McNemar's), "
    "corrected after Holm. Models that read the same prompts are compared on them, by the ratio of their largest "
    "activations.\n\n"
    "No components are selected, so no half of the prompts is held out.",
    controls="A wider window has larger magnitudes by its width alone, which RMS does not: growth is told by RMS. "
    "The window that ends with the trained length is what growth is measured against. Random weights: the same of a "
    "model of this shape that has learned nothing. Dips: steps as far below the median, which noise gives as often "
    "as spikes. The lowest rate of the stress is an ordinary one, at which nothing should happen.",
    measure=measure,
    headline=(
        *(GROWTH + q for q in POINTS),
        *(MAX + q for q in POINTS),
        *(SPIKES, DIPS, GRADIENT, CLIPPED, DIVERGED, END_LOSS, LARGEST),
    ),
    by=BY,
    figures=figures,
    reading=reading,
    tables=tables,
    cells=cells,
    check=check,
)
