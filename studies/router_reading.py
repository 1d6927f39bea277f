"""What ``router_load`` found, as tables and in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from jambascope.studies.comparisons import by_sample, holm, sign_flip_p
from jambascope.studies.expert_ablation import CHANGE, FORMS, SPECIFIC, TRAINED_CV, TRAINED_LOSS
from jambascope.studies.head_ablation import plural
from jambascope.studies.runner.summary import number, summarize

ENDS = ["mean", "low", "high"]
NAMES = {
    "variation": "CV",
    "max_violation": "MaxVio",
    "load_entropy": "normalised entropy of load",
    "dead_experts": "dead experts",
    "token_entropy": "token entropy (nats)",
    "margin": "top-1 less top-2",
    "retained_mass": "retained mass",
    "balance_loss": "balance loss",
}


def balance_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Every measure of every layer, beside chance and, of the CV, beside the multinomial."""
    table = _table(rows, "balance: ", NAMES)
    multinomial = rows[rows.measure == "balance: variation of a multinomial"]
    keys = ["model", "seed", "layer"]
    found = multinomial.set_index(keys)["value"].rename("multinomial")
    table = table[table.measure != "variation of a multinomial"].join(found, on=keys)
    table.loc[table.measure != "CV", "multinomial"] = float("nan")
    return table


def dependence_lines(rows: pd.DataFrame) -> pd.DataFrame:
    return _table(rows, "dependence: ").rename(columns={"measure": "on", "by chance": "shuffled"})


def parallel_lines(rows: pd.DataFrame) -> pd.DataFrame:
    return _table(rows, "parallel: ").rename(columns={"condition": "prompts", "n": "windows"})


def _table(rows: pd.DataFrame, kind: str, names: dict[str, str] = {}) -> pd.DataFrame:
    own = rows[rows.measure.str.startswith(kind)].copy()
    own["measure"] = [names.get(m.removeprefix(kind), m.removeprefix(kind)) for m in own.measure]
    own = own.rename(columns={"value": "mean", "chance": "by chance", "p_value": "p"})
    own["layer"] = own["layer"].astype(int)
    columns = ["model", "seed", "layer", "condition", "measure", "mean", "low", "high", "n", "by chance", "p"]
    return own[columns].reset_index(drop=True)


def reading(spec: Any, rows: pd.DataFrame) -> str:
    """What was found of every recipe, also when that is nothing."""
    routes, trained = rows[rows.part == "routes"], rows[rows.part == "balancing loss"]
    words = [_reading_of(routes[routes.recipe == recipe], recipe) for recipe in routes.recipe.unique()]
    return "\n\n".join([*words, _trained(spec, trained)] if len(trained) else words)


def _reading_of(rows: pd.DataFrame, recipe: str) -> str:
    return "\n\n".join([_balance(rows, recipe), _dependence(rows), _parallel(rows), _ablation(rows), _favourites(rows)])


def _mean_by_layer(rows: pd.DataFrame, measure: str, column: str = "value") -> pd.Series:
    """Over models and seeds."""
    return rows[rows.measure == measure].groupby("layer")[column].mean()


def _balance(rows: pd.DataFrame, recipe: str) -> str:
    cv, chance = (_mean_by_layer(rows, "balance: variation", c) for c in ("value", "chance"))
    p = holm(rows[rows.measure == "balance: variation"].groupby("layer")["p_value"].max().tolist())
    uneven = sum(value < 0.05 for value in p)
    dead = _mean_by_layer(rows, "balance: dead_experts").sum()
    violation, loss, mass = (
        _mean_by_layer(rows, f"balance: {m}") for m in ("max_violation", "balance_loss", "retained_mass")
    )
    pooled = rows[rows.measure == "balance loss, layers pooled"]["value"].mean()
    n = int(rows[rows.measure == "balance: variation"].n.max())
    verdict = "more uneven than chance" if uneven else "no more uneven than chance"
    tokens = "which tokens alike within a prompt would bring about, too" if uneven else "n may be too small to see more"
    return (
        f"{recipe}: the load is {verdict} in {uneven} of {len(cv)} layers (p < 0.05 after Holm; {tokens}). Its CV runs "
        f"from {cv.min():.2f} (layer {int(cv.idxmin())}) to {cv.max():.2f} (layer {int(cv.idxmax())}), by chance it is "
        f"{chance.mean():.2f} ({n} prompts); the busiest expert has {1 + violation.max():.2f} times its share, and "
        f"{'no expert is' if dead == 0 else f'{dead:g} experts are'} dead. The balance loss is "
        f"{loss.min():.2f} to {loss.max():.2f} by layer, {pooled:.2f} with layers pooled, which hides what layers have "
        f"of opposite preferences. The kept experts have {mass.min():.2f} to {mass.max():.2f} of the probability."
    )


def _dependence(rows: pd.DataFrame) -> str:
    said = []
    for name in ("token", "position", "domain"):
        own = rows[rows.measure == f"dependence: {name}"]
        if own.empty:
            continue
        clear = own.assign(clear=own.low > own.chance_high).groupby("layer")["clear"].all()
        shares = own.groupby("layer")["value"].mean()
        said.append(
            f"the {name} tells {shares.min():.2f} to {shares.max():.2f} of the choice by layer (shuffled: "
            f"{own.chance.mean():.2f}), clearly more than shuffled in {int(clear.sum())} of {len(clear)} layers"
        )
    return f"What choices go by: {'; '.join(said)}." if said else "No layer uses more than one expert."


