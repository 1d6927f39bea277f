"""What do the states of Mamba layers hold, for how long, and how much of what must be remembered goes through them?"""

from __future__ import annotations

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
from jambascope.errors import ConfigError
from jambascope.hooks.heads import repeated_random_tokens
from jambascope.model import HookedJamba
from jambascope.studies import state_pairs, state_probes
from jambascope.studies.comparisons import by_sample, fingerprint, holm, interval, same_prompts, sign_flip_p
from jambascope.studies.figures.parts import Bar, grouped
from jambascope.studies.prompts import check_language
from jambascope.studies.runner.spec import Spec, models_of
from jambascope.studies.runner.study import Cell, Found, Study, grid
from jambascope.studies.runner.summary import number, one, summarize
from jambascope.studies.state_pairs import BEST, CHANNELS, KEYS, NONE, OTHER, PERSISTENT, QUERY_READ, TRANSIENT
from jambascope.studies.state_probes import BY_LAYER, CONTROL, HITS, SELECTIVITY, STATE, STREAM, UNTRAINED

Asked = Literal["episodes", "words", "half-life", "labels", "query", "repetition"]
IN_LANGUAGE = ("episodes", "labels", "query")
"""What needs documents of the packaged models' language."""
PAIRS = {
    "labels": "the labels of the examples",
    "query": "the review that is asked about",
    "repetition": "a word of a random sequence, half a sequence ago",
}
MEDIAN, LONGEST = "median half-life, tokens", "half-life of the longest tenth, tokens"
WHOLE, CHANGE, SHARE, LAYER = "clean less corrupted, logits", "change, logits", "share", "layer: share"
HALF_LIVES = "median half-lives, times as long"
BY = ("asked", "what", "layer")
ENDS = ["mean", "low", "high"]


class MemorySpec(Spec):
    """Settings of the study."""

    models: tuple[str, ...] = models_of("jamba-micro", "mamba-micro")
    asked: tuple[Asked, ...] = Field(
        ("episodes", "words", "half-life", "labels", "query", "repetition"),
        description="Probes on few-shot reviews and on random words; half-lives; patches of prompt pairs that differ "
        "in the examples' labels, in the review that is asked about, or in a word of a sequence to be repeated.",
    )
    prompts: int = Field(256, ge=20, description="For probes; the best layer is chosen on one half.")
    pairs: int = Field(32, ge=2, description="Prompt pairs of each kind.")
    shots: int = Field(6, ge=2, description="Labelled reviews before the one to label.")
    distances: tuple[int, ...] = Field((1, 4, 16, 32), description="Positions back to the word that is probed for.")
    length: int = Field(24, ge=4, description="Random tokens that are repeated.")
    windows: tuple[int, ...] = Field((4,), description="Read-outs that see a windowed patch of the states.")
    draws: int = Field(5, ge=1, description="Random sets of as many channels as one layer has, of any Mamba layers.")
    untrained: bool = Field(True, description="Also probe states of a model with random weights (control).")
    batch_size: int = Field(8, ge=1, description="Prompts run at a time.")


def check(spec: MemorySpec, config: JambaConfig, directory: Path) -> None:
    if not config.ssm_layers:
        raise ConfigError("it has no Mamba layers, so it has no states; leave it out")
    for name, values in (("distances", spec.distances), ("windows", spec.windows)):
        if min(values) < 1:
            raise ConfigError(f"{name}={values}: give whole numbers of at least 1")
    longest = max(2 * spec.length, max(spec.distances)) + 3
    if longest > config.n_ctx:
        raise ConfigError(f"length={spec.length} and distances={spec.distances} exceed its context of {config.n_ctx}")
    if needing := [name for name in spec.asked if name in IN_LANGUAGE]:
        try:
            check_language(checkpoint.load_tokenizer(directory))
        except ConfigError as e:
            rest = ",".join(name for name in spec.asked if name not in IN_LANGUAGE) or "words,half-life,repetition"
            raise ConfigError(f"asked={','.join(needing)}: {e}; or set asked={rest}") from None


def cells(spec: MemorySpec) -> list[Cell]:
    return grid(spec, asked=spec.asked)


