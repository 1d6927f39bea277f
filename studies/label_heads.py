"""Which heads look from the final ":" of a few-shot prompt at its labels, and does the format depend on them?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from pydantic import Field

from jambascope import checkpoint
from jambascope.config import JambaConfig
from jambascope.hooks.label_ablation import Head, ablate_heads, label_mass, mean_head_outputs, metric_without
from jambascope.hooks.labels import FewShotPrompt, LabelAttention, label_attention
from jambascope.model import HookedJamba, initialize
from jambascope.studies import head_ablation
from jambascope.studies.prompts import check_tokenizer, few_shot_reviews
from jambascope.studies.runner.spec import Spec
from jambascope.studies.runner.study import Cell, Found, Study
from jambascope.studies.runner.summary import number, one, summarize

ENDS = ["mean", "low", "high"]
LABELS, MATCHED, EVEN = "attention to labels", "attention to matched tokens", "attention to labels if even"
UNTRAINED = "attention to labels, untrained weights"
MASS, HITS = "label mass", "accuracy among labels"
CHANGE_MASS, CHANGE_HITS = f"change of {MASS}", f"change of {HITS}"
KINDS, CHANGE_KINDS = {MASS: None, HITS: "hit"}, {MASS: None, HITS: "change of hits"}


class LabelSpec(Spec):
    """Settings of the study."""

    prompts: int = Field(64, ge=4, description="Few-shot reviews of a seed; heads are found on one half.")
    shots: int = Field(8, ge=2, description="Labelled reviews in each.")
    k: tuple[int, ...] = Field((1, 2), description="Numbers of heads that are taken away, those with most attention.")
    ablation: Literal["mean", "zero"] = Field("mean", description="What stands in for a head's output.")
    draws: int = Field(20, ge=1, description="Random sets of as many other heads; fewer where fewer exist.")
    untrained: bool = Field(True, description="Also measure a model of the same shape with random weights (control).")
    batch_size: int = Field(16, ge=1, description="Prompts run at a time.")


def check(spec: LabelSpec, config: JambaConfig, directory: Path) -> None:
    head_ablation.check_counts(config, spec.k)
    check_tokenizer(checkpoint.load_tokenizer(directory))


def right_among_labels(
    logits: Float[torch.Tensor, "batch vocab"], prompts: Sequence[FewShotPrompt]
) -> Float[torch.Tensor, " batch"]:
    """1 where the wanted label is the likeliest of the label set, else 0."""
    best = [
        prompt.label_ids[int(row[list(prompt.label_ids)].argmax())] for row, prompt in zip(logits, prompts, strict=True)
    ]
    return torch.tensor([float(label == prompt.answer_id) for label, prompt in zip(best, prompts, strict=True)])


def measure(spec: LabelSpec, cell: Cell, model: HookedJamba) -> Found:
    prompts = few_shot_reviews(model, spec.prompts, spec.shots, cell["seed"])
    half = len(prompts) // 2
    first, second = prompts[:half], prompts[half:]
    chosen, held_out = (label_attention(model, part, batch_size=spec.batch_size) for part in (first, second))
    ranked = [(row["layer"], row["head"]) for row in chosen.top(chosen.mean.numel())]
    passed = [{(row["layer"], row["head"]) for row in found.label_heads()} for found in (chosen, held_out)]
    rows = [*_head_rows(chosen, "finding", ranked), *_head_rows(held_out, "confirming", ranked, half)]
    rows += [
        {"measure": "head: above chance in both halves", "layer": layer, "head": head, "sample": 0, "value": 1.0}
        for layer, head in ranked
        if all((layer, head) in own for own in passed)
    ]
    rows += _whole_rows(spec, model, first, second)
    for k in spec.k:
        rows += _attention_rows(held_out, ranked, k, half)
        rows += _ablation_rows(spec, cell["seed"], model, first, second, ranked[:k])
    if spec.untrained:
        rows += _untrained_rows(spec, cell["seed"], model, first, second)
    return Found(rows, {"attention to labels, confirming": held_out.mean, "lift, confirming": held_out.lift})


def _ablation_rows(
    spec: LabelSpec,
    seed: int,
    model: HookedJamba,
    reference: Sequence[FewShotPrompt],
    prompts: Sequence[FewShotPrompt],
    heads: Sequence[Head],
) -> list[dict]:
    """The found heads taken away on held-out prompts, and random ones."""
    rows = []
    for name, metric in ((MASS, label_mass), (HITS, right_among_labels)):
        found = ablate_heads(
            model, prompts, tuple(heads), ablation=spec.ablation, reference=reference, metric=metric,
            draws=spec.draws, batch_size=spec.batch_size, seed=seed,
        )  # fmt: skip
        change = (f"change of {name}", len(heads), found.clean, found.ablated, found.random)
        rows += head_ablation.effect_rows(*change, len(reference), CHANGE_KINDS[name])
    return rows


def _whole_rows(
    spec: LabelSpec, model: HookedJamba, reference: Sequence[FewShotPrompt], prompts: Sequence[FewShotPrompt]
) -> list[dict]:
    """Both metrics with all heads, and their change without any."""
    means = mean_head_outputs(model, reference, spec.batch_size) if spec.ablation == "mean" else None
    everyone, rows = head_ablation.everyone(model.config), []
    for name, metric in ((MASS, label_mass), (HITS, right_among_labels)):
        options = dict(means=means, metric=metric, batch_size=spec.batch_size)
        whole, without = (metric_without(model, prompts, heads, **options) for heads in ((), everyone))
        change = (f"change of {name}", len(everyone), whole, without)
        rows += _sample_rows(name, whole, "none taken", 0, len(reference), KINDS[name])
        rows += head_ablation.all_rows(*change, len(reference), CHANGE_KINDS[name])
    return rows


def _untrained_rows(
    spec: LabelSpec, seed: int, model: HookedJamba, first: Sequence[FewShotPrompt], second: Sequence[FewShotPrompt]
) -> list[dict]:
    """The same search in a model of random weights: its top heads, found on one half, scored on the other."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        other = HookedJamba(model.config)
        initialize(other)
    other = other.to(model.device).eval()
    chosen, held_out = (label_attention(other, part, batch_size=spec.batch_size) for part in (first, second))
    ranked = [(row["layer"], row["head"]) for row in chosen.top(chosen.mean.numel())]
    return [
        row
        for k in spec.k
        for row in _sample_rows(UNTRAINED, _mean_of(held_out, held_out.samples, ranked[:k]), "found", k, len(first))
    ]


