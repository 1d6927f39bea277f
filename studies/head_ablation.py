"""Heads taken away against as many random ones, as rows of a study: what both studies of heads report alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float

from jambascope.config import JambaConfig
from jambascope.errors import ConfigError
from jambascope.studies.figures.heads import Effect, effects, score_map
from jambascope.studies.runner.summary import number, one, summarize

FOUND, RANDOM, LESS, ALL = "found", "random", "found less random", "all"
BY = ("heads", "k")
"""Labels of these rows: which heads, and how many."""
SET_MEAN = "random set: "
"""Begins the measure of the mean over samples with one random set taken away."""


def check_counts(config: JambaConfig, counts: Sequence[int]) -> None:
    """Raise ConfigError unless the model has twice as many heads as are taken away, and no fewer than one is."""
    if not config.attention_layers:
        raise ConfigError("it has no attention layers, so it has no heads; leave it out")
    total = len(config.attention_layers) * config.n_heads
    for k in counts:
        if not 1 <= k <= total // 2:
            raise ConfigError(
                f"k={k} must lie in 1..{total // 2}: as many of its {total} heads must be left to compare"
            )


def effect_rows(
    measure: str,
    k: int,
    whole: Float[torch.Tensor, " samples"],
    without: Float[torch.Tensor, " samples"],
    without_random: Float[torch.Tensor, "draws samples"],
    first_sample: int = 0,
    kind: str | None = None,
) -> list[dict[str, Any]]:
    """Of every sample, the change of a number by taking the found heads away, by random ones (draws averaged), and how
    far the two are apart; and of every random set the mean change over samples."""
    found, random = without - whole, (without_random - whole).mean(0)
    changes = {FOUND: found, RANDOM: random, LESS: found - random}
    rows = [
        {"measure": measure, "heads": heads, "k": k, "sample": first_sample + i, "value": value, "kind": kind}
        for heads, values in changes.items()
        for i, value in enumerate(values.tolist())
    ]
    means = (without_random - whole).mean(1).tolist()
    return rows + [
        {"measure": SET_MEAN + measure, "heads": RANDOM, "k": k, "draw": i, "sample": 0, "value": value}
        for i, value in enumerate(means)
    ]


def all_rows(
    measure: str,
    count: int,
    whole: Float[torch.Tensor, " samples"],
    without: Float[torch.Tensor, " samples"],
    first_sample: int = 0,
    kind: str | None = None,
) -> list[dict[str, Any]]:
    """The change by taking all ``count`` heads of the model away: what there is to be lost."""
    same = {"measure": measure, "heads": ALL, "k": count, "kind": kind}
    return [{**same, "sample": first_sample + i, "value": v} for i, v in enumerate((without - whole).tolist())]


def everyone(config: JambaConfig) -> tuple[tuple[int, int], ...]:
    """(layer, head) of every attention head."""
    return tuple((layer, head) for layer in config.attention_layers for head in range(config.n_heads))


def p_value(rows: pd.DataFrame, measure: str, k: int) -> tuple[float, int]:
    """How often random sets change the mean as much as the found heads do, or more: (1 + such sets) / (1 + sets), and
    the number of sets; means over models and seeds, each of which has its own found heads and sets, of which the
    n-th are taken together."""
    at = rows[rows.k == k]
    found = at[(at.measure == measure) & (at.heads == FOUND)].groupby(["model", "seed"])["value"].mean().mean()
    sets = at[at.measure == SET_MEAN + measure].groupby("draw")["value"]
    whole = sets.mean()[sets.count() == sets.count().max()]  # sets that every model and seed has
    return (1 + int((whole.abs() >= abs(found)).sum())) / (1 + len(whole)), len(whole)


def sentence(rows: pd.DataFrame, recipe: str, measure: str, k: int, unit: str = "") -> str:
    """What taking k heads away did to a number, and what random heads did, with intervals, n and p."""
    own = rows[rows.recipe == recipe]
    summary = summarize(own, [measure], BY)
    found, random, less = (one(summary, heads=heads, k=k) for heads in (FOUND, RANDOM, LESS))
    p, sets = p_value(own, measure, k)
    clear = "differs from" if less.low > 0 or less.high < 0 else "cannot be told from"
    rarest = ", the least that so few can give" if sets < 19 and p <= 1 / (1 + sets) else ""
    everything = summary[summary.heads == ALL].iloc[0]
    what, ones = ("head", "a random one") if k == 1 else (f"{k} heads", "as many random ones")
    ends = ["mean", "low", "high"]
    return (
        f"Taking the top {what} away changes the {measure.removeprefix('change of ')} by {number(*found[ends])}{unit}, "
        f"{ones} by {number(*random[ends])} (n = {found.n}, {plural(found.trainings, 'training')}). That {clear} the "
        f"random ones' mean, by {number(*less[ends])}; p = {p:.2g} against {plural(sets, 'random set')}{rarest}. "
        f"All {int(everything.k)} away: {number(*everything[ends])}."
    )


def plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def maps(heads: pd.DataFrame, seed: int, k: int, what: str, unit: str = "score") -> list[go.Figure]:
    """The heads of one seed, a map for each model, those framed that rank among the first ``k``.

    Args:
        heads: a line for each head: model, seed, rank, layer, head, mean, low, high, n, and ``also``, what hovering
            tells beside the number.
        what: what is shown, with ``{n}`` for the number of samples.
    """
    found = []
    for model, own in heads[heads.seed == seed].groupby("model", sort=False):
        texts = [
            f"layer {row.layer}, head {row['head']}: {number(row['mean'], row.low, row.high)}, {row.also}"
            for _, row in own.iterrows()
        ]
        grid = own.pivot(index="layer", columns="head", values="mean")
        hover = own.assign(text=texts).pivot(index="layer", columns="head", values="text")
        first = own[own["rank"] <= k]
        subtitle = f"{what.format(n=own.n.iloc[0])} of seed {seed}; framed: found"
        marked = list(zip(first.layer, first["head"], strict=True))
        values = grid.to_numpy(dtype=np.float64)
        found.append(score_map(model, subtitle, list(grid.index), values, hover.to_numpy(), marked, unit))
    return found


def figure(rows: pd.DataFrame, measure: str, unit: str, title: str) -> go.Figure:
    """The change by found heads and by random ones against how many were taken away, for every recipe."""
    summary = summarize(rows, [measure], BY)
    sets = rows[rows.measure == SET_MEAN + measure]
    points = [
        Effect(
            row.recipe,
            row.heads,
            int(row.k),
            row["mean"],
            row.low,
            row.high,
            tuple(sets[(sets.recipe == row.recipe) & (sets.k == row.k)]["value"]) if row.heads == RANDOM else (),
        )
        for _, row in summary.iterrows()
        if row.heads in (FOUND, RANDOM)
    ]
    return effects(title, points, unit)
