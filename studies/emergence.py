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
from jambascope.studies.comparisons import holm, sign_flip_p
from jambascope.studies.corpus import TEXT, check_corpus, losses_and_hits, mixed, speaks_zoo
from jambascope.studies.figures.course import courses
from jambascope.studies.figures.points import Dot, dots
from jambascope.studies.figures.zoo import Point
from jambascope.studies.head_ablation import plural
from jambascope.studies.runner.models import open_model
from jambascope.studies.runner.spec import Spec
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
CONTROLS = (IN_RANDOM_ORDER, OTHER_ORDER)
EARLY, LATE = (20, 31), 11
"""Positions around 25, and how many last ones, over which the two losses of the ICL score are averaged."""
SHOTS, ENTRIES = 8, 8


class EmergenceSpec(Spec):
    """Settings of the study."""

    sequences: int = Field(32, ge=4, description="Repeated random sequences of a seed; heads are found on one half.")
    length: int = Field(16, ge=2, description="Different random tokens, said twice.")
    rows: int = Field(64, ge=2, description="Rows of the training's mixture (or of text files) for the ICL score.")
    context: int = Field(256, ge=48, description="Tokens of such a row.")
    documents: int = Field(32, ge=2, description="Documents of recall, and of few-shot reviews.")
    text: tuple[str, ...] = Field((), description=TEXT)
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
    heads = _best_heads(spec, open_model(found[max(found)], str(model.device)), tokens)
    rows: list[dict[str, Any]] = []
    for step, path in found.items():
        at = open_model(path, str(model.device))
        rows += [row | {"step": step} for row in _rows(spec, cell["seed"], at, tokens, heads)]
    starts = [stage["until"] for stage in record(directory).get("stages", ()) if stage.get("until")]
    rows += [{"measure": "data change", "step": step, "sample": 0, "value": 1.0} for step in starts]
    where = [
        {"measure": f"head of {m}", "layer": i, "head": h, "sample": 0, "value": 1.0} for m, (i, h) in heads.items()
    ]
    return Found([*rows, *where])


def _best_heads(spec: EmergenceSpec, final: HookedJamba, tokens: torch.Tensor) -> dict[str, tuple[int, int]]:
    """Of the finished weights, on the finding half: the head that stands for each kind."""
    if not final.config.attention_layers:
        return {}
    scores = _scores(spec, final, tokens[: len(tokens) // 2])
    return {
        name: (top["layer"], top["head"])
        for name, kind in ((PREVIOUS, "previous_token"), (INDUCTION, "induction"))
        for top in scores[kind].top(1)
    }


def _scores(spec: EmergenceSpec, model: HookedJamba, tokens: torch.Tensor) -> dict[str, HeadScores]:
    return score_heads(model, tokens, ("previous_token", "induction"), batch_size=spec.batch_size)


def _rows(
    spec: EmergenceSpec, seed: int, model: HookedJamba, tokens: torch.Tensor, heads: dict[str, tuple[int, int]]
) -> list[dict[str, Any]]:
    """Everything at one checkpoint."""
    half, values = len(tokens) // 2, {}
    held_out = tokens[half:]
    if heads:
        scores = _scores(spec, model, held_out)
        values[PREVIOUS] = _of_head(scores["previous_token"].samples, model, heads[PREVIOUS])
        values[INDUCTION] = _of_head(scores["induction"].samples, model, heads[INDUCTION])
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
    options = dict(shots=SHOTS + 1, classes=2, filler=0, kind="natural")
    reviews = [document("review", rng, "held_out", **options) for _ in range(spec.documents)]
    return {
        RECALL: scoring.answer_scores(model, tables).hits.nanmean(1),
        LABELS: scoring.label_scores(model, reviews).mass[:, SHOTS],
    }


def _of_head(samples: torch.Tensor, model: HookedJamba, head: tuple[int, int]) -> Float[torch.Tensor, " sequences"]:
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
    heads = panels(previous_token=PREVIOUS, induction=INDUCTION, random_order=IN_RANDOM_ORDER)
    told = panels(repetition=REPEATED, other_order=OTHER_ORDER, recall=RECALL, label_mass=LABELS)
    made = [courses("Heads over training", subtitle, heads, "attention", unit_range=True)] if heads else []
    made.append(courses("What the context tells", subtitle, told, "share", unit_range=True))
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
        return words + "nothing that is measured here changes clearly over training (p < 0.05 after Holm)."
    said = [
        f"{r.measure} (from {r['first']:.2f} to {r['last']:.2f}, n = {r['n']}) is half way at step "
        f"{number(*r[ENDS], 0)}, between the checkpoints {r['between']}"
        for _, r in clear.iterrows()
    ]
    words += "; ".join(said) + "."
    rest = halves[~halves.measure.isin(clear.measure)]
    if len(rest):
        values = zip(rest.measure, rest["first"], rest["last"], strict=True)
        words += f" No clear change: {', '.join(f'{m} ({a:.2f} to {b:.2f})' for m, a, b in values)}."
    pairs = [
        f"{a.measure} before {b.measure}"
        for (_, a), (_, b) in zip(clear.iterrows(), list(clear.iterrows())[1:], strict=False)
        if a.high < b.low
    ]
    words += f" Clear order of neighbours: {'; '.join(pairs)}." if pairs else " No order of neighbours is clear."
    own = rows[rows.measure.isin(CONTROLS) & (rows.step == steps[-1])]
    control = ", ".join(f"{m} {v:.2f}" for m, v in own.groupby("measure", sort=False)["value"].mean().items())
    words += f" Controls at the end: {control}." if control else ""
    changes = ", ".join(f"{step:g}" for step in sorted(rows[rows.measure == "data change"].step.unique()))
    if changes:
        words += f" Training's data change at steps {changes}: what comes right after may be what they newly ask for."
    return words


study = Study(
    name="emergence",
    version=1,
    spec=EmergenceSpec,
    question=__doc__,
    method="The snapshots of a training (snapshots/step-*, which `jambascope zoo train NAME --snapshots` keeps) are "
    "opened one after the other and read the same sequences. Heads: of the finished weights the head with the highest "
    "previous-token score and the one with the highest prefix matching (Olsson et al. 2022) are found on one half of "
    "the repeated random sequences, and followed through all snapshots on the other. Repetition: accuracy on tokens "
    "said the second time. ICL score: mean loss of the last 11 tokens of rows less that around token 25; the packaged "
    "language packs unrelated documents into a row, of which what lies far back tells little. Recall: a table of "
    "eight pairs is asked for; label mass: probability of both labels after eight shots (the packaged models' "
    "language alone).\n\n"
    "Half way: from which step on the mean stays beyond half of its way from the first checkpoint to the last, "
    "interpolated between checkpoints in the logarithm of the step; intervals resample sequences, and the two "
    "checkpoints around bound what can be known.",
    controls="The first checkpoint, at step 0 untrained. The head of highest prefix matching on the same tokens in "
    "random order; accuracy on tokens said again in another order. A measure counts as emerged when its change from "
    "the first checkpoint to the last has p < 0.05 (random signs, Holm over measures and models).",
    measure=measure,
    headline=(*EMERGING, *CONTROLS),
    by=("step",),
    figures=figures,
    reading=reading,
    tables=tables,
    check=check,
)