def _head_rows(found: LabelAttention, half: str, ranked: Sequence[Head], first_sample: int = 0) -> list[dict]:
    """Attention of every head on every prompt, to labels and to matched tokens."""
    rows = []
    for name, samples in (("head: " + LABELS, found.samples), ("head: " + MATCHED, found.matched_samples)):
        for i, of_sample in enumerate(samples.tolist()):
            for layer, heads in zip(found.layers, of_sample, strict=True):
                for head, value in enumerate(heads):
                    where = {"layer": layer, "head": head, "half": half, "rank": ranked.index((layer, head)) + 1}
                    rows.append({"measure": name, **where, "sample": first_sample + i, "value": value})
    return rows


def _attention_rows(found: LabelAttention, ranked: Sequence[Head], k: int, first_sample: int) -> list[dict]:
    """On held-out prompts, the mean over the first k heads and over the others; and what even attention would give."""
    rows = _sample_rows(LABELS, _mean_of(found, found.samples, ranked[:k]), "found", k, first_sample)
    rows += _sample_rows(LABELS, _mean_of(found, found.samples, ranked[k:]), "others", k, first_sample)
    rows += _sample_rows(MATCHED, _mean_of(found, found.matched_samples, ranked[:k]), "found", k, first_sample)
    return rows + _sample_rows(EVEN, found.uniform_samples, "found", k, first_sample)


def _mean_of(
    found: LabelAttention, samples: Float[torch.Tensor, "prompts layers heads"], heads: Sequence[Head]
) -> Float[torch.Tensor, " prompts"]:
    return samples[:, [found.layers.index(layer) for layer, _ in heads], [head for _, head in heads]].mean(1)


def _sample_rows(
    name: str, values: Float[torch.Tensor, " n"], heads: str, k: int, first_sample: int, kind: str | None = None
) -> list[dict]:
    same = {"measure": name, "heads": heads, "k": k, "kind": kind}
    return [{**same, "sample": first_sample + i, "value": value} for i, value in enumerate(values.tolist())]


# -- the report ----------------------------------------------------------------------------------------------


