"""The report of ``activation_patching``: maps of effects, found cells against random ones, what was confirmed."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from jambascope.studies.comparisons import holm, sign_flip_p
from jambascope.studies.figures.effects import Mean, Panel, effect_maps, means
from jambascope.studies.runner.spec import Spec
from jambascope.studies.runner.summary import number, one, summarize

EFFECT, SET = "effect of the top cells", "random set: effect of the top cells"
CELL, CELL_PROBABILITY, CELL_RANK = "cell: effect", "cell: change of probability", "cell: change of rank"
ALIKE = "pairs too alike to be used"
NOTHING, EVERYTHING = "check: patch of its own values (0)", "check: patch of every position (1)"
METRICS = ("logit difference", "probability", "rank")
RUNS = tuple(f"{metric}, {name} run" for metric in METRICS for name in ("clean", "corrupted"))
HEADLINE = (EFFECT, *RUNS, ALIKE, NOTHING, EVERYTHING)
BY = ("direction", "component", "cells")
ENDS = ["mean", "low", "high"]
LEVEL = 0.05
UNITS = {"k": "KV head", "v": "KV head", "expert_out": "expert"}
MEANING = {"denoise": "clean values into the corrupted run", "noise": "corrupted values into the clean run"}


def tables(spec: Spec, rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Every found cell on held-out pairs."""
    found = _found(rows)
    return [("Found cells, on held-out pairs; rank by the finding half of that seed", found)] if len(found) else []


def _found(rows: pd.DataFrame) -> pd.DataFrame:
    """A line for every found cell, with p by random signs, corrected over a model, direction and seed."""
    if "rank" not in rows:
        return pd.DataFrame()
    own = rows[(rows["rank"] > 0) & (rows.half == "confirming")]
    by = ["direction", "seed", "component", "rank", "layer", "unit", "group"]
    own = own.astype({name: int for name in ("seed", "rank", "layer", "unit")})
    if not len(own):
        return pd.DataFrame()
    lines = summarize(own, [CELL], by, pooled="model").drop(columns=["measure", "trainings"])
    for name, column in ((CELL_PROBABILITY, "change of probability"), (CELL_RANK, "change of rank")):
        other = summarize(own, [name], by, pooled="model").set_index(["model", *by])["mean"].rename(column)
        lines = lines.join(other, on=["model", *by])
    values = own[own.measure == CELL].groupby(["model", *by])["value"].apply(list)
    p = [sign_flip_p(torch.tensor(values[tuple(line)])) for line in lines[["model", *by]].to_numpy()]
    lines["p"] = p
    lines["p, Holm"] = lines.groupby(["model", "direction", "seed"])["p"].transform(lambda own: holm(list(own)))
    lines["confirmed"] = ["yes" if value < LEVEL else "no" for value in lines["p, Holm"]]
    return lines


def figures(spec: Spec, rows: pd.DataFrame) -> list[go.Figure]:
    if not (rows.measure == CELL).any():
        return []
    cells = rows[rows.measure == CELL].astype({"layer": int, "unit": int})
    maps = [
        _map(model, direction, own)
        for (model, direction), own in cells[cells.seed == spec.seeds[0]].groupby(["model", "direction"], sort=False)
    ]
    summary = summarize(rows, [EFFECT], BY)
    summary = summary[summary.cells.isin(["found", "random"])]
    points = [
        Mean(f"{row.recipe}, {row.direction}", row.component, row.cells, *row[ENDS], int(row.n))
        for _, row in summary.iterrows()
    ]
    title, subtitle = "Found cells against random ones", "held-out pairs; means and 95 % intervals"
    unit = "effect (share of the logit difference)"
    return [*maps, *([means(title, subtitle, points, unit)] if points else [])]


def _map(model: str, direction: str, cells: pd.DataFrame) -> go.Figure:
    groups = list(dict.fromkeys(cells.group))
    panels = []
    for component, own in cells.groupby("component", sort=False):
        lines = own[["layer", "unit"]].drop_duplicates().sort_values(["layer", "unit"]).to_records(index=False).tolist()
        mean = own.groupby(["layer", "unit", "group"])["value"].mean()
        values = np.array([[mean.get((*line, group), np.nan) for group in groups] for line in lines])
        several = own.unit.nunique() > 1
        names = tuple(
            f"layer {layer}, {_unit(component)} {unit}" if several else f"layer {layer}" for layer, unit in lines
        )
        found = own[own["rank"] > 0][["layer", "unit", "group"]].drop_duplicates().to_records(index=False).tolist()
        marked = tuple((lines.index((layer, unit)), groups.index(group)) for layer, unit, group in found)
        panels.append(Panel(component, names, values, marked))
    pairs = cells["sample"].nunique()
    subtitle = f"mean effect over {pairs} pairs of one seed; framed: found on one half of them"
    return effect_maps(f"{model}, {direction}: {MEANING[direction]}", subtitle, groups, panels, "effect")


def reading(spec: Any, rows: pd.DataFrame) -> str:
    """What was found of every recipe and direction, also when that is nothing."""
    found = _found(rows)
    parts = []
    for recipe in rows.recipe.unique():
        own = rows[rows.recipe == recipe]
        parts.append(_runs(own, recipe))
        if not (own.measure == CELL).any():
            parts.append("No pair is told apart by the model, so there is nothing to patch between: nothing was found.")
            continue
        parts += [_direction(own, found, direction) for direction in own.direction.unique()]
        parts.append(_checks(own) + _lacking(spec, own))
    return "\n\n".join(parts)


