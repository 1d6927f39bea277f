"""Which heads look for what followed the current token before, and does repetition depend on them?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from pydantic import Field

from jambascope.config import JambaConfig
from jambascope.errors import ConfigError
from jambascope.hooks.heads import HeadScores, repeated_random_tokens, score_heads
from jambascope.hooks.label_ablation import Head, random_head_sets
from jambascope.hooks.repetition import repetition, take_away
from jambascope.model import HookedJamba
from jambascope.studies import head_ablation
from jambascope.studies.runner.spec import Spec
from jambascope.studies.runner.study import Cell, Found, Study
from jambascope.studies.runner.summary import number, one, summarize

SECOND, FIRST = "change of loss on the repetition", "change of loss before it"
LOSS_SECOND, LOSS_FIRST = "loss on the repetition", "loss before it"
ENDS = ["mean", "low", "high"]
SCORE, SHUFFLED, EVEN = "prefix matching", "prefix matching, tokens in random order", "prefix matching, even attention"


class InductionSpec(Spec):
    """Settings of the study."""

    sequences: int = Field(64, ge=4, description="Repeated random sequences of a seed; heads are found on one half.")
    length: int = Field(50, ge=2, description="Different random tokens, said twice.")
    k: tuple[int, ...] = Field((1, 2), description="Numbers of heads that are taken away, those of highest score.")
    ablation: Literal["mean", "zero"] = Field("mean", description="What stands in for a head's output.")
    draws: int = Field(20, ge=1, description="Random sets of as many other heads; fewer where fewer exist.")
    batch_size: int = Field(16, ge=1, description="Sequences run at a time.")


def check(spec: InductionSpec, config: JambaConfig, directory: Path) -> None:
    head_ablation.check_counts(config, spec.k)
    if 2 * spec.length + 1 > config.n_ctx:
        raise ConfigError(f"length={spec.length} said twice exceeds its context of {config.n_ctx}; make length smaller")


def measure(spec: InductionSpec, cell: Cell, model: HookedJamba) -> Found:
    tokens = repeated_random_tokens(model, spec.sequences, spec.length, seed=cell["seed"])
    half = len(tokens) // 2
    options = dict(kinds="induction", batch_size=spec.batch_size, seed=cell["seed"])
    chosen, held_out = (score_heads(model, part, **options)["induction"] for part in (tokens[:half], tokens[half:]))
    ranked = [(row["layer"], row["head"]) for row in chosen.top(chosen.mean.numel())]
    rows = [*_head_rows(chosen, "finding", ranked), *_head_rows(held_out, "confirming", ranked, half)]
    rest = tokens[half:].to(model.device)
    whole = repetition(model, rest, (), spec.batch_size)[:2]
    everyone = head_ablation.everyone(model.config)
    gone = take_away(model, everyone, spec.ablation, tokens[:half].to(model.device))
    nobody = repetition(model, rest, gone, spec.batch_size)[:2]
    for name, losses, without in zip((LOSS_FIRST, LOSS_SECOND), whole, nobody, strict=True):
        rows += _sample_rows(name, losses, "none taken", 0, half)
        rows += head_ablation.all_rows(f"change of {name}", len(everyone), losses, without, half)
    for k in spec.k:
        rows += _score_rows(held_out, ranked, k, half)
        rows += _ablation_rows(spec, cell["seed"], model, tokens[:half].to(model.device), rest, ranked[:k], whole)
    tensors = {"induction, confirming": held_out.samples.mean(0), "tokens": tokens}
    return Found(rows, tensors)


def _ablation_rows(
    spec: InductionSpec,
    seed: int,
    model: HookedJamba,
    reference: Int[torch.Tensor, "sequences pos"],
    tokens: Int[torch.Tensor, "sequences pos"],
    heads: Sequence[Head],
    whole: tuple[torch.Tensor, torch.Tensor],
) -> list[dict]:
    """The found heads taken away on held-out sequences, and random ones."""
    sets = [heads, *random_head_sets(model, heads, spec.draws, seed)]
    taken = [
        repetition(model, tokens, take_away(model, own, spec.ablation, reference), spec.batch_size) for own in sets
    ]
    rows = []
    for which, name in enumerate((FIRST, SECOND)):
        without, *random = (losses[which] for losses in taken)
        rows += head_ablation.effect_rows(
            name, len(heads), whole[which], without, torch.stack(random), first_sample=len(reference)
        )
    return rows


def _head_rows(scores: HeadScores, half: str, ranked: Sequence[Head], first_sample: int = 0) -> list[dict]:
    """The score of every head on every sequence, and on the same tokens in random order."""
    rows = []
    for name, samples in (("head: " + SCORE, scores.samples), ("head: " + SHUFFLED, scores.control_samples)):
        for i, of_sample in enumerate(samples.tolist()):
            for layer, heads in zip(scores.layers, of_sample, strict=True):
                for head, value in enumerate(heads):
                    where = {"layer": layer, "head": head, "half": half, "rank": ranked.index((layer, head)) + 1}
                    rows.append({"measure": name, **where, "sample": first_sample + i, "value": value})
    return rows


def _score_rows(scores: HeadScores, ranked: Sequence[Head], k: int, first_sample: int) -> list[dict]:
    """On held-out sequences the mean score of the first k heads and of the others, of the first in random order, and of
    even attention."""

    def mean(samples: torch.Tensor, heads: Sequence[Head]) -> torch.Tensor:
        return samples[:, [scores.layers.index(layer) for layer, _ in heads], [head for _, head in heads]].mean(1)

    rows = _sample_rows(SCORE, mean(scores.samples, ranked[:k]), "found", k, first_sample)
    rows += _sample_rows(SCORE, mean(scores.samples, ranked[k:]), "others", k, first_sample)
    rows += _sample_rows(SHUFFLED, mean(scores.control_samples, ranked[:k]), "found", k, first_sample)
    return rows + _sample_rows(EVEN, scores.uniform_samples, "found", k, first_sample)


def _sample_rows(name: str, values: Float[torch.Tensor, " n"], heads: str, k: int, first_sample: int) -> list[dict]:
    same = {"measure": name, "heads": heads, "k": k}
    return [{**same, "sample": first_sample + i, "value": value} for i, value in enumerate(values.tolist())]


# -- the report ----------------------------------------------------------------------------------------------


def tables(spec: InductionSpec, rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Every head on held-out sequences, best first as the finding half ranks them."""
    return [("Heads, on held-out sequences; rank by the finding half of that seed", _heads(rows))]


