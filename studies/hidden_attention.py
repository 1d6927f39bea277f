"""Which picture of what a Mamba layer attends to predicts what happens when it no longer sees a position?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field

from jambascope import checkpoint
from jambascope.config import JambaConfig
from jambascope.errors import ConfigError, InputError
from jambascope.hooks.heads import repeated_random_tokens
from jambascope.hooks.hidden_attention import Form, attention_map, hidden_attention, inputs, normalize_rows, rollout
from jambascope.hooks.mixer_terms import MixerTerms, capture_terms
from jambascope.hooks.sweep import Metric, Reference, knock_out_sweep
from jambascope.model import HookedJamba
from jambascope.studies import hidden_attention_report as report
from jambascope.studies.prompts import check_tokenizer, few_shot_reviews
from jambascope.studies.rank_correlation import partial_spearman, spearman
from jambascope.studies.runner.spec import Spec
from jambascope.studies.runner.study import Cell, Found, Study
from jambascope.zoo.documents import log_uniform

Edge = tuple[int, int]
"""(query, key)"""
Edges = Float[np.ndarray, "prompt edge"]
WORDS = 7
"""Tokens of a review at least."""


class HiddenAttentionSpec(Spec):
    """Settings of the study."""

    prompts: int = Field(24, ge=4, description="Of a seed; the best form is found on one half.")
    text: Literal["reviews", "repeated"] = Field(
        "reviews", description="Few-shot reviews, or random tokens said twice, which need no tokenizer."
    )
    length: int = Field(40, ge=8, description="Tokens of each prompt.")
    queries: int = Field(12, ge=2, description="Positions, drawn at random, that no longer see others.")
    keys: int = Field(8, ge=3, description="Earlier positions of each query, at distances even on a logarithmic scale.")
    batch_size: int = Field(8, ge=1, description="Prompts run at a time.")


def check(spec: HiddenAttentionSpec, config: JambaConfig, directory: Path) -> None:
    if not config.ssm_layers:
        raise ConfigError("it has no Mamba layers, so it has no hidden attention; leave it out")
    if spec.length > config.n_ctx:
        raise ConfigError(f"length={spec.length} exceeds its context of {config.n_ctx}; make length smaller")
    if spec.keys * 3 > spec.length or spec.queries * 2 > spec.length:
        raise ConfigError(
            f"queries={spec.queries} with keys={spec.keys} cannot be drawn from length={spec.length} tokens: at most "
            "half as many queries and a third as many keys; make length larger"
        )
    if spec.text == "reviews":
        check_tokenizer(checkpoint.load_tokenizer(directory))


def measure(spec: HiddenAttentionSpec, cell: Cell, model: HookedJamba) -> Found:
    tokens = _prompts(spec, model, cell["seed"]).to(model.device)
    edges = draw_edges(spec, cell["seed"])
    truths, predicted = [], []
    for part in tokens.split(spec.batch_size):
        truths.append(knocked_out(model, part, edges))
        predicted.append(predictions(model, part, edges))
    truth, forms = ({place: np.concatenate([o[place] for o in own]) for place in own[0]} for own in (truths, predicted))
    rows = [row for place, values in forms.items() for row in _rows(spec, cell["seed"], place, values, truth, edges)]
    rows += _mean_rows(rows)
    for (of, layer), values in truth.items():
        where = {"measure": report.SIZE, "of": of, "layer": layer}
        rows += [{**where, "sample": i, "value": float(value)} for i, value in enumerate(values.mean(1))]
    return Found(rows, {"tokens": tokens.cpu()})


def _prompts(spec: HiddenAttentionSpec, model: HookedJamba, seed: int) -> Int[torch.Tensor, "prompt pos"]:
    if spec.text == "repeated":
        return repeated_random_tokens(model, spec.prompts, -(-spec.length // 2), seed=seed)[:, : spec.length]
    drawn = few_shot_reviews(model, spec.prompts, max(2, -(-spec.length // WORDS)), seed)
    if short := next((p for p in drawn if len(p.tokens) < spec.length), None):
        raise InputError(f"length={spec.length}: a prompt has {len(short.tokens)} tokens; make length smaller")
    return torch.tensor([prompt.tokens[: spec.length] for prompt in drawn])


def draw_edges(spec: HiddenAttentionSpec, seed: int) -> list[Edge]:
    """Queries from the last two thirds of the prompt, each with as many keys before it."""
    rng = np.random.default_rng([seed, spec.length])
    queries = sorted(rng.choice(range(spec.length // 3, spec.length), spec.queries, replace=False).tolist())
    edges = []
    for query in queries:
        distances: set[int] = set()
        while len(distances) < spec.keys:
            distances.add(log_uniform(rng, 1, query))
        edges += [(query, query - distance) for distance in sorted(distances)]
    return edges


# -- what happens, and what is predicted ---------------------------------------------------------------------


def _logit_change(logits: torch.Tensor, at: Reference) -> Float[torch.Tensor, " row"]:
    """Euclidean norm, over all positions, of the change of the logits less its mean over the vocabulary, which no
    softmax sees."""
    change = logits.double() - at.rows(at.clean).double()
    return (change - change.mean(-1, keepdim=True)).flatten(1).norm(dim=1)


def _divergence(logits: torch.Tensor, at: Reference) -> Float[torch.Tensor, " row"]:
    """KL(clean || patched) in nats, summed over all positions."""
    clean = at.rows(at.clean).double().log_softmax(-1)
    return (clean.exp() * (clean - logits.double().log_softmax(-1))).sum((1, 2))


def knocked_out(
    model: HookedJamba, tokens: Int[torch.Tensor, "prompt pos"], edges: list[Edge]
) -> dict[tuple[str, int], Edges]:
    """(truth, layer) -> what taking each edge out of that layer alone does to the logits of all later positions."""
    config, positions = model.config, tuple(range(tokens.shape[1]))
    metrics = [Metric(report.WRITE, _logit_change, positions), Metric(report.DIVERGENCE, _divergence, positions)]
    options = dict(by_head=False, progress=False)
    writes = knock_out_sweep(model, tokens, metrics, edges, **options).changes()
    whole = [Metric(report.INPUT, _logit_change, positions)]
    inputs = knock_out_sweep(model, tokens, whole, edges, layers=config.ssm_layers, form="conv", **options).changes()
    places = [
        *((writes["mamba"], of, layer) for of in (report.WRITE, report.DIVERGENCE) for layer in config.ssm_layers),
        *((inputs["mamba"], report.INPUT, layer) for layer in config.ssm_layers),
        *((writes["attention"], report.WRITE, layer) for layer in config.attention_layers),
    ]
    return {(of, layer): found.sel(metric=of).isel(layer=layer).values for found, of, layer in places}


@torch.no_grad()
def predictions(
    model: HookedJamba, tokens: Int[torch.Tensor, "prompt pos"], edges: list[Edge]
) -> dict[tuple[str, int], Edges]:
    """(form, layer) -> its number for each edge."""
    queries = sorted({query for query, _ in edges})
    row, key = np.array([queries.index(query) for query, _ in edges]), np.array([key for _, key in edges])
    far = np.array([[float(key - query) for query, key in edges]] * len(tokens))
    rolled = rollout(model, tokens)[:, queries].cpu().numpy()[:, row, key]
    found: dict[tuple[str, int], np.ndarray] = {}
    for layer, terms in capture_terms(model, tokens).items():
        for form in report.FORMS:
            raw = attention_map(terms, queries, form, normalize=False)
            found[form, layer] = normalize_rows(raw).cpu().numpy()[:, row, key]
            found[form + report.RAW, layer] = raw.cpu().numpy()[:, row, key]
        found[report.ROLLOUT, layer], found[report.DISTANCE, layer] = rolled, far
        for name, form in report.VALUES.items():
            found[name, layer] = np.concatenate(list(_value_weighted(model, layer, terms, edges, form)), 1)
    for layer, pattern in _patterns(model, tokens).items():
        found[report.PATTERN, layer] = pattern[:, queries].cpu().numpy()[:, row, key]
    return found


def _value_weighted(
    model: HookedJamba, layer: int, terms: MixerTerms, edges: list[Edge], form: Form
) -> Iterator[np.ndarray]:
    """Norm of what each edge adds to the stream, query by query: its weight times the key's input, gated and projected
    (Kobayashi et al., arXiv 2004.10102, for attention)."""
    projection, x = model.blocks[layer].mixer.out_proj.weight.to(terms.x.dtype).T, inputs(terms, form)
    for query in dict.fromkeys(query for query, _ in edges):
        keys = [k for q, k in edges if q == query]
        weights = hidden_attention(terms, [query], form).weights[:, :, 0, keys].transpose(1, 2)  # [prompt key E]
        yield (weights * x[:, keys] * terms.scale[:, query, None] @ projection).norm(dim=-1).cpu().numpy()


def _patterns(model: HookedJamba, tokens: Int[torch.Tensor, "prompt pos"]) -> dict[int, torch.Tensor]:
    """Layer -> its heads' mean pattern."""
    found: dict[int, torch.Tensor] = {}

    def keep(pattern: torch.Tensor, hook) -> None:
        found[int(hook.name.split(".")[1])] = pattern.float().mean(1)

    with model.hooks([(f"blocks.{layer}.attn.hook_pattern", keep) for layer in model.config.attention_layers]):
        model(tokens, return_type=None)
    return found