def _runs(rows: pd.DataFrame, recipe: str) -> str:
    summary = summarize(rows[rows.direction == rows.direction.iloc[0]], [*RUNS[:4], ALIKE], ())
    clean, corrupted, p_clean, p_corrupted = (one(summary, measure=m) for m in RUNS[:4])
    alike = one(summary, measure=ALIKE)
    return (
        f"{recipe}: the logit of the clean answer less that of the other is {number(*clean[ENDS])} in the clean run, "
        f"{number(*corrupted[ENDS])} in the corrupted one, its probability {number(*p_clean[ENDS])} and "
        f"{number(*p_corrupted[ENDS])} (n = {clean.n} pairs, of which {alike['mean']:.0%} are too alike to be used)."
    )


def _direction(rows: pd.DataFrame, found: pd.DataFrame, direction: str) -> str:
    own = rows[rows.direction == direction]
    head = f"{direction.capitalize()} ({MEANING[direction]}). {_stream(own)}".strip()
    summary, words = summarize(own, [EFFECT], BY), []
    if not len(summary):
        return f"{head} Too few pairs are left to confirm any cell."
    units = own[own.measure == CELL].groupby("component")["unit"].nunique()
    here = found[(found.direction == direction) & found.model.isin(own.model.unique())]
    confirmed = _confirmed(here, set(units[units > 1].index))
    for component in summary.component.unique():
        at = summary[summary.component == component]
        top, random, less = (one(at, cells=cells) for cells in ("found", "random", "found less random"))
        draws = own[(own.measure == SET) & (own.component == component)].groupby("draw")["value"].mean()
        p = (1 + int((draws.abs() >= abs(top["mean"])).sum())) / (1 + len(draws))
        clear = "more than" if less.low > 0 else "no more than"
        words.append(
            f"{component}: top cells {number(*top[ENDS])}, {clear} random ones {number(*random[ENDS])} "
            f"(n = {top.n}, p = {p:.2g} of {len(draws)} sets)."
        )
    return f"{head} {confirmed}\n\nOn held-out pairs: {' '.join(words)}"


def _unit(component: str) -> str:
    """What the cells of a component are, where it has several at a position."""
    return UNITS.get(component.rsplit("hook_", 1)[-1], "head")


def _unit_of(row: pd.Series, several: Collection[str]) -> str:
    return f" {_unit(row.component)} {row.unit}" if row.component in several else ""


def _confirmed(found: pd.DataFrame, several: Collection[str]) -> str:
    good = found[found.confirmed == "yes"].sort_values("mean", key=lambda v: -v.abs(), kind="stable")
    said = f"{len(good)} of {len(found)} found cells are confirmed on held-out pairs (random signs, Holm)"
    if not len(good) and len(found) * 2 / 2 ** int(found.n.max()) >= LEVEL:
        return f"{said}: {int(found.n.max())} of them are too few to confirm any, whatever they show."
    if not len(good):
        return f"{said}: nothing was found."
    first = good[good.component != "resid_pre"].head(4)
    largest = "; ".join(
        f"{row.component} of layer {row.layer}{_unit_of(row, several)} at {row.group} "
        f"{number(row['mean'], row.low, row.high)}"
        for _, row in first.iterrows()
    )
    return f"{said}{f'; largest besides the stream: {largest}' if largest else ''}."


def _stream(rows: pd.DataFrame) -> str:
    """At which positions the stream has what matters, layer by layer: chosen on the finding half of the pairs, measured
    on the other; where that has no pair, on the same ones, and then it says so."""
    stream = rows[(rows.measure == CELL) & (rows.component == "resid_pre")]
    if not len(stream):
        return ""
    finding, held_out = (stream[stream.half == half] for half in ("finding", "confirming"))
    best = _best_groups(finding)
    measured = held_out if len(held_out) else finding
    own = measured[measured.group == measured.layer.map(best)]
    lines = summarize(own, [CELL], ("layer",)).set_index("layer")
    stretches: list[list] = []
    for layer, group in best.items():
        if stretches and stretches[-1][0] == group:
            stretches[-1][2] = layer
        else:
            stretches.append([group, layer, layer])
    said = [
        f"{group} ({'layer ' if a == b else 'layers '}{int(a)}{'' if a == b else f'-{int(b)}'}, effect "
        f"{number(*lines.loc[a, ENDS])}{'' if a == b else f' to {number(*lines.loc[b, ENDS])}'})"
        for group, a, b in stretches
    ]
    n = int(lines.n.max())
    if len(held_out):
        same = int((_best_groups(held_out) == best).sum())
        chosen = (
            f"chosen on one half of the pairs, effects of the other (n = {n}), which would choose the same in "
            f"{same} of {len(best)} layers"
        )
    else:
        chosen = f"chosen and measured on the same pairs (n = {n}), so that nothing is confirmed"
    return f"The stream that enters a layer matters most at {', then '.join(said)}; {chosen}."


def _best_groups(stream: pd.DataFrame) -> pd.Series:
    """Of each layer the positions of largest mean effect."""
    return stream.groupby(["layer", "group"])["value"].mean().unstack().abs().idxmax(axis=1)


def _checks(rows: pd.DataFrame) -> str:
    nothing, everything = (rows[rows.measure == name]["value"] for name in (NOTHING, EVERYTHING))
    return (
        f"Checks: patches of a run's own values change the result by {nothing.abs().max():.1e} at most (n = "
        f"{len(nothing)}), patches of every position by {everything.min():.4f} to {everything.max():.4f} (n = "
        f"{len(everything)})."
    )


def _lacking(spec: Any, rows: pd.DataFrame) -> str:
    lacking = [name for name in spec.components if name not in set(rows.component)]
    return f" It has no {', '.join(lacking)}." if lacking else ""
