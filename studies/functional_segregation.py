"""Which function lives in attention and which in Mamba: what is lost without either, and how few heads are enough?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from pydantic import Field

from jambascope.config import JambaConfig
from jambascope.errors import ConfigError
from jambascope.hooks.intervals import percentiles, resampled_means
from jambascope.hooks.interventions import hooks
from jambascope.model import HookedJamba
from jambascope.studies import ablations
from jambascope.studies.ablations import Means, Part
from jambascope.studies.comparisons import by_sample, holm, sign_flip_p
from jambascope.studies.corpus import TEXT
from jambascope.studies.figures.parts import Bar, grouped, layer_map
from jambascope.studies.runner.spec import Files, Spec
from jambascope.studies.runner.study import Cell, Found, Study, grid
from jambascope.studies.runner.summary import number, one, summarize
from jambascope.studies.segregation_prompts import (
    HITS,
    IN_LANGUAGE,
    KINDS,
    LOSS,
    Prompts,
    TaskName,
    Values,
    chance_of_repeat,
    chances,
    check_tasks,
    documents_of,
    prompts_of,
)

WHOLE, ATTENTION, MAMBA, TOP = "nothing", "all attention layers", "all Mamba layers", "all heads but the top"
CONTROLS = {
    ATTENTION: "as many random layers as attention",
    MAMBA: "as many random layers as Mamba",
    TOP: "all heads but random ones",
}
CHANGE, LESS, LAYER, SET = "change of ", "less the control: change of ", "layer: change of ", "random set: change of "
FINDING = "finding half, "
BY = ("task", "without", "k")
ENDS = ["mean", "low", "high"]
LEAST = 0.05
"""Nats that the attention layers must be worth for a share of it to mean something."""

NOTHING = 0.1
"""Share of the accuracy below which a model is called broken, whichever layers are gone."""


class SegregationSpec(Spec):
    """Settings of the study."""

    documents: int = Field(64, ge=4, description="Of a task and seed; means and heads are found on one half.")
    tasks: tuple[TaskName, ...] = Field(
        ("recall", "phones", "repeat", "copy", "text"),
        description="Recall of pairs, of phone numbers, repeated random words (induction), selective copying, and the "
        "words of stories that no earlier word determines. Models of another language can be asked repeat (random "
        f"tokens) and text (files) alone, not {', '.join(IN_LANGUAGE)}.",
    )
    text: Files = Field((), description=TEXT)
    length: int = Field(
        64, ge=8, description="Tokens of a window of text files; half as many random tokens are said twice."
    )
    k: tuple[int, ...] = Field((1, 2), description="Numbers of attention heads that are kept.")
    draws: int = Field(5, ge=1, description="Random sets of layers or heads for comparison; fewer where fewer exist.")


def check(spec: SegregationSpec, config: JambaConfig, directory: Path) -> None:
    total = len(config.attention_layers) * config.n_heads
    for k in spec.k if total else ():
        if not 1 <= k < total:
            raise ConfigError(f"k={k} must lie in 1..{total - 1}: it has {total} heads, and some must be taken away")
    check_tasks(spec.tasks, spec.text, spec.length, config, directory)


def cells(spec: SegregationSpec) -> list[Cell]:
    return grid(spec, task=spec.tasks)


def measure(spec: SegregationSpec, cell: Cell, model: HookedJamba) -> Found:
    asked = prompts_of(model, cell["task"], spec.documents, spec.text, spec.length, cell["seed"])
    half = len(asked) // 2
    finding, confirming = asked.part(slice(0, half)), asked.part(slice(half, None))
    means = ablations.mean_outputs(model, finding.batches())

    def measured(prompts: Prompts, parts: Sequence[Part]) -> Values:
        return _measured(model, prompts, means, parts)

    whole, before = measured(confirming, ()), measured(finding, ())
    rows = [row for name in KINDS for row in _rows(name, whole[name], "hit" if name == HITS else None, WHOLE, 0, half)]
    for layer in range(model.config.n_layers):
        alone = ((layer, None),)
        where = {"layer": layer, "mixer": model.config.mixers[layer]}
        found = _change_rows(LAYER, _changes(measured(confirming, alone), whole), "one layer", 1, half)
        found += _change_rows(FINDING + LAYER, _changes(measured(finding, alone), before), "one layer", 1, 0)
        rows += [row | where for row in found]
    for (name, k), (parts, others) in _sets(spec, cell["seed"], model, finding, measured).items():
        found = _changes(measured(confirming, parts), whole)
        random = [_changes(measured(confirming, own), whole) for own in others]
        rows += _compared_rows(name, k, found, random, half)
    return Found(rows)


def _measured(model: HookedJamba, prompts: Prompts, means: Means, parts: Sequence[Part]) -> Values:
    with model.hooks(hooks(model, ablations.without(model, means, parts))):
        return prompts.measured(model)


def _changes(values: Values, whole: Values) -> Values:
    return {name: values[name] - whole[name] for name in KINDS}


def _sets(spec: SegregationSpec, seed: int, model: HookedJamba, finding: Prompts, measured) -> dict:
    """What is taken away, and the random sets it is compared to: all attention, all Mamba, all heads but some."""
    config, sets = model.config, {}
    for name, layers in ((ATTENTION, config.attention_layers), (MAMBA, config.ssm_layers)):
        if 0 < len(layers) < config.n_layers:
            others = ablations.random_layers(config, layers, spec.draws, seed)
            sets[name, len(layers)] = ablations.layers_as_parts(layers), others
    if not config.attention_layers:
        return sets
    everyone = [(layer, head) for layer in config.attention_layers for head in range(config.n_heads)]

    def keeping(heads: Sequence[tuple[int, int]]) -> tuple[Part, ...]:
        return ablations.heads_as_parts([head for head in everyone if head not in heads])

    alone = [measured(finding, keeping([head]))[LOSS].mean() for head in everyone]
    ranked = [everyone[i] for i in np.argsort(alone, kind="stable")]
    for k in spec.k:
        others = ablations.random_heads(config, k, spec.draws, seed, ranked[:k])
        sets[TOP, k] = keeping(ranked[:k]), tuple(keeping(own) for own in others)
    return sets


def _compared_rows(name: str, k: int, found: Values, random: Sequence[Values], first: int) -> list[dict]:
    """Changes by a set and by random ones (averaged), how far they are apart, and each random set's mean."""
    averaged = {m: sum(own[m] for own in random) / len(random) for m in KINDS}
    apart = {m: found[m] - averaged[m] for m in KINDS}
    rows = _change_rows(CHANGE, found, name, k, first) + _change_rows(CHANGE, averaged, CONTROLS[name], k, first)
    rows += _change_rows(LESS, apart, name, k, first)
    for i, own in enumerate(random):
        means = {m: np.array([np.nanmean(own[m])]) for m in KINDS}
        rows += [row | {"draw": i, "kind": None} for row in _change_rows(SET, means, CONTROLS[name], k, 0)]
    return rows