# -- rows ----------------------------------------------------------------------------------------------------


def _rows(
    spec: HiddenAttentionSpec,
    seed: int,
    place: tuple[str, int],
    values: Edges,
    truth: Mapping[tuple[str, int], Edges],
    edges: list[Edge],
) -> list[dict]:
    """The correlations of one form in one layer on every prompt, and their controls."""
    form, layer = place
    rng, rows = np.random.default_rng([seed, layer]), []
    order = np.concatenate([i + rng.permutation(spec.keys) for i in range(0, len(edges), spec.keys)])
    far = np.array([[float(key - query) for query, key in edges]] * len(values))
    for of in report.TRUTHS:
        if (real := truth.get((of, layer))) is None:
            continue
        found = {report.RHO: spearman(values, real)}
        if of != report.DIVERGENCE:
            found[report.SHUFFLED] = spearman(values, real[:, order])
            found[report.OTHER] = spearman(np.roll(values, 1, axis=0), real)
            found[report.WITHIN] = _within(values, real, spec.keys)
            found |= {report.PARTIAL: partial_spearman(values, real, far)} if form != report.DISTANCE else {}
        where = {"form": form, "of": of, "layer": layer}
        rows += [
            {"measure": report.LAYER + name, **where, "sample": i, "value": float(value)}
            for name, own in found.items()
            for i, value in enumerate(own)
            if np.isfinite(value)
        ]
    return rows


