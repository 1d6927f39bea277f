"""What ``stability`` measures by name, and what it found in words."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import torch

from jambascope.studies import training_stress
from jambascope.studies.comparisons import EXACT, by_sample, holm, interval, least_p, same_prompts, sign_flip_p
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
    pairs_of,
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
NORMS = "inner norms"
BY = ("condition",)


def names_of(spec: Any) -> list[str]:
    """Windows by name."""
    return [f"{a}-{b}" for a, b in zip(spec.edges, spec.edges[1:], strict=False)]


def reading(spec: Any, rows: pd.DataFrame) -> str:
    """What was found of every recipe, also when that is nothing."""
    inner = rows[rows.part == "activations"]
    words = [_reading_of(spec, inner[inner.recipe == recipe], recipe) for recipe in inner.recipe.unique()]
    words += _between(spec, inner)
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
    """Pairs of trainings at each rate, and over all rates."""
    measured = {m: {rate: pairs_of(rows, m, rate) for rate in spec.rates} for m in (DIVERGED, LARGEST, END_LOSS)}
    rates = list(spec.rates)
    of_rates = [(m, rate, measured[m][rate]) for rate in rates for m in measured if len(measured[m][rate])]
    p_values = holm([sign_flip_p(_apart(m, pairs)) for m, _, pairs in of_rates])
    told: dict[float, list[str]] = {}
    for (m, rate, pairs), p in zip(of_rates, p_values, strict=True):
        told.setdefault(rate, []).append(_told(m, pairs, p))
    by_rate = " ".join(f"At rate {rate:g} {'; '.join(words)}." for rate, words in told.items())
    joined = {m: pd.concat([measured[m][rate] for rate in rates]) for m in measured}
    every = {m: pairs for m, pairs in joined.items() if len(pairs)}
    together = holm([sign_flip_p(_apart(m, pairs)) for m, pairs in every.items()])
    said = "; ".join(_told(m, pairs, p) for (m, pairs), p in zip(every.items(), together, strict=True))
    n = len(measured[DIVERGED][rates[0]])
    few = (
        f" {plural(n, 'pair')} at each rate cannot tell anything there (p is {least_p(n):.2g} at least)."
        if least_p(n) * len(p_values) >= 0.05
        else ""
    )
    return (
        f"Small models trained here for {plural(spec.steps, 'step')} without inner norms, beside ones with them of the "
        f"same seeds and batches. Over all {len(rates)} rates: {said}. {by_rate} p is of signs over pairs (all "
        f"assignments, of up to {EXACT} pairs), after Holm.{few}"
    )


def _apart(measure_: str, pairs: pd.DataFrame) -> torch.Tensor:
    """Without less with, of activations in logarithms."""
    both = torch.tensor(pairs[["without", "with"]].to_numpy(), dtype=torch.float64)
    both = both.log() if measure_ == LARGEST else both
    return both[:, 0] - both[:, 1]


def _told(measure_: str, pairs: pd.DataFrame, p: float) -> str:
    """One comparison."""
    n = len(pairs)
    clear = f"p = {p:.2g}" if p < 0.05 else f"no difference told, p = {p:.2g}"
    apart = _apart(measure_, pairs)
    if measure_ == DIVERGED:
        without, with_ = (int(pairs[word].sum()) for word in ("without", "with"))
        share = number(*interval(apart, "change of hits"))
        return f"{without} of {n} diverge without and {with_} of {n} with, {share} of the pairs apart ({clear})"
    if measure_ == LARGEST:
        times = number(*(math.exp(end) for end in interval(apart)))
        return f"the largest activation inside Mamba is {times} times as large without ({clear}, n = {n})"
    return f"the loss ends {number(*interval(apart))} nats higher without ({clear}, n = {n})"


def _between(spec: Any, rows: pd.DataFrame) -> list[str]:
    """The largest activations of the first model over those of each other, where both read the same prompts."""
    recipes, found = list(rows.recipe.unique()), []
    at = rows[rows.condition == names_of(spec)[-1]]
    for other in recipes[1:]:
        if not same_prompts([rows[rows.recipe == recipe] for recipe in (recipes[0], other)]):
            continue
        for q in POINTS:
            own = at[at.measure == MAX + q].assign(value=lambda own: own["value"].clip(lower=1e-12).map(math.log))
            first, second = (by_sample(own[own.recipe == recipe]) for recipe in (recipes[0], other))
            found.append((other, q, torch.tensor((first - second).dropna().to_numpy())))
    p_values, words = holm([sign_flip_p(values) for *_, values in found]), {}
    for (other, q, values), p in zip(found, p_values, strict=True):
        times = number(*(math.exp(end) for end in interval(values)))
        words.setdefault(other, []).append(f"{q} {times}" + ("" if p < 0.05 else " (not told from 1)"))
    names = {recipe: f"{recipe} ({_norms(rows[rows.recipe == recipe])} inner norms)" for recipe in recipes}
    n = len(found[0][-1]) if found else 0
    return [
        f"Largest magnitudes at {names_of(spec)[-1]} of {names[recipes[0]]}, times those of {names[other]} on the same "
        f"{plural(n, 'prompt')}, p < 0.05 after Holm unless said: {'; '.join(said)}."
        for other, said in words.items()
    ]


def _norms(rows: pd.DataFrame) -> str:
    return "with" if (rows[rows.measure == NORMS]["value"] > 0).all() else "without"
