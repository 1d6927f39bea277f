"""Attention from the end of a few-shot prompt to the labels of its examples, and whether the heads that pay it matter.

Axes: B prompt, T position, S key position, L attention layer (in the order of ``layers``), H head. The Jamba paper
(arXiv 2403.19887, section 6 and figure 7) shows heads in which the final ":" attends to the labels of the examples; it
gives neither a threshold nor an ablation. Here a head's attention is compared with what it pays to other tokens at the
same places, and ``jambascope.hooks.label_ablation`` takes the heads away.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int

from jambascope.errors import InputError
from jambascope.hook_point import At
from jambascope.hooks.heads import attention_layers, head_rows, top_rows
from jambascope.hooks.intervals import at_least, bootstrap_interval, percentiles, resampled_means
from jambascope.zoo.documents import Split
from jambascope.zoo.reviews import review
from jambascope.zoo.words import BOS, VOCABULARY

if TYPE_CHECKING:
    from jambascope.model import HookedJamba


@dataclass(frozen=True)
class FewShotPrompt:
    """A prompt of labelled examples that ends where the next label is wanted.

    Raises:
        InputError: positions outside the prompt or of the wrong order, or no labels.
    """

    tokens: tuple[int, ...]
    label_positions: tuple[int, ...]
    """Where the examples' labels stand, each before ``query_position``."""
    query_position: int
    """The position that predicts the wanted label: the final ":"."""
    label_ids: tuple[int, ...]
    """The label set: ids of all labels that may be wanted, each once."""
    answer_id: int | None = None
    """The wanted label; needed for its loss only."""

    def __post_init__(self) -> None:
        for field in ("tokens", "label_positions", "label_ids", "query_position", "answer_id"):
            object.__setattr__(self, field, _whole(field, getattr(self, field)))
        length, query = len(self.tokens), self.query_position
        if not 0 <= query < length:
            raise InputError(f"query_position={query!r} must be a position of the prompt, 0..{length - 1}")
        if not self.label_positions or len(set(self.label_positions)) < len(self.label_positions):
            raise InputError(f"label_positions={self.label_positions!r} must name at least one position, each once")
        outside = [p for p in self.label_positions if not 0 <= p < query]
        if outside:
            raise InputError(f"label_positions={outside!r} must lie before query_position={query}, in 0..{query - 1}")
        if not self.label_ids or len(set(self.label_ids)) < len(self.label_ids):
            raise InputError(f"label_ids={self.label_ids!r} must name at least one label, each once")
        if self.answer_id is not None and self.answer_id not in self.label_ids:
            raise InputError(f"answer_id={self.answer_id!r} must be one of label_ids={self.label_ids!r}")


def _whole(field: str, value: Any) -> Any:
    """Whole numbers of any kind (tensors, numpy) as int, several as a tuple of int."""
    try:
        if field in ("query_position", "answer_id"):
            return None if value is None and field == "answer_id" else operator.index(value)
        return tuple(operator.index(i) for i in value)
    except TypeError:
        raise InputError(f"{field}={value!r} must be whole numbers") from None