def _parallel(rows: pd.DataFrame) -> str:
    own = rows[rows.measure.str.startswith("parallel: ")]
    means = own.groupby(["measure", "condition"], sort=False)[["value", "chance"]].mean()
    said = []
    for measure in own.measure.unique():
        mixed, sorted_ = means.loc[measure, "mixed"], means.loc[measure, "by domain"]
        name = measure.removeprefix("parallel: ")
        said.append(f"{name}: {mixed.value:.3f} (random choices {mixed.chance:.3f}; {sorted_.value:.3f} by domain)")
    return "Spread over devices, domains mixed, mean over layers: " + "; ".join(said) + "."


def _tested(rows: pd.DataFrame, measure: str, conditions: Sequence[str]) -> list[tuple[str, int, pd.Series, float]]:
    """Condition, layer, line of the summary and p after Holm over all of them; trainings averaged for p."""
    own = rows[(rows.measure == measure) & rows.condition.isin(conditions)]
    summary = summarize(own, [measure], ("layer", "condition"))
    p_values = []
    for _, line in summary.iterrows():
        at = own[(own.layer == line.layer) & (own.condition == line.condition)]
        values = by_sample(at)
        p_values.append(sign_flip_p(torch.tensor(values.to_numpy())))
    lines = [line for _, line in summary.iterrows()]
    return [(line.condition, int(line.layer), line, p) for line, p in zip(lines, holm(p_values), strict=True)]


def _ablation(rows: pd.DataFrame) -> str:
    said = []
    for form in FORMS:
        found = _tested(rows, CHANGE, [f"busiest less random, {form}"])
        if not found:
            continue
        clear = [f"layer {layer} ({number(*line[ENDS], 3)})" for _, layer, line, p in found if p < 0.05]
        busiest, random = (_over_layers(rows, f"{name}, {form}") for name in ("busiest", "random"))
        verdict = f"differ in {', '.join(clear)}" if clear else "can be told apart in no layer"
        said.append(
            f"{form}: the busiest expert of a layer {busiest}, a random other {random} nats; the two {verdict} "
            "(p < 0.05 after Holm)"
        )
    everything = _over_layers(rows, "all, zeroed")
    n = rows[(rows.measure == CHANGE) & (rows.condition == "all, zeroed")].groupby("layer").size().max()
    return (
        f"Without an expert the loss on {plural(int(n), 'held-out prompt')} changes, mean over layers, "
        f"{'; '.join(said)}. Without all that a layer's experts add: {everything}."
    )


def _over_layers(rows: pd.DataFrame, condition: str) -> str:
    """Mean over layers with its interval over prompts."""
    own = rows[(rows.measure == CHANGE) & (rows.condition == condition)]
    means = own.groupby(["recipe", "model", "seed", "sample"], as_index=False)["value"].mean()
    (line,) = summarize(means.assign(measure=CHANGE), [CHANGE], ()).to_dict("records")
    return number(line["mean"], line["low"], line["high"], 3)


def _favourites(rows: pd.DataFrame) -> str:
    found = _tested(rows, SPECIFIC, FORMS)
    if not found:
        return "Domains do not differ in their favourite experts, or there is one domain."
    clear = [f"layer {layer}, {form}: {number(*line[ENDS], 3)}" for form, layer, line, p in found if p < 0.05]
    total = f"{len(clear)} of {len(found)} tests"
    if not clear:
        return (
            "No domain depends on its favourite expert more than on other domains' favourites in any layer: "
            f"specialised choice is not seen to be specialised need ({len(found)} tests, Holm)."
        )
    return (
        f"Prompts lose more or less without their domain's favourite than without other domains' favourites in {total} "
        f"(p < 0.05 after Holm), nats: {'; '.join(clear)}."
    )


def _trained(spec: Any, rows: pd.DataFrame) -> str:
    summary = summarize(rows, [TRAINED_CV, TRAINED_LOSS], ("condition",))
    lines = {(line.measure, line.condition): line for _, line in summary.iterrows()}
    less = "with less without"
    with_, without = (lines[TRAINED_CV, f"coefficient {c:g}"] for c in (spec.coefficient, 0))
    pairs = rows[(rows.measure == TRAINED_CV) & (rows.condition == less)]["value"]
    evened = int((pairs < 0).sum())
    least = 2.0 ** (1 - len(pairs))
    return (
        f"Trained here for {plural(spec.steps, 'step')} in {plural(len(pairs), 'pair')} of small models, the balancing "
        f"loss lowers the CV of load in {evened} of {len(pairs)} (by chance alone all agree with p = {least:.2g}): "
        f"{number(*with_[ENDS])} with it, {number(*without[ENDS])} without, difference "
        f"{number(*lines[TRAINED_CV, less][ENDS])}. The loss on the language differs by "
        f"{number(*lines[TRAINED_LOSS, less][ENDS], 3)} nats. That is of short trainings; for long ones give "
        "checkpoints that differ in it, --model A --model B."
    )