def _heads(rows: pd.DataFrame) -> pd.DataFrame:
    own = rows[rows.half == "confirming"]
    by = ["seed", "rank", "layer", "head"]
    own = own.astype({name: int for name in by})
    found = summarize(own, ["head: " + SCORE, "head: " + SHUFFLED], by, pooled="model")
    columns = [*(["model"] + by), "mean", "low", "high", "n"]
    control = found[found.measure == "head: " + SHUFFLED].set_index(["model", *by])["mean"].rename("in random order")
    scores = found[found.measure == "head: " + SCORE][columns].join(control, on=["model", *by])
    return scores.sort_values(["model", "seed", "rank"], kind="stable")


def figures(spec: InductionSpec, rows: pd.DataFrame) -> list[go.Figure]:
    heads = _heads(rows)
    said = heads.assign(also=[f"in random order {value:.2f}" for value in heads["in random order"]])
    maps = head_ablation.maps(said, spec.seeds[0], max(spec.k), "mean prefix matching on {n} held-out sequences")
    return [
        *maps,
        head_ablation.figure(rows, SECOND, "change of loss (nats per token)", "Loss on the repetition without heads"),
        head_ablation.figure(rows, FIRST, "change of loss (nats per token)", "Loss before the repetition (control)"),
    ]


def reading(spec: InductionSpec, rows: pd.DataFrame) -> str:
    """What was found of every recipe, also when that is nothing."""
    return "\n\n".join(_reading_of(spec, rows[rows.recipe == recipe], recipe) for recipe in rows.recipe.unique())


def _reading_of(spec: InductionSpec, rows: pd.DataFrame, recipe: str) -> str:
    k = spec.k[0]
    summary = summarize(rows, [SCORE, SHUFFLED, EVEN, LOSS_SECOND, LOSS_FIRST], head_ablation.BY)
    score, control, even = (one(summary, measure=m, k=k, heads="found") for m in (SCORE, SHUFFLED, EVEN))
    others = one(summary, measure=SCORE, k=k, heads="others")
    second, first = (one(summary, measure=measure) for measure in (LOSS_SECOND, LOSS_FIRST))
    is_induction = score.low > max(control.high, even.high)
    said = "attends by induction" if is_induction else "does not attend by induction"
    repeats = "It repeats" if second.high < first.low else "It does not repeat"
    top = "head" if k == 1 else f"{k} heads"
    return (
        f"{recipe}: the top {top} of the finding half {said} on held-out sequences: "
        f"{number(*score[ENDS])} of the attention goes to what followed the current token before (n = {score.n}); on "
        f"the same tokens in random order {number(*control[ENDS])}, spread evenly {even['mean']:.3f}. The other heads: "
        f"{number(*others[ENDS])}. {repeats}: loss {number(*second[ENDS])} nats the second time against "
        f"{number(*first[ENDS])} the first.\n\n"
        + " ".join(head_ablation.sentence(rows, recipe, SECOND, k, " nats") for k in spec.k)
        + f"\n\nControl: {head_ablation.sentence(rows, recipe, FIRST, k, ' nats')}"
    )


study = Study(
    name="induction_heads",
    version=1,
    spec=InductionSpec,
    question=__doc__,
    method="Random tokens, none of which comes twice, are said twice. A head's score is the share of its attention, "
    "from tokens said again, that goes to the position after the same token's first place (prefix matching, Olsson et "
    "al. 2022). Heads are ranked on one half of the sequences. On the other half the top k are scored again, and taken "
    "away: what they read (z) is set, at every position, to its mean over the finding half, or to zero.\n\n"
    "Two losses are measured without them: of tokens said the second time, which induction would tell, all but the "
    "first of them; and of tokens said the first time, which nothing tells.",
    controls="Random heads: as many of the other heads, drawn again and again, taken away in the same way; p is how "
    "often they do as much. Where the other heads are of the same sort, that finds no difference: see their score, and "
    "what taking all away does. In random order: the same heads' attention, at the same places, when the tokens are "
    "shuffled, which leaves what position alone explains. Even attention: what a head would score that looks "
    "everywhere alike. Before the repetition: taking heads away should change nothing there that is about repetition.",
    measure=measure,
    headline=(SCORE, SHUFFLED, EVEN, LOSS_SECOND, LOSS_FIRST, SECOND, FIRST),
    by=head_ablation.BY,
    figures=figures,
    reading=reading,
    tables=tables,
    check=check,
)