@dataclass(frozen=True, eq=False)
class LabelAttention:
    """Label-token attention of every head, on the CPU in float64; a sample is a prompt."""

    layers: tuple[int, ...]
    samples: Float[torch.Tensor, "prompts layers heads"]
    """Attention from the query position to all label positions together."""
    matched_samples: Float[torch.Tensor, "prompts layers heads"]
    """Attention to as many other tokens at matched positions: see :func:`label_attention`."""
    uniform_samples: Float[torch.Tensor, " prompts"]
    """The share of label positions among all that the query sees: even attention would give this."""

    @property
    def mean(self) -> Float[torch.Tensor, "layers heads"]:
        return self.samples.mean(0)

    @property
    def lift(self) -> Float[torch.Tensor, "layers heads"]:
        """Mean attention to labels over mean attention to matched tokens; 1 is no preference."""
        return self.mean / self.matched_samples.mean(0)

    @cached_property
    def lift_interval(self) -> tuple[Float[torch.Tensor, "layers heads"], Float[torch.Tensor, "layers heads"]]:
        """95 % bootstrap interval of the lift over prompts, both means from the same draws."""
        if len(self.samples) < 2:
            infinity = torch.full_like(self.lift, float("inf"))
            return -infinity, infinity
        return percentiles(resampled_means(self.samples) / resampled_means(self.matched_samples))

    def rows(self) -> list[dict[str, Any]]:
        """One row per head: layer, head, attention, low, high, matched, lift, lift_low, lift_high, uniform, n."""
        columns = dict(zip(("low", "high"), bootstrap_interval(self.samples), strict=True))
        columns = {"attention": self.mean, **columns, "matched": self.matched_samples.mean(0), "lift": self.lift}
        columns |= dict(zip(("lift_low", "lift_high"), self.lift_interval, strict=True))
        rest = {"uniform": float(self.uniform_samples.mean()), "n": len(self.samples)}
        return [{**row, **rest} for row in head_rows(self.layers, columns)]

    def top(self, k: int = 10) -> list[dict[str, Any]]:
        """The rows of the ``k`` heads that pay labels the most attention, most first."""
        return top_rows(self.rows(), "attention", k)

    def label_heads(self, lift: float = 1.0) -> list[dict[str, Any]]:
        """The heads, most attention first, that pay labels more than an even spread would and whose lift lies above
        ``lift`` with its whole interval; of a single prompt, which has no interval, none."""
        rows = top_rows(self.rows(), "attention", self.mean.numel())
        return [row for row in rows if row["low"] > row["uniform"] and row["lift_low"] > lift]


def review_prompts(
    prompts: int = 64, shots: int = 8, split: Split = "held_out", seed: int = 0, classes: int = 2
) -> list[FewShotPrompt]:
    """Few-shot reviews in the language of the packaged models, ``shots`` labelled ones and one to be labelled.

    All labels appear among the examples, so that the wanted one can be known.

    Raises:
        InputError: no prompts, fewer than one shot for each label, or a number of classes or a split that does not
            exist.
    """
    at_least("prompts", prompts)
    at_least("shots", shots, max(2, classes))
    rng = np.random.default_rng([seed, shots])
    drawn: list[FewShotPrompt] = []
    while len(drawn) < prompts:
        episode = review(rng, split, shots + 1, classes)
        *examples, wanted = episode.classes
        if len(set(examples)) == classes:
            # Word i stands at position i + 1, behind <bos>.
            *positions, query = (i + 1 for i in episode.label_positions)
            tokens = (BOS, *(VOCABULARY[word] for word in episode.words[: query - 1]))
            ids = tuple(VOCABULARY[word] for word in episode.labels)
            drawn.append(FewShotPrompt(tokens, tuple(positions), query - 1, ids, ids[wanted]))
    return drawn


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts side by side, padded on the right."""

    prompts: tuple[FewShotPrompt, ...]
    tokens: Int[torch.Tensor, "batch pos"]
    mask: Bool[torch.Tensor, "batch pos"]
    queries: Int[torch.Tensor, " batch"]


def batches(model: HookedJamba, prompts: Sequence[FewShotPrompt], batch_size: int) -> Iterator[Batch]:
    """The prompts, ``batch_size`` at a time, on the model's device."""
    for start in range(0, len(prompts), batch_size):
        part = tuple(prompts[start : start + batch_size])
        width = max(len(p.tokens) for p in part)
        pad = model.config.pad_token_id or 0
        tokens = torch.tensor([[*p.tokens, *[pad] * (width - len(p.tokens))] for p in part])
        mask = torch.tensor([[i < len(p.tokens) for i in range(width)] for p in part])
        queries = torch.tensor([p.query_position for p in part])
        yield Batch(part, *(m.to(model.device) for m in (tokens, mask, queries)))