def measure(spec: MemorySpec, cell: Cell, model: HookedJamba) -> Found:
    asked, seed = cell["asked"], cell["seed"]
    if asked == "half-life":
        tokens = repeated_random_tokens(model, min(spec.pairs, 16), spec.length, seed=seed)
        return Found([*state_probes.half_life_rows(model, tokens), fingerprint(tokens)])
    if asked in ("episodes", "words"):
        probed = (
            state_probes.few_shot(spec.prompts, spec.shots, seed)
            if asked == "episodes"
            else state_probes.random_words(model, spec.prompts, spec.distances, seed)
        )
        rows = state_probes.probe_rows(model, probed, spec.untrained, spec.batch_size, seed)
        return Found([*rows, fingerprint(probed.tokens)])
    if asked == "repetition":
        pairs = state_pairs.repetition_pairs(model, spec.pairs, spec.length, seed)
    else:
        draw = state_pairs.label_pairs if asked == "labels" else state_pairs.query_pairs
        pairs = draw(spec.pairs, spec.shots, seed)
    rows = state_pairs.together_rows(model, pairs, spec.windows, spec.batch_size)
    rows += state_pairs.layer_rows(model, pairs, spec.windows, spec.draws, spec.batch_size, seed)
    return Found([*rows, fingerprint(torch.cat((pairs.clean, pairs.corrupted)))])


# -- the report ----------------------------------------------------------------------------------------------


def figures(spec: MemorySpec, rows: pd.DataFrame) -> list[go.Figure]:
    found = []
    if (rows.measure == BY_LAYER + HITS).any():
        found += [_probe_figure(own, recipe) for recipe, own in rows.groupby("recipe", sort=False)]
    if (rows.measure == MEDIAN).any():
        found.append(_half_life_figure(rows))
    if (rows.measure == SHARE).any():
        found.append(_patch_figure(spec, rows))
        found += [_layer_figure(own, recipe) for recipe, own in rows.groupby("recipe", sort=False)]
    return found


def _by_layer(rows: pd.DataFrame, measure: str, by: Sequence[str]) -> pd.DataFrame:
    return summarize(rows[rows.measure == measure].astype({"layer": int}), [measure], (*by, "layer"))


def _probe_figure(rows: pd.DataFrame, recipe: str) -> go.Figure:
    """Accuracy of every layer, a panel for each target."""
    hits, control = (_by_layer(rows, BY_LAYER + name, ("target", "features")) for name in (HITS, CONTROL))
    control = control[control.features == STATE].assign(features="state, shuffled labels")
    bars = [
        Bar(r.target, str(r.layer), r.features, r["mean"], r.low, r.high)
        for _, r in pd.concat([hits, control]).iterrows()
    ]
    subtitle = f"held-out prompts, {int(hits.n.max())} for each layer; across: Mamba layers; 95 % intervals"
    return grouped(f"{recipe}: what a linear probe reads", subtitle, bars, "accuracy")


def _half_life_figure(rows: pd.DataFrame) -> go.Figure:
    bars = [
        Bar(r.recipe, str(r.layer), name, r["mean"], r.low, r.high)
        for name in (MEDIAN, LONGEST)
        for _, r in _by_layer(rows, name, ()).iterrows()
    ]
    fig = grouped("Half-lives of states", "means over prompts; across: Mamba layers", bars, "tokens")
    ticks = [digit * 10**power for power in range(7) for digit in (1, 2, 5)]
    return fig.update_yaxes(type="log", tickmode="array", tickvals=ticks)


def _patch_figure(spec: MemorySpec, rows: pd.DataFrame) -> go.Figure:
    summary = summarize(rows, [SHARE], ("asked", "what"))
    bars = [
        Bar(r.recipe, r.asked, r.what, r["mean"], r.low, r.high)
        for asked in spec.asked
        for _, r in summary[summary.asked == asked].iterrows()
    ]
    subtitle = (
        "the memory of the clean run put into the corrupted one, in all layers; 0: nothing, 1: all of the difference"
    )
    return grouped("What carries the memory", subtitle, bars, "share of the difference")


def _layer_figure(rows: pd.DataFrame, recipe: str) -> go.Figure:
    summary = _by_layer(rows, LAYER, ("asked", "what"))
    bars = [Bar(r.asked, str(r.layer), r.what, r["mean"], r.low, r.high) for _, r in summary.iterrows()]
    subtitle = "the memory of one layer put in; across: Mamba layers; 95 % intervals over pairs"
    return grouped(f"{recipe}, layer by layer", subtitle, bars, "share of the difference")


def reading(spec: MemorySpec, rows: pd.DataFrame) -> str:
    """What each model's states hold, how long and how much it matters, also where that is nothing."""
    found = [_reading_of(spec, rows[rows.recipe == recipe], recipe) for recipe in rows.recipe.unique()]
    return "\n\n".join([*found, *_between(rows)])


def _reading_of(spec: MemorySpec, rows: pd.DataFrame, recipe: str) -> str:
    parts = [_probes(spec, rows)] if (rows.measure == HITS).any() else []
    if (rows.measure == MEDIAN).any():
        layers = [f"{r.layer}: {number(*r[ENDS], digits=1)}" for _, r in _by_layer(rows, MEDIAN, ()).iterrows()]
        parts.append(f"Median half-life of the states' entries in tokens, by layer: {', '.join(layers)}.")
    parts += [_patches(rows[rows.asked == asked], asked) for asked in spec.asked if asked in PAIRS]
    return f"{recipe}. " + "\n\n".join(parts)


