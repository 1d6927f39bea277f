"""When do heads, in-context learning and recall emerge over training, and in which order?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from pydantic import Field

from jambascope import checkpoint
from jambascope.config import JambaConfig
from jambascope.errors import ConfigError
from jambascope.hooks.heads import HeadScores, repeated_random_tokens, score_heads, shuffled
from jambascope.model import HookedJamba
from jambascope.studies.comparisons import holm, interval, sign_flip_p
from jambascope.studies.corpus import TEXT, check_corpus, losses_and_hits, mixed, speaks_zoo
from jambascope.studies.figures.course import courses
from jambascope.studies.figures.points import Dot, dots
from jambascope.studies.figures.zoo import Point
from jambascope.studies.head_ablation import plural
from jambascope.studies.runner.models import open_model
from jambascope.studies.runner.spec import Files, Spec
from jambascope.studies.runner.study import Cell, Found, Study
from jambascope.studies.runner.summary import number, summarize
from jambascope.studies.snapshots import check_snapshots, half_way, record, snapshots
from jambascope.zoo import scoring
from jambascope.zoo.language import document

ENDS = ["mean", "low", "high"]
INDUCTION, IN_RANDOM_ORDER, PREVIOUS = "prefix matching", "prefix matching, random order", "previous-token attention"
REPEATED, OTHER_ORDER = "accuracy on a repetition", "accuracy, other order again"
ICL, RECALL, LABELS = "ICL score (nats)", "recall accuracy", "label mass"
EMERGING = (PREVIOUS, INDUCTION, REPEATED, ICL, RECALL, LABELS)
OTHER_HEAD = {PREVIOUS: f"{PREVIOUS}, other head", INDUCTION: f"{INDUCTION}, other head"}
CONTROLS = (*OTHER_HEAD.values(), IN_RANDOM_ORDER, OTHER_ORDER)
CHANCE = "chance: "
EARLY, LATE = (20, 31), 11
"""Positions around 25, and how many last ones, over which the two losses of the ICL score are averaged."""
SHOTS, ENTRIES, CLASSES = 8, 8, 2
Head = tuple[int, int]
"""Layer and head."""


class EmergenceSpec(Spec):
    """Settings of the study."""

    sequences: int = Field(32, ge=4, description="Repeated random sequences of a seed; heads are found on one half.")
    length: int = Field(16, ge=2, description="Different random tokens, said twice.")
    rows: int = Field(64, ge=2, description="Rows of the training's mixture (or of text files) for the ICL score.")
    context: int = Field(256, ge=48, description="Tokens of such a row.")
    documents: int = Field(32, ge=2, description="Documents of recall, and of few-shot reviews.")
    text: Files = Field((), description=TEXT)
    batch_size: int = Field(16, ge=1, description="Sequences run at a time.")


def check(spec: EmergenceSpec, config: JambaConfig, directory: Path) -> None:
    check_snapshots(directory, config)
    if 2 * spec.length + 1 > config.n_ctx:
        raise ConfigError(f"length={spec.length} said twice exceeds its context of {config.n_ctx}; make length smaller")
    check_corpus(directory, config, spec.text, spec.context)


def measure(spec: EmergenceSpec, cell: Cell, model: HookedJamba) -> Found:
    directory = checkpoint.find_directory(cell["model"])
    found = snapshots(directory)
    tokens = repeated_random_tokens(model, spec.sequences, spec.length, seed=cell["seed"])
    heads = _followed(spec, cell["seed"], open_model(found[max(found)], str(model.device)), tokens)
    rows: list[dict[str, Any]] = []
    for step, path in found.items():
        at = open_model(path, str(model.device))
        rows += [row | {"step": step} for row in _rows(spec, cell["seed"], at, tokens, heads)]
    starts = [stage["until"] for stage in record(directory).get("stages", ()) if stage.get("until")]
    rows += [{"measure": "data change", "step": step, "sample": 0, "value": 1.0} for step in starts]
    where = [
        {"measure": f"head of {m}", "layer": i, "head": h, "sample": 0, "value": 1.0} for m, (i, h) in heads.items()
    ]
    return Found([*rows, *where, *(_chance_rows(model) if speaks_zoo(model.tokenizer) else [])])


def _chance_rows(model: HookedJamba) -> list[dict[str, Any]]:
    """One of the table's values at random; an even guess over the vocabulary."""
    levels = {RECALL: 1 / ENTRIES, LABELS: CLASSES / model.config.d_vocab}
    return [{"measure": CHANCE + name, "sample": 0, "value": value} for name, value in levels.items()]


