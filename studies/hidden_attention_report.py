"""The report of ``hidden_attention``: how well each form predicts, and which does best on held-out prompts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from jambascope.studies.comparisons import holm, sign_flip_p
from jambascope.studies.figures.effects import Mean, Panel, effect_maps, means
from jambascope.studies.runner.spec import Spec
from jambascope.studies.runner.summary import number, one, summarize

FORMS = ("alpha", "conv", "gate")
RAW = ", raw"
ROLLOUT, DISTANCE, PATTERN = "rollout", "distance", "attention pattern"
VALUES = {"value-weighted write": "alpha", "value-weighted input": "conv"}
"""Yardsticks, and the form whose edges they weigh."""
CANDIDATES = (*FORMS, *(form + RAW for form in FORMS), ROLLOUT)
"""Forms of hidden attention, of which the best is found; the others are yardsticks."""
WRITE, INPUT, DIVERGENCE = "logits, write out", "logits, input out", "divergence, write out"
TRUTHS = (WRITE, INPUT, DIVERGENCE)
OWN = {WRITE: "value-weighted write", INPUT: "value-weighted input"}
NAMES = {WRITE: "the key's write taken out", INPUT: "all that the key's input gives taken out"}
RHO, SHUFFLED, OTHER = "Spearman", "Spearman, keys shuffled", "Spearman, another prompt"
PARTIAL, WITHIN = "Spearman, distance held fixed", "Spearman within queries"
LAYER, SIZE = "layer: ", "size of a knock-out"
HEADLINE = (RHO, SHUFFLED, PARTIAL)
BY = ("of", "form")
ENDS = ["mean", "low", "high"]
LEVEL = 0.05


def tables(spec: Spec, rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The best form against each other one, further controls, and all by layer with the size of what was predicted."""
    against = [
        _against(rows[rows.recipe == recipe], of).assign(recipe=recipe, of=of)
        for recipe in rows.recipe.unique()
        for of in OWN
    ]
    columns = ["recipe", "of", "best", "form", *ENDS, "n", "p", "p, Holm"]
    plain = rows[rows.layer.isna()]
    controls = summarize(plain[plain.of != DIVERGENCE], [OTHER, WITHIN], BY).drop(columns="trainings")
    layers = rows.dropna(subset=["layer"]).astype({"layer": int})
    lines = summarize(layers, [SIZE, LAYER + RHO], (*BY, "layer"), pooled="model").drop(columns="trainings")
    return [
        ("The best form less each other, on held-out prompts", pd.concat(against)[columns]),
        ("Further controls", controls),
        ("By layer: mean size of a knock-out, and Spearman's correlation", lines),
    ]