def _probes(spec: MemorySpec, rows: pd.DataFrame) -> str:
    """Best layer of one half, measured on the other; tested against shuffled labels over all targets."""
    summary = summarize(rows, [HITS, CONTROL, SELECTIVITY], ("target", "features"))
    own = rows[rows.measure.isin([HITS, SELECTIVITY])]
    of = {key: by_sample(part) for key, part in own.groupby(["measure", "features", "target"], sort=False)}
    targets = list(rows[rows.measure == HITS].target.unique())
    apart = [of[SELECTIVITY, STATE, target] for target in targets]
    apart += [of[HITS, STATE, target] - of[HITS, UNTRAINED, target] for target in targets] if spec.untrained else []
    p_values = holm([sign_flip_p(torch.tensor(a.to_numpy())) for a in apart])
    told = []
    for i, target in enumerate(targets):
        hits, control, stream = (
            one(summary, measure=measure, target=target, features=features)
            for measure, features in ((HITS, STATE), (CONTROL, STATE), (HITS, STREAM))
        )
        there = p_values[i] < 0.05 and hits["mean"] > control["mean"]
        read = "there to be read" if there else "not there to be read"
        words = f"{target}: {number(*hits[ENDS])}, {read} (p = {p_values[i]:.2g}"
        words += f" against shuffled labels, {number(*control[ENDS])}), {number(*stream[ENDS])} off the stream"
        if spec.untrained:
            random, p = one(summary, measure=HITS, target=target, features=UNTRAINED), p_values[len(targets) + i]
            more = "no difference told" if p >= 0.05 else "more" if hits["mean"] > random["mean"] else "less"
            words += f", {number(*random[ENDS])} off states of random weights ({more}, p = {p:.2g})"
        told.append(words)
    return (
        "Read off the state of the best layer, chosen on one half of the prompts and measured on the other (n = "
        f"{int(summary.n.max())}; p after Holm): {'; '.join(told)}."
    )


def _patches(rows: pd.DataFrame, asked: str) -> str:
    """How much of the difference each memory carries, tested against the states of another pair."""
    summary = summarize(rows, [WHOLE, CHANGE, SHARE], ("what",))
    whole = one(summary, measure=WHOLE)
    begin = f"Pairs that differ in {PAIRS[asked]}: the logit difference is {number(*whole[ENDS])} apart (n = {whole.n})"
    shares = summary[summary.measure == SHARE]
    if whole.low <= 0 or not len(shares):
        return f"{begin} on average, so the right one is not remembered; what carries it is not told."
    told = [(r.what, f"{r.what} {number(*r[ENDS])}") for _, r in shares.iterrows()]
    words = [words for what, words in told if what not in (OTHER, NONE, BEST, CHANNELS)]
    controls = [words for what, words in told if what in (OTHER, NONE)]
    alone = [words for what, words in told if what in (BEST, CHANNELS)]
    changes = rows[rows.measure == CHANGE]
    of = {patch: own.set_index(["model", "seed", "sample"])["value"] for patch, own in changes.groupby("what")}
    names, differences = [], []
    compared = ((PERSISTENT, OTHER), (PERSISTENT, KEYS), (PERSISTENT, TRANSIENT), (QUERY_READ, NONE), (BEST, CHANNELS))
    for first, second in compared:
        if first in of and second in of:
            names.append((first, second))
            differences.append((of[first] - of[second]).groupby(["seed", "sample"]).mean())
    p_values = holm([sign_flip_p(torch.tensor(d.to_numpy())) for d in differences])
    tested = [
        f"{first} carry {'more' if d.mean() > 0 else 'less'} than {second} (p = {p:.2g})"
        if p < 0.05
        else f"{first} cannot be told from {second} (p = {p:.2g})"
        for (first, second), d, p in zip(names, differences, p_values, strict=True)
    ]
    return (
        f"{begin}. Of that, put into all layers at once where the prompts become alike, in the {int(shares.n.max())} "
        f"pairs apart enough: {'; '.join(words)}. Controls: {'; '.join(controls)}.{_alone(shares, alone)} After Holm: "
        f"{'; '.join(tested)}."
    )


def _alone(shares: pd.DataFrame, words: Sequence[str]) -> str:
    """The one layer beside random channels; nothing where there is one Mamba layer."""
    n = shares[shares.what == BEST].n.max()
    return (
        f" By itself, chosen on one half of the pairs and measured on the other (n = {int(n)}): {'; '.join(words)}."
        if words
        else ""
    )