def tables(spec: LabelSpec, rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Every head on held-out prompts, best first as the finding half ranks them."""
    return [("Heads, attention to labels on held-out prompts; rank by the finding half of that seed", _heads(rows))]


def _heads(rows: pd.DataFrame) -> pd.DataFrame:
    by = ["seed", "rank", "layer", "head"]
    own = rows[rows.half == "confirming"].astype({name: int for name in by})
    found = summarize(own, ["head: " + LABELS, "head: " + MATCHED], by, pooled="model")
    columns = ["model", *by, "mean", "low", "high", "n"]
    matched = found[found.measure == "head: " + MATCHED].set_index(["model", *by])["mean"].rename("matched tokens")
    heads = found[found.measure == "head: " + LABELS][columns].join(matched, on=["model", *by])
    heads["lift"] = heads["mean"] / heads["matched tokens"]
    passed = _passed(rows)
    where = zip(heads.model, heads.seed, heads.layer, heads["head"], strict=True)
    heads["above chance in both halves"] = ["yes" if place in passed else "no" for place in where]
    return heads.sort_values(["model", "seed", "rank"], kind="stable")


def _passed(rows: pd.DataFrame) -> set[tuple[str, int, int, int]]:
    """(model, seed, layer, head) of those whose attention to labels lies, with its whole interval, above even attention
    and above that to matched tokens, on both halves."""
    own = rows[rows.measure == "head: above chance in both halves"]
    return {(row.model, int(row.seed), int(row.layer), int(row["head"])) for _, row in own.iterrows()}


def figures(spec: LabelSpec, rows: pd.DataFrame) -> list[go.Figure]:
    heads = _heads(rows)
    said = heads.assign(also=[f"{value:.2f} times what matched tokens get" for value in heads.lift])
    maps = head_ablation.maps(
        said, spec.seeds[0], max(spec.k), "attention to labels, {n} held-out prompts", "attention"
    )
    return [
        *maps,
        head_ablation.figure(rows, CHANGE_MASS, "change of label mass (probability)", "Label mass without heads"),
        head_ablation.figure(rows, CHANGE_HITS, "change of accuracy", "Accuracy among the labels without heads"),
    ]


def reading(spec: LabelSpec, rows: pd.DataFrame) -> str:
    """What was found of every recipe, also when that is nothing."""
    return "\n\n".join(_reading_of(spec, rows[rows.recipe == recipe], recipe) for recipe in rows.recipe.unique())


def _reading_of(spec: LabelSpec, rows: pd.DataFrame, recipe: str) -> str:
    k = spec.k[0]
    measures = [LABELS, MATCHED, EVEN, MASS, HITS] + [UNTRAINED] * spec.untrained
    summary = summarize(rows, measures, head_ablation.BY)
    labels, matched, even = (one(summary, measure=m, k=k, heads="found") for m in (LABELS, MATCHED, EVEN))
    others = one(summary, measure=LABELS, k=k, heads="others")
    mass, hits = (one(summary, measure=measure) for measure in (MASS, HITS))
    heads = rows.dropna(subset=["layer"])[["model", "layer", "head"]].drop_duplicates()
    passed, seeds = _passed(rows), rows.seed.unique()
    always = sum(
        all((m, seed, int(h), int(i)) in passed for seed in seeds) for m, h, i in heads.itertuples(index=False)
    )
    looks = labels.low > max(matched.high, even.high)
    top = "head" if k == 1 else f"{k} heads"
    words = (
        f"{recipe}: {always} of {len(heads)} heads ({head_ablation.plural(rows.model.nunique(), 'training')}, "
        f"{head_ablation.plural(len(seeds), 'seed')} of prompts) look at labels more than at matched tokens and than "
        f"an even spread would, on both halves of the prompts of every seed. The top {top} of the finding half, on "
        f"held-out prompts: {number(*labels[ENDS])} of the attention goes to labels (n = {labels.n}), "
        f"{number(*matched[ENDS])} to matched tokens; the others give labels {number(*others[ENDS])}, and an even "
        f"spread {even['mean']:.3f}. "
        f"{'So there are label heads.' if looks else 'That is no preference for labels.'}"
    )
    if spec.untrained:
        random = one(summary, measure=UNTRAINED, k=k)
        words += f" With random weights the same search gives {number(*random[ENDS])}."
    words += (
        f"\n\nWith all heads the labels get {number(*mass[ENDS])} of the probability, and the right one is the "
        f"likelier in {number(*hits[ENDS])} of the prompts.\n\n"
    )
    effects = (" ".join(head_ablation.sentence(rows, recipe, m, k) for k in spec.k) for m in (CHANGE_MASS, CHANGE_HITS))
    return words + "\n\n".join(effects)


study = Study(
    name="label_heads",
    version=1,
    spec=LabelSpec,
    question=__doc__,
    method="Few-shot reviews, of which the last waits for its label (the Jamba paper, arXiv 2403.19887, section 6 and "
    'figure 7, which gives neither threshold nor ablation). A head\'s number is the attention from the final ":" to '
    "the labels of the examples, all together. Heads are ranked by it on one half of the prompts. On the other half "
    "the top k are measured again, and taken away: what they read (z) is set, at every position, to its mean over the "
    "finding half, or to zero.\n\n"
    "Label mass is the probability of all labels of the prompt together: whether the format is followed. Accuracy "
    "among the labels is how often the right one is the likeliest of them: whether the class is known.",
    controls="Random heads: as many of the other heads, drawn again and again, taken away in the same way; p is how "
    "often they do as much. Where the other heads are of the same sort, that finds no difference: see their attention, "
    "and what taking all away does. Matched tokens: the mean attention to the four nearest other tokens around each "
    "label, which recency favours alike. An even spread over the prompt. Random weights: the same search in a model of "
    "this shape that has learned nothing.",
    measure=measure,
    headline=(LABELS, MATCHED, EVEN, UNTRAINED, MASS, HITS, CHANGE_MASS, CHANGE_HITS),
    by=head_ablation.BY,
    figures=figures,
    reading=reading,
    tables=tables,
    check=check,
)