def _halves(rows: pd.DataFrame, of: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Spearman with one truth on the prompts of both halves: form across, prompts down."""
    own = rows[(rows.measure == RHO) & (rows.of == of)]
    wide = own.pivot_table(index=["model", "seed", "sample"], columns="form", values="value")
    number_of = wide.index.get_level_values("sample")
    half = (number_of.max() + 1) // 2
    return wide[number_of < half], wide[number_of >= half]


def _best(rows: pd.DataFrame, of: str) -> str:
    """The form that predicts best on the finding half."""
    finding = _halves(rows, of)[0]
    return str(finding[[form for form in CANDIDATES if form in finding]].mean().idxmax())


def _against(rows: pd.DataFrame, of: str) -> pd.DataFrame:
    """How far the best form is above each other one on held-out prompts, with p by random signs, Holm."""
    best, held_out = _best(rows, of), _halves(rows, of)[1]
    others = [form for form in (*CANDIDATES, DISTANCE, *VALUES) if form in held_out and form != best]
    long = pd.concat(
        (held_out[best] - held_out[form]).rename("value").reset_index().assign(form=form) for form in others
    )
    long = long.assign(measure=RHO, recipe=rows.recipe.iloc[0])
    lines = summarize(long, [RHO], ("form",)).drop(columns=["recipe", "measure", "trainings"])
    lines.insert(0, "best", best)
    p = [sign_flip_p(torch.tensor((held_out[best] - held_out[f]).dropna().to_numpy())) for f in lines.form]
    return lines.assign(**{"p": p, "p, Holm": holm(p)})


def figures(spec: Spec, rows: pd.DataFrame) -> list[go.Figure]:
    kinds = {RHO: "form", OTHER: "form of another prompt", SHUFFLED: "keys shuffled"}
    order, found = [*CANDIDATES, *VALUES, DISTANCE, PATTERN], []
    for of, name in NAMES.items():
        summary = summarize(rows[rows.of == of], list(kinds), ("form",))
        points = [
            Mean(row.recipe, row.form, kinds[row.measure], *row[ENDS], int(row.n)) for _, row in summary.iterrows()
        ]
        points.sort(key=lambda point: (list(kinds.values()).index(point.kind), order.index(point.row)))
        subtitle = "means over layers of each prompt, and 95 % intervals"
        found.append(means(f"Forms against knock-outs: {name}", subtitle, points, "Spearman's correlation"))
    layers = rows[rows.measure == LAYER + RHO].astype({"layer": int})
    for model, own in layers.groupby("model", sort=False):
        panels = []
        for of, name in NAMES.items():
            mean = own[own.of == of].groupby(["layer", "form"])["value"].mean().unstack()
            values = mean.reindex(columns=order).to_numpy(dtype=np.float64)
            panels.append(Panel(name, tuple(f"layer {layer}" for layer in mean.index), values))
        subtitle = f"means over {own['sample'].nunique()} prompts of each seed; {PATTERN} is of attention layers"
        found.append(effect_maps(f"{model}: correlation by layer", subtitle, order, panels, "Spearman"))
    return found


def reading(spec: Spec, rows: pd.DataFrame) -> str:
    """What was found of every recipe, also when that is nothing."""
    parts = []
    for recipe in rows.recipe.unique():
        own = rows[rows.recipe == recipe]
        parts += [f"{recipe}, {name}: {_reading_of(own, of)}" for of, name in NAMES.items()]
    return "\n\n".join(parts)


def _reading_of(rows: pd.DataFrame, of: str) -> str:
    best, half = _best(rows, of), (rows["sample"].max() + 1) // 2
    later = rows[rows["sample"] >= half]
    summary = summarize(later[later.of == of], [RHO, SHUFFLED, OTHER, PARTIAL, WITHIN], ("form",))

    def said(measure: str, form: str = best) -> str:
        return number(*one(summary, measure=measure, form=form)[ENDS])

    top, shuffled = (one(summary, measure=m, form=best) for m in (RHO, SHUFFLED))
    words = (
        f"of the forms of hidden attention, {best!r} predicts best on the finding half. On held-out prompts its rank "
        f"correlation with the change of the logits is {said(RHO)} (n = {top.n} prompts, mean over layers); with keys "
        f"shuffled {said(SHUFFLED)}, of another prompt {said(OTHER)}, within queries {said(WITHIN)}, and with distance "
        f"held fixed {said(PARTIAL)}. "
    )
    if top.low <= max(0.0, shuffled.high):
        return words + "That is no more than chance: none of them predicts what a knock-out does."
    against = _against(rows, of).set_index("form")
    words += _distance(against.loc[DISTANCE], said(RHO, DISTANCE))
    equal = [form for form in against.index if form in CANDIDATES and against.loc[form, "p, Holm"] >= LEVEL]
    words += f" The other forms: {'; '.join(f'{form!r} {said(RHO, form)}' for form in CANDIDATES if form != best)}. "
    words += (
        f"Not told from it (Holm): {'; '.join(map(repr, equal))}." if equal else "All are clearly behind it (Holm)."
    )
    words += f" Yardsticks: what the edge adds to the stream {said(RHO, OWN[of])}"
    if (summary.form == PATTERN).any():
        words += f"; in attention layers, the mean pattern and knock-outs there {said(RHO, PATTERN)}"
    if of == WRITE:
        divergence = summarize(later[(later.of == DIVERGENCE) & (later.form == best)], [RHO], ())
        words += f". With the divergence in place of the logits {number(*one(divergence)[ENDS])}"
    layers = later[(later.measure == LAYER + RHO) & (later.form == best) & (later.of == of)]
    mean = layers.groupby("layer")["value"].mean()
    low, high = mean.idxmin(), mean.idxmax()
    return f"{words}. By layer from {mean[low]:.2f} (layer {int(low)}) to {mean[high]:.2f} (layer {int(high)})."


def _distance(line: pd.Series, distance: str) -> str:
    """Whether the best form says more than how near a key is."""
    gap = number(*line[ENDS])
    if line.low > 0 and line["p, Holm"] < LEVEL:
        return f"Distance alone reaches {distance}: the form says more, by {gap}."
    return f"Distance alone reaches {distance}: that the form says more is not shown, the gap is {gap}."