def _followed(spec: EmergenceSpec, seed: int, final: HookedJamba, tokens: torch.Tensor) -> dict[str, Head]:
    """Of the finished weights, on the finding half: the head that stands for each kind, and one for comparison."""
    if not final.config.attention_layers:
        return {}
    scores, heads = _scores(spec, final, tokens[: len(tokens) // 2]), {}
    for name, kind in ((PREVIOUS, "previous_token"), (INDUCTION, "induction")):
        heads[name], *others = [(row["layer"], row["head"]) for row in scores[kind].top(scores[kind].mean.numel())]
        if others:
            heads[OTHER_HEAD[name]] = _other_head(final.config, heads[name], others, seed)
    return heads


def _other_head(config: JambaConfig, head: Head, others: Sequence[Head], seed: int) -> Head:
    """A random other head of the same layer. Of one attention layer, whose few heads may all do the same, the last of
    ``others``, which has the lowest score; so too where a layer has one head."""
    near = [other for other in others if other[0] == head[0]]
    if len(config.attention_layers) == 1 or not near:
        return others[-1]
    return sorted(near)[int(np.random.default_rng([seed, *head]).integers(len(near)))]


def _scores(spec: EmergenceSpec, model: HookedJamba, tokens: torch.Tensor) -> dict[str, HeadScores]:
    return score_heads(model, tokens, ("previous_token", "induction"), batch_size=spec.batch_size)


def _rows(
    spec: EmergenceSpec, seed: int, model: HookedJamba, tokens: torch.Tensor, heads: dict[str, Head]
) -> list[dict[str, Any]]:
    """Everything at one checkpoint."""
    half, values = len(tokens) // 2, {}
    held_out = tokens[half:]
    if heads:
        scores = _scores(spec, model, held_out)
        for kind, name in (("previous_token", PREVIOUS), ("induction", INDUCTION)):
            own = [measure_ for measure_ in (name, OTHER_HEAD[name]) if measure_ in heads]
            values |= {measure_: _of_head(scores[kind].samples, model, heads[measure_]) for measure_ in own}
        values[IN_RANDOM_ORDER] = _of_head(scores["induction"].control_samples, model, heads[INDUCTION])
    other = torch.cat([held_out[:, : -spec.length], shuffled(held_out[:, -spec.length :], seed=seed)], 1)
    for name, asked in ((REPEATED, held_out), (OTHER_ORDER, other)):
        values[name] = losses_and_hits(model, asked, spec.batch_size)[1][:, 1 - spec.length :].mean(1)
    losses, _ = losses_and_hits(model, mixed(model, spec.text, spec.rows, spec.context, seed), spec.batch_size)
    early, late = slice(EARLY[0] - 1, EARLY[1] - 1), slice(-LATE, None)
    values[ICL] = losses[:, late].mean(1) - losses[:, early].mean(1)
    if speaks_zoo(model.tokenizer):
        values |= _of_documents(spec, seed, model)
    return [
        {"measure": name, "sample": i, "value": value}
        for name, of in values.items()
        for i, value in enumerate(of.tolist())
    ]


def _of_documents(spec: EmergenceSpec, seed: int, model: HookedJamba) -> dict[str, Float[torch.Tensor, " documents"]]:
    """What the packaged models' language asks for: recall of a table, and labels after eight shots."""
    rng = np.random.default_rng([seed, 6, 6])
    tables = [document("recall", rng, "held_out", entries=ENTRIES) for _ in range(spec.documents)]
    options = dict(shots=SHOTS + 1, classes=CLASSES, filler=0, kind="natural")
    reviews = [document("review", rng, "held_out", **options) for _ in range(spec.documents)]
    return {
        RECALL: scoring.answer_scores(model, tables).hits.nanmean(1),
        LABELS: scoring.label_scores(model, reviews).mass[:, SHOTS],
    }


def _of_head(samples: torch.Tensor, model: HookedJamba, head: Head) -> Float[torch.Tensor, " sequences"]:
    return samples[:, model.config.attention_layers.index(head[0]), head[1]]


# -- the report ----------------------------------------------------------------------------------------------


def half_ways(rows: pd.DataFrame) -> pd.DataFrame:
    """Of every model and measure: first and last value, the step at half of the way between, and p of no way (Holm)."""
    found = []
    for model, own in rows[rows.measure.isin(EMERGING)].groupby("model", sort=False):
        for measure_ in EMERGING:
            part = own[own.measure == measure_]
            if part.empty:
                continue
            table = part.pivot(index=["seed", "sample"], columns="step", values="value").sort_index(axis=1)
            values = torch.tensor(table.to_numpy())
            half = half_way([int(step) for step in table.columns], values)
            gained = values[:, -1] - values[:, 0]
            line = {"model": model, "recipe": part.recipe.iloc[0], "measure": measure_, "n": len(values)}
            line |= {"first": values[:, 0].mean().item(), "last": values[:, -1].mean().item()}
            line |= {"mean": half.step, "low": half.low, "high": half.high, "between": f"{half.before}-{half.after}"}
            found.append(line | {"p": sign_flip_p(gained)})
    columns = ["model", "recipe", "measure", "n", "first", "last", "mean", "low", "high", "between", "p"]
    table = pd.DataFrame(found, columns=columns)
    return table.assign(p=holm(table.p.tolist()))


def tables(spec: EmergenceSpec, rows: pd.DataFrame) -> Sequence[tuple[str, pd.DataFrame]]:
    table = half_ways(rows).drop(columns="recipe")
    table.loc[~np.isfinite(table["mean"]), "mean"] = float("nan")
    title = "First and last value, and the step at half of the way; p of no change, after Holm"
    return [(title, table)]


def figures(spec: EmergenceSpec, rows: pd.DataFrame) -> list[go.Figure]:
    summary = summarize(rows, (*EMERGING, *CONTROLS), ("step",))

    def panels(**named: str) -> list[tuple[str, list[Point]]]:
        found = []
        for title, measure_ in named.items():
            own = summary[summary.measure == measure_]
            points = [Point(r.recipe, None, float(r.step), r["mean"], r.low, r.high) for _, r in own.iterrows()]
            found += [(title.replace("_", " "), points)] if points else []
        return found

    subtitle = "means over held-out sequences and 95 % intervals"
    levels = {name: _chance(rows, measure_) for name, measure_ in (("recall", RECALL), ("label mass", LABELS))}
    chance = {name: level for name, level in levels.items() if level is not None}
    heads = panels(previous_token=PREVIOUS, other_head=OTHER_HEAD[PREVIOUS])
    heads += panels(induction=INDUCTION, another_head=OTHER_HEAD[INDUCTION], random_order=IN_RANDOM_ORDER)
    told = panels(repetition=REPEATED, other_order=OTHER_ORDER, recall=RECALL, label_mass=LABELS)
    made = [courses("Heads over training", subtitle, heads, "attention", unit_range=True)] if heads else []
    made.append(
        courses("What the context tells", subtitle + "; dotted: chance" * bool(chance), told, "share", True, chance)
    )
    made.append(courses("ICL score over training", subtitle, panels(ICL=ICL), "late less early (nats)"))
    halves = half_ways(rows)
    halves = halves[(halves.p < 0.05) & np.isfinite(halves["mean"])]
    if len(halves):
        alone = halves.groupby("recipe").model.nunique() == 1
        names = [r if alone[r] else m for r, m in zip(halves.recipe, halves.model, strict=True)]
        lines = zip(names, halves.iterrows(), strict=True)
        points = [Dot(r.measure, name, r["mean"], r.low, r.high) for name, (_, r) in lines]
        title = "Half of the way from the first checkpoint to the last"
        made.append(dots(title, "what changed clearly (p < 0.05, Holm)", [("", points)], "training step", log=True))
    return made


def reading(spec: EmergenceSpec, rows: pd.DataFrame) -> str:
    """What emerged in every model and when, also when that is nothing."""
    halves = half_ways(rows)
    return "\n\n".join(
        _reading_of(rows[rows.model == model], own) for model, own in halves.groupby("model", sort=False)
    )


def _reading_of(rows: pd.DataFrame, halves: pd.DataFrame) -> str:
    model, recipe = halves.model.iloc[0], halves.recipe.iloc[0]
    name = recipe if recipe == model or rows.model.nunique() == 1 else model
    clear = halves[(halves.p < 0.05) & np.isfinite(halves["mean"])].sort_values("mean")
    steps = sorted(rows[rows.measure.isin(EMERGING)].step.unique())
    words = f"{name} ({plural(len(steps), 'checkpoint')}, steps {steps[0]:g} to {steps[-1]:g}): "
    if clear.empty:
        words += "nothing that is measured here changes clearly over training (p < 0.05 after Holm)."
    else:
        words += _emerged(clear, halves)
    words += _against_heads(rows, steps) + _against_chance(rows, steps[-1])
    own = rows[rows.measure.isin(CONTROLS) & (rows.step == steps[-1])]
    control = ", ".join(f"{m} {v:.2f}" for m, v in own.groupby("measure", sort=False)["value"].mean().items())
    words += f" Controls at the end: {control}." if control else ""
    changes = ", ".join(f"{step:g}" for step in sorted(rows[rows.measure == "data change"].step.unique()))
    if changes:
        words += f" Training's data change at steps {changes}: what comes right after may be what they newly ask for."
    return words


def _emerged(clear: pd.DataFrame, halves: pd.DataFrame) -> str:
    """When each came, and what came before what."""
    said = [
        f"{r.measure} (from {r['first']:.2f} to {r['last']:.2f}, n = {r['n']}) is half way at step "
        f"{number(*r[ENDS], 0)}, between the checkpoints {r['between']}"
        for _, r in clear.iterrows()
    ]
    words = "; ".join(said) + "."
    rest = halves[~halves.measure.isin(clear.measure)]
    if len(rest):
        values = zip(rest.measure, rest["first"], rest["last"], strict=True)
        words += f" No clear change: {', '.join(f'{m} ({a:.2f} to {b:.2f})' for m, a, b in values)}."
    pairs = [
        f"{a.measure} before {b.measure}"
        for (_, a), (_, b) in zip(clear.iterrows(), list(clear.iterrows())[1:], strict=False)
        if a.high < b.low
    ]
    return words + (
        f" Clear order of neighbours: {'; '.join(pairs)}." if pairs else " No order of neighbours is clear."
    )


def _against_heads(rows: pd.DataFrame, steps: Sequence[float]) -> str:
    """How much more the followed heads gained than others, on the same sequences."""

    def gain(measure_: str) -> pd.Series:
        own = rows[rows.measure == measure_].pivot(index=["seed", "sample"], columns="step", values="value")
        return own[steps[-1]] - own[steps[0]]

    kinds = [name for name, other in OTHER_HEAD.items() if (rows.measure == other).any()]
    if not kinds:
        return ""
    apart = [torch.tensor((gain(name) - gain(OTHER_HEAD[name])).to_numpy()) for name in kinds]
    p_values = holm([sign_flip_p(values) for values in apart])
    said = [
        f"{name} {number(*interval(values))} ({f'p = {p:.2g}' if p < 0.05 else f'not told apart, p = {p:.2g}'}, "
        f"n = {len(values)})"
        for name, values, p in zip(kinds, apart, p_values, strict=True)
    ]
    return f" Gain of the followed head less that of another (Holm): {'; '.join(said)}."


def _chance(rows: pd.DataFrame, measure_: str) -> float | None:
    own = rows[rows.measure == CHANCE + measure_]["value"]
    return float(own.iloc[0]) if len(own) else None


def _against_chance(rows: pd.DataFrame, last: float) -> str:
    """Where recall and label mass end, beside what chance gives."""
    said = []
    for measure_ in (RECALL, LABELS):
        chance = _chance(rows, measure_)
        if chance is not None:
            (line,) = summarize(rows[rows.step == last], [measure_], ()).itertuples()
            side = "above" if line.low > chance else "not clearly above"
            said.append(f"{measure_} {number(line.mean, line.low, line.high)} ({side} chance, {chance:.3f})")
    return f" At the end: {'; '.join(said)}." if said else ""


study = Study(
    name="emergence",
    version=2,
    spec=EmergenceSpec,
    question=__doc__,
    method="The snapshots of a training (snapshots/step-*, which `jambascope zoo train NAME --snapshots` keeps) are "
    "opened one after the other and read the same sequences. Heads: of the finished weights the head with the "
    "highest previous-token score and the one with the highest prefix matching (Olsson et al. 2022) are found on "
    "one half of the repeated random sequences, and followed through all snapshots on the other, and beside each "
    "another head for comparison. Repetition: accuracy on tokens said the second time. ICL score: mean loss of the "
    "last 11 tokens of rows less that around token 25; the packaged language packs unrelated documents into a row, "
    "of which what lies far back tells little. Recall: a table of eight pairs is asked for; label mass: probability "
    "of both labels after eight shots (the packaged models' language alone).\n\n"
    "Half way: from which step on the mean stays beyond half of its way from the first checkpoint to the last, "
    "interpolated between checkpoints in the logarithm of the step; intervals resample sequences, and the two "
    "checkpoints around bound what can be known.",
    controls="The first checkpoint, at step 0 untrained. Beside each followed head another of its layer, drawn at "
    "random, through the same steps; of one attention layer, whose few heads may all do the same, the one of lowest "
    "score on the finding half. Their gains are compared on the same sequences (random signs, Holm). Chance: of "
    "recall one of the table's eight values, of label mass an even guess over the vocabulary. The head of highest "
    "prefix matching on the same tokens in random order; accuracy on tokens said again in another order. A measure "
    "counts as emerged when its change from the first checkpoint to the last has p < 0.05 (random signs, Holm over "
    "measures and models).",
    measure=measure,
    headline=(*EMERGING, *CONTROLS),
    by=("step",),
    figures=figures,
    reading=reading,
    tables=tables,
    check=check,
)