def _between(rows: pd.DataFrame) -> list[str]:
    """What the states of the first model tell, carry and keep more or less than those of each other, where both read
    the same prompts."""
    recipes = list(rows.recipe.unique())
    found = [(other, *pair) for other in recipes[1:] for pair in _paired(rows, recipes[0], other)]
    if not found:
        return []
    p_values = holm([sign_flip_p(values) for *_, values in found])
    said: dict[str, list[str]] = {}
    for (other, kind, name, values), p in zip(found, p_values, strict=True):
        ends = interval(values)
        shown = number(*(torch.tensor(ends).exp().tolist() if kind == HALF_LIVES else ends))
        clear = f"p = {p:.2g}" if p < 0.05 else f"no difference told, p = {p:.2g}"
        which = f"less {other}, " if len(recipes) > 2 else ""
        said.setdefault(kind, []).append(f"{which}{name} {shown} ({clear}, n = {len(values)})")
    to = f"{recipes[0]} less {recipes[1]}" if len(recipes) == 2 else recipes[0]
    kinds = [f"{kind}: {'; '.join(words)}" for kind, words in said.items()]
    return [
        f"{to}, on the same prompts, p after Holm. {'. '.join(kinds)}. Of one training each that says nothing about "
        "another."
    ]


def _paired(rows: pd.DataFrame, first: str, other: str) -> list[tuple[str, str, torch.Tensor]]:
    """Kind and name of every comparison, and the differences by prompt, trainings averaged."""
    found = []
    for asked in rows.asked.unique():
        sides = [rows[(rows.recipe == recipe) & (rows.asked == asked)] for recipe in (first, other)]
        for kind, name, parts in _compared(sides, asked) if same_prompts(sides) else ():
            apart = (by_sample(parts[0]) - by_sample(parts[1])).dropna()
            if len(apart):
                found.append((kind, name, torch.tensor(apart.to_numpy())))
    return found


def _compared(sides: Sequence[pd.DataFrame], asked: str) -> list[tuple[str, str, list[pd.DataFrame]]]:
    """Probes of states by target; the share that goes through states; logarithms of half-lives, layers averaged."""
    if asked == "half-life":
        own = [side[side.measure == MEDIAN] for side in sides]
        return [(HALF_LIVES, "of all layers", [side.assign(value=np.log(side["value"])) for side in own])]
    if asked in PAIRS:
        own = [side[(side.measure == SHARE) & (side.what == PERSISTENT)] for side in sides]
        return [("share of the difference that goes through states", asked, own)]
    own = [side[(side.measure == HITS) & (side.features == STATE)] for side in sides]
    targets = own[0].target.unique()
    return [("accuracy off the states", t, [side[side.target == t] for side in own]) for t in targets]


study = Study(
    name="state_memory",
    version=2,
    spec=MemorySpec,
    question=__doc__,
    method="Probes: ridge regression onto classes, cross-validated, of the whole state of a layer (channels x "
    'd_state) at one position of each prompt. Few-shot reviews are read at the final ":": which label words the '
    "episode uses, the class of the last example, the class that is asked. Sequences of eight random tokens are "
    "read at their end: the token so many positions before. Half-lives: ln 2 / (|A| mean dt) of every entry, on "
    "random tokens.\n\n"
    "Patches: two prompts that differ up to a border and are alike after it; the logit difference of their two "
    "answers is read at the end. The clean run's memory is put into the corrupted one in all layers at once: states "
    "with the convolutions' last inputs, for good (states), for some read-outs (windowed) or for one (transient, "
    "the state alone), and the keys and values of the attention layers up to the border. Also the read-out of the "
    "query alone. Then each layer by itself (hooks.sweep), and of the layer that carries most on one half of the "
    "pairs the share on the other half. A share is (patched - corrupted) / (clean - corrupted), of pairs whose runs "
    "differ by half a logit at least.\n\n"
    "Models that read the same prompts are compared on them, prompt by prompt: probes, the share that goes through "
    "states, and half-lives (logarithms, mean over layers).",
    controls="Probes: shuffled labels (selectivity is the accuracy less that); the state of a model of the same "
    "shape with random weights, which keeps recent words, too; the stream that enters the layer. Patches: its own "
    "states put in again must change nothing; states, keys and values together must make all of the difference, and "
    "in pure Mamba states alone must; the states of another pair are as foreign, but hold neither answer, which by "
    "itself may be worth half of the difference; beside the best layer as many channels drawn at random from all "
    "Mamba layers.",
    measure=measure,
    headline=(HITS, SELECTIVITY, "chance", MEDIAN, WHOLE, SHARE),
    by=BY,
    figures=figures,
    reading=reading,
    cells=cells,
    check=check,
)
