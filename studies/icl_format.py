"""Does a model follow the format of its examples, by shots, and who in a hybrid follows it: attention or Mamba?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from pydantic import Field

from jambascope import checkpoint
from jambascope.config import JambaConfig
from jambascope.hooks.interventions import hooks
from jambascope.model import HookedJamba
from jambascope.studies.ablations import (
    Part,
    layers_as_parts,
    mean_outputs,
    random_channels,
    random_layers,
    without,
)
from jambascope.studies.comparisons import by_sample, holm, sign_flip_p
from jambascope.studies.episodes import TokenEpisode, batches, draw_episodes, label_scores
from jambascope.studies.figures.zoo import Panel, Point, lines
from jambascope.studies.prompts import check_tokenizer
from jambascope.studies.runner.spec import Spec, models_of
from jambascope.studies.runner.study import Cell, Found, Study, grid
from jambascope.studies.runner.summary import as_tensor, number, one, samples_of, summarize
from jambascope.studies.zoo.differences import difference
from jambascope.studies.zoo.measures import CALIBRATION, label_values, statistic
from jambascope.studies.zoo.tasks import SHOTS, TRAINED_SHOTS, Task
from jambascope.zoo.reviews import Episode

Condition = Literal["familiar", "unseen", "familiar-long", "unseen-long", "shuffled", "natural"]
OPTIONS = {
    "familiar": {"kind": "arbitrary"},
    "unseen": {"kind": "unseen"},
    "familiar-long": {"kind": "arbitrary"},
    "unseen-long": {"kind": "unseen"},
    "shuffled": {"kind": "arbitrary", "shuffled": True},
    "natural": {"kind": "natural"},
}
MASS, VALID, FREE, AMONG = "label mass", "valid rate", "accuracy free", "accuracy restricted"
GAP, CHANCE = "format gap", "chance"
KINDS = {MASS: None, VALID: "hit", FREE: "hit", AMONG: "hit", GAP: "change of hits", CHANCE: None}
ABLATED = (MASS, FREE, AMONG)
"""What is compared when parts are taken away: whether the format is followed, the answer, and the class."""
WHOLE, ATTENTION, LAYERS, CHANNELS = (
    "nothing taken away", "without attention", "without random Mamba layers", "without random Mamba channels",
)  # fmt: skip
CURVE, CHANGE, LESS, SET = "by shots: ", "change of ", "less the control: ", "random set: "
BY = ("condition", "shots", "without")
ENDS = ["mean", "low", "high"]


class FormatSpec(Spec):
    """Settings of the study."""

    models: tuple[str, ...] = models_of("jamba-micro", "mamba-micro", "attention-micro")
    episodes: int = Field(64, ge=4, description="Of a condition and seed; half as many more give the means.")
    shots: int = Field(8, ge=1, le=max(SHOTS), description="Most labelled reviews before the one that is asked.")
    filler: int = Field(4, ge=1, description="Sentences without sentiment in each review of the long conditions.")
    conditions: tuple[Condition, ...] = Field(
        ("familiar", "unseen", "familiar-long", "unseen-long", "shuffled"),
        description="Words that the packaged models' training had as labels or never; long reviews; labels at random "
        "(control); natural pairs such as Positive and Negative.",
    )
    draws: int = Field(5, ge=1, description="Random sets of Mamba layers, and of channels, that are taken away.")


def check(spec: FormatSpec, config: JambaConfig, directory: Path) -> None:
    check_tokenizer(checkpoint.load_tokenizer(directory))


def cells(spec: FormatSpec) -> list[Cell]:
    return grid(spec, condition=spec.conditions)


def task_of(spec: FormatSpec, condition: str) -> Task:
    """A condition as the zoo's evaluation asks it."""
    options = {"shots": spec.shots + 1, "classes": 2, "filler": spec.filler if condition.endswith("-long") else 0}
    return Task(
        task="few-shot", condition=condition, measured="labels", domain="review", x_name="shots",
        asked="drawn" if condition == "shuffled" else "shown", options=tuple((options | OPTIONS[condition]).items()),
    )  # fmt: skip


def most_shots(spec: FormatSpec) -> int:
    """The number of shots at which numbers are told and compared."""
    return max(s for s in SHOTS if s <= spec.shots)


