"""What the Induction page shows: scores of every head on repeated random tokens and on the prompt; heads taken away.

L attention layer, H head, T position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import streamlit as st
import torch
from jaxtyping import Float

from jambascope import HookedJamba
from jambascope.dashboards.models import Checkpoint
from jambascope.dashboards.session import View
from jambascope.dashboards.work import Report
from jambascope.hooks.copying import LogitCopying, OVCopying, logit_copying, ov_copying
from jambascope.hooks.heads import (
    HeadScores,
    detection_pattern,
    drawable_tokens,
    has_targets,
    repeated_random_tokens,
    score_heads,
)
from jambascope.hooks.intervals import bootstrap_interval
from jambascope.hooks.label_ablation import Head, HeadAblation
from jambascope.hooks.repetition import Ablation, ablate_repetition

OV, LOGIT = "copying (OV)", "copying (logits)"
NAMES = {"induction": "induction", "previous_token": "previous token", "duplicate_token": "duplicate"}
ALL = (*NAMES.values(), OV, LOGIT)
"""The scores, by the names that the page gives them."""
SIGNED = (OV, LOGIT)
"""Those in -1..1; the others are shares."""
LENGTHS = (50, 10, 20, 100, 200)
FIELDS = {"loss": "on the repetition", "loss_before": "before it (control)", "accuracy": "accuracy on the repetition"}


class Drawn(NamedTuple):
    """Which random tokens heads are scored on."""

    sequences: int
    length: int
    seed: int


@dataclass(frozen=True)
class Score:
    """One kind of score of every head."""

    values: Float[np.ndarray, "layers heads"]
    low: Float[np.ndarray, "layers heads"] | None = None
    """Of the 95 % interval over sequences; None where there is but one."""
    high: Float[np.ndarray, "layers heads"] | None = None
    chance: tuple[float, float] | None = None
    """The ends of what chance gives."""
    control: Float[np.ndarray, "layers heads"] | None = None
    n: int = 1


def lengths(model: HookedJamba) -> list[int]:
    """Numbers of different random tokens that the model has, and can hold twice; the default first."""
    usable = min(len(drawable_tokens(model)), (model.config.n_ctx - 1) // 2)
    return [n for n in LENGTHS if n <= usable] or [max(2, usable)]


# -- scores ----------------------------------------------------------------------------------------------------


def on_random_tokens(model: HookedJamba, drawn: Drawn, report: Report) -> dict[str, Score]:
    """Every score on <bos> and random tokens that are said twice."""
    tokens = repeated_random_tokens(model, drawn.sequences, drawn.length, seed=drawn.seed)
    if not report(0.0, "scores by attention"):
        return {}
    found = score_heads(model, tokens, progress=lambda share: report(0.5 * share))
    scores = {name: _of_attention(found[kind]) for kind, name in NAMES.items()}
    if not report(0.5, "copying by weights", scores):
        return scores
    scores[OV] = _of_weights(ov_copying(model))
    if report(0.55, "copying by logits", scores):
        scores[LOGIT] = _of_logits(logit_copying(model, tokens, progress=lambda share: report(0.55 + 0.45 * share)))
    return scores


def _of_attention(found: HeadScores) -> Score:
    low, high = (end.numpy() for end in found.interval)
    control = None if found.control_samples is None else found.control_samples.nanmean(0).numpy()
    return Score(found.mean.numpy(), low, high, (found.uniform,) * 2, control, len(found.samples))


def _of_weights(found: OVCopying) -> Score:
    row = found.rows()[0]
    return Score(found.score.numpy(), chance=(row["random_low"], row["random_high"]))


def _of_logits(found: LogitCopying) -> Score:
    low, high = (end.numpy() for end in bootstrap_interval(found.samples))
    chance = float(found.uniform_samples.nanmean())
    control = found.control_samples.nanmean(0).numpy()
    return Score(found.mean.numpy(), low, high, (chance, chance), control, len(found.samples))


def on_prompt(view: View, report: Report) -> dict[str, Score]:
    """The scores that the prompt has something to look at for; those of weights are the same as on any tokens."""
    kinds = [kind for kind in NAMES if has_targets(kind, view.tokens)]
    scores = {}
    if kinds and report(0.0, "scores on the prompt"):
        found = score_heads(view.model, view.tokens, kinds, control=False)
        scores = {NAMES[k]: Score(one.mean.numpy(), chance=(one.uniform,) * 2) for k, one in found.items()}
    if report(0.6, "copying on the prompt"):
        found = logit_copying(view.model, view.tokens)
        chance = float(found.uniform_samples.nanmean())
        scores[LOGIT] = Score(found.mean.numpy(), chance=(chance, chance))
    return scores


def ranked(layers: Sequence[int], score: Score) -> list[Head]:
    """(layer, head), the highest score first, heads without one last."""
    values = np.where(np.isnan(score.values), -math.inf, score.values)
    order = np.argsort(-values, axis=None, kind="stable")
    return [(layers[i // values.shape[1]], int(i % values.shape[1])) for i in order.tolist()]


def rows(
    layers: Sequence[int], order: Sequence[Head], random: dict[str, Score], prompt: dict[str, Score]
) -> list[dict]:
    """A row of the table for each head, in this order."""
    found = []
    for rank, (layer, head) in enumerate(order, 1):
        at = (list(layers).index(layer), head)
        own = {"rank": rank, "layer": layer, "head": head}
        own |= {name: float(score.values[at]) for name, score in random.items()}
        own |= {f"{name}, prompt": float(score.values[at]) for name, score in prompt.items()}
        found.append(own)
    return found


def rows_of(layers: Sequence[int], head: Head, random: dict[str, Score], prompt: dict[str, Score]) -> list[dict]:
    """Every score of one head: on random tokens with interval, control and chance, and on the prompt."""
    at, found = (list(layers).index(head[0]), head[1]), []
    for name, score in random.items():
        row = {"score": name, "random": f"{score.values[at]:.3f}"}
        row["interval"] = "" if score.low is None else f"{score.low[at]:.3f} to {score.high[at]:.3f}"
        row["chance"] = " to ".join(f"{end:.3f}" for end in sorted(set(score.chance or ())))
        row["control"] = "" if score.control is None else f"{score.control[at]:.3f}"
        row["prompt"] = f"{prompt[name].values[at]:.3f}" if name in prompt else ""
        found.append(row)
    return found


# -- one head --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One head on the first of the random sequences."""

    pattern: Float[np.ndarray, "T T"]
    ids: tuple[int, ...]
    texts: tuple[str, ...]
    targets: dict[str, tuple[list[int], list[int]]]
    """Of each score of attention the queries and keys where a perfect head looks."""