def _change_rows(prefix: str, values: Values, taken: str, k: int, first: int) -> list[dict]:
    return [row for name, kind in KINDS.items() for row in _rows(prefix + name, values[name], kind, taken, k, first)]


def _rows(name: str, values: np.ndarray, kind: str | None, taken: str, k: int, first: int) -> list[dict]:
    same = {"measure": name, "without": taken, "k": k, "kind": kind}
    return [{**same, "sample": first + i, "value": round(float(v), 12)} for i, v in enumerate(values) if v == v]


# -- the report ----------------------------------------------------------------------------------------------


def chance(spec: SegregationSpec, rows: pd.DataFrame, recipe: str, task: str) -> float | None:
    """Accuracy of a task by chance on the very documents that were measured, as
    :func:`jambascope.studies.segregation_prompts.chances` means it; None of text files, where any token may come."""
    own = rows[(rows.measure == HITS) & (rows.recipe == recipe) & (rows.task == task)]
    if task == "repeat":
        return chance_of_repeat(spec.tasks, spec.length, own["value"].to_numpy(float))
    if task == "text" and spec.text:
        return None
    levels = [
        _levels(task, spec.documents, int(seed))[sorted(set(of_seed["sample"]))]
        for seed, of_seed in own.groupby("seed")
    ]
    return float(np.concatenate(levels).mean())