def measure(spec: FormatSpec, cell: Cell, model: HookedJamba) -> Found:
    task = task_of(spec, cell["condition"])
    drawn = draw_episodes(model, task, spec.episodes + spec.episodes // 2, cell["seed"])
    episodes, reference = drawn[: spec.episodes], drawn[spec.episodes :]
    whole = _measured(model, episodes)
    rows = _curve_rows(spec, WHOLE, whole)
    if not (model.config.attention_layers and model.config.ssm_layers) or cell["condition"] == "shuffled":
        return Found(rows)
    means = mean_outputs(model, batches(reference))
    sets = part_sets(model.config, spec.draws, cell["seed"])
    taken = {
        name: [_measured(model, episodes, without(model, means, parts)) for parts in of_name]
        for name, of_name in sets.items()
    }
    for name, found in taken.items():
        averaged = {key: sum(values[key] for values in found) / len(found) for key in whole}
        rows += _curve_rows(spec, name, averaged, ABLATED)
        rows += _change_rows(spec, name, whole, found, taken[ATTENTION][0])
        for i, (parts, values) in enumerate(zip(sets[name], found, strict=True)):
            rows += _set_rows(spec, name, i, parts, whole, values) if name != ATTENTION else []
    return Found(rows)


def part_sets(config: JambaConfig, draws: int, seed: int) -> dict[str, tuple[tuple[Part, ...], ...]]:
    """What is taken away of a hybrid: all attention layers; as many Mamba layers; as many Mamba channels as the
    attention layers have of their own (heads x d_head)."""
    width = len(config.attention_layers) * config.n_heads * config.d_head
    return {
        ATTENTION: (layers_as_parts(config.attention_layers),),
        LAYERS: random_layers(config, config.attention_layers, draws, seed),
        CHANNELS: random_channels(config, width, draws, seed),
    }


Values = dict[tuple[str, int | None], np.ndarray]
"""Measure and shots -> a value for each episode."""


def _measured(model: HookedJamba, episodes: Sequence[Episode | TokenEpisode], edits: Sequence = ()) -> Values:
    with model.hooks(hooks(model, edits)):
        found = label_values(label_scores(model, episodes), classes=2)
    values = {(name, shots): np.asarray(array) for (name, shots), array in found.items() if shots is not None}
    error = statistic(torch.from_numpy(found[CALIBRATION, None]).mean(0))
    return values | {(CALIBRATION, None): error.reshape(1).numpy()}


def _curve_rows(spec: FormatSpec, taken: str, values: Values, measures: Sequence[str] = tuple(KINDS)) -> list[dict]:
    """Every measure at every number of shots; and again, for the table, at the most and at none."""
    rows, told = [], (0, most_shots(spec))
    for (name, shots), array in values.items():
        if name in measures:
            rows += _rows(CURVE + name, array, KINDS[name], shots, taken)
            if taken == WHOLE and shots in told:
                rows += _rows(name, array, KINDS[name], shots, taken)
    if taken == WHOLE and math.isfinite(values[CALIBRATION, None][0]):
        rows += _rows(CALIBRATION, values[CALIBRATION, None], None, most_shots(spec), taken)
    return rows


def _change_rows(spec: FormatSpec, taken: str, whole: Values, found: Sequence[Values], attention: Values) -> list[dict]:
    """At the most shots: the change by taking a part away (sets averaged), and how far attention's is from it."""
    rows, shots = [], most_shots(spec)
    kind = {MASS: None}
    for name in ABLATED:
        key = (name, shots)
        if key not in whole:
            continue
        changes = [values[key] - whole[key] for values in found]
        change = sum(changes) / len(changes)
        rows += _rows(CHANGE + name, change, kind.get(name, "change of hits"), shots, taken)
        if taken == ATTENTION:
            continue
        apart = attention[key] - whole[key] - change
        rows += _rows(LESS + name, apart, kind.get(name, "change of hits"), shots, taken)
    return rows


def _set_rows(
    spec: FormatSpec, taken: str, number: int, parts: Sequence[Part], whole: Values, values: Values
) -> list[dict]:
    """The mean change by one random set."""
    layers = " ".join(str(layer) for layer, _ in parts)
    which = {"draw": number, "layers": layers}
    shots = most_shots(spec)
    changes = {name: values[name, shots] - whole[name, shots] for name in ABLATED if (name, shots) in whole}
    means = {name: np.array([np.nanmean(change)]) for name, change in changes.items()}
    return [row | which for name, mean in means.items() for row in _rows(SET + name, mean, None, shots, taken)]


def _rows(name: str, values: np.ndarray, kind: str | None, shots: int, taken: str) -> list[dict]:
    same = {"measure": name, "shots": shots, "without": taken, "kind": kind}
    return [{**same, "sample": i, "value": round(float(v), 12)} for i, v in enumerate(values) if math.isfinite(v)]


# -- the report ----------------------------------------------------------------------------------------------


def tables(spec: FormatSpec, rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """What each random set of layers changed."""
    own = rows[rows.measure.str.startswith(SET) & (rows["without"] == LAYERS)]
    if not len(own):
        return []
    by = ["model", "seed", "condition", "layers"]
    table = own.assign(measure=own.measure.str.removeprefix(SET)).pivot(index=by, columns="measure", values="value")
    title = f"Change after {most_shots(spec)} shots without random Mamba layers, each set by itself"
    return [(title, table.reset_index())]


def figures(spec: FormatSpec, rows: pd.DataFrame) -> list[go.Figure]:
    """By shots, models side by side; and of every hybrid, what it does without parts."""
    found = [_figure(spec, rows[rows["without"] == WHOLE], "recipe", "Format following", (MASS, VALID, AMONG, FREE))]
    for recipe, own in rows.groupby("recipe", sort=False):
        conditions = own[own["without"] == ATTENTION].condition.unique()
        if len(conditions):
            found.append(
                _figure(spec, own[own.condition.isin(conditions)], "without", f"{recipe} without parts", ABLATED)
            )
    return found


def _figure(spec: FormatSpec, rows: pd.DataFrame, by: str, title: str, measures: Sequence[str]) -> go.Figure:
    conditions = [c for c in spec.conditions if c in set(rows.condition)]
    panels = []
    for name in measures:
        own = summarize(rows[rows.measure == CURVE + name], [CURVE + name], BY)
        chance = [(float(s), 0.5) for s in SHOTS if 1 <= s <= spec.shots] if name == AMONG else []
        panels.append((name, [_panel(own, condition, by, chance) for condition in conditions]))
    subtitle = "episodes of two classes; bands: 95 % intervals; shaded: shots in training"
    return lines(title, subtitle, panels, "shots")


def _panel(summary: pd.DataFrame, condition: str, by: str, chance: list[tuple[float, float]]) -> Panel:
    own = summary[summary.condition == condition]
    points = [
        Point(row[by], None, float(row.shots), row["mean"], max(row.low, 0.0), min(row.high, 1.0))
        for _, row in own.iterrows()
    ]
    guides = {"chance": chance} if chance else {}
    return Panel(condition, points, tuple(map(float, TRAINED_SHOTS)), guides)


def reading(spec: FormatSpec, rows: pd.DataFrame) -> str:
    """What each model does, what a hybrid does without its attention, and how models differ."""
    found = [_of_recipe(spec, rows[rows.recipe == recipe], recipe) for recipe in rows.recipe.unique()]
    return "\n\n".join([*found, *_between(spec, rows)])


def _of_recipe(spec: FormatSpec, rows: pd.DataFrame, recipe: str) -> str:
    shots = most_shots(spec)
    told = rows[rows["without"] == WHOLE]
    summary = summarize(told, [MASS, VALID, FREE, AMONG, GAP], BY)
    words = [f"{recipe}, after {shots} shots:"]
    for condition in (c for c in spec.conditions if c != "shuffled"):
        at = {name: one(summary, measure=name, condition=condition, shots=shots) for name in (MASS, AMONG, GAP)}
        none = one(summary, measure=MASS, condition=condition, shots=0)
        words.append(
            f"{condition} labels get {number(*at[MASS][ENDS])} of the probability (without a shot "
            f"{number(*none[ENDS])}), the right one is the likelier in {number(*at[AMONG][ENDS])}, and the format "
            f"costs {number(*at[GAP][ENDS])} of the answers (n = {at[MASS].n});"
        )
    words = [" ".join(words).removesuffix(";") + "."]
    if "shuffled" in spec.conditions:
        row = summary[(summary.measure == AMONG) & (summary.condition == "shuffled") & (summary.shots == shots)]
        if len(row):
            row = row.iloc[0]
            fair = "as it must be" if row.low <= 0.5 <= row.high else "which is not the half that it must be"
            words.append(f"Labels at random (control): right in {number(*row[ENDS])}, {fair}.")
    return " ".join(words) + _without_attention(spec, rows, recipe)


def _without_attention(spec: FormatSpec, rows: pd.DataFrame, recipe: str) -> str:
    """Changes by taking attention away beside both controls, tested over conditions, measures and controls."""
    tested = rows[rows.measure.str.startswith(LESS)]
    if not len(tested):
        return ""
    parts = list(tested.groupby(["condition", "measure", "without"], sort=False))
    p_values = holm([sign_flip_p(torch.tensor(by_sample(own).to_numpy())) for _, own in parts])
    p_of = {key: p for (key, _), p in zip(parts, p_values, strict=True)}
    summary = summarize(rows, [CHANGE + name for name in ABLATED], BY)
    words = []
    for condition in tested.condition.unique():
        for name in (MASS, AMONG):
            if (condition, LESS + name, LAYERS) not in p_of:
                continue
            attention, layers, channels = (
                one(summary, measure=CHANGE + name, condition=condition, without=taken)
                for taken in (ATTENTION, LAYERS, CHANNELS)
            )
            p = max(p_of[condition, LESS + name, taken] for taken in (LAYERS, CHANNELS))
            apart = [attention["mean"] - control["mean"] for control in (layers, channels)]
            verdict = "cannot be told from both" if p >= 0.05 else "is other than both"
            if p < 0.05:
                verdict = "loses more than both" if max(apart) < 0 else verdict
                verdict = "loses less than both" if min(apart) > 0 else verdict
            sets = rows[(rows.measure == SET + name) & (rows.condition == condition)]["value"]
            beyond = int((sets.abs() < abs(attention["mean"])).sum())
            words.append(
                f"{condition}, {name}: {number(*attention[ENDS])} without attention, {number(*layers[ENDS])} without "
                f"as many Mamba layers, {number(*channels[ENDS])} without as many Mamba channels; that {verdict} "
                f"(p = {p:.2g} after Holm, the larger of the two), and is more than {beyond} of {len(sets)} single "
                "random sets do."
            )
    return f"\n\nWho follows it in {recipe}, as changes. " + " ".join(words)


def _between(spec: FormatSpec, rows: pd.DataFrame) -> list[str]:
    """The first model less each other one, on the same episodes."""
    recipes, shots = list(rows.recipe.unique()), most_shots(spec)
    own = rows[(rows["without"] == WHOLE) & (rows.shots == shots) & (rows.condition != "shuffled")]
    pairs = []
    for other in recipes[1:]:
        for condition in own.condition.unique():
            for name in (MASS, FREE):
                at = own[(own.condition == condition) & (own.measure == name)]
                sides = [at[at.recipe == recipe] for recipe in (recipes[0], other)]
                first, second = map(by_sample, sides)
                apart = (first - second).dropna()
                if len(apart):
                    ends = _difference(sides, apart.index)
                    pairs.append((other, condition, name, ends, torch.tensor(apart.to_numpy())))
    if not pairs:
        return []
    p_values = holm([sign_flip_p(apart) for *_, apart in pairs])
    trainings = rows.groupby("recipe")["model"].nunique().to_dict()
    words = []
    for (other, condition, name, ends, apart), p in zip(pairs, p_values, strict=True):
        clear = f"p = {p:.2g}" if p < 0.05 else f"no difference told, p = {p:.2g}"
        words.append(f"less {other}, {condition}, {name}: {number(*ends)} ({clear}, n = {len(apart)})")
    counted = ", ".join(f"{recipe} {n}" for recipe, n in trainings.items())
    return [
        f"{recipes[0]}, after {shots} shots, on the same episodes, p after Holm: " + "; ".join(words) + ". Trainings: "
        f"{counted}; intervals are over episodes and trainings, p-values over episodes, and of one training they say "
        "nothing about another."
    ]


def _difference(sides: Sequence[pd.DataFrame], common: pd.Index) -> tuple[float, float, float]:
    """Mean difference of two models on the (seed, sample) that both have, and its 95 % interval: samples are drawn for
    both together, trainings of each by themselves."""
    a, b = (as_tensor(table.reindex(columns=common)) for side in sides for table in samples_of(side, ()).values())
    mean, low, high, _ = (end.item() for end in difference(a, b))
    return mean, low, high


study = Study(
    name="icl_format",
    version=1,
    spec=FormatSpec,
    question=__doc__,
    method="Few-shot reviews of two classes, whose two label words change with every episode (the Jamba paper, "
    "arXiv 2403.19887, section 6, in the packaged models' language; held-out combinations). At every label: the "
    "probability of both labels together (label mass), whether the likeliest word of the vocabulary is one of them "
    "(valid rate) or the right one (accuracy free), whether the right one is the likelier of the two (accuracy "
    "restricted), and what of that is lost by answering outside of them (format gap: restricted less free). "
    "Accuracies are of labels whose class an earlier example showed. Calibration error is of the likelier label's "
    "share of the label mass. Models with another tokenizer read the same text, and a label stands for its first "
    "token.\n\n"
    "In a hybrid, all attention layers are then taken away: what their output projection reads is set to its mean "
    "over other episodes of the same condition. Who follows the format is told by what that changes. No components "
    "are selected, so no half of the episodes is held out for confirmation.",
    controls="As many random Mamba layers, and as many random Mamba channels as all heads have dimensions, taken "
    "away in the same way; differences to them are tested by flipping signs over episodes, corrected by Holm over "
    "all conditions, measures and controls. Shuffled labels, drawn anew for every review: only the label set can be "
    "learned, and accuracy must be chance. No shots: label mass before any label was shown. Chance is one half.",
    measure=measure,
    headline=(MASS, VALID, FREE, AMONG, GAP, CALIBRATION, *(CHANGE + name for name in ABLATED)),
    by=BY,
    tables=tables,
    figures=figures,
    reading=reading,
    cells=cells,
    check=check,
)
