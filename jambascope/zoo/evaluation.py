"""What a packaged model can do, measured on documents that its training never combined."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from jambascope.losses import token_losses
from jambascope.model import HookedJamba
from jambascope.zoo.language import BOS, DOMAINS, LABELS, VOCABULARY, Document, mixture, recall, repeat, review

ROW = 128
"""Ids of an evaluated row."""
HEADS_LENGTH = 30
"""Words of the sequences on which heads are scored."""


class Measure(NamedTuple):
    """A mean over ``n`` independent samples (rows, sequences, episodes) and its 95 % interval.

    Wilson's for hits and misses, which stays honest when all are hits; bootstrapped for other numbers.
    """

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, samples: Iterable[float]) -> Measure:
        values = np.array(list(samples), dtype=float)
        n, mean, z = len(values), float(values.mean()), 1.96
        if np.isin(values, (0, 1)).all():
            center = (mean + z**2 / (2 * n)) / (1 + z**2 / n)
            half = z / (1 + z**2 / n) * float(np.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2)))
            return cls(mean, max(0.0, center - half), min(1.0, center + half), n)
        if n < 2:
            return cls(mean, float("-inf"), float("inf"), n)
        resampled = np.random.default_rng(0).choice(values, (2000, n)).mean(1)
        low, high = np.quantile(resampled, (0.025, 0.975))
        return cls(mean, float(low), float(high), n)


def _rng(seed: int, measure: int) -> np.random.Generator:
    """Random numbers of one measure; three numbers, since training batches are seeded by two (seed and step)."""
    return np.random.default_rng([seed, measure, 1])


def _tokens(documents: list[Document], model: HookedJamba) -> torch.Tensor:
    """<bos> and the words, as ids [B T]; the documents must be equally long."""
    return torch.tensor([[BOS, *(VOCABULARY[w] for w in d.words)] for d in documents], device=model.device)


@torch.no_grad()
def held_out_loss(model: HookedJamba, rows: int = 32, seed: int = 1) -> dict[str, Measure]:
    """Per domain, next-token loss in nats on packed held-out rows: over all words, and over answers alone."""
    found = {}
    for domain in DOMAINS:
        drawn = list(islice(mixture(_rng(seed, 1), ROW, "held_out", {domain: 1.0}), rows))
        losses = token_losses(*_logits(model, np.stack([row.ids for row in drawn]))).double().cpu().numpy()
        answers = np.stack([row.answers[1:] for row in drawn])
        found[domain] = Measure.of(losses.mean(1))
        found[f"{domain}, answers"] = Measure.of(
            loss[answer].mean() for loss, answer in zip(losses, answers, strict=True) if answer.any()
        )
    return found


def _logits(model: HookedJamba, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.as_tensor(ids, device=model.device)
    return model(tokens), tokens


@torch.no_grad()
def induction(model: HookedJamba, sequences: int = 64, length: int = 30, seed: int = 1) -> dict[str, Measure]:
    """<bos> and ``length`` random words said twice: loss (nats) and top-1 accuracy, word 2 on of each half.

    The first word of the second half is left out: that the repetition begins cannot be known.
    """
    rng = _rng(seed, 2)
    tokens = _tokens([repeat(rng, "held_out", length, 2) for _ in range(sequences)], model)
    logits = model(tokens)
    losses = token_losses(logits, tokens)
    hits = (logits[:, :-1].argmax(-1) == tokens[:, 1:]).float()
    first, second = slice(1, length), slice(length + 1, 2 * length)
    return {
        "first loss": Measure.of(losses[:, first].mean(1).tolist()),
        "second loss": Measure.of(losses[:, second].mean(1).tolist()),
        "gain": Measure.of((losses[:, first].mean(1) - losses[:, second].mean(1)).tolist()),
        "accuracy": Measure.of(hits[:, second].mean(1).tolist()),
    }


@torch.no_grad()
def induction_heads(
    model: HookedJamba, sequences: int = 64, length: int = HEADS_LENGTH, seed: int = 1
) -> dict[str, Measure]:
    """Head (``layer.head``) -> its attention, in the second half, to what followed the current word's first mention.

    The same sequences as :func:`induction`. An even spread over the context would be about 2 / (3 length).
    """
    rng = _rng(seed, 2)
    tokens = _tokens([repeat(rng, "held_out", length, 2) for _ in range(sequences)], model)
    names = {layer: f"blocks.{layer}.attn.hook_pattern" for layer in model.config.attention_layers}
    _, cache = model.run_with_cache(tokens, names_filter=list(names.values()))
    found = {}
    for layer, name in names.items():
        # The query that predicts word t of the second half stands at length + t; its target, word t, at t + 1.
        scores = cache[name].diagonal(1 - length, dim1=2, dim2=3)[..., 2 : length + 1].mean(-1)
        found |= {f"{layer}.{head}": Measure.of(scores[:, head].tolist()) for head in range(scores.shape[1])}
    return found


@torch.no_grad()
def few_shot(model: HookedJamba, episodes: int = 200, shots: int = 8, seed: int = 1) -> dict[str, Measure]:
    """The last label of ``shots`` held-out reviews, after both labels were shown, for natural and arbitrary labels.

    ``choice``: the right label is likelier than the other one (chance 0.5); ``mass``: probability of the two together;
    ``right``: probability of the right one.
    """
    rng = _rng(seed, 3)
    found: dict[str, list[float]] = {}
    for _ in range(episodes):
        words, shown = _episode(rng, shots)
        tokens = _tokens([Document("review", words[:-1], ())], model)
        probability = model(tokens)[0, -1].softmax(-1)
        right, wrong = (probability[VOCABULARY[w]].item() for w in (words[-1], *(shown - {words[-1]})))
        kind = "natural" if words[-1] in LABELS else "arbitrary"
        for name, value in (("choice", right > wrong), ("mass", right + wrong), ("right", right)):
            found.setdefault(f"{kind}, {name}", []).append(float(value))
    return {name: Measure.of(values) for name, values in sorted(found.items())}


def _episode(rng: np.random.Generator, shots: int) -> tuple[tuple[str, ...], set[str]]:
    """The words of a document whose last label could be known from the earlier ones, and its two labels."""
    while True:
        words = review(rng, "held_out", shots).words
        given = {words[i + 2] for i, word in enumerate(words[:-3]) if word == "Sentiment"}
        if len(given) == 2:
            return words, given


@torch.no_grad()
def recall_accuracy(model: HookedJamba, documents: int = 200, entries: int = 6, seed: int = 1) -> Measure:
    """Top-1 accuracy on the first question about a held-out table of ``entries`` keys."""
    rng = _rng(seed, 4)
    drawn = [recall(rng, "held_out", entries) for _ in range(documents)]
    tokens = _tokens([Document("recall", d.words[: d.answers[0] + 1], ()) for d in drawn], model)
    return Measure.of((model(tokens[:, :-1])[:, -1].argmax(-1) == tokens[:, -1]).float().tolist())


@torch.no_grad()
def router_load(model: HookedJamba, rows: int = 32, seed: int = 1) -> dict[str, dict[int, list[float]]]:
    """For every domain, and ``all`` of them mixed: MoE layer -> the share of its routes that each expert received."""
    names = {f"blocks.{layer}.mlp.router.hook_expert_indices": layer for layer in model.config.moe_layers}
    found = {}
    for domain in ("all", *DOMAINS):
        shares = {} if domain == "all" else {"shares": {domain: 1.0}}
        drawn = islice(mixture(_rng(seed, 5), ROW, "held_out", **shares), rows)
        tokens = torch.as_tensor(np.stack([row.ids for row in drawn]), device=model.device)
        _, cache = model.run_with_cache(tokens, names_filter=list(names))
        found[domain] = {}
        for name, layer in names.items():
            counts = cache[name].flatten().bincount(minlength=model.config.num_experts).double()
            found[domain][layer] = (counts / counts.sum()).tolist()
    return found


def summary(model: HookedJamba) -> dict[str, float]:
    """A few quick numbers to follow a training run by."""
    loop, shots = induction(model, 16), few_shot(model, 24)
    return {
        "held_out": float(np.mean([held_out_loss(model, 4)[domain].mean for domain in DOMAINS])),
        "induction_gain": loop["gain"].mean,
        "induction_accuracy": loop["accuracy"].mean,
        "label_choice": float(np.mean([m.mean for name, m in shots.items() if name.endswith("choice")])),
        "recall": recall_accuracy(model, 32).mean,
    }


@dataclass(frozen=True)
class Evaluation:
    """All that a model card reports."""

    held_out: dict[str, Measure]
    induction: dict[int, dict[str, Measure]]
    """Length of the random sequence -> what :func:`induction` measures."""
    heads: dict[str, Measure]
    """As :func:`induction_heads`."""
    few_shot: dict[int, dict[str, Measure]]
    """Number of shots -> what :func:`few_shot` measures."""
    recall: dict[int, Measure]
    """Entries of the table -> accuracy."""
    router: dict[str, dict[int, list[float]]]


def evaluate(model: HookedJamba) -> Evaluation:
    """The full evaluation, with fixed seeds; about a minute on one CPU thread for the smallest model."""
    return Evaluation(
        held_out=held_out_loss(model, rows=64),
        induction={length: induction(model, 128, length) for length in (10, 30, 60, 100)},
        heads=induction_heads(model, 128),
        few_shot={shots: few_shot(model, 400, shots) for shots in (4, 8)},
        recall={entries: recall_accuracy(model, 400, entries) for entries in (3, 6)},
        router=router_load(model, rows=64),
    )