@st.cache_data(max_entries=32, show_spinner=False)
def _example(checkpoint: Checkpoint, drawn: Drawn, layer: int, head: int, _model: HookedJamba) -> Example:
    tokens = repeated_random_tokens(_model, 1, drawn.length, seed=drawn.seed)
    kept: list[np.ndarray] = []

    def keep(pattern: torch.Tensor, hook) -> None:
        kept.append(pattern[0, head].float().cpu().numpy().copy())

    with torch.no_grad(), _model.hooks([(f"blocks.{layer}.attn.hook_pattern", keep)]):
        _model(tokens.to(_model.device), return_type=None)
    targets = {}
    for kind, name in NAMES.items():
        queries, keys = detection_pattern(kind, tokens)[0].nonzero().T.tolist()
        targets[name] = (queries, keys)
    ids = tuple(tokens[0].tolist())
    return Example(kept[0], ids, tuple(_model.to_string(torch.tensor([i])) for i in ids), targets)


def example(view: View, drawn: Drawn, layer: int, head: int) -> Example:
    """One head's pattern on the first of the random sequences."""
    return _example(view.checkpoint, drawn, layer, head, view.model)


# -- heads taken away --------------------------------------------------------------------------------------------


def ablate(
    model: HookedJamba, drawn: Drawn, heads: tuple[Head, ...], ablation: Ablation, draws: int, report: Report
) -> dict[str, HeadAblation]:
    """Heads taken away on sequences that they were not chosen on, against as many random ones."""
    tokens = repeated_random_tokens(model, 2 * drawn.sequences, drawn.length, seed=drawn.seed)
    chosen_on, confirmed_on = tokens.split(drawn.sequences)
    report(0.0, "the model as it is")
    return ablate_repetition(
        model,
        heads,
        chosen_on,
        confirmed_on,
        ablation=ablation,
        draws=draws,
        seed=drawn.seed,
        progress=lambda share, known: report(share, f"{len(known['loss'].random)} random sets", known),
    )


# -- the code that computes it -----------------------------------------------------------------------------------


def code(drawn: Drawn, layer: int, head: int, on_prompt: Sequence[str]) -> str:
    """Scores, and one head's pattern."""
    kinds = tuple(kind for kind, name in NAMES.items() if name in on_prompt)
    lines = [
        "from jambascope.hooks import run",
        "from jambascope.hooks.copying import logit_copying, ov_copying",
        "from jambascope.hooks.heads import repeated_random_tokens, score_heads",
        "",
        f"tokens = repeated_random_tokens(model, {drawn.sequences}, length={drawn.length}, seed={drawn.seed})",
        "scores = score_heads(model, tokens)  # kind -> .mean [attention layer, head], .interval, .uniform",
        "by_weights, by_logits = ov_copying(model).score, logit_copying(model, tokens).mean",
    ]
    if kinds:
        lines.append(f"on_prompt = score_heads(model, prompt, {kinds!r}, control=False)")
    return "\n".join(
        [
            *lines,
            f'name = "blocks.{layer}.attn.hook_pattern"',
            f"pattern = run(model, tokens[:1], capture=[name]).cache[name][0, {head}]  # [query, key]",
        ]
    )


def code_of_ablation(drawn: Drawn, heads: Sequence[Head], ablation: Ablation, draws: int) -> str:
    """What taking heads away does; follows on :func:`code`."""
    n = drawn.sequences
    return f"""

from jambascope.hooks.repetition import ablate_repetition

fresh = repeated_random_tokens(model, 2 * {n}, length={drawn.length}, seed={drawn.seed})[{n}:]
heads = {list(heads)!r}  # (layer, head)
found = ablate_repetition(model, heads, tokens, fresh, ablation={ablation!r}, draws={draws}, seed={drawn.seed})
effects = {{name: one.rows() for name, one in found.items()}}"""