@lru_cache(maxsize=32)
def _levels(task: TaskName, documents: int, seed: int) -> np.ndarray:
    """Of each document; the table and the reading both ask."""
    return chances(documents_of(task, documents, seed))


def tables(spec: SegregationSpec, rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Accuracies with all parts and without, beside chance."""
    keys = ["recipe", "model", "seed", "task", "sample"]
    whole = rows[rows.measure == HITS]
    left = rows[rows.measure == CHANGE + HITS].merge(whole[[*keys, "value"]], on=keys, suffixes=("", " before"))
    left = left.assign(measure=HITS, value=(left["value"] + left["value before"]).round(9))
    both, parts = pd.concat([whole, left]).assign(kind="hit"), []
    for (recipe, task), own in both.groupby(["recipe", "task"], sort=False):
        level = chance(spec, rows, recipe, task)
        lines = summarize(own, [HITS], BY).drop(columns=["measure", "trainings"]).astype({"k": int})
        above = ["" if level is None else "yes" if low > level else "no" for low in lines.low]
        parts.append(lines.assign(chance=float("nan") if level is None else level, above=above))
    table = pd.concat(parts).rename(columns={"above": "above chance", "without": "taken away"})
    return [("Accuracy, with all parts and with what is left, beside chance (see Controls)", table)]


def figures(spec: SegregationSpec, rows: pd.DataFrame) -> list[go.Figure]:
    """Of every recipe: parts against random ones, and layer by layer."""
    found = []
    for recipe, own in rows.groupby("recipe", sort=False):
        if (own.measure == CHANGE + HITS).any():
            found.append(_parts_figure(spec, own, recipe))
        found.append(_map(spec, own, recipe))
    return found


def _parts_figure(spec: SegregationSpec, rows: pd.DataFrame, recipe: str) -> go.Figure:
    summary = summarize(rows, [CHANGE + HITS], BY)
    bars = []
    for name, control in CONTROLS.items():
        for k in sorted(summary[summary["without"] == name].k.unique()) if name == TOP else (None,):
            panel = f"{name} {int(k)}" if k is not None else name
            for which, said in ((name, "these"), (control, "random ones, as many")):
                own = summary[(summary["without"] == which) & ((summary.k == k) | (k is None))]
                bars += [Bar(panel, r.task, said, r["mean"], r.low, r.high) for _, r in own.iterrows()]
    subtitle = (
        f"taken away: layers or heads set to their means; {int(summary.n.max())} documents a task, 95 % intervals"
    )
    return grouped(f"{recipe} without parts", subtitle, bars, "change of accuracy")


def _map(spec: SegregationSpec, rows: pd.DataFrame, recipe: str) -> go.Figure:
    own = rows[rows.measure == LAYER + HITS].astype({"layer": int})
    summary = summarize(own, [LAYER + HITS], ("task", "layer"))
    tasks = [task for task in spec.tasks if task in set(summary.task)]
    grid_ = summary.pivot(index="layer", columns="task", values="mean")[tasks]
    texts = summary.assign(
        text=[
            f"layer {r.layer}, {r.task}: {number(r['mean'], r.low, r.high)}, n = {r.n}" for _, r in summary.iterrows()
        ]
    )
    hover = texts.pivot(index="layer", columns="task", values="text")[tasks]
    title = f"{recipe}: one layer set to its mean"
    mixers = own.drop_duplicates("layer").sort_values("layer").mixer
    return layer_map(
        title, "change of accuracy; blue is better", list(mixers), tasks, grid_.to_numpy(float), hover.to_numpy(),
        "change of accuracy",
    )  # fmt: skip


def reading(spec: SegregationSpec, rows: pd.DataFrame) -> str:
    """What each part is needed for, of every recipe, also when nothing can be told."""
    return "\n\n".join(_reading_of(spec, rows[rows.recipe == recipe], recipe) for recipe in rows.recipe.unique())


def _reading_of(spec: SegregationSpec, rows: pd.DataFrame, recipe: str) -> str:
    whole = summarize(rows, [HITS, LOSS], BY)
    right = {task: one(whole, measure=HITS, task=task) for task in spec.tasks}
    can = ", ".join(
        f"{task} {number(*line[ENDS])} ({_beside(line, chance(spec, rows, recipe, task))})"
        for task, line in right.items()
    )
    words = [f"{recipe} with all its parts is right in: {can} (n = {int(whole.n.max())} documents each)."]
    tested = rows[rows.measure == LESS + LOSS]
    if not len(tested):
        return (
            words[0] + " It has no attention layers beside Mamba layers, so nothing can be told apart. " + _layers(rows)
        )
    parts = list(tested.groupby(["task", "without", "k"], sort=False))
    p_values = holm([sign_flip_p(torch.tensor(by_sample(own).to_numpy())) for _, own in parts])
    p_of = {key: p for (key, _), p in zip(parts, p_values, strict=True)}
    summary = summarize(rows, [CHANGE + LOSS, CHANGE + HITS, LESS + LOSS], BY)
    for name in (ATTENTION, MAMBA):
        if (summary["without"] == name).any():
            words.append(_of_part(spec, pd.concat([whole, summary]), p_of, name))
    words += [_of_heads(spec, rows, summary, p_of, k) for k in spec.k if (summary["without"] == TOP).any()]
    return "\n\n".join([*words, _layers(rows)])


def _beside(line: pd.Series, level: float | None) -> str:
    if level is None:
        return "any token may come, so there is no chance level"
    return f"{'above' if line.low > level else 'not clearly above'} chance, {level:.3f}"


def _of_part(spec: SegregationSpec, summary: pd.DataFrame, p_of: dict, name: str) -> str:
    """What a kind of layer is needed for, beyond as many random layers."""
    told, sorted_ = [], {"more": [], "less": [], "no other": [], "nothing left": []}
    for task in spec.tasks:
        found, control, less = (
            one(summary, task=task, without=which, measure=measure)
            for which, measure in ((name, CHANGE + LOSS), (CONTROLS[name], CHANGE + LOSS), (name, LESS + LOSS))
        )
        hits, others = (one(summary, task=task, without=w, measure=CHANGE + HITS) for w in (name, CONTROLS[name]))
        p = p_of[task, name, found.k]
        before = one(summary, task=task, without=WHOLE, measure=HITS)["mean"]
        left = before + max(hits["mean"], others["mean"])
        verdict = "no other" if p >= 0.05 else "more" if less["mean"] > 0 else "less"
        sorted_["nothing left" if left < NOTHING * before else verdict].append(task)
        told.append(
            f"{task}: loss {number(*found[ENDS])} nats, accuracy {number(*hits[ENDS])}; random layers "
            f"{number(*control[ENDS])} and {number(*others[ENDS])}; p = {p:.2g}"
        )
    verdict = [
        f"needed {how} than as many random layers for {', '.join(tasks)}"
        for how, tasks in (("more", sorted_["more"]), ("less", sorted_["less"]))
        if tasks
    ]
    if sorted_["no other"]:
        verdict.append(f"not told from as many random layers for {', '.join(sorted_['no other'])}")
    if sorted_["nothing left"]:
        verdict.append(
            f"of {', '.join(sorted_['nothing left'])} too little is left either way to tell (accuracy below "
            f"{NOTHING:.0%} of the whole model's)"
        )
    return f"Without {name}, as changes (p of loss, after Holm): {'. '.join(told)}. In sum: {'; '.join(verdict)}."


def _of_heads(spec: SegregationSpec, rows: pd.DataFrame, summary: pd.DataFrame, p_of: dict, k: int) -> str:
    """What is kept with the top k heads alone, found on the other half."""
    told = []
    for task in spec.tasks:
        found, control = (
            one(summary, task=task, without=which, measure=CHANGE + LOSS, k=k) for which in (TOP, CONTROLS[TOP])
        )
        p = p_of[task, TOP, k]
        clear = f"p = {p:.2g}" if p < 0.05 else f"not told apart, p = {p:.2g}"
        told.append(
            f"{task} {number(*found[ENDS])} nats{_share(rows, task, k)}, with random ones {number(*control[ENDS])} "
            f"({clear})"
        )
    heads = "the top head" if k == 1 else f"the top {k} heads"
    return f"With {heads} of the finding half and no other, loss changes by: {'; '.join(told)}."


def _share(rows: pd.DataFrame, task: str, k: int) -> str:
    """Of what all attention layers are worth, how much these heads keep."""
    own = rows[(rows.measure == CHANGE + LOSS) & (rows.task == task)]
    every, kept = by_sample(own[own["without"] == ATTENTION]), by_sample(own[(own["without"] == TOP) & (own.k == k)])
    if not len(every) or every.mean() < LEAST:
        return ""
    both = torch.tensor(pd.concat([kept, every], axis=1).to_numpy())
    drawn = resampled_means(both)
    low, high = percentiles(1 - drawn[:, 0] / drawn[:, 1].clamp_min(LEAST))
    share = 1 - float(both[:, 0].mean() / both[:, 1].mean())
    return f", which keeps {number(share, float(low), float(high))} of what attention is worth"


def _layers(rows: pd.DataFrame) -> str:
    """The one layer that each task misses most on the finding half, and how much on the other."""
    own = rows[rows.measure.isin([LAYER + HITS, FINDING + LAYER + HITS])].astype({"layer": int})
    summary = summarize(own, [FINDING + LAYER + HITS, LAYER + HITS], ("task", "layer", "mixer"))
    finding = summary[summary.measure == FINDING + LAYER + HITS]
    told = []
    for worst in finding.loc[finding.groupby("task", sort=False)["mean"].idxmin()].itertuples():
        found = one(summary, measure=LAYER + HITS, task=worst.task, layer=worst.layer)
        told.append(f"{worst.task} layer {worst.layer} ({worst.mixer}, {number(*found[ENDS])})")
    return (
        "Accuracy falls most without one layer, chosen on the finding half and measured on the other: "
        f"{'; '.join(told)}."
    )


study = Study(
    name="functional_segregation",
    version=2,
    spec=SegregationSpec,
    question=__doc__,
    method="Held-out documents of five tasks in the packaged models' language. Recall asks for the values of keys "
    "in a table, phones for whole numbers of a phone book, repeat for the words of a random sequence said before "
    "(induction), copy for words among noise (a control that Mamba solves alone). Text is stories, of which only "
    "the words count that no earlier word determines. Of models of another language repeat is different random "
    "tokens said twice, whose second saying but its first token counts, and text is windows of text files, of which "
    "all tokens count; recall, phones and copy need the packaged models' language.\n\n"
    "Taken away is a mixer: what its output projection reads is set, at every position, to its mean over the "
    "finding half of the documents. All numbers are of the other half. Heads are ranked, for each task by itself, "
    "by the loss when all others of the model are taken away; then all heads but the top k are. The one layer that "
    "a task needs most is chosen on the finding half, too.",
    controls="As many random layers: others where there are enough, else any other set. As many random heads kept. "
    "Differences to them in loss are tested by flipping signs over documents, corrected by Holm over all tasks and "
    "parts. Copy and text: what is about looking things up should change nothing there.\n\n"
    "Chance is what is expected, on the very documents that were asked, of an even draw: for recall of the values of "
    "the table's entries, for phones of the whole numbers of the book's, for repeat and copy of the words that are to "
    "be said again. For stories it is always saying their commonest word; for text files there is none.",
    measure=measure,
    headline=(HITS, LOSS, CHANGE + HITS, CHANGE + LOSS),
    by=BY,
    figures=figures,
    reading=reading,
    tables=tables,
    cells=cells,
    check=check,
)