def _within(values: Edges, real: Edges, keys: int) -> Float[np.ndarray, " prompt"]:
    """The mean over queries of the correlation over each query's keys."""
    parts = [spearman(values[:, i : i + keys], real[:, i : i + keys]) for i in range(0, values.shape[1], keys)]
    known = np.isfinite(parts)
    with np.errstate(invalid="ignore"):
        return np.where(known.any(0), np.where(known, parts, 0).sum(0) / known.sum(0), np.nan)


def _mean_rows(rows: list[dict]) -> list[dict]:
    """Every correlation averaged over layers, on every prompt."""
    sums: dict[tuple, list[float]] = {}
    for row in rows:
        sums.setdefault((row["measure"], row["form"], row["of"], row["sample"]), []).append(row["value"])
    return [
        {
            "measure": measure.removeprefix(report.LAYER),
            "form": form,
            "of": of,
            "sample": sample,
            "value": float(np.mean(v)),
        }
        for (measure, form, of, sample), v in sums.items()
    ]


study = Study(
    name="hidden_attention",
    version=1,
    spec=HiddenAttentionSpec,
    question=__doc__,
    method="Unrolled, a Mamba layer multiplies by a matrix that depends on the prompt, its hidden attention (Ali, "
    "Zimerman and Wolf, arXiv 2403.01590): alpha of the scan alone, conv with the convolution, gate with the gate; "
    "here the mean over channels of absolute weights, each row made to sum to one as pictures show it, or left as it "
    "is (raw). Rollout multiplies the matrices of all layers (Abnar and Zuidema, arXiv 2005.00928).\n\nThe truth is a "
    "knock-out in one layer, all channels, after which everything runs again: of the key's write, which is taken out "
    "of what one query reads of the state (an edge of alpha), or of all that the key's input to the convolution gives "
    "to the query, by the direct path too (an edge of conv). Its size is the Euclidean norm of the change of the "
    "logits at all later positions; for writes, beside it, the divergence KL(clean || changed). A form predicts it as "
    "far as Spearman's correlation over edges (query, key) goes, of each prompt and layer, averaged over layers. The "
    "best form is found on one half of the prompts; what is said of it is from the other.",
    controls="Keys shuffled: the knock-outs of each query's keys in random order, which leaves only that some queries "
    "matter more than others. Another prompt: the form of another prompt at the same positions, which leaves position. "
    "Distance: how near the key is, and nothing else; partial: the correlation with distance held fixed. Within "
    "queries: over each query's keys alone. Yardsticks that are no forms of hidden attention: the norm of what an edge "
    "adds to the stream (value-weighted), which knows the values and the output map; and, in attention layers, how "
    "well the mean pattern of the heads predicts the knock-out of an edge in all of them. Differences between forms: "
    "random signs over held-out prompts, with Holm's correction.",
    measure=measure,
    headline=report.HEADLINE,
    by=report.BY,
    figures=report.figures,
    reading=report.reading,
    tables=report.tables,
    check=check,
)