def check_prompts(model: HookedJamba, prompts: Sequence[FewShotPrompt], batch_size: int) -> None:
    """Raise InputError for a model without attention, no prompts, or ids outside the vocabulary."""
    attention_layers(model)
    if isinstance(prompts, FewShotPrompt) or not all(isinstance(p, FewShotPrompt) for p in prompts) or not prompts:
        raise InputError("prompts must be a list of at least one FewShotPrompt")
    at_least("batch_size", batch_size)
    V = model.config.d_vocab
    for number, prompt in enumerate(prompts):
        bad = [i for i in (*prompt.tokens, *prompt.label_ids) if not 0 <= i < V]
        if bad:
            raise InputError(
                f"prompt {number} has token id {bad[0]}, outside the vocabulary; ids run from 0 to {V - 1}"
            )


@torch.no_grad()
def label_attention(
    model: HookedJamba, prompts: Sequence[FewShotPrompt], *, neighbours: int = 4, batch_size: int = 16
) -> LabelAttention:
    """Attention of every head from the query position to the labels; that one row of the pattern is all that is built.

    Recency alone would favour what stands late, so each label is compared with the tokens around it: the mean attention
    to the ``neighbours`` nearest positions (the earlier one first when equally near) that hold no label, are not the
    query and not the first token, which many heads use as a place to rest. Neighbours are other words, though, and a
    head of random weights may prefer a few words to others: score ``HookedJamba(model.config)`` for an untrained model.

    Raises:
        InputError: a model without attention; ids that it does not have; a prompt without other tokens to compare with.
    """
    check_prompts(model, prompts, batch_size)
    at_least("neighbours", neighbours)
    weights = [_weights(number, prompt, neighbours) for number, prompt in enumerate(prompts)]
    rows: list[torch.Tensor] = []
    for number, batch in enumerate(batches(model, prompts, batch_size)):
        sums = torch.zeros(2, *batch.tokens.shape, dtype=torch.float64)
        for i, own in enumerate(weights[number * batch_size : number * batch_size + len(batch.prompts)]):
            sums[:, i, : own.shape[1]] = own
        rows.append(query_rows(model, batch, sums))
    labels, matched = torch.cat(rows, 1)
    uniform = torch.tensor([len(p.label_positions) / (p.query_position + 1) for p in prompts], dtype=torch.float64)
    return LabelAttention(model.config.attention_layers, labels, matched, uniform)


def query_rows(
    model: HookedJamba, batch: Batch, weights: Float[torch.Tensor, "sums batch pos"]
) -> Float[torch.Tensor, "sums batch layers heads"]:
    """Weighted sums over key positions of the pattern's row at each prompt's query position."""
    positions = sorted({prompt.query_position for prompt in batch.prompts})
    row_of = [positions.index(prompt.query_position) for prompt in batch.prompts]
    prompts, row_of = (torch.tensor(index, device=model.device) for index in (range(len(row_of)), row_of))
    weights = weights.to(model.device, torch.promote_types(model.dtype, torch.float32))
    found: list[torch.Tensor] = []

    def reduce(pattern: torch.Tensor, hook: Any) -> None:
        rows = pattern[prompts, :, row_of].to(weights.dtype)
        found.append(einsum(rows, weights, "b h s, w b s -> w b h"))

    look = At(positions, reduce)
    with model.hooks([(f"blocks.{layer}.attn.hook_pattern", look) for layer in model.config.attention_layers]):
        model(batch.tokens, attention_mask=batch.mask, return_type=None)
    return torch.stack(found, 2).cpu().double()


def _weights(number: int, prompt: FewShotPrompt, neighbours: int) -> Float[torch.Tensor, "2 pos"]:
    """1 at labels; and at their neighbours, for each label shares that sum to 1."""
    weights = torch.zeros(2, len(prompt.tokens), dtype=torch.float64)
    others = [p for p in range(1, prompt.query_position) if p not in prompt.label_positions]
    if not others:
        raise InputError(f"prompt {number} has no tokens but labels between the first and the query; give longer ones")
    for label in prompt.label_positions:
        near = sorted(others, key=lambda p: (abs(p - label), p))[:neighbours]
        weights[0, label] = 1
        weights[1, near] += 1 / len(near)
    return weights
