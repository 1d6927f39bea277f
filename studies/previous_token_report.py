"""The report of ``previous_token``: what each cut costs, and who is needed or enough."""

from __future__ import annotations

import math

import pandas as pd
import plotly.graph_objects as go
import torch

from jambascope.studies.comparisons import holm, sign_flip_p
from jambascope.studies.figures.effects import Mean, means
from jambascope.studies.runner.spec import Spec
from jambascope.studies.runner.summary import number, one, summarize

SCORE, SHUFFLED, EVEN = "prefix matching", "prefix matching, tokens in random order", "prefix matching, even attention"
LOSSES = ("loss on the repetition", "loss before it")
CHANGES = tuple(f"change of {name}" for name in (SCORE, *LOSSES))
SINGLE = "one layer: "
"""Begins the measure of changes by cuts of one layer, or of all but one."""
CHANNELS, CHANNEL_SET = "change of prefix matching by channels", "random set: change of prefix matching by channels"
BY = ("mode", "way", "layers", "set")
ENDS = ["mean", "low", "high"]
RANDOM_EDGES = "random edges"
LEVEL, MUCH = 0.05, 0.5
"""Corrected p, and the share of what the head has above chance, from which on something is called needed or enough."""


def tables(spec: Spec, rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """What cutting off each layer costs, and what each keeps when all others are cut off."""
    rows, title = _unnamed(rows), "on held-out sequences: change of prefix matching"
    kept = _lines(rows[rows["mode"] == "only this left"])
    found = [("Layers cut off one by one, " + title, _layers(rows))]
    return [*found, ("All below cut off but one, " + title, kept)] if len(kept) else found


def _unnamed(rows: pd.DataFrame) -> pd.DataFrame:
    """Changes by one layer under the names of the others."""
    return rows.assign(measure=rows.measure.str.removeprefix(SINGLE))


def _lines(rows: pd.DataFrame) -> pd.DataFrame:
    """A line for each layer and way, and what became of the losses."""
    by = ["seed", "side", "layers", "way"]
    lines = summarize(rows, [CHANGES[0]], by, pooled="model").drop(columns=["measure", "trainings"])
    for name in CHANGES[1:]:
        other = summarize(rows, [name], by, pooled="model").set_index(["model", *by])["mean"].rename(name)
        lines = lines.join(other, on=["model", *by])
    return lines


def _layers(rows: pd.DataFrame) -> pd.DataFrame:
    """A line for each layer and way, with p by random signs, corrected over a model and seed."""
    own = rows[rows["mode"] == "taken"]
    own = own[own.layers.str.isdigit().astype(bool)]
    by = ["model", "seed", "side", "layers", "way"]
    lines = _lines(own)
    values = own[own.measure == CHANGES[0]].groupby(by)["value"].apply(list)
    lines["p"] = [sign_flip_p(torch.tensor(values[tuple(line)])) for line in lines[by].to_numpy()]
    lines["p, Holm"] = lines.groupby(["model", "seed"])["p"].transform(lambda p: holm(list(p)))
    return lines


def figures(spec: Spec, rows: pd.DataFrame) -> list[go.Figure]:
    rows, found = _unnamed(rows), []
    for mode, title in (("taken", "Cut off"), ("only this left", "All below cut off but one")):
        own = rows[rows["mode"] == mode]
        for measure, unit in zip(CHANGES[:2], ("change of prefix matching", "change of loss (nats)"), strict=True):
            summary = summarize(own, [measure], ("way", "layers"))
            points = [
                Mean(row.recipe, _named(row.layers), row.way, *row[ENDS], int(row.n)) for _, row in summary.iterrows()
            ]
            points.sort(key=lambda p: (p.row.startswith("all"), len(p.row), p.row))
            if points:
                subtitle = "held-out sequences; means and 95 % intervals"
                found.append(means(f"{title}: {measure.removeprefix('change of ')}", subtitle, points, unit))
    return found


def _named(layers: str) -> str:
    return f"layer {layers}" if layers.isdigit() else layers


def reading(spec: Spec, rows: pd.DataFrame) -> str:
    """What was found of every recipe, also when that is nothing."""
    rows = _unnamed(rows)
    return "\n\n".join(_reading_of(spec, rows[rows.recipe == recipe], recipe) for recipe in rows.recipe.unique())


def _reading_of(spec: Spec, rows: pd.DataFrame, recipe: str) -> str:
    base = rows[rows["mode"] == "nothing taken"]
    score, shuffled, even, again, before = (
        one(summarize(base, [name], ())) for name in (SCORE, SHUFFLED, EVEN, *LOSSES)
    )
    heads = base[base.measure == SCORE][["layer", "head"]].drop_duplicates().astype(int).to_records(index=False)
    named = ", ".join(f"layer {layer} head {head}" for layer, head in heads.tolist())
    words = (
        f"{recipe}: the head of highest prefix matching, {named}, gives {number(*score[ENDS])} of its attention to "
        f"what followed the current token before (n = {score.n}); on the same tokens in random order "
        f"{number(*shuffled[ENDS])}, spread evenly {even['mean']:.3f}. Loss {number(*again[ENDS])} nats on the "
        f"repetition against {number(*before[ENDS])} before."
    )
    chance = max(shuffled["mean"], even["mean"])
    if score.low <= max(shuffled.high, even.high):
        return f"{words} That is no induction, so there is no previous-token step to look for: nothing was found."
    lost = summarize(rows[rows["mode"] == "taken"], [CHANGES[0]], ("way", "layers"))
    lost = lost.assign(**{end: -lost[end] / (score["mean"] - chance) for end in ENDS})
    lost = lost.rename(columns={"low": "high", "high": "low"})
    kept = summarize(rows[rows["mode"] == "only this left"], [CHANGES[0]], ("way", "layers"))
    for end in ENDS:
        kept[end] = 1 + kept[end] / (score["mean"] - chance)
    parts = [words, _together(lost), _singly(lost, kept, rows), _channels(rows), _above(rows, spec)]
    return "\n\n".join(part for part in parts if part)


def _together(lost: pd.DataFrame) -> str:
    """What all layers below cost together, and what follows."""
    below = lost[lost.layers == "all below"]
    said = [f"{row.way} {number(*row[ENDS])}" for _, row in below.iterrows()]
    needed = [row.way for _, row in below.iterrows() if row.low > MUCH and row.way in ("conv", "state")]
    edges = below[below.way == "edge to the token before"]
    if len(edges) and edges.iloc[0].low > MUCH:
        needed.append("heads of lower layers that look at the token before")
    everything = below[below.way == "everything"].iloc[0]
    if needed:
        verdict = f"So it needs {' and '.join({'conv': 'convolutions', 'state': 'states'}.get(n, n) for n in needed)}."
    elif everything.low > MUCH:
        verdict = "So no way is needed by itself, but some is: they can stand in for each other, or share the work."
    else:
        verdict = "So neither convolution nor state nor the edge to the token before does it: the step is not here."
    return (
        "Share of its prefix matching above chance that is lost when all layers below are cut off from earlier "
        f"positions: {', '.join(said)}. {verdict}"
    )


def _singly(lost: pd.DataFrame, kept: pd.DataFrame, rows: pd.DataFrame) -> str:
    """The layers that cost most alone, and those that are enough alone."""
    lines = _layers(rows)
    clear = {
        (r.layers, r.way)
        for _, r in lines[(lines["p, Holm"] < LEVEL) & (lines.side == "below")].iterrows()
        if r.way != RANDOM_EDGES
    }
    single = lost[[(r.layers, r.way) in clear for _, r in lost.iterrows()]].sort_values("mean", ascending=False).head(4)
    said = "; ".join(f"layer {r.layers}, {r.way}: {number(*r[ENDS])}" for _, r in single.iterrows())
    words = f"Lost by cutting off one layer: {said}." if said else "No single layer below makes a difference (Holm)."
    best = kept.sort_values("mean", ascending=False, kind="stable").head(2)
    if len(best):
        said = "; ".join(f"{r.way} of layer {r.layers} {number(*r[ENDS])}" for _, r in best.iterrows())
        words += (
            f" With everything below cut off but one, that keeps: {said}. "
            f"{'One alone keeps most of it.' if best.iloc[0].low > MUCH else 'None alone keeps most of it.'}"
        )
    return words


def _channels(rows: pd.DataFrame) -> str:
    own = rows[rows.measure == CHANNELS]
    if not len(own):
        return ""
    found, random, less = (
        one(summarize(own[own.set == s], [CHANNELS], ())) for s in ("found", "random", "found less random")
    )
    draws = rows[rows.measure == CHANNEL_SET].groupby("draw")["value"].mean()
    p = (1 + int((draws.abs() >= abs(found["mean"])).sum())) / (1 + len(draws))
    places = own[["layers", "way", "mode"]].drop_duplicates().to_records(index=False).tolist()
    where = ", ".join(f"layer {layer}, {way}, {mode}" for layer, way, mode in places)
    clear = "differs from" if less.high < 0 or less.low > 0 else "cannot be told from"
    return (
        f"Channels ({where}): those found change prefix matching by {number(*found[ENDS])}, random ones by "
        f"{number(*random[ENDS])} (n = {found.n}); that {clear} them, p = {p:.2g} against {len(draws)} random sets."
    )


def _above(rows: pd.DataFrame, spec: Spec) -> str:
    """The controls: layers above, and random edges."""
    above = rows[(rows.side == "above") & (rows.measure == CHANGES[0])]["value"]
    words = ""
    if len(above):
        words = f"Control: cutting off layers above changes prefix matching by {above.abs().max():.1e} at most."
    edges = rows[(rows.way == RANDOM_EDGES) & (rows.layers == "all below")]
    if len(edges):
        random = one(summarize(edges, [CHANGES[0]], ()))
        words += f" Random edges below, all away: {number(*random[ENDS])}."
    before = summarize(rows[(rows["mode"] == "taken") & (rows.layers == "all below")], [CHANGES[2]], ("way",))
    said = ", ".join(f"{r.way} {number(*r[ENDS])}" for _, r in before.iterrows() if math.isfinite(r["mean"]))
    return f"{words} Loss before the repetition changes, with all below cut off, by {said} nats.".strip()
