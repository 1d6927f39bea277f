"""What ``stability`` measures by name, and what it found in words."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch

from jambascope.studies import training_stress
from jambascope.studies.comparisons import by_sample, holm, sign_flip_p
from jambascope.studies.head_ablation import plural
from jambascope.studies.runner.summary import number, summarize
from jambascope.studies.training_stress import (
    CLIPPED,
    DIPS,
    DIVERGED,
    END_LOSS,
    GRADIENT,
    LARGEST,
    SPIKES,
    summary_of_pairs,
)

ENDS = ["mean", "low", "high"]
POINTS = {
    "dt": "mixer.hook_dt",
    "B": "mixer.hook_B",
    "C": "mixer.hook_C",
    "state": "mixer.hook_ssm_state",
    "mixer out": "hook_mixer_out",
    "residual stream": "hook_resid_post",
}
RMS, MAX, GROWTH = "largest RMS of a layer: ", "largest activation: ", "RMS beyond training over within: "
UNTRAINED = "untrained"
BY = ("condition",)


def names_of(spec: Any) -> list[str]:
    """Windows by name."""
    return [f"{a}-{b}" for a, b in zip(spec.edges, spec.edges[1:], strict=False)]


def reading(spec: Any, rows: pd.DataFrame) -> str:
    """What was found of every recipe, also when that is nothing."""
    inner = rows[rows.part == "activations"]
    words = [_reading_of(spec, inner[inner.recipe == recipe], recipe) for recipe in inner.recipe.unique()]
    stress = rows[rows.part == "learning-rate stress"]
    return "\n\n".join([*words, _stress(spec, stress)] if len(stress) else words)


def _reading_of(spec: Any, rows: pd.DataFrame, recipe: str) -> str:
    names = names_of(spec)
    growth, tests = summarize(rows, [GROWTH + q for q in POINTS], BY), []
    for _, line in growth[~growth.condition.str.contains(UNTRAINED)].iterrows():
        own = rows[(rows.measure == line.measure) & (rows.condition == line.condition)]
        values = by_sample(own)
        tests.append((line, sign_flip_p(torch.tensor(values.to_numpy()).log())))
    adjusted = holm([p for _, p in tests])
    said = [
        f"{line.measure.removeprefix(GROWTH)} {number(*line[ENDS])}" + ("" if p < 0.05 else " (not told from 1)")
        for (line, _), p in zip(tests, adjusted, strict=True)
    ]
    most = max(abs(float(torch.tensor(line["mean"]).log())) for line, _ in tests)
    verdict = "Nothing grows or shrinks by half" if most < 0.405 else "Some grow or shrink by half or more"
    largest = summarize(rows, [MAX + q for q in POINTS], BY)
    within = largest[largest.condition == names[-1]]
    maxima = ", ".join(f"{r.measure.removeprefix(MAX)} {r['mean']:.3g}" for _, r in within.iterrows())
    n = plural(int(growth.n.max()), "prompt")
    words = (
        f"{recipe}: {verdict} beyond the trained length. RMS at positions {names[-1]} over that in the last trained "
        f"window, mean over layers, {n}: {'; '.join(said)} (p < 0.05 after Holm unless said). "
        f"Largest magnitudes at {names[-1]}: {maxima}."
    )
    if spec.untrained:
        control = growth[growth.condition.str.contains(UNTRAINED)]
        said = ", ".join(f"{r.measure.removeprefix(GROWTH)} {r['mean']:.2f}" for _, r in control.iterrows())
        words += f" With random weights the ratios are {said}."
    return f"{words}\n\n{_log(rows, recipe)}"


def _log(rows: pd.DataFrame, recipe: str) -> str:
    own = rows[rows.condition == "training log"]
    if own.empty:
        return f"{recipe}: no training log lies beside the weights (training/log.parquet), so none is read."
    means = own.groupby("measure")["value"].mean()
    counts = own[own.measure == SPIKES]
    verdict = (
        "spikes no more than it dips, as noise would" if means[SPIKES] <= means[DIPS] else "spikes more than it dips"
    )
    clipped = f", {100 * means[CLIPPED]:.0f} % of the steps were clipped" if CLIPPED in means else ""
    return (
        f"Its training log ({plural(len(counts), 'training')} of {int(counts.n.max())} steps) {verdict}: "
        f"{means[SPIKES]:g} steps lie {training_stress.FAR:g} robust standard deviations above the steps before them, "
        f"{means[DIPS]:g} as far below; the largest gradient norm is {means[GRADIENT]:.3g}{clipped}."
    )


def _stress(spec: Any, rows: pd.DataFrame) -> str:
    said, diverged, larger = [], {"with": 0, "without": 0}, 0
    for rate in spec.rates:
        ends = {w: rows[rows.condition == f"{w} inner norms, rate {rate:g}"] for w in diverged}
        gone = {w: own[own.measure == DIVERGED]["value"] for w, own in ends.items()}
        diverged = {w: n + int(gone[w].sum()) for w, n in diverged.items()}
        largest = {w: own[own.measure == LARGEST]["value"].max() for w, own in ends.items()}
        larger = int((summary_of_pairs(rows, LARGEST, rate) > 0).sum())
        loss = summary_of_pairs(rows, END_LOSS, rate)
        words = (
            f"At rate {rate:g} {int(gone['without'].sum())} of {len(gone['without'])} diverge without and "
            f"{int(gone['with'].sum())} of {len(gone['with'])} with them; the largest activation inside Mamba is "
            f"{largest['without']:.3g} without, {largest['with']:.3g} with (larger without in {larger} pairs)"
        )
        if len(loss):
            words += (
                f"; the loss ends {loss.mean():+.2f} nats without ({int((loss > 0).sum())} of {len(loss)} pairs higher)"
            )
        said.append(words + ".")
    verdict = "diverge more often" if diverged["without"] > diverged["with"] else "do not diverge more often"
    grown = "all" if larger == spec.trainings else f"{larger} of {spec.trainings}"
    return (
        f"Small models trained here for {plural(spec.steps, 'step')} without inner norms {verdict} than with them; at "
        f"the highest rate their activations are larger in {grown} pairs. {' '.join(said)} With "
        f"{plural(spec.trainings, 'pair')} at each rate only large effects show."
    )
